"""Text and label columns are found by their usual names, or given."""

from __future__ import annotations

import pytest

from data.test_table import write_csv
from remora.data.table import Table, read_table, stream_texts
from remora.errors import ConfigError, DataError


@pytest.mark.parametrize(
    ("header", "places"),
    [
        (["text", "label"], (0, 1)),
        (["label", "text"], (1, 0)),
        (["id", "Message", "Category"], (1, 2)),
        (["label", "label_text", "text"], (2, 1)),  # the name of a class rather than its number
        (["idx", "sentence", "intent"], (1, 2)),
        (["prompt", "completion"], (0, 1)),
        (["content", "text", "topic"], (1, 2)),
        (["words", "label"], (0, 1)),  # of two columns the other one
        (["text", "verdict"], (0, 1)),
        ([" text ", " label"], (0, 1)),
        (["n", "Text", "text", "label"], (1, 3)),
    ],
)
def test_usual_column_names_are_found(tmp_path, header, places):
    cells = [[f"{row}{place}" for place in range(len(header))] for row in range(2)]
    table = read_table(write_csv(tmp_path / "a.csv", cells, header))
    assert table.texts == [row[places[0]] for row in cells]
    assert table.labels == [row[places[1]] for row in cells]


def test_given_names_win(tmp_path):
    path = write_csv(tmp_path / "a.csv", [("t", "l", "x", "y")], ("text", "label", "note", "kind"))
    table = read_table(path, text_column="note", label_column="kind")
    assert table == Table(["x"], ["y"])
    assert read_table(path, text_column="label", label_column="text") == Table(["l"], ["t"])
    assert read_table(path, text_column="label", label_column="kind") == Table(["l"], ["y"])
    assert list(stream_texts(str(path), text_column="note")) == ["x"]
    other = write_csv(tmp_path / "b.csv", [("x", "y", "z")], ("label", "category", "n"))
    assert read_table(other, text_column="label") == Table(["x"], ["y"])
    with pytest.raises(ConfigError, match="'note' is both text and label column"):
        read_table(path, text_column="note", label_column="note")


def test_a_given_column_that_is_not_there(tmp_path):
    path = write_csv(tmp_path / "a.csv", [("a", "x")], ("message", "intent"))
    with pytest.raises(DataError, match=r"no column 'mesage'.*did you mean 'message'"):
        read_table(path, text_column="mesage")
    with pytest.raises(DataError, match=r"no column 'zzz'.*name one with --label-column"):
        read_table(path, label_column="zzz")

"""Text and label columns are found by their usual names, or given."""

from __future__ import annotations

import pytest

from data.test_table import write_csv
from remora.data.columns import UnlabelledError
from remora.data.dataset import load_dataset
from remora.data.parts import Remarks
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


def test_several_text_columns_are_read_by_their_names(tmp_path):
    rows = [("1", "Card", "  where is it?", "x"), ("2", "", "a refund", "y"), ("3", "t", " ", "x")]
    path = write_csv(tmp_path / "a.csv", rows, ("id", "title", "body", "label"))
    remarks = Remarks()
    table = read_table(path, text_column=("title", "body"), remarks=remarks)
    texts = ["title: Card\nbody: where is it?", "body: a refund", "title: t"]
    assert table == Table(texts, ["x", "y", "x"])
    assert read_table(path, text_column=["body", "title"]).texts[0] == (
        "body: where is it?\ntitle: Card"
    )
    dataset = load_dataset(str(path), text_column=("title", "body"), test_fraction=0)
    assert dataset.summary.text_columns == ("title", "body")
    assert "text: 'title', 'body', label: 'label'" in dataset.summary.lines()[0]
    blank = write_csv(
        tmp_path / "b.csv", [*rows, ("4", " ", "", "x")], ("id", "title", "body", "l")
    )
    read_table(blank, text_column=("title", "body"), label_column="l", remarks=remarks)
    assert remarks.lines() == [f"{blank}: 1 row with a blank text, skipped; row 4 (line 5)"]
    with pytest.raises(DataError, match=r"no column 'bdy'.*did you mean 'body'"):
        read_table(path, text_column=("title", "bdy"))
    with pytest.raises(ConfigError, match="'label' is both text and label column"):
        read_table(path, text_column=("title", "label"), label_column="label")


def test_the_columns_of_the_training_table_come_first(tmp_path):
    rows = [("a b", "c d", "x", "1"), ("e f", "g h", "y", "2")]
    path = write_csv(tmp_path / "a.csv", rows, ("text", "clean", "label", "kind"))
    trained = ("clean", "kind")
    assert read_table(path, trained=trained) == Table(["c d", "g h"], ["1", "2"])
    assert list(stream_texts(str(path), trained=("clean",))) == ["c d", "g h"]
    assert list(stream_texts(str(path), text_column="text", trained=("clean",))) == ["a b", "e f"]
    assert list(stream_texts(str(path), trained=("gone",))) == ["a b", "e f"]
    with pytest.raises(
        DataError, match=r"no column 'gone', which the model was trained on .*--text-"
    ):
        stream_texts(str(path), trained=("clean", "gone"))
    two = write_csv(tmp_path / "b.csv", [("a", "1"), ("b", "2")], ("clean", "verdict"))
    assert read_table(two, trained=trained, known=["1", "2"]).labels == ["1", "2"]
    with pytest.raises(UnlabelledError, match=r"has no label column 'kind' .*remora predict"):
        read_table(two, trained=trained, known=["x", "y"])

"""Rows are checked as they are read; texts are streamed."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest

from remora.data.table import Table, open_stream, read_table, stream_texts
from remora.errors import ConfigError, DataError

ROWS = [("where is my card?", "card"), ("a; b, c", "refund"), ("two\nlines, “quoted”", "card")]
TEXTS, LABELS = [text for text, _ in ROWS], [label for _, label in ROWS]


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def write_csv(path, rows=ROWS, header=("text", "label"), **options):
    with path.open("w", newline="", encoding=options.pop("encoding", "utf-8")) as stream:
        writer = csv.writer(stream, **options)
        writer.writerow(header)
        writer.writerows(rows)
    return path


def write_parquet(path, columns, features=None):
    table = pyarrow.table(columns)
    if features:
        metadata = {"huggingface": json.dumps({"info": {"features": features}})}
        table = table.replace_schema_metadata(metadata)
    pyarrow.parquet.write_table(table, path)
    return path


def test_values_are_kept_but_labels_are_trimmed(tmp_path):
    table = read_table(write_csv(tmp_path / "a.csv", [("  a  ", " x "), ("nan", "null")]))
    assert table == Table(["  a  ", "nan"], ["x", "null"])


@pytest.mark.parametrize(
    ("values", "expected"), [([3, 10], ["3", "10"]), ([3.0, 10.0], ["3", "10"])]
)
def test_whole_numbers_are_labels(tmp_path, values, expected):
    path = write_parquet(tmp_path / "a.parquet", {"text": ["x", "y"], "label": values})
    assert read_table(path).labels == expected


def test_columns_of_one_name_in_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    columns = [["x", "y"], ["a", "b"], [1, 2], [3, 4]]
    table = pyarrow.table([*map(pyarrow.array, columns)], names=["text", "label", "n", "n"])
    pyarrow.parquet.write_table(table, path)
    assert read_table(path).labels == ["a", "b"]
    assert list(open_stream(str(path), keep=["label"]).rows) == [("x", ["a"]), ("y", ["b"])]
    with pytest.raises(DataError) as caught:
        open_stream(str(path))
    assert str(caught.value) == f"{path} has 2 columns called 'n'; rename all but one"


def test_an_unknown_label_is_told_with_the_nearest(tmp_path):
    path = write_csv(tmp_path / "a.csv", [("a", "refund"), ("b", "refnud")])
    known = ["refund", "card"]
    with pytest.raises(DataError, match=r"row 2 \(line 3\) has the label 'refnud'") as caught:
        read_table(path, known=known)
    assert "did you mean 'refund'?" in str(caught.value)
    assert read_table(path, known=[*known, "refnud"]).labels == ["refund", "refnud"]


def test_streaming_equals_reading(tmp_path):
    lines = "".join(json.dumps({"text": t, "label": c}) + "\n" for t, c in ROWS)
    for path in (
        write_csv(tmp_path / "a.csv"),
        write_csv(tmp_path / "a.tsv", delimiter="\t"),
        write(tmp_path / "a.jsonl", lines),
        write_parquet(tmp_path / "a.parquet", {"text": TEXTS, "label": LABELS}),
    ):
        assert list(stream_texts(str(path))) == TEXTS, path
    path = write(tmp_path / "a.txt", "one, two\r\nthree\n“four”")
    assert list(stream_texts(str(path))) == ["one, two", "three", "“four”"]
    assert list(stream_texts(str(write_csv(tmp_path / "a.dat")), format="csv")) == TEXTS


def stdin(monkeypatch, content):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


def test_streaming_standard_input(monkeypatch):
    stdin(monkeypatch, "\ufeffhello\r\ncafé, “x”\n".encode())
    assert list(stream_texts("-")) == ["hello", "café, “x”"]
    stdin(monkeypatch, b'label,text\nx,"a\nb"\ny,c\n')
    assert list(stream_texts("-", format="csv")) == ["a\nb", "c"]
    stdin(monkeypatch, b'{"note": "n", "other": 1}\n')
    assert list(stream_texts("-", format="jsonl", text_column="note")) == ["n"]


def test_streaming_yields_before_the_input_ends():
    code = (
        "from remora.data.table import stream_texts\n"
        "for t in stream_texts('-'): print(t[::-1], flush=1)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        for word in (b"abc", b"xyz"):
            process.stdin.write(word + b"\n")
            process.stdin.flush()
            assert process.stdout.readline().strip() == word[::-1]


def test_faults_in_a_stream(monkeypatch, tmp_path):
    stdin(monkeypatch, b"")
    with pytest.raises(DataError, match="standard input is empty; give one message a line"):
        stream_texts("-")  # at once, before the first text is asked for
    with pytest.raises(DataError, match=r"a\.txt is empty; give one message a line"):
        stream_texts(str(write(tmp_path / "a.txt", "")))
    with pytest.raises(DataError, match="standard input is empty; add a header and rows"):
        stream_texts("-", format="csv")
    stdin(monkeypatch, b"text\n")
    with pytest.raises(DataError, match="standard input has no rows"):
        stream_texts("-", format="csv")
    stdin(monkeypatch, b"one\n\nthree\n")
    texts = stream_texts("-")
    assert next(texts) == "one"
    with pytest.raises(DataError, match="standard input: row 2 has a blank text"):
        next(texts)
    path = write(tmp_path / "a.jsonl", '{"text": "a"}\n{"text": {}}\n')
    with pytest.raises(DataError, match="row 2 has a text of type dict"):
        list(stream_texts(str(path)))
    path = write_csv(tmp_path / "a.csv", [("a", "b", "c")], ("x", "txt", "z"))
    with pytest.raises(DataError, match="did you mean --text-column txt"):
        stream_texts(str(path))
    with pytest.raises(DataError, match=r"there is no file .*gone\.txt"):
        stream_texts(str(tmp_path / "gone.txt"))
    with pytest.raises(ConfigError, match="'parquet' is not a format of standard input"):
        stream_texts("-", format="parquet")
    with pytest.raises(ConfigError, match=r"'xml' is not a format of a file; choose one of csv"):
        stream_texts(str(path), format="xml")

"""Tables of every format read as the rows that were written; every fault is told with its row."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest

from remora.data.table import Table, read_table, stream_texts
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


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.csv", {}),
        ("a.CSV", {"encoding": "utf-8-sig"}),
        ("a.csv", {"lineterminator": "\r\n", "quoting": csv.QUOTE_ALL}),
        ("a.csv", {"lineterminator": "\n"}),
        ("a.csv", {"delimiter": ";"}),
        ("a.csv", {"delimiter": "\t"}),
        ("a.tsv", {"delimiter": "\t"}),
    ],
)
def test_csv_dialects(tmp_path, name, options):
    assert read_table(write_csv(tmp_path / name, **options)) == Table(TEXTS, LABELS)


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson"])
def test_json_lines(tmp_path, name):
    lines = [json.dumps({"id": i, "text": t, "label": c}) for i, (t, c) in enumerate(ROWS)]
    path = write(tmp_path / name, "\n\n".join(lines))
    assert read_table(path) == Table(TEXTS, LABELS)


def test_parquet(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", {"id": [1, 2, 3], "label": LABELS, "text": TEXTS})
    assert read_table(path) == Table(TEXTS, LABELS)


def test_parquet_class_numbers_become_their_names(tmp_path):
    features = {"text": {"_type": "Value"}, "label": {"names": ["card", "refund"]}, "tags": [{}]}
    columns = {"text": TEXTS, "label": [0, 1, 0], "tags": [["x"], [], []]}
    assert read_table(write_parquet(tmp_path / "a.parquet", columns, features)).labels == LABELS
    columns["label"] = [0, -1, 0]
    path = write_parquet(tmp_path / "hidden.parquet", columns, features)
    with pytest.raises(DataError, match="row 2 has a blank label"):
        read_table(path)


def test_a_parquet_file_of_many_row_groups_counts_rows_through(tmp_path):
    texts = [f"message {i}" for i in range(10)]
    table = pyarrow.table({"text": [*texts, " "], "label": ["a"] * 11})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=3)
    with pytest.raises(DataError, match="row 11 has a blank text"):
        read_table(tmp_path / "a.parquet")


def test_a_field_longer_than_the_csv_module_allows_by_default(tmp_path):
    long = "x" * 300_000  # the module's own limit is 131,072
    table = read_table(write_csv(tmp_path / "a.csv", [(long, "a"), ("short", "b")]))
    assert table.texts == [long, "short"]


def test_values_are_kept_but_labels_are_trimmed(tmp_path):
    table = read_table(write_csv(tmp_path / "a.csv", [("  a  ", " x "), ("nan", "null")]))
    assert table == Table(["  a  ", "nan"], ["x", "null"])


@pytest.mark.parametrize(
    ("values", "expected"), [([3, 10], ["3", "10"]), ([3.0, 10.0], ["3", "10"])]
)
def test_whole_numbers_are_labels(tmp_path, values, expected):
    path = write_parquet(tmp_path / "a.parquet", {"text": ["x", "y"], "label": values})
    assert read_table(path).labels == expected


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
    with pytest.raises(ConfigError, match="'note' is named for the texts and for the labels"):
        read_table(path, text_column="note", label_column="note")


CSV_FAULTS = {
    "no text column": (
        "txt,label,n\na,b,1\n",
        "has no text column: found 'txt', 'label', 'n'",
        "did you mean --text-column txt?",
    ),
    "no label column": (
        "text,lable,n\na,b,1\n",
        "has no label column",
        "did you mean --label-column lable?",
    ),
    "no header": ("hello there,x,1\na,b,1\n", "has no text column: found 'hello there'"),
    "two text columns": ("text,text,label\na,b,c\n", "has 2 columns called 'text'; rename all but"),
    "empty": ("", "is empty"),
    "blank first line": ("\ntext,label\na,b\n", "line 1 is blank"),
    "header only": ("text,label\n", "has no rows"),
    "blank text": ("text,label\na,x\n  ,y\n", "row 2 (line 3) has a blank text;"),
    "blank label": ("text,label\na,\nb,x\n", "row 1 (line 2) has a blank label;"),
    "blanks": ("text,label\na,\nb,x\n,x\n", "row 1 (line 2) has a blank label, and it is one of 2"),
    "after a quoted newline": (
        'text,label\n"a\n\nb",x\n ,x\n',
        "row 2 (line 5) has a blank text",
    ),
    "unquoted comma": (
        "text,label\na,x\nwell, no,x\n",
        "row 2 (line 3) has 3 fields where the header has 2; put a text that holds ','",
    ),
    "too few fields": ("text,label\na\n", "row 1 (line 2) has 1 fields"),
    "open quote in the header": ('text,"label\na,x\n', "line 1 opens a double quote"),
    "open quote": (
        'text,label\na,x\n"b,x\nc,x\n',
        "row 2 (line 3) opens a double quote that is never closed",
    ),
    "text after a quote": (
        'text,label\n"a" b,x\n',
        "row 1 (line 2) has text after a closing double quote",
    ),
    "old Macintosh line ends": (
        "text,label\ra,x\r",
        "line 1 has a bare carriage return; save the file with LF",
    ),
    "Latin-1": (
        "text,label\na,x\ncaf\xe9,x\n".encode("latin-1"),
        "line 3 has the byte 0xe9 at position 4, which is not UTF-8",
        "Windows-1252 or Latin-1",
    ),
    "UTF-16": ("text,label\na,x\n".encode("utf-16"), "line 1 has the byte 0xff", "may be UTF-16)"),
    "NUL": ("text,label\na,x\nb\0,x\n", "line 3 has a NUL byte"),
}
JSON_FAULTS = {
    "broken line": (
        '{"text": "a", "label": "x"}\n\n{"text": "b", "label": \n',
        "row 2 (line 3) is not valid JSON",
    ),
    "an array": ('["a", "b"]\n', "row 1 is a JSON list and not an object"),
    "a missing key": (
        '{"text": "a", "label": "x"}\n{"text": "b"}\n',
        "row 2 has a blank label",
    ),
    "a number as text": ('{"text": 5, "label": "x"}\n', "row 1 has a text of type int"),
    "a list as label": (
        '{"text": "a", "label": ["x", "y"]}\n',
        "row 1 has the label \"['x', 'y']\" of type list",
    ),
    "half a character": (
        '{"text": "a \\ud83d", "label": "x"}\n',
        "row 1 has half of a surrogate pair, \\ud83d",
    ),
}


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        *(pytest.param("bad.csv", fault, id=key) for key, fault in CSV_FAULTS.items()),
        *(pytest.param("bad.jsonl", fault, id=f"JSON {k}") for k, fault in JSON_FAULTS.items()),
    ],
)
def test_faults_are_told_in_a_line_with_the_row(tmp_path, name, fault):
    content, *expected = fault
    path = write(tmp_path / name, content)
    with pytest.raises(DataError) as caught:
        read_table(path)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(str(path))
    for part in expected:
        assert part in message


def test_an_unknown_label_is_told_with_the_nearest(tmp_path):
    path = write_csv(tmp_path / "a.csv", [("a", "refund"), ("b", "refnud")])
    known = ["refund", "card"]
    with pytest.raises(DataError, match=r"row 2 \(line 3\) has the label 'refnud'") as caught:
        read_table(path, known=known)
    assert "did you mean 'refund'?" in str(caught.value)
    assert read_table(path, known=[*known, "refnud"]).labels == ["refund", "refnud"]


def test_a_given_column_that_is_not_there(tmp_path):
    path = write_csv(tmp_path / "a.csv", [("a", "x")], ("message", "intent"))
    with pytest.raises(DataError, match=r"no column 'mesage'.*did you mean 'message'"):
        read_table(path, text_column="mesage")
    with pytest.raises(DataError, match=r"no column 'zzz'.*name one with --label-column"):
        read_table(path, label_column="zzz")


@pytest.mark.parametrize("content", [b"not parquet", b"PAR1" + bytes(40) + b"PAR1", b""])
def test_a_file_that_is_no_parquet(tmp_path, content):
    path = write(tmp_path / "a.parquet", content)
    with pytest.raises(
        DataError, match=r"a\.parquet (is not a Parquet file|cannot be read) "
    ) as caught:
        read_table(path)
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_tables(tmp_path):
    write(tmp_path / "train.csv", "text,label\na,b\n")
    for name, expected in (
        ("trian.csv", "there is no file or folder .*; did you mean 'train.csv'"),
        ("nowhere/zz.csv", "there is no file or folder .*; check the path"),
        (".", "is a folder; name a file in it"),
    ):
        with pytest.raises(DataError, match=expected):
            read_table(tmp_path / name)
    for name, hint in (
        ("a.xlsx", "save the sheet as 'CSV UTF-8'"),
        ("a.json", "write one JSON object a line and call it .jsonl"),
        ("a.csv.gz", "unpack it"),
        ("a.dat", "save the table as one of these"),
        ("a.txt", "save the table as one of these"),  # texts alone have no labels
    ):
        path = write(tmp_path / name, "text,label\na,b\n")
        with pytest.raises(DataError, match=rf"those are \.csv, .*; {hint}"):
            read_table(path)


def test_the_name_of_a_hub_dataset_is_recognized(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="write hf:owner/name for a dataset"):
        read_table("owner/name")


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
        "from remora.table import stream_texts\nfor t in stream_texts('-'): print(t[::-1], flush=1)"
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
    with pytest.raises(DataError, match="standard input is empty"):
        stream_texts("-")  # at once, before the first text is asked for
    stdin(monkeypatch, b"text\n")
    with pytest.raises(DataError, match="standard input has no rows"):
        stream_texts("-", format="csv")
    stdin(monkeypatch, b"one\n\nthree\n")
    texts = stream_texts("-")
    assert next(texts) == "one"
    with pytest.raises(DataError, match="standard input: row 2 has a blank text"):
        next(texts)
    path = write(tmp_path / "a.jsonl", '{"text": "a"}\n{"text": 5}\n')
    with pytest.raises(DataError, match="row 2 has a text of type int"):
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

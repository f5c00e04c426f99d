"""Tables that people have: each is read, or refused in one line whose advice works."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import re
import sys
import threading
import zipfile

import datasets
import pyarrow
import pytest

import workbooks
from data.test_table import LABELS, ROWS, TEXTS, write, write_csv, write_parquet
from remora.data.dataset import load_dataset
from remora.data.parts import ReadOptions, Remarks
from remora.data.table import Table, open_stream, read_table
from remora.errors import ConfigError, DataError

RECORDS = [{"text": text, "label": label} for text, label in ROWS]
CSV = "text,label\n" + "".join(f'"{text}",{label}\n' for text, label in ROWS)


def pair(rows):
    return Table([text for text, _ in rows], [label for _, label in rows])


def zipped(**members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name.replace("_csv", ".csv").replace("MAC", "__MACOSX/"), content)
    return buffer.getvalue()


READ_AS_ROWS = {
    "an array": ("a.json", json.dumps(RECORDS)),
    "an array over lines": ("a.json", json.dumps(RECORDS, indent=2)),
    "lines called .json": ("a.json", "\n".join(map(json.dumps, RECORDS))),
    "an array in an object": ("a.json", json.dumps({"version": "1", "data": RECORDS})),
    "an array called .jsonl": ("a.jsonl", json.dumps(RECORDS)),
    "an array over lines called .jsonl": ("a.jsonl", json.dumps(RECORDS, indent=1)),
    "gzip": ("a.csv.gz", gzip.compress(CSV.encode())),
    "gzip of two members": (
        "a.csv.gz",
        gzip.compress(CSV[:30].encode()) + gzip.compress(CSV[30:].encode()),
    ),
    "gzip of JSON lines": ("a.jsonl.gz", gzip.compress(json.dumps(RECORDS).encode())),
    "bzip2": ("a.csv.bz2", bz2.compress(CSV.encode())),
    "xz": ("a.csv.xz", lzma.compress(CSV.encode())),
    "zstandard": ("a.csv.zst", pyarrow.compress(CSV.encode(), "zstd", asbytes=True)),
    "zip": ("a.zip", zipped(a_csv=CSV)),
    "zip of a Mac": ("a.csv.zip", zipped(a_csv=CSV, MACa_csv="x")),
    "pipes": ("a.csv", CSV.replace('",', '"|').replace("text,", "text|")),
    "a spreadsheet's empty cells": ("a.csv", CSV.replace("card\n", "card,,\n")),
}


@pytest.mark.parametrize("case", READ_AS_ROWS)
def test_ordinary_files(tmp_path, case):
    name, content = READ_AS_ROWS[case]
    assert read_table(write(tmp_path / name, content)) == Table(TEXTS, LABELS)


def test_a_workbook(tmp_path):
    path = workbooks.write(tmp_path / "a.xlsx", [("id", "text", "label"), (1, "a", 3), (2, 5, "x")])
    assert read_table(path) == pair([("a", "3"), ("5", "x")])  # numbers as CSV has them
    bare = workbooks.write(tmp_path / "b.xlsx", [("x", "a"), ("y", "b")], [])
    assert read_table(bare, options=ReadOptions(columns=("label", "text"))) == pair(
        [("a", "x"), ("b", "y")]
    )
    with pytest.raises(DataError, match="row 1 has 2 fields, but --columns names 3"):
        read_table(bare, options=ReadOptions(columns=("label", "text", "n")))
    two = workbooks.write(tmp_path / "c.xlsx", [("text",)], [("text",)])
    with pytest.raises(DataError, match=r"2 sheets with rows .'Sheet1', 'Sheet2'.; save the one"):
        read_table(two)
    with pytest.raises(DataError, match=r"has no sheets with rows"):
        read_table(workbooks.write(tmp_path / "d.xlsx", []))
    with pytest.raises(DataError, match="is not a readable workbook"):
        read_table(write(tmp_path / "e.xlsx", "text,label\n"))


def test_values_that_are_kept_beside_the_text(tmp_path):
    path = workbooks.write(tmp_path / "a.xlsx", [("id", "text", "n"), (1, "a", 0.5)])
    assert list(open_stream(str(path)).rows) == [("a", [1, "a", 0.5])]
    parquet = write_parquet(tmp_path / "b.parquet", {"text": ["a"], "n": [7]})
    packed = write(tmp_path / "b.parquet.gz", gzip.compress(parquet.read_bytes()))
    for each, has_schema in ((parquet, True), (packed, False)):
        stream = open_stream(str(each), keep=["n"])
        assert list(stream.rows) == [("a", [7])]
        assert (stream.schema is not None) == has_schema


def test_a_workbook_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "python_calamine", None)
    with pytest.raises(ConfigError, match=r"install remora\[excel\], or save the sheet as 'CSV"):
        read_table(write(tmp_path / "a.xlsx", ""))


def test_a_folder_of_save_to_disk(tmp_path):
    rows = datasets.Dataset.from_dict(
        {"text": ["a", "b", "c"], "label": [1, 0, 1]},
        features=datasets.Features(
            {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["x", "y"])}
        ),
    )
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=rows, test=rows.select([0])).save_to_disk(tmp_path / "two")
    options = {"validation_fraction": 0, "test_fraction": 0}
    assert load_dataset(str(tmp_path / "one"), **options).train.labels == ["y", "x", "y"]
    two = load_dataset(str(tmp_path / "two"), **options)
    assert (two.train.texts, two.test.texts) == (["a", "b", "c"], ["a"])
    (tmp_path / "one" / "state.json").write_text("{}")
    with pytest.raises(DataError, match=r"one cannot be loaded \(.*\); save the data set again"):
        load_dataset(str(tmp_path / "one"))


def chat(question, answer, system=None):
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": [{"role": "system", "content": system}, *turns] if system else turns}


def test_chats(tmp_path):
    records = [chat("a", "x"), chat("b", " y ", system="Classify.")]
    path = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, records)))
    assert read_table(path) == pair([("a", "x"), ("b", "y")])
    columns = {"messages": [each["messages"] for each in records]}
    assert read_table(write_parquet(tmp_path / "a.parquet", columns)) == read_table(path)
    records.append({"messages": [*records[0]["messages"], *records[1]["messages"]]})
    path = write(tmp_path / "b.jsonl", "\n".join(map(json.dumps, records)))
    with pytest.raises(DataError, match=r"row 3 has a chat with 2 messages of the user; write one"):
        read_table(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes are of POSIX")
def test_a_pipe_and_standard_input(tmp_path, monkeypatch):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    threading.Thread(target=lambda: pipe.write_text(CSV)).start()
    assert read_table(pipe, options=ReadOptions("csv")) == Table(TEXTS, LABELS)
    with pytest.raises(
        DataError, match=r"pipe is not a readable table by its name .*--input-format"
    ):
        read_table(pipe)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(CSV.encode())))
    assert read_table("-", options=ReadOptions("csv")) == Table(TEXTS, LABELS)
    with pytest.raises(ConfigError, match=r"standard input has no name .*--input-format, such as"):
        read_table("-")
    with pytest.raises(ConfigError, match="'parquet' is not a format of standard input"):
        read_table("-", options=ReadOptions("parquet"))


def test_a_format_that_the_name_does_not_tell(tmp_path):
    path = write(tmp_path / "SMSSpamCollection", "ham\tHi\nspam\tWin\n")
    options = ReadOptions("tsv", ("label", "text"))
    assert read_table(path, options=options) == pair([("Hi", "ham"), ("Win", "spam")])
    with pytest.raises(ConfigError, match="format json names its own; leave out --columns"):
        read_table(write(tmp_path / "a.json", "[]"), options=ReadOptions(columns=("text",)))


QUOTES = [
    'ham\t"Hello there, he said',
    "spam\tplain",
    'ham\tlast one "',
    'ham\tand "so" on',
    'spam\t"quoted"',
    'ham\t"a ""b"" c"',
    'spam\t"half" quoted',
]


def test_plain_quotes_in_tab_separated_text_swallow_no_row(tmp_path):
    remarks = Remarks()
    path = write(tmp_path / "a.tsv", "label\ttext\n" + "\n".join(QUOTES * 5) + "\n")
    table = read_table(path, remarks=remarks)
    assert len(table) == 35
    assert table.texts[:7] == [
        *('"Hello there, he said', "plain", 'last one "', 'and "so" on', "quoted"),
        *('a "b" c', '"half" quoted'),
    ]
    (line,) = remarks.lines()
    assert line == (
        f"{path}: 10 rows with double quotes that enclose no field, read as text;"
        " the first is row 1 (line 2)"
    )


def test_quoted_fields_in_tab_separated_text_may_span_lines(tmp_path):
    remarks = Remarks()
    path = write(tmp_path / "a.tsv", 'text\tlabel\n"a\n\n""b"""\tx\nc\ty\n"d\te"\tx\n')
    assert read_table(path, remarks=remarks) == pair([('a\n\n"b"', "x"), ("c", "y"), ("d\te", "x")])
    assert remarks.lines() == [f"{path}: 1 row with a field that spans lines; row 1 (line 2)"]
    for content in ('text\tlabel\n"a\nb\tx\nc\ty\n', 'id\ttext\tlabel\n1\t"a\nb\tx\n'):
        with pytest.raises(DataError, match=r"row 1 \(line 2\) has . fields? where the header has"):
            read_table(write(tmp_path / "b.tsv", content))


def test_csv_fields_that_span_lines_are_told(tmp_path):
    remarks = Remarks()
    path = write(tmp_path / "a.csv", 'text,label\n"a\nb",x\nc,y\n"d\ne\nf",x\n')
    assert len(read_table(path, remarks=remarks)) == 3
    assert remarks.lines() == [
        f"{path}: 2 rows with a field that spans lines; the first is row 1 (line 2)"
    ]


def test_blank_rows_are_skipped_and_counted(tmp_path):
    path = write(tmp_path / "a.csv", "text,label\na,x\n,\n ,y\nb,\nc,y\n")
    remarks = Remarks()
    assert read_table(path, remarks=remarks) == pair([("a", "x"), ("c", "y")])
    assert remarks.lines() == [
        f"{path}: 2 rows with a blank text, skipped; the first is row 2 (line 3)",
        f"{path}: 1 row without a label, skipped; row 4 (line 5)",
    ]
    with pytest.raises(DataError, match=r"row 2 .line 3. has a blank text, and it is one of 3"):
        read_table(path, strict=True)
    with pytest.raises(DataError, match=r"row 1 .line 2. has a blank label"):
        read_table(write(tmp_path / "b.csv", "text,label\na,\nb,\n"))
    many = "text,label\n" + "".join(f"t{i},{'ab'[i % 2]}\n" for i in range(20)) + ",a\n"
    source = str(write(tmp_path / "c.csv", many))
    assert load_dataset(source).summary.remarks == (
        f"{source}: 1 row with a blank text, skipped; row 21 (line 22)",
    )
    with pytest.raises(DataError, match=r"row 21 .line 22. has a blank text"):
        load_dataset(source, strict=True)


def test_a_missing_header_is_told_and_the_advice_keeps_the_first_row(tmp_path):
    rows = [("ham", f"see you at {i} then") for i in range(6)] + [("spam", "win a prize now")]
    path = write(tmp_path / "a.tsv", "".join(f"{a}\t{b}\n" for a, b in rows))
    with pytest.raises(DataError, match="seems to have no header, its first line is 'ham'") as told:
        read_table(path)
    names = re.search(r"--columns (\S+)$", str(told.value))[1]
    assert names == "label,text"
    options = ReadOptions(columns=tuple(names.split(",")))
    assert read_table(path, options=options) == pair([(b, a) for a, b in rows])
    three = write(tmp_path / "b.csv", "".join(f"{i},great film no {i},pos\n" for i in range(5)))
    with pytest.raises(DataError, match=r"--columns column1,text,\S+"):
        read_table(three)


PHRASES = "PhraseId,SentenceId,Phrase,Class_\n" + "".join(
    f"{i},{i // 9},some words about film {i},{'good' if i % 3 else 'bad'}\n" for i in range(60)
)


def test_columns_are_suggested_by_what_they_hold(tmp_path):
    path = write(tmp_path / "a.csv", PHRASES)
    with pytest.raises(DataError, match="has no text and no label column") as told:
        read_table(path)
    advice = re.search(r"did you mean --text-column (\S+) --label-column (\S+)\?", str(told.value))
    assert advice.groups() == ("Phrase", "Class_")
    assert len(read_table(path, text_column="Phrase", label_column="Class_")) == 60
    with pytest.raises(DataError, match=r"did you mean --text-column Phrase\?"):
        open_stream(str(path))


SEVERAL = {
    "a list in JSON": (
        "a.jsonl",
        '{"text": "t", "label": ["a", "b"]}',
        "row 1 has the label .* of type list; each row needs one label",
    ),
    "a list in CSV": (
        "a.csv",
        "text,label\nt,\"['a', 'b']\"\n",
        r"row 1 .line 2. has a list as its label, .*; each row needs one label: keep one",
    ),
    "columns of 0 and 1": (
        "a.csv",
        "comment_text,toxic,obscene,id\none comment,0,1,x\nother comment,1,0,y\nlast one,0,0,z\n",
        r"columns of 0 and 1 \('toxic', 'obscene'\) its labels\? .* --label-columns toxic,obscene$",
    ),
}


@pytest.mark.parametrize("case", SEVERAL)
def test_several_labels_a_row_are_refused_in_a_line(tmp_path, case):
    name, content, expected = SEVERAL[case]
    with pytest.raises(DataError, match=expected):
        read_table(write(tmp_path / name, content), text_column=None)


def test_numbers_and_truth_values_are_those_of_csv(tmp_path):
    values = {"text": [1, 2], "label": [True, False], "n": [0.5, 3.0]}
    parquet = write_parquet(tmp_path / "a.parquet", values)
    lines = [dict(zip(values, row, strict=True)) for row in zip(*values.values(), strict=True)]
    jsonl = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, lines)))
    csv = write(tmp_path / "a.csv", "text,label,n\n1,True,0.5\n2,False,3\n")
    for label_column in ("label", "n"):
        expected = read_table(csv, label_column=label_column)
        assert read_table(parquet, label_column=label_column) == expected
        assert read_table(jsonl, label_column=label_column) == expected


def contest(folder, test, header=("id", "text")):
    folder.mkdir()
    rows = [(f"id{i}", f"message {i}", "ab"[i % 2]) for i in range(40)]
    write_csv(folder / "train.csv", rows, ("id", "text", "label"))
    write_csv(folder / "test.csv", test, header)
    write_csv(folder / "sample_submission.csv", [("id9", "a")], ("id", "label"))
    return str(folder)


def test_a_test_file_without_labels_is_for_predict(tmp_path):
    for name, test, header in (
        ("kaggle", [("id9000", "x y"), ("id9001", "z")], ("id", "text")),
        ("glue", [("9", "x", "-1"), ("10", "y", "-1")], ("id", "text", "label")),
        ("empty", [("9", "x", ""), ("10", "y", "")], ("id", "text", "label")),
    ):
        source = contest(tmp_path / name, test, header)
        dataset = load_dataset(source)
        assert (len(dataset.train), len(dataset.validation), len(dataset.test)) == (32, 4, 4)
        (line,) = [each for each in dataset.summary.lines() if "remora predict" in each]
        assert line.endswith(
            f"classify it with `remora predict RUN {tmp_path / name / 'test.csv'}`"
        )
        with pytest.raises(DataError, match=r"test\.csv has no label"):
            load_dataset(f"{source}/train.csv", test=f"{source}/test.csv")


@pytest.mark.parametrize(
    ("trained", "held_out", "more"),
    [
        ("-1.0", "-1.0", {}),
        ("-1.0", "-1", {"merge_labels": True}),
        ("-1", "-1.0", {"merge_labels": True}),
        ("-1", "-1", {}),
    ],
)
def test_a_trained_label_of_minus_1_is_not_hidden(tmp_path, trained, held_out, more):
    """pandas writes -1, 0 and 1 with decimals where a row of the column is blank."""
    rows = [(f"message {i}", [trained, "0.0", "1.0"][i % 3]) for i in range(30)]
    test = [("one", held_out), ("two", "0.0"), ("three", held_out)]
    write_csv(tmp_path / "train.csv", rows)
    write_csv(tmp_path / "test.csv", test)
    dataset = load_dataset(str(tmp_path), **more)
    assert dataset.test.labels == [trained, "0.0", trained]
    assert not any("skipped" in line for line in dataset.summary.lines())
    if trained != held_out:
        with pytest.raises(DataError, match=f"--merge-labels takes it for '{trained}'"):
            load_dataset(str(tmp_path))


def test_a_hidden_class_in_parquet(tmp_path):
    features = {"text": {"_type": "Value"}, "label": {"names": ["a", "b"]}}
    for split, labels in (("train", [0, 1] * 10), ("test", [-1] * 4)):
        texts = [f"{split} {i}" for i in range(len(labels))]
        columns = {"text": texts, "label": labels}
        write_parquet(tmp_path / f"{split}.parquet", columns, features)
    dataset = load_dataset(str(tmp_path))
    assert len(dataset.test) == 2
    assert all(text.startswith("train") for text in dataset.test.texts)


REFUSED = {
    "several tables in a zip": ("a.zip", zipped(a_csv=CSV, b_csv=CSV), "holds 2 tables .*; unpack"),
    "a zip without a table": ("a.zip", zipped(readme="x", notes="y"), "holds no tables .*; unpack"),
    "no zip": ("a.zip", b"nothing", "cannot be unpacked .*; check the file"),
    "no gzip": ("a.csv.gz", CSV.encode(), r"cannot be read \(.*\); check the file"),
    "half a gzip": ("a.csv.gz", gzip.compress(CSV.encode() * 99)[:60], r"cannot be read|no rows"),
    "gzip by another name": ("a.csv", gzip.compress(b"x"), "so end its name with .gz"),
    "columns of pandas": (
        "a.json",
        '{"text": {"0": "a"}, "label": {"0": "x"}}',
        "holds one JSON object with 'text', 'label', not an array",
    ),
    "an object": ("a.json", '{"a": 1}', "holds one JSON object with 'a', not an array of rows"),
    "a number": ("a.json", "5", "holds a JSON int; write an array"),
    "strings": ("a.json", '["a"]', "row 1 is a JSON str, not an object"),
    "half a document": ("a.json", '[{"text": ', "is not valid JSON .*; write an array"),
    "an empty array": ("a.json", "[]", "has no rows; add some"),
    "a missing field": ("a.csv", "text,label\na\n", "has 1 field where .* 2; add the missing ones"),
    "a tab too many": ("a.tsv", "text\tlabel\na\tb\tc\n", "replace tabs in the text by spaces"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_is_told_in_a_line(tmp_path, case):
    name, content, expected = REFUSED[case]
    with pytest.raises(DataError, match=expected) as told:
        read_table(write(tmp_path / name, content))
    assert "\n" not in str(told.value)
    assert name in str(told.value)


def test_rows_that_annotators_refused_are_told(tmp_path):
    rows = [{"text": f"text {i}", "label": "ab"[i % 2], "answer": "accept"} for i in range(9)]
    path = tmp_path / "prodigy.jsonl"

    def told() -> list[str]:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return [each for each in load_dataset(str(path)).summary.remarks if "reject" in each]

    assert told() == []
    rows[3]["answer"] = "reject"
    (line,) = told()
    assert line.endswith("are read as the accepted ones are; leave them out of the table")
    rows[3]["answer"] = "forty two"
    assert told() == []

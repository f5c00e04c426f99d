"""Tables of every format read as the rows that were written; a fault is reported with its row."""

from __future__ import annotations

import csv
import json
import zipfile

import numpy as np
import psutil
import pyarrow
import pyarrow.parquet
import pytest

import workbooks
from data.test_table import LABELS, ROWS, TEXTS, write, write_csv, write_parquet
from remora.data.label_sets import LabelForm
from remora.data.table import Table, open_stream, read_table
from remora.errors import DataError

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
    "no header": (
        "hello there,x,1\na,b,1\n",
        "seems to have no header, its first line is 'hello there', 'x', '1'; add one, or name",
    ),
    "two text columns": ("text,text,label\na,b,c\n", "has 2 columns called 'text'; rename all but"),
    "empty": ("", "is empty"),
    "blank first row": (",\ntext,label\na,b\n", "line 1 is blank"),
    "blank lines only": ("\ufeff\n \n", "is empty"),
    "broken after blank lines": ("\n\ntext,label\na\n", "row 1 (line 4) has 1 field where"),
    "a pointer": (
        "version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 9\n",
        "is a pointer of Git LFS, not the file; run: git lfs pull",
    ),
    "two texts that belong together": (
        "sentence1,sentence2,label\na b,c d,x\n",
        "did you mean --text-column sentence1 --text-column sentence2?",
    ),
    "premise and hypothesis": (
        "label,premise,hypothesis\nx,a b,c d e\n",
        "did you mean --text-column premise --text-column hypothesis?",
    ),
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
    "too few fields": ("text,label\na\n", "row 1 (line 2) has 1 field where"),
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
    "an array": ('["a", "b"]\n', "row 1 is a JSON list, not an object"),
    "a missing key": (
        '{"text": "a", "label": "x"}\n{"text": "b"}\n',
        "row 2 has a blank label",
    ),
    "an object as text": ('{"text": {}, "label": "x"}\n', "row 1 has a text of type dict"),
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


@pytest.mark.parametrize("before", ["sep=;\n", "\n\nsep=;\r\n", "\ufeffsep=;\n"])
def test_lines_before_the_header(tmp_path, before):
    """Excel reads `sep=;` as the delimiter of what follows."""
    path = write(tmp_path / "a.csv", f"{before}text;label\na,b,c;x\n;y\n")
    with pytest.raises(
        DataError, match=f"row 2 \\(line {before.count(chr(10)) + 3}\\) has a blank"
    ):
        read_table(path, strict=True)
    assert read_table(path) == Table(["a,b,c"], ["x"])


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson"])
def test_json_lines(tmp_path, name):
    lines = [json.dumps({"id": i, "text": t, "label": c}) for i, (t, c) in enumerate(ROWS)]
    path = write(tmp_path / name, "\n\n".join(lines))
    assert read_table(path) == Table(TEXTS, LABELS)


def test_parquet(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", {"id": [1, 2, 3], "label": LABELS, "text": TEXTS})
    assert read_table(path) == Table(TEXTS, LABELS)


def test_columns_that_a_parquet_file_lacks(tmp_path):
    columns = {"idx": [1, 2, 3], "clause": TEXTS, "label": LABELS}
    path = write_parquet(tmp_path / "a.parquet", columns)
    with pytest.raises(DataError, match=r"a\.parquet has no text column: .*--text-column clause"):
        read_table(path)


def test_parquet_class_numbers_become_their_names(tmp_path):
    features = {"text": {"_type": "Value"}, "label": {"names": ["card", "refund"]}, "tags": [{}]}
    columns = {"text": TEXTS, "label": [0, 1, 0], "tags": [["x"], [], []]}
    assert read_table(write_parquet(tmp_path / "a.parquet", columns, features)).labels == LABELS
    columns["label"] = [0, -1, 0]
    path = write_parquet(tmp_path / "hidden.parquet", columns, features)
    with pytest.raises(DataError, match="row 2 has a blank label"):
        read_table(path, strict=True)


def test_a_parquet_file_of_many_row_groups_counts_rows_through(tmp_path):
    texts = [f"message {i}" for i in range(10)]
    table = pyarrow.table({"text": [*texts, " "], "label": ["a"] * 11})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=3)
    with pytest.raises(DataError, match="row 11 has a blank text"):
        read_table(tmp_path / "a.parquet", strict=True)


def test_a_field_longer_than_the_csv_module_allows_by_default(tmp_path):
    long = "x" * 300_000  # the module's own limit is 131,072
    table = read_table(write_csv(tmp_path / "a.csv", [(long, "a"), ("short", "b")]))
    assert table.texts == [long, "short"]


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
        read_table(path, strict=True)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(str(path))
    for part in expected:
        assert part in message


def test_what_was_read_of_a_parquet_file_is_not_kept(tmp_path):
    random = np.random.default_rng(0)
    texts = [random.bytes(500).hex() for _ in range(60_000)]  # which compress to half
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=2_000)
    size = path.stat().st_size
    assert size > 30e6
    used = []
    for number, _ in enumerate(open_stream(str(path)).rows):
        if number % 20_000 == 10_000:
            used.append(psutil.Process().memory_info().rss)
    assert used[-1] - used[0] < size / 4


@pytest.mark.parametrize("content", [b"not parquet", b"PAR1" + bytes(40) + b"PAR1", b""])
def test_a_file_that_is_no_parquet(tmp_path, content):
    path = write(tmp_path / "a.parquet", content)
    with pytest.raises(
        DataError, match=r"a\.parquet (is not a readable Parquet file|cannot be read) "
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
        ("a.xls", "save the sheet as .xlsx"),
        ("a.dat", "name its format with --input-format, or save the table as one of these"),
        ("a.txt", "name its format"),  # texts alone have no labels
    ):
        path = write(tmp_path / name, "text,label\na,b\n")
        with pytest.raises(DataError, match=rf"readable are \.csv, .*; {hint}"):
            read_table(path)


def test_the_name_of_a_hub_dataset_is_recognized(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="write hf:owner/name for a dataset on"):
        read_table("owner/name")


def test_archives_by_other_names_and_what_macos_adds(tmp_path):
    archive = tmp_path / "a.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("d.csv", "text,label\na,b\n")
        file.writestr("._d.csv", "\0\x05\x16")
        file.writestr("e/._d.csv", "\0\x05\x16")
    assert read_table(archive).texts == ["a"]
    for name in ("a.csv", "a.jsonl"):
        archive = archive.rename(tmp_path / name)
        with pytest.raises(DataError, match=r"archive, so end its name with \.xlsx or \.zip"):
            read_table(archive)


def test_an_archive_compressed_in_another_way(tmp_path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("d.csv", "text,label\na,b\n")
    content = bytearray(path.read_bytes())
    content[8] = content[content.index(b"PK\1\2") + 10] = 9  # Deflate64, as Windows writes it
    path.write_bytes(content)
    with pytest.raises(
        DataError, match=r"a\.zip is compressed in a way that cannot be read \(.*\); unpack it"
    ):
        read_table(path)


def test_rows_of_a_workbook_are_counted_from_the_top_of_its_sheet(tmp_path):
    path = workbooks.write(tmp_path / "a.xlsx", [(), (), ("text", "label"), ("x", "a"), (" ", "b")])
    with pytest.raises(DataError, match=r"row 2 \(line 5\) has a blank text"):
        read_table(path, strict=True)


def test_a_number_in_the_header_of_a_workbook_is_a_name(tmp_path):
    path = workbooks.write(tmp_path / "a.xlsx", [("text", 2024), ("x", "a"), ("y", "b")])
    assert read_table(path, label_column="2024").labels == ["a", "b"]


@pytest.mark.parametrize(
    ("metadata", "labels"),
    [
        ({"info": None}, ["0", "1"]),
        ({"info": {"features": None}}, ["0", "1"]),
        ([], ["0", "1"]),
        ({"info": {"features": {"label": {"names": ["no", "yes"]}}}}, ["no", "yes"]),
    ],
)
def test_what_a_parquet_file_says_of_its_columns(metadata, labels, tmp_path):
    table = pyarrow.table({"text": ["a", "b"], "label": [0, 1]})
    path = tmp_path / "a.parquet"
    described = table.replace_schema_metadata({"huggingface": json.dumps(metadata)})
    pyarrow.parquet.write_table(described, path)
    assert read_table(path).labels == labels


def test_lists_of_class_numbers_have_the_names_that_either_version_writes(tmp_path):
    table = pyarrow.table({"text": ["a", "b"], "labels": [[0, 1], [1]]})
    for feature in ([{"names": ["x", "y"]}], {"feature": {"names": ["x", "y"]}}):
        metadata = {"info": {"features": {"labels": feature}}}
        described = table.replace_schema_metadata({"huggingface": json.dumps(metadata)})
        pyarrow.parquet.write_table(described, tmp_path / "a.parquet")
        found = read_table(tmp_path / "a.parquet", label_column="labels", form=LabelForm())
        assert found.labels == ['["x", "y"]', '["y"]']

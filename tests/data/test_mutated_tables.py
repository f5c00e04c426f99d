"""Tables with bytes changed are read, or refused in one line; none ends in a traceback."""

from __future__ import annotations

import gzip
import io
import json
import tempfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import workbooks
from data.test_ordinary_tables import chat, zipped
from data.test_table import ROWS
from remora.data.dataset import load_dataset
from remora.data.parts import ReadOptions, Remarks
from remora.data.table import open_stream, read_table
from remora.errors import RemoraError

MANY = [*ROWS, ("  ", "x"), ("-1", "-1"), ("\U0001f600", "Café"), ("a 'b' \"c\"", "card")]
RECORDS = [{"id": i, "text": text, "label": label} for i, (text, label) in enumerate(MANY)]
PIECES = [
    *(b'"', b'""', b"\t", b",", b"\n", b"\r", b"\r\n", b"\0", b"\xff", b"\xef\xbb\xbf", b"'"),
    *(b"[", b"]", b"{", b"}", b"null", b"NaN", b"-1", b"1e999", b"\\ud83d", b"\xf0\x9f\x98\x80"),
    *(b"label", b"text", b"messages", b"['a', 'b']", b"[" * 3000, b"9" * 5000, b" " * 300),
]


def delimited(mark: str) -> bytes:
    cells = [["id", "text", "label"], *([str(i), t, c] for i, (t, c) in enumerate(MANY))]
    quoted = (['"' + cell.replace('"', '""') + '"' for cell in row] for row in cells)
    return "\n".join(mark.join(row) for row in quoted).encode()


def parquet() -> bytes:
    buffer = io.BytesIO()
    features = {"text": {"_type": "Value"}, "label": {"names": ["a"]}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    columns = {"text": [t for t, _ in MANY], "label": [0] * len(MANY), "n": [[1]] * len(MANY)}
    table = pyarrow.table(columns).replace_schema_metadata(metadata)
    pyarrow.parquet.write_table(table, buffer, compression="none")
    return buffer.getvalue()


def workbook() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = workbooks.write(Path(folder) / "a.xlsx", [("id", "text", "label"), (1, "a", "x")])
        return path.read_bytes()


LINES = "\n".join(map(json.dumps, RECORDS)).encode()
FILES = {
    "a.csv": delimited(","),
    "a.tsv": delimited("\t"),
    "b.tsv": b"label\ttext\n" + b"".join(b'ham\t"so" it "is\n' for _ in range(9)),
    "a.jsonl": LINES,
    "b.jsonl": "\n".join(json.dumps(chat(*row)) for row in ROWS).encode(),
    "a.json": json.dumps(RECORDS, indent=1).encode(),
    "a.parquet": parquet(),
    "a.xlsx": workbook(),
    "a.csv.gz": gzip.compress(delimited(","), mtime=0),
    "a.zip": zipped(a_csv=delimited(",").decode()),
    "a.txt": b"one\n\ntwo",
}


@st.composite
def mutated(draw: st.DrawFn) -> tuple[str, bytes]:
    name = draw(st.sampled_from(sorted(FILES)))
    content = bytearray(FILES[name])
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, len(content)))
        match draw(st.sampled_from(["insert", "delete", "replace", "cut", "double"])):
            case "insert":
                content[place:place] = draw(st.sampled_from(PIECES))
            case "delete":
                del content[place : place + draw(st.integers(1, 30))]
            case "replace":
                content[place : place + 1] = draw(st.binary(min_size=1, max_size=3))
            case "cut":
                del content[place:]
            case "double":
                content[place:place] = content[max(0, place - 60) : place]
    return draw(st.sampled_from([name, name, draw(st.sampled_from(sorted(FILES)))])), bytes(content)


def summarized(path: Path) -> None:
    assert load_dataset(str(path), merge_labels=True).summary.lines()


def read_every_way(path: Path) -> None:
    def all_rows(**options: ReadOptions | tuple[str, ...]) -> None:
        for text, values in open_stream(str(path), **options).rows:
            assert text is None or text.encode()
            assert isinstance(values, list)

    ways = (
        lambda: read_table(path, remarks=Remarks()),
        lambda: read_table(path, known=["card", "refund"], trained=("text", "label"), strict=True),
        lambda: summarized(path),
        all_rows,
        lambda: all_rows(options=ReadOptions(columns=("a", "text", "label"))),
    )
    for way in ways:
        told = None
        try:
            way()
        except RemoraError as error:
            told = str(error)
        assert told is None or ("\n" not in told and "; " in told and len(told) < 3000), told


def check(number: int) -> None:
    with tempfile.TemporaryDirectory() as folder:

        @settings(
            max_examples=number,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(mutated())
        def holds(case: tuple[str, bytes]) -> None:
            name, content = case
            path = Path(folder) / name
            path.write_bytes(content)
            read_every_way(path)

        holds()


def test_mutated_tables_end_in_no_traceback() -> None:
    check(200)


@pytest.mark.durability
def test_many_mutated_tables_end_in_no_traceback() -> None:
    check(5_000)

"""Rows of files and Hub datasets: CSV, TSV, JSON lines, Parquet, plain text.

Rows are counted from 1 without the header. The line is the one an editor shows; messages name it if
it differs from the row.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from remora.errors import DataError
from remora.formatting import close_match, one_line, quote

if TYPE_CHECKING:
    import datasets

FORMATS = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".txt": "text",
}

Row = tuple[int, int, Sequence[object]]  # row, line, the values of the picked columns
Pick = Callable[[Sequence[str]], list[int]]  # a table's columns -> the indices of those wanted
Part = tuple[str, Callable[[Pick], Iterator[Row]]]  # a name for messages, a reader


def file_part(path: Path, file_format: str | None = None, *, allow_text: bool = False) -> Part:
    """Return a file as a part, after checking its name."""
    if not path.exists():
        raise DataError(f"there is no file or folder {path}; {_missing_hint(path)}")
    if path.is_dir():
        raise DataError(f"{path} is a folder; name a file in it")
    suffix = path.suffix.lower()
    file_format = file_format or FORMATS.get(suffix)
    if file_format is None or (file_format == "text" and not allow_text):
        readable = ", ".join(s for s, f in FORMATS.items() if allow_text or f != "text")
        hint = {
            ".json": "write one JSON object a line and call it .jsonl",
            ".gz": "unpack it",
            ".xlsx": "save the sheet as 'CSV UTF-8'",
            ".xls": "save the sheet as 'CSV UTF-8'",
        }.get(suffix, "save the table as one of these")
        raise DataError(f"{path} is not a readable table (readable are {readable}); {hint}")
    return str(path), partial(_file_rows, path, file_format)


def _missing_hint(path: Path) -> str:
    if close := close_match(path.name, [p.name for p in path.parent.glob("*")]):
        return f"did you mean {quote(close)}?"
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(path)) and path.suffix not in FORMATS:
        return f"check the path, or write hf:{path} for a dataset on the Hugging Face Hub"
    return "check the path"


def _file_rows(path: Path, file_format: str, pick: Pick) -> Iterator[Row]:
    try:
        if file_format == "parquet":
            yield from _parquet_rows(path, pick)
        else:
            with path.open("rb") as stream:
                yield from parse(stream, str(path), file_format, pick)
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror or one_line(error)}); check the file"
        ) from error


def parse(stream: Iterable[bytes], name: str, file_format: str, pick: Pick) -> Iterator[Row]:
    """Yield the rows of a stream in a format of `FORMATS` but Parquet; raises DataError."""
    lines = _decode(stream, name)
    if file_format == "jsonl":
        yield from _json_rows(lines, name, pick)
    elif file_format == "text":
        for number, line in enumerate(lines, 1):
            yield number, number, [line.rstrip("\r\n")]
    else:
        yield from _csv_rows(lines, name, "\t" if file_format == "tsv" else None, pick)


def _decode(stream: Iterable[bytes], name: str) -> Iterator[str]:
    """Decode UTF-8 line by line, so that an error can name the line."""
    number = 0
    for number, line in enumerate(stream, 1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            utf16 = number == 1 and line.startswith((b"\xff\xfe", b"\xfe\xff"))
            raise DataError(
                f"{name}: line {number} has the byte 0x{line[error.start]:02x} at position"
                f" {error.start + 1}, which is not UTF-8; save the file as UTF-8"
                f" (it may be {'UTF-16' if utf16 else 'Windows-1252 or Latin-1'})"
            ) from None
        if "\0" in text:
            raise DataError(
                f"{name}: line {number} has a NUL byte; remove it,"
                " or save the file as UTF-8 if it is UTF-16"
            )
        yield text
    if number == 0:
        raise DataError(f"{name} is empty; add a header and rows")


def _csv_rows(lines: Iterator[str], name: str, delimiter: str | None, pick: Pick) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)
    first = next(lines)
    row, line = 0, 1  # of the row being read; a row may span lines
    try:
        if delimiter is None:  # the one that splits the header most, the comma on a tie
            delimiter = max(",;\t", key=lambda mark: len(next(csv.reader([first], delimiter=mark))))
        reader = csv.reader(chain([first], lines), delimiter=delimiter, strict=True)
        header = [column.strip() for column in next(reader)]
        if not any(header):
            raise DataError(f"{name}: line 1 is blank; name the columns there")
        places = pick(header)
        line = reader.line_num + 1
        for values in reader:
            if values:  # and not a blank line
                row += 1
                if len(values) != len(header):
                    raise DataError(
                        f"{name}: {row_place(row, line)} has {len(values)} fields where the header"
                        f" has {len(header)}; put a text that holds {quote(delimiter)} in double"
                        " quotes"
                    )
                yield row, line, [values[place] for place in places]
            line = reader.line_num + 1
    except csv.Error as error:
        advice = "close it, and double every double quote inside a quoted text"
        if "unexpected end" in str(error):
            fault = "opens a double quote that is never closed"
        elif "expected after" in str(error):
            fault = "has text after a closing double quote"
        elif "new-line" in str(error):
            fault = "has a bare carriage return"
            advice = "save the file with LF or CRLF line endings"
        else:
            fault = f"is not CSV ({one_line(error)})"
        place = row_place(row + 1, line) if line > 1 else "line 1"
        raise DataError(f"{name}: {place} {fault}; {advice}") from None


def _json_rows(lines: Iterator[str], name: str, pick: Pick) -> Iterator[Row]:
    row, wanted = 0, list[str]()
    for line, content in enumerate(lines, 1):
        if not content.strip():
            continue
        row += 1
        try:
            record = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{name}: {row_place(row, line)} is not valid JSON ({one_line(error)});"
                " write one JSON object a line"
            ) from None
        if not isinstance(record, dict):
            raise DataError(
                f"{name}: {row_place(row, line)} is a JSON {type(record).__name__}, not an"
                ' object; write one object a line, such as {"text": "...", "label": "..."}'
            )
        if row == 1:
            columns = list(record)
            wanted = [columns[place] for place in pick(columns)]
        yield row, line, [record.get(column) for column in wanted]


def _parquet_rows(path: Path, pick: Pick) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            wanted = [columns[place] for place in pick(columns)]
            metadata = json.loads((file.schema_arrow.metadata or {}).get(b"huggingface", b"{}"))
            features = metadata.get("info", {}).get("features", {})
            described = [features.get(column) for column in wanted]
            names = [each.get("names") if isinstance(each, dict) else None for each in described]
            yield from _arrow_rows(file.iter_batches(columns=wanted), wanted, names)
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise DataError(
            f"{path} is not a readable Parquet file ({one_line(error)});"
            " write it again, or save the table as CSV"
        ) from None


def _arrow_rows(
    batches: Iterable[Any], columns: list[str], names: list[list[str] | None]
) -> Iterator[Row]:
    """Yield the rows of Arrow batches, class numbers replaced by their names if there are any."""
    row = 0
    for batch in batches:
        values = [batch.column(column).to_pylist() for column in columns]
        for place, classes in enumerate(names):
            if classes:  # a hidden label is -1
                by_number = dict(enumerate(classes))
                values[place] = [by_number.get(number) for number in values[place]]
        for record in zip(*values, strict=True):
            row += 1
            yield row, row, record


def hub_splits(source: str) -> dict[str, Part]:
    """Load `hf:owner/name[:config]` and return its splits by their names on the Hub."""
    import datasets

    name, _, config = source.removeprefix("hf:").partition(":")
    if not name:
        raise DataError(f"{source} names no dataset; write it as hf:owner/name")
    try:
        splits = datasets.load_dataset(name, config or None)
    except Exception as error:  # the hub, the network and the files raise anything
        raise DataError(
            f"{source} cannot be loaded ({one_line(error)});"
            " check the name, the network and HF_ENDPOINT, or name a file"
        ) from error
    return {
        split: (f"{source} ({split})", partial(_hub_rows, rows)) for split, rows in splits.items()
    }


def _hub_rows(rows: datasets.Dataset, pick: Pick) -> Iterator[Row]:
    wanted = [rows.column_names[place] for place in pick(rows.column_names)]
    names = [getattr(rows.features[column], "names", None) for column in wanted]
    batches = rows.select_columns(wanted).with_format("arrow").iter(batch_size=10_000)
    yield from _arrow_rows(batches, wanted, names)


def row_place(row: int, line: int) -> str:
    """Return the row, with its line if that differs."""
    return f"row {row}" if row == line else f"row {row} (line {line})"

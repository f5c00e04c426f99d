"""Files in, checked rows out.

A file is CSV, TSV, JSON lines, Parquet or, for texts alone, one text a line. Whatever is wrong with
it is a `DataError` that names the file and the row. Rows are counted from 1 without the header; the
line is what an editor shows, and is told where it differs.
"""

from __future__ import annotations

import csv
import difflib
import json
import math
import re
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from remora.errors import ConfigError, DataError

if TYPE_CHECKING:
    import datasets

# The usual names of the columns, in the order in which they are preferred.
TEXT_NAMES = (
    *("text", "message", "sentence", "utterance", "content", "query", "review", "question"),
    *("document", "body", "comment", "tweet", "sms", "request", "description", "input", "prompt"),
)
LABEL_NAMES = (
    *("label_text", "label_name", "label", "labels", "category", "intent", "class", "target"),
    *("sentiment", "topic", "tag", "output", "completion"),
)

FORMATS = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".txt": "text",
}

Row = tuple[int, int, Sequence[object]]  # row, line, the values of the columns picked
Pick = Callable[[Sequence[str]], list[int]]  # a table's columns -> the places of those wanted
Part = tuple[str, Callable[[Pick], Iterator[Row]]]  # a name for messages, a reader


@dataclass(frozen=True)
class Table:
    """Texts and their labels, as parallel lists."""

    texts: list[str]
    labels: list[str]

    def __len__(self) -> int:
        return len(self.texts)


def read_table(
    path: str | Path,
    *,
    text_column: str | None = None,
    label_column: str | None = None,
    known: Collection[str] | None = None,
) -> Table:
    """Read one file into memory.

    Texts stay as they are; labels lose the white space around them and are interned.

    Args:
        path: A file.
        text_column: The column of the messages; by default found by its usual names.
        label_column: The column of the labels; by default found by its usual names.
        known: The labels that may occur; any, by default.

    Raises:
        DataError: The file is missing or broken, lacks a column, or has a blank or unknown value.

    """
    return read_parts([file_part(Path(path))], text_column, label_column, known=known)[0]


def stream_texts(
    source: str,
    *,
    text_column: str | None = None,
    format: str | None = None,  # noqa: A002
) -> Iterator[str]:
    """Yield the texts of a file or of standard input (`-`) one by one, never holding the rest.

    Args:
        source: A path, or `-`.
        text_column: The column of the messages; by default found by its usual names.
        format: `text` (one message a line), `csv`, `tsv`, `jsonl` or `parquet`. By default what the
            file's name says, and `text` for standard input.

    Raises:
        ConfigError: There is no such format, or standard input cannot have it.
        DataError: As in `read_table`: at once if the first row shows it, else when it is reached.

    """
    formats = sorted(set(FORMATS.values()) - ({"parquet"} if source == "-" else set()))
    if format is not None and format not in formats:
        place = "standard input" if source == "-" else "a file"
        raise ConfigError(
            f"{quote(format)} is not a format of {place}; choose one of {', '.join(formats)}"
        )
    name: str
    read: Callable[[Pick], Iterator[Row]]
    if source == "-":
        name = "standard input"
        read = partial(_parse, sys.stdin.buffer, name, format or "text")
    else:
        name, read = file_part(Path(source), format, allow_text=True)

    def texts() -> Iterator[str]:
        for row, line, (value,) in read(partial(_choose_text, name, text_column)):
            if _is_blank(value):
                raise DataError(f"{name}: {_where(row, line)} has a blank text; write or delete it")
            try:
                yield _text(value)
            except DataError as error:
                raise DataError(f"{name}: {_where(row, line)} has {error}") from None

    stream = texts()
    first = next(stream, None)  # what is wrong with the file as a whole shows before any work
    if first is None:
        raise DataError(f"{name} has no rows; add some")
    return chain([first], stream)


def file_part(path: Path, file_format: str | None = None, *, allow_text: bool = False) -> Part:
    """Return the part that a file is, after its name has been checked."""
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
        raise DataError(f"{path} is not a table that can be read (those are {readable}); {hint}")
    return str(path), partial(_file_rows, path, file_format)


def _missing_hint(path: Path) -> str:
    if close := close_match(path.name, [p.name for p in path.parent.glob("*")]):
        return f"did you mean {quote(close)}?"
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(path)) and path.suffix not in FORMATS:
        return f"check the path, or write hf:{path} for a dataset of the Hugging Face Hub"
    return "check the path"


# Checking rows


def read_parts(
    parts: Sequence[Part],
    text_column: str | None = None,
    label_column: str | None = None,
    *,
    known: Collection[str] | None = None,
) -> tuple[Table, list[str]]:
    """Read and check the parts of one split; return it with the names of its two columns.

    Blank values are counted, so that one error tells how many there are.
    """
    known = None if known is None else frozenset(known)
    texts: list[str] = []
    labels: list[str] = []
    chosen: list[str] = []
    blank, num_blank = "", 0
    for name, read in parts:

        def pick(columns: Sequence[str], name: str = name) -> list[int]:
            places = _choose(name, text_column, label_column, columns)
            chosen[:] = [columns[place] for place in places]
            return places

        for row, line, (text, label) in read(pick):
            if _is_blank(text) or _is_blank(label):
                num_blank += 1
                kind = "text" if _is_blank(text) else "label"
                blank = blank or f"{name}: {_where(row, line)} has a blank {kind}"
                continue
            try:
                texts.append(_text(text))
                labels.append(_label(label, known))
            except DataError as error:
                raise DataError(f"{name}: {_where(row, line)} has {error}") from None
    if blank:
        if num_blank > 1:
            blank += f", and it is one of {num_blank:,} rows with a blank value"
        raise DataError(f"{blank}; fill it in or delete the row")
    if not texts:
        raise DataError(f"{parts[0][0]} has no rows; add some")
    return Table(texts, labels), chosen


def _is_blank(value: object) -> bool:
    """Tell whether a value is white space, null or not a number."""
    if isinstance(value, str):
        return not value or value.isspace()
    return value is None or (isinstance(value, float) and math.isnan(value))


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise DataError(
            f"a text of type {type(value).__name__};"
            " make it a string, or name another column with --text-column"
        )
    _check_encodable(value)
    return value


def _label(value: object, known: Collection[str] | None) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # what pandas makes of whole numbers in a column that had a gap
    if not isinstance(value, str | int):
        raise DataError(
            f"the label {quote(str(value))} of type {type(value).__name__}; make it a string"
            " or a whole number, or name another column with --label-column"
        )
    label = sys.intern(str(value).strip())
    if known is None:
        _check_encodable(label)
    elif label not in known:
        close = close_match(label, known)
        raise DataError(
            f"the label {quote(label)}, which is none of the {len(known):,} labels to learn; "
            + (f"did you mean {quote(close)}?" if close else "correct it, or train on rows of it")
        )
    return label


def _check_encodable(value: str) -> None:
    if "\0" in value:
        raise DataError("a NUL character; remove it")
    try:
        value.isascii() or value.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"half of a surrogate pair, \\u{ord(value[error.start]):04x};"
            " write the character whole or remove it"
        ) from None


# Parsing


def _file_rows(path: Path, file_format: str, pick: Pick) -> Iterator[Row]:
    try:
        if file_format == "parquet":
            yield from _parquet_rows(path, pick)
        else:
            with path.open("rb") as stream:
                yield from _parse(stream, str(path), file_format, pick)
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror or one_line(error)}); check the file"
        ) from error


def _parse(stream: Iterable[bytes], name: str, file_format: str, pick: Pick) -> Iterator[Row]:
    lines = _decode(stream, name)
    if file_format == "jsonl":
        yield from _json_rows(lines, name, pick)
    elif file_format == "text":
        for number, line in enumerate(lines, 1):
            yield number, number, [line.rstrip("\r\n")]
    else:
        yield from _csv_rows(lines, name, "\t" if file_format == "tsv" else None, pick)


def _decode(stream: Iterable[bytes], name: str) -> Iterator[str]:
    """Decode UTF-8 line by line, which is what lets an error tell the line."""
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
        raise DataError(f"{name} is empty; put a table into it")


def _csv_rows(lines: Iterator[str], name: str, delimiter: str | None, pick: Pick) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)
    first = next(lines)
    row, line = 0, 1  # of the row being read; a row may span lines
    try:
        if delimiter is None:  # what makes the most columns of the header, the comma on a tie
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
                        f"{name}: {_where(row, line)} has {len(values)} fields where the header"
                        f" has {len(header)}; put a text that holds {quote(delimiter)} in double"
                        " quotes"
                    )
                yield row, line, [values[place] for place in places]
            line = reader.line_num + 1
    except csv.Error as error:
        advice = "close it, and write a double quote inside a quoted text twice"
        if "unexpected end" in str(error):
            found = "opens a double quote that is never closed"
        elif "expected after" in str(error):
            found = "has text after a closing double quote"
        elif "new-line" in str(error):
            found = "has a bare carriage return"
            advice = "save the file with LF or CRLF at the end of lines"
        else:
            found = f"is not CSV ({one_line(error)})"
        place = _where(row + 1, line) if line > 1 else "line 1"
        raise DataError(f"{name}: {place} {found}; {advice}") from None


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
                f"{name}: {_where(row, line)} is not valid JSON ({one_line(error)});"
                " write one JSON object a line"
            ) from None
        if not isinstance(record, dict):
            raise DataError(
                f"{name}: {_where(row, line)} is a JSON {type(record).__name__} and not an object;"
                ' write one object a line, such as {"text": "...", "label": "..."}'
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
            f"{path} is not a Parquet file that can be read ({one_line(error)});"
            " write it again, or save the table as CSV"
        ) from None


def _arrow_rows(
    batches: Iterable[Any], columns: list[str], names: list[list[str] | None]
) -> Iterator[Row]:
    """Yield the rows of Arrow batches, with class numbers as their names where there are names."""
    row = 0
    for batch in batches:
        values = [batch.column(column).to_pylist() for column in columns]
        for place, classes in enumerate(names):
            if classes:  # a hidden label is -1, and none of the classes
                by_number = dict(enumerate(classes))
                values[place] = [by_number.get(number) for number in values[place]]
        for record in zip(*values, strict=True):
            row += 1
            yield row, row, record


def hub_splits(source: str) -> dict[str, Part]:
    """Load `hf:owner/name[:config]` and return its splits by the names that the hub gives them."""
    import datasets

    name, _, config = source.removeprefix("hf:").partition(":")
    if not name:
        raise DataError(f"{source} names no data set; write it as hf:owner/name")
    try:
        splits = datasets.load_dataset(name, config or None)
    except Exception as error:  # whatever the hub, the network or the files of the dataset raise
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


# Choosing columns


def _choose(
    name: str, text_column: str | None, label_column: str | None, columns: Sequence[str]
) -> list[int]:
    """Return the places of the text column and of the label column."""
    text = None if text_column is None else _given(name, "text", text_column, columns)
    label = None if label_column is None else _given(name, "label", label_column, columns)
    if text is None:
        text = _usual(name, TEXT_NAMES, columns, label)
    if label is None:
        label = _usual(name, LABEL_NAMES, columns, text)
    if len(columns) == 2:  # where one is known, the other is the other
        if text is None and label is not None:
            text = 1 - label
        elif label is None and text is not None:
            label = 1 - text
    if text is None:
        raise _missing_column(name, "text", TEXT_NAMES, columns)
    if label is None:
        raise _missing_column(name, "label", LABEL_NAMES, columns)
    if text == label:
        raise ConfigError(
            f"column {quote(columns[text])} is named for the texts and for the labels;"
            " give --text-column and --label-column different columns"
        )
    return [text, label]


def _choose_text(name: str, text_column: str | None, columns: Sequence[str]) -> list[int]:
    if text_column is not None:
        return [_given(name, "text", text_column, columns)]
    text = _usual(name, TEXT_NAMES, columns, None)
    if text is None:
        raise _missing_column(name, "text", TEXT_NAMES, columns)
    return [text]


def _given(name: str, kind: str, column: str, columns: Sequence[str]) -> int:
    if column not in columns:
        close = close_match(column, columns)
        raise DataError(
            f"{name} has no column {quote(column)} (found {listed(columns)}); "
            + (f"did you mean {quote(close)}?" if close else f"name one with --{kind}-column")
        )
    return _only(name, column, columns)


def _usual(
    name: str, usual: Sequence[str], columns: Sequence[str], taken: int | None
) -> int | None:
    lowered = {column.casefold(): column for column in reversed(columns)}
    for candidate in usual:
        if candidate in lowered:
            place = _only(name, lowered[candidate], columns)
            if place != taken:
                return place
    return None


def _only(name: str, column: str, columns: Sequence[str]) -> int:
    if (count := columns.count(column)) > 1:
        raise DataError(f"{name} has {count} columns called {quote(column)}; rename all but one")
    return columns.index(column)


def _missing_column(
    name: str, kind: str, usual: Sequence[str], columns: Sequence[str]
) -> DataError:
    others = [c for c in columns if c.casefold() not in (*TEXT_NAMES, *LABEL_NAMES)]
    close = next((c for c in others if close_match(c.casefold(), usual)), None)
    hint = f"did you mean --{kind}-column {close}?" if close else f"name it with --{kind}-column"
    return DataError(
        f"{name} has no {kind} column: found {listed(columns)},"
        f" expected one of {', '.join(usual[:8])}; {hint}"
    )


# Wording


def _where(row: int, line: int) -> str:
    return f"row {row}" if row == line else f"row {row} (line {line})"


def quote(value: str) -> str:
    """Quote what a table holds, on one line and not too long."""
    return repr(value if len(value) <= 60 else value[:57] + "...")


def listed(names: Sequence[str]) -> str:
    """Quote the first eight of some names."""
    return ", ".join(map(quote, names[:8])) + (", ..." if len(names) > 8 else "")


def close_match(name: str, names: Iterable[str]) -> str | None:
    """Return the one of some names that was probably meant."""
    return next(iter(difflib.get_close_matches(name, list(names), n=1)), None)


def one_line(error: BaseException) -> str:
    """Return the message of a foreign error on one line and not too long."""
    said = f"no {error}" if isinstance(error, KeyError) else str(error)
    text = " ".join(said.split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."

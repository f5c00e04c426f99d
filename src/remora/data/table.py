"""Files read into checked rows.

A file is CSV, TSV, JSON lines, Parquet or, for texts alone, one text a line. Every fault is a
`DataError` that names the file and the row.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

from remora.data.columns import choose, choose_text
from remora.data.readers import FORMATS, Part, Pick, Row, file_part, parse, row_place
from remora.errors import ConfigError, DataError
from remora.formatting import close_match, quote


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

    Texts stay as they are; labels are stripped of surrounding white space and interned.

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
    """Yield the texts of a file or of standard input (`-`) one by one, holding none in memory.

    Args:
        source: A path, or `-`.
        text_column: The column of the messages; by default found by its usual names.
        format: `text` (one message a line), `csv`, `tsv`, `jsonl` or `parquet`. By default taken
            from the file's name, and `text` for standard input.

    Raises:
        ConfigError: There is no such format, or standard input cannot have it.
        DataError: As in `read_table`: at once for the first row, else when the row is reached.
    """
    # The source and its format
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
        read = partial(parse, sys.stdin.buffer, name, format or "text")
    else:
        name, read = file_part(Path(source), format, allow_text=True)

    def texts() -> Iterator[str]:
        for row, line, (value,) in read(partial(choose_text, name, text_column)):
            if _is_blank(value):
                raise DataError(
                    f"{name}: {row_place(row, line)} has a blank text; write or delete it"
                )
            try:
                yield _text(value)
            except DataError as error:
                raise DataError(f"{name}: {row_place(row, line)} has {error}") from None

    # The first row now, the others as they are asked for
    stream = texts()
    first = next(stream, None)  # a fault of the whole file shows before any work
    if first is None:
        raise DataError(f"{name} has no rows; add some")
    return chain([first], stream)


def read_parts(
    parts: Sequence[Part],
    text_column: str | None = None,
    label_column: str | None = None,
    *,
    known: Collection[str] | None = None,
) -> tuple[Table, list[str]]:
    """Read and check the parts of one split; return it with the names of its two columns.

    Blank values are counted, so that one error reports all of them.
    """
    known = None if known is None else frozenset(known)
    texts: list[str] = []
    labels: list[str] = []
    chosen: list[str] = []
    blank, num_blank = "", 0
    for name, read in parts:

        def pick(columns: Sequence[str], name: str = name) -> list[int]:
            places = choose(name, text_column, label_column, columns)
            chosen[:] = [columns[place] for place in places]
            return places

        for row, line, (text, label) in read(pick):
            if _is_blank(text) or _is_blank(label):
                num_blank += 1
                kind = "text" if _is_blank(text) else "label"
                blank = blank or f"{name}: {row_place(row, line)} has a blank {kind}"
                continue
            try:
                texts.append(_text(text))
                labels.append(_label(label, known))
            except DataError as error:
                raise DataError(f"{name}: {row_place(row, line)} has {error}") from None
    if blank:
        if num_blank > 1:
            blank += f", and it is one of {num_blank:,} rows with a blank value"
        raise DataError(f"{blank}; fill it in or delete the row")
    if not texts:
        raise DataError(f"{parts[0][0]} has no rows; add some")
    return Table(texts, labels), chosen


def _is_blank(value: object) -> bool:
    """Whether a value is white space, null or NaN."""
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
        value = int(value)  # pandas writes whole numbers so in a column with a gap
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
            f"the label {quote(label)}, which is none of the {len(known):,} training labels; "
            + (
                f"did you mean {quote(close)}?"
                if close
                else "correct it, or add training rows of it"
            )
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

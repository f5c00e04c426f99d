"""Rows of JSON: one object a line, or an array of objects."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from remora.data.parts import PEEKED_ROWS, Ahead, Pick, Remarks, Row, row_place
from remora.errors import DataError
from remora.formatting import listed, one_line, quote

EXTRA = "with a field that the first rows lack, left out"
EXAMPLE = '{"text": "...", "label": "..."}'

Record = tuple[int, int, dict[str, Any]]  # row, line, its object


def line_rows(
    lines: Iterator[str], name: str, pick: Pick, remarks: Remarks, *, may_wait: bool = False
) -> Iterator[Row]:
    """Yield the rows of JSON lines; of an array if the file begins as one over several lines.

    The columns are the fields of the first rows; of the very first one, if that has what is wanted
    and the next ones may be long in coming (`may_wait`).

    Raises:
        DataError: A line is not valid JSON, or no object.
    """
    content = Ahead(lines)
    blank = []
    for line in content:
        blank.append(line)
        if line.strip():
            break
    content.put_back(blank)
    first = blank[-1].strip() if blank else ""
    if first == "[" or first.startswith("[{") or first == "{":
        return document_rows(content, name, pick, remarks)
    return _picked(_line_records(content, name), name, pick, remarks, may_wait=may_wait)


def document_rows(lines: Iterator[str], name: str, pick: Pick, remarks: Remarks) -> Iterator[Row]:
    """Yield the rows of a JSON file: an array of objects, an object that holds one, or lines.

    Raises:
        DataError: The file is not valid JSON, or of another form.
    """
    content = Ahead(lines)
    first = next((line for line in content.peek(20) if line.strip()), "")
    try:
        is_lines = isinstance(json.loads(first), dict) and any(map(str.strip, content.peek(21)[1:]))
    except (ValueError, RecursionError):
        is_lines = False
    if is_lines:
        return _picked(_line_records(content, name), name, pick, remarks)
    return _picked(_array_records("".join(content), name), name, pick, remarks)


def _line_records(lines: Iterator[str], name: str) -> Iterator[Record]:
    row = 0
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
                f" object; write one object a line, such as {EXAMPLE}"
            )
        yield row, line, record


def _array_records(content: str, name: str) -> Iterator[Record]:
    try:
        document = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{name} is not valid JSON ({one_line(error)}); write an array of objects, or one"
            " object a line"
        ) from None
    if isinstance(document, dict):  # one that holds the array, beside other things
        lists = [each for each in document.values() if isinstance(each, list)]
        rows = [each for each in lists if each and all(isinstance(row, dict) for row in each)]
        is_row = {"text", "label"} <= document.keys() and isinstance(document["text"], str)
        if len(rows) != 1 and not is_row:
            raise DataError(
                f"{name} holds one JSON object with {listed(list(document)) or 'nothing'}, not an"
                " array of rows; write an array of objects (in pandas: orient='records')"
            )
        document = rows[0] if len(rows) == 1 else [document]
    if not isinstance(document, list):
        raise DataError(
            f"{name} holds a JSON {type(document).__name__}; write an array of objects, such as"
            f" [{EXAMPLE}]"
        )
    for row, record in enumerate(document, 1):
        if not isinstance(record, dict):
            raise DataError(
                f"{name}: row {row} is a JSON {type(record).__name__}, not an object; write an"
                f" array of objects, such as [{EXAMPLE}]"
            )
        yield row, row, record


def _picked(
    records: Iterator[Record], name: str, pick: Pick, remarks: Remarks, *, may_wait: bool = False
) -> Iterator[Row]:
    """Yield the wanted values of records; a field that a record lacks is None."""
    ahead = Ahead(records)
    if not ahead.peek(1):
        return
    columns = _fields(ahead, 1 if may_wait else PEEKED_ROWS)
    try:
        places = pick(columns, lambda: _cells(ahead, columns))
    except DataError:
        if not may_wait:
            raise
        columns = _fields(ahead, PEEKED_ROWS)
        places = pick(columns, lambda: _cells(ahead, columns))
    known, wanted = set(columns), [columns[place] for place in places]
    keeps_all = len(set(places)) == len(columns)
    for row, line, record in ahead.rest():
        if keeps_all and not record.keys() <= known:
            extra = next(key for key in record if key not in known)
            remarks.add(name, f"{EXTRA} ({quote(extra)})", row, line)
        yield row, line, [record.get(column) for column in wanted]


def _fields(ahead: Ahead[Record], num_rows: int) -> list[str]:
    """Return the fields that occur in the next rows, in the order in which they are met."""
    return list(dict.fromkeys(field for _, _, record in ahead.peek(num_rows) for field in record))


def _cells(ahead: Ahead[Record], columns: list[str]) -> list[Sequence[object]]:
    return [[record.get(c) for c in columns] for _, _, record in ahead.peek(PEEKED_ROWS)]

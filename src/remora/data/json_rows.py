"""Rows of JSON: one object a line, or an array of objects."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import chain
from typing import Any

from remora.data.parts import PEEKED_ROWS, Ahead, Pick, Remarks, Row, row_place
from remora.errors import DataError
from remora.formatting import listed, one_line, quote

EXTRA = "with a field that row 1 lacks, left out"
EXAMPLE = '{"text": "...", "label": "..."}'

Record = tuple[int, int, dict[str, Any]]  # row, line, its object


def line_rows(lines: Iterator[str], name: str, pick: Pick, remarks: Remarks) -> Iterator[Row]:
    """Yield the rows of JSON lines; of an array if the file begins as one over several lines.

    Raises:
        DataError: A line is not valid JSON, or no object.
    """
    content = Ahead(lines)
    first = next((line for line in content.peek(20) if line.strip()), "").strip()
    if first == "[" or first.startswith("[{") or first == "{":
        return document_rows(content, name, pick, remarks)
    return _picked(_line_records(content, name), name, pick, remarks)


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


def _picked(records: Iterator[Record], name: str, pick: Pick, remarks: Remarks) -> Iterator[Row]:
    """Yield the wanted values of records; a field that a record lacks is None."""
    first = next(records, None)
    if first is None:
        return
    ahead = Ahead(chain([first], records))
    columns = list(first[2])
    known = set(columns)
    places = pick(
        columns,
        lambda: [[r.get(c) for c in columns] for _, _, r in ahead.peek(PEEKED_ROWS)],
    )
    wanted = [columns[place] for place in places]
    keeps_all = len(set(places)) == len(columns)
    for row, line, record in ahead.rest():
        if keeps_all and not record.keys() <= known:
            extra = next(key for key in record if key not in known)
            remarks.add(name, f"{EXTRA} ({quote(extra)})", row, line)
        yield row, line, [record.get(column) for column in wanted]

"""Rows of Excel workbooks, read with python-calamine, an extra."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from remora.data.delimited import is_alike
from remora.data.parts import PEEKED_ROWS, Ahead, Pick, Row
from remora.errors import ConfigError, DataError
from remora.formatting import listed, one_line


def sheet_rows(stream: Any, name: str, columns: Sequence[str], pick: Pick) -> Iterator[Row]:
    """Yield the rows of a workbook's only sheet that holds any.

    Args:
        stream: The file.
        name: Of the table, for messages.
        columns: Names for a sheet without a header; by default its first row has them.
        pick: Chooses the columns.

    Raises:
        ConfigError: The package is not installed.
        DataError: The file is broken, or has no such sheet.
    """
    try:
        import python_calamine
    except ImportError:
        raise ConfigError(
            f"{name} needs the package python-calamine; install remora[excel], or save the sheet"
            " as 'CSV UTF-8'"
        ) from None
    try:
        with python_calamine.CalamineWorkbook.from_filelike(stream) as book:
            sheets = {each: book.get_sheet_by_name(each) for each in book.sheet_names}
            filled = {each: sheet for each, sheet in sheets.items() if sheet.height}
            if len(filled) != 1:
                raise DataError(
                    f"{name} has {len(filled) or 'no'} sheets with rows"
                    f" ({listed(list(filled)) or 'all are empty'});"
                    " save the one to use in a file of its own"
                )
            (sheet,) = filled.values()
            table = sheet.to_python()  # without the empty rows above
            num_above = sheet.start[0] if sheet.start else 0
    except python_calamine.CalamineError as error:
        raise DataError(
            f"{name} is not a readable workbook ({one_line(error)});"
            " save it again as .xlsx, or as 'CSV UTF-8'"
        ) from None
    header = list(columns) or [str(_plain(cell)).strip() for cell in table[0]]
    if len(header) != len(table[0]):
        raise DataError(
            f"{name}: row 1 has {len(table[0])} fields, but --columns names {len(header)};"
            " name each column once"
        )
    if columns and is_alike([str(_plain(cell)) for cell in table[0]], header):
        raise DataError(
            f"{name} has the names of --columns in its first row; delete that row, or leave out"
            " --columns if every table has it"
        )
    first = 1 if columns else 2  # the line of the first row
    ahead = Ahead(iter(list(enumerate(table[first - 1 :], 1))))
    places = pick(header, lambda: [values for _, values in ahead.peek(PEEKED_ROWS)])
    empty = {place: _empty(values[place] for values in table[first - 1 :]) for place in places}
    for row, values in ahead.rest():
        cells = [empty[place] if values[place] == "" else values[place] for place in places]
        yield row, num_above + row + first - 1, [_plain(cell) for cell in cells]


def _empty(cells: Iterable[object]) -> str | None:
    """Return what an empty cell of a column is: no value beside numbers or dates, else a text."""
    filled = [cell for cell in cells if cell != ""]
    return None if filled and not any(isinstance(cell, str) for cell in filled) else ""


def _plain(value: object) -> object:
    """Return a cell; a workbook holds all its numbers with decimals."""
    return int(value) if isinstance(value, float) and value.is_integer() else value

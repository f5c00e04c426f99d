"""Rows of CSV and tab-separated files."""

from __future__ import annotations

import contextlib
import csv
import re
from collections.abc import Iterator, Sequence
from itertools import islice

from remora.data.columns import LABEL_NAMES, TEXT_NAMES, UnlabelledError
from remora.data.parts import PEEKED_ROWS, Ahead, Pick, Remarks, Row, row_place
from remora.errors import DataError
from remora.formatting import one_line, quote

SPANNING = "with a field that spans lines"
PLAIN_QUOTES = "with double quotes that enclose no field, read as text"
DELIMITERS = ",;\t|"
MAX_SPANNED_LINES = 1000
"""Lines after which a double quote in a tab-separated file is no longer taken to open a field."""

_DELIMITER_LINE = re.compile(r"sep=(.)\s*$")  # Excel reads one as the delimiter of what follows
_OPEN = re.compile(r' *"(?:[^"]|"")*$')
_QUOTED = re.compile(r'"((?:[^"]|"")*)"(?=\t|$)', re.DOTALL)

Record = tuple[int, list[str]]  # the first line, the fields; none where the line is blank


def rows(
    lines: Iterator[str],
    name: str,
    delimiter: str | None,
    columns: Sequence[str],
    pick: Pick,
    remarks: Remarks,
) -> Iterator[Row]:
    """Yield the rows of delimited text.

    Args:
        lines: The lines with their ends.
        name: Of the table, for messages.
        delimiter: The delimiter, None to take it from the first line.
        columns: Names for a table without a header; by default the first line has them.
        pick: Chooses the columns.
        remarks: Told of fields that span lines, and of quotes that are text.

    Raises:
        DataError: A row is broken, or has more or fewer fields than there are columns.
    """
    skipped = 0  # lines before the header
    for first in lines:
        if named := _DELIMITER_LINE.match(first):
            delimiter = named[1]
        elif first.strip():
            break
        skipped += 1
    else:
        raise DataError(f"{name} is empty; add a header and rows")
    below: list[str] = []  # the first lines after that one, as far as they were read
    ahead = Ahead(_kept(lines, below))
    marks, delimiter = delimiter or DELIMITERS, delimiter or _delimiter(first, ahead)
    ahead.put_back([first])
    records = _tabbed(ahead, name, skipped, remarks) if delimiter == "\t" else None
    records = records or _quoted(ahead, name, delimiter, skipped, remarks)
    header = [column.strip() for column in columns]
    if not header:
        _, fields = next(records)
        header = [column.strip() for column in fields]
        if not any(header):
            raise DataError(f"{name}: line {skipped + 1} is blank; name the columns there")
    complete = Ahead(_complete(records, header, name, delimiter))
    try:
        places = pick(header, lambda: [values for _, _, values in complete.peek(PEEKED_ROWS)])
    except UnlabelledError:
        raise
    except DataError as error:
        if columns or len(header) > 1:
            raise
        with contextlib.suppress(DataError):
            ahead.peek(PEEKED_ROWS)  # which fills `below`
        title = _title(name, header[0], below, marks)
        raise title or _other_delimiter(name, [first, *below], marks) or error from None
    if columns and any(is_alike(values, header) for _, _, values in complete.peek(1)):
        raise DataError(
            f"{name} has the names of --columns in its first line; delete that line, or leave out"
            " --columns if every table has it"
        )
    for row, line, values in complete.rest():
        yield row, line, [values[place] for place in places]


def _kept(lines: Iterator[str], kept: list[str]) -> Iterator[str]:
    """Yield lines, the first two that are not blank into a list too."""
    for line in lines:
        if line.strip():
            kept.append(line)
        yield line
        if len(kept) == 2:
            break
    yield from lines


def _title(name: str, first: str, below: Sequence[str], marks: str) -> DataError | None:
    """Return the error of a title above the header: one field, and several in the lines below."""
    if first.casefold() in (*TEXT_NAMES, *LABEL_NAMES) or first.startswith("__label__"):
        return None  # a column of texts, or lines of fastText
    for mark in marks:
        widths = {_num_fields(line, mark) for line in below[:2]}
        if len(widths) == 1 and (width := widths.pop()) > 1:
            return DataError(
                f"{name} has one field in its first line, {quote(first)}, and {width} in the"
                " next; delete what stands above the header"
            )
    return None


def _other_delimiter(name: str, lines: Sequence[str], marks: str) -> DataError | None:
    """Return the error of a table whose name says tabs, and whose lines have another delimiter."""
    if marks != "\t" or lines[0].startswith("__label__"):  # lines of fastText
        return None
    for mark in DELIMITERS:
        widths = {_num_fields(line, mark) for line in lines}
        if len(widths) == 1 and (width := widths.pop()) > 1:
            return DataError(
                f"{name} has no tabs in its first lines, and {width} fields each by {quote(mark)};"
                " read it with --input-format csv"
            )
    return None


def is_alike(values: Sequence[str], header: Sequence[str]) -> bool:
    """Whether the values of a row are the names of the columns."""
    return [value.strip().casefold() for value in values] == [each.casefold() for each in header]


def _delimiter(first: str, following: Ahead[str]) -> str:
    """Return what splits the first line most; on a tie what splits the next one alike."""
    counts = {mark: _num_fields(first, mark) for mark in DELIMITERS}
    most = max(counts.values())
    tied = [mark for mark, count in counts.items() if count == most]
    if len(tied) > 1 and most > 1:
        (second,) = following.peek(1) or [first]
        tied = [mark for mark in tied if _num_fields(second, mark) == most] or tied
    return tied[0]


def _num_fields(line: str, delimiter: str) -> int:
    try:
        return len(next(csv.reader([line], delimiter=delimiter), ()))
    except csv.Error:  # told with its place when the line is read
        return 0


def _complete(
    records: Iterator[Record], header: list[str], name: str, delimiter: str
) -> Iterator[tuple[int, int, list[str]]]:
    """Yield the records that are not blank as rows, each with as many fields as the header."""
    row, width = 0, len(header)
    for line, values in records:
        if not values:  # a blank line
            continue
        row += 1
        if len(values) > width and not any(values[width:]):
            del values[width:]  # a spreadsheet's empty cells
        if len(values) < width and not "".join(values).strip():
            values[:] = [""] * width  # a line of spaces
        if len(values) != width:
            if row == 1 and 1 < width == len(values) - 1 and _all_have(len(values), records):
                raise DataError(
                    f"{name}: each row has {len(values)} fields, and the header names {width}; add"
                    " the name that is missing, in front for the row names that R writes"
                )
            fields = f"{len(values)} field{'' if len(values) == 1 else 's'}"
            if len(values) < width:
                advice = "add the missing ones, or delete the row"
            elif delimiter == "\t":
                advice = "replace tabs in the text by spaces"
            else:
                advice = f"put a text that holds {quote(delimiter)} in double quotes"
            raise DataError(
                f"{name}: {row_place(row, line)} has {fields} where the header has {width};"
                f" {advice}"
            )
        yield row, line, values


def _all_have(width: int, records: Iterator[Record]) -> bool:
    """Whether there are further records, and the next ones all have as many fields."""
    try:
        widths = {len(values) for _, values in islice(records, PEEKED_ROWS) if values}
    except DataError:  # of a quote, further below
        return False
    return widths == {width}


def _quoted(
    lines: Iterator[str], name: str, delimiter: str, skipped: int, remarks: Remarks
) -> Iterator[Record]:
    """Yield the records of CSV, in which double quotes enclose a field."""
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(_without_spaces(lines, delimiter), delimiter=delimiter, strict=True)
    row, line = 0, skipped + 1  # of the record being read, the header being row 0
    try:
        for values in reader:
            if skipped + reader.line_num > line and values:
                remarks.add(name, SPANNING, row, line)
            yield line, values
            line = skipped + reader.line_num + 1
            row += bool(values)
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
        place = row_place(row, line) if row else f"line {line}"
        raise DataError(f"{name}: {place} {fault}; {advice}") from None


def _without_spaces(lines: Iterator[str], delimiter: str) -> Iterator[str]:
    """Yield the lines of CSV without spaces around quoted fields, which hide their quotes.

    `skipinitialspace` of csv would take those of other fields too, and none behind a quote.
    """
    mark = re.escape(delimiter)
    quoted = re.compile(rf' *"(?:[^"]|"")*" *(?=[{mark}\r\n]|$)')
    is_open = False  # whether the line begins within quotes
    for line in lines:
        may_have = not is_open and (' "' in line or '" ' in line)
        is_open ^= line.count('"') % 2 == 1
        yield _without_outer_spaces(line, delimiter, quoted) if may_have else line


def _without_outer_spaces(line: str, delimiter: str, quoted: re.Pattern[str]) -> str:
    """Return a line that begins with a field, without spaces around its quoted ones.

    Args:
        line: The line.
        delimiter: Between its fields.
        quoted: Matches a quoted field with the spaces around it, up to the next delimiter.
    """
    parts, place = [], 0
    while True:
        match, end = quoted.match(line, place), line.find(delimiter, place)
        if match:
            parts.append(match[0].strip(" "))
            end = match.end()
        elif _OPEN.match(line, place):
            return "".join(parts) + line[place:].lstrip(" ")  # it ends on a later line
        else:
            end = len(line) if end < 0 else end
            parts.append(line[place:end])
        if line[end : end + 1] != delimiter:
            return "".join(parts) + line[end:]
        parts.append(delimiter)
        place = end + 1


def _tabbed(lines: Ahead[str], name: str, skipped: int, remarks: Remarks) -> Iterator[Record]:
    """Yield the records of tab-separated text.

    Many such files were written without any quoting, so a double quote encloses a field only if it
    is closed before a tab or the line's end, here or on a later line. Where the lines are records
    on their own, it is text, unless the first line quotes each of its fields.
    """
    number, row, width, all_quoted = skipped + 1, 0, 0, False
    for raw in lines:
        line, content = number, raw.rstrip("\r\n")
        if "\r" in content and number == skipped + 1:
            raise DataError(
                f"{name}: line {number} has a bare carriage return;"
                " save the file with LF or CRLF line endings"
            )
        plain = content.split("\t")
        values, spanned = plain, 0
        if not width:
            all_quoted = _is_all_quoted(plain)
        if any(field.startswith('"') for field in plain):
            values, spanned = _unquoted(raw, plain, width, lines, all_quoted)
            if spanned:
                remarks.add(name, SPANNING, row, line)
            elif any(field.startswith('"') for field in values):
                remarks.add(name, PLAIN_QUOTES, row, line)
        number += 1 + spanned
        yield line, values if content else []
        width = width or len(values)
        row += bool(content)


def _is_all_quoted(plain: list[str]) -> bool:
    """Whether each field of a line is in quotes; the last one may be closed on a later line."""
    *before, last = plain
    is_open = bool(before) and last.startswith('"')
    return all(map(_QUOTED.fullmatch, before)) and (is_open or bool(_QUOTED.fullmatch(last)))


def _unquoted(
    raw: str, plain: list[str], width: int, lines: Ahead[str], all_quoted: bool
) -> tuple[list[str], int]:
    """Return a record's fields without the quotes that enclose them, and the further lines of it.

    Args:
        raw: The line that it begins on, with its end.
        plain: Its fields if all quotes are text.
        width: The number of fields of the first record; 0 if this is it.
        lines: The lines after it.
        all_quoted: Whether the first line quotes all fields, so that quotes are no text.
    """
    fields, is_open = _fields(raw.rstrip("\r\n"))
    if not is_open:
        if width == len(plain) != len(fields):
            return plain, 0
        return fields, 0
    following = lines.peek(1)
    is_record = len(plain) == width or not width
    follows = not following or following[0].count("\t") == width - 1 or not width
    if is_record and follows and not all_quoted:
        return _closed_fields(plain), 0
    taken: list[str] = []
    whole = raw
    for more in lines:
        taken.append(more)
        whole += more
        if '"' in more:
            fields, is_open = _fields(whole.rstrip("\r\n"))
        if not is_open:
            if is_record and len(fields) != (width or len(plain)):
                break
            return fields, len(taken)
        if len(taken) == MAX_SPANNED_LINES:
            break
    lines.put_back(taken)
    return _closed_fields(plain), 0


def _fields(content: str) -> tuple[list[str], bool]:
    """Return the fields of a record, and whether the last one opens a quote that is not closed."""
    fields, place = [], 0
    while True:
        match = _QUOTED.match(content, place)
        if match:
            fields.append(match[1].replace('""', '"'))
            end = match.end()
        else:
            end = content.find("\t", place)
            end = len(content) if end < 0 else end
            if content.startswith('"', place) and not _is_closed(content[place:end]):
                return fields, True
            fields.append(content[place:end])
        if end == len(content):
            return fields, False
        place = end + 1


def _is_closed(field: str) -> bool:
    """Whether a field that begins with a quote is text: it has another one, and text after it."""
    return re.match(r'"(?:[^"]|"")*"[^"\t]', field) is not None


def _closed_fields(plain: list[str]) -> list[str]:
    """Return fields, unquoted where a quote is closed before the next tab."""
    matches = [_QUOTED.fullmatch(field) for field in plain]
    return [
        match[1].replace('""', '"') if match else field
        for field, match in zip(plain, matches, strict=True)
    ]

"""A person's decisions on labels: read from a relabel.csv, and applied to the rows of a table."""

from __future__ import annotations

import codecs
import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from remora.data.label_sets import NONE_OF_THEM, names_in, set_text
from remora.data.table import Table
from remora.errors import DataError
from remora.formatting import close_match, escape_formula, quote, unescape_formula

RELABEL = "relabel.csv"
"""The table of rows to decide that a diagnosis leaves in a run directory."""

DELETE = "delete"
"""The decision that removes a row, unless a label has this name."""

NEEDED = ("row", "text", "label", "decision")

Decisions = Mapping[int, str | None]
"""By the places of rows in their source: the right label, None to delete the row."""


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """A relabel.csv as it is, its cells escaped for spreadsheets."""

    columns: tuple[str, ...]
    records: tuple[dict[str, str], ...]
    lines: tuple[int, ...]  # of the file, on which each record ends

    def rows(self) -> list[list[str]]:
        """Return the cells of each record, as they are without their escapes."""
        return [[unescape_formula(each[name]) for name in self.columns] for each in self.records]

    def decided(self) -> Sheet:
        """Return the records that have a decision."""
        kept = [
            (line, record)
            for line, record in zip(self.lines, self.records, strict=True)
            if record["decision"].strip()
        ]
        return Sheet(
            columns=self.columns,
            records=tuple(record for _, record in kept),
            lines=tuple(line for line, _ in kept),
        )


def read_sheet(path: Path) -> Sheet:
    """Read a relabel.csv, as Remora or a spreadsheet wrote it.

    Columns may be separated by commas, semicolons or tabs, and the encoding may be UTF-8, UTF-16 or
    that of Western Windows: texts are compared with the table's, so a wrong guess is noticed.

    Raises:
        DataError: If the file cannot be read or is no such table.
    """
    try:
        text = _decoded(path.read_bytes())
        first, _, rest = text.partition("\n")
        if first.strip().lower().startswith("sep="):  # Excel's word to itself
            text = rest
            first = rest.partition("\n")[0]
        delimiter = max(",;\t", key=lambda mark: len({*NEEDED} & {*_names(first, mark)}))
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
        found = [(reader.line_num, record) for record in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path} cannot be read ({reason}); give a relabel.csv") from error
    columns = tuple(reader.fieldnames)
    if missing := [name for name in NEEDED if name not in columns]:
        raise DataError(f"{path} has no column {missing[0]}; give a relabel.csv with decisions")
    kept: dict[int, dict[str, str]] = {}
    for line, record in found:
        extra = record.pop(None, None) or []
        if not any(record.values()) and not any(extra):  # a spreadsheet's empty row
            continue
        if any(record[name] is None for name in columns) or any(extra):
            raise DataError(f"{path}: line {line} has too few or too many fields; restore it")
        kept[line] = record
    return Sheet(columns=columns, records=tuple(kept.values()), lines=tuple(kept))


@dataclass(frozen=True, kw_only=True)
class Corrections:
    """Decisions, and the records that they stand in."""

    decisions: Decisions
    sheet: Sheet  # decided records only


def read_corrections(
    path: Path, table: Table, renamed: Mapping[str, str] | None = None
) -> Corrections:
    """Read a relabel.csv that was written for the rows of `table`; see `read_decisions`."""
    sheet = read_sheet(path)
    decisions = read_decisions(path, sheet, table, renamed)
    return Corrections(decisions=decisions, sheet=sheet.decided())


def _decoded(content: bytes) -> str:
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return content.decode("utf-16")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return content.decode("cp1252")


def _names(line: str, delimiter: str) -> list[str]:
    try:
        return [name.strip() for name in next(csv.reader([line], delimiter=delimiter), ())]
    except csv.Error:
        return []


def read_decisions(
    path: Path, sheet: Sheet, table: Table, renamed: Mapping[str, str] | None = None
) -> Decisions:
    """Return the decisions of a sheet.

    Args:
        path: Where the sheet is, for messages.
        sheet: Records with decisions or without; rows may be left out or reordered.
        table: The rows that it was written for.
        renamed: Names that labels of the table have got; a sheet may be older than they are.

    Raises:
        DataError: If its rows are not those of `table`, or a decision is no label.
    """
    known = known_labels(table)
    places = {row: place for place, row in enumerate(table.places)}
    decided: dict[int, str | None] = {}
    decided_on: dict[int, int] = {}
    for line, record in zip(sheet.lines, sheet.records, strict=True):
        row, decision = _decided(path, line, record, table, places, renamed or {})
        if not decision:
            continue
        try:
            choice = read_choice(decision, table, known)
        except DataError as error:
            raise DataError(f"{path}: line {line} has {error}") from None
        if decided.setdefault(row, choice) != choice:
            raise DataError(
                f"{path}: line {line} decides row {row + 1} otherwise than line "
                f"{decided_on[row]}; keep one of them"
            )
        decided_on.setdefault(row, line)
    return decided


def known_labels(table: Table) -> dict[str, str]:
    """Return the labels of a table by their names as a spreadsheet shows them."""
    return {escape_formula(label): label for label in set(table.each_label)}


def read_choice(decision: str, table: Table, known: Mapping[str, str]) -> str | None:
    """Return the label, or set of labels, that a decision gives; None if it deletes the row.

    Args:
        decision: As it stands in a sheet.
        table: The rows that it is for.
        known: Their `known_labels`.

    Raises:
        DataError: Without the line: it is none.
    """
    if decision.lower() == DELETE and DELETE not in map(str.lower, known):
        return None
    names: Sequence[object] = [known.get(decision, decision)]
    if table.multi_label and decision not in known:
        names = names_in(unescape_formula(decision), table.form)
    if unknown := [str(name) for name in names if name not in known.values()]:
        close = close_match(unknown[0], known)
        others = f"labels, {NONE_OF_THEM} for none" if table.multi_label else "a label"
        hint = f"did you mean {quote(close)}?" if close else f"give {others}, or {DELETE}"
        named = "" if unknown == [decision] else f" has {quote(unknown[0])}, which"
        raise DataError(f"the decision {quote(decision)}, which{named} is no label; {hint}")
    return set_text(map(str, names)) if table.multi_label else str(names[0])


def _decided(
    path: Path,
    line: int,
    record: Mapping[str, str],
    table: Table,
    places: Mapping[int, int],
    renamed: Mapping[str, str],
) -> tuple[int, str]:
    """Return the place of a record's row in the source, and its decision."""
    number = record["row"].strip()
    row = int(number) - 1 if number.isdecimal() else -1
    if row not in places:
        raise DataError(
            f"{path}: line {line} is for row {quote(number)}, which is not in the data; "
            "use it with the table that was diagnosed"
        )
    place = places[row]
    label = table.written(table.labels[place])
    expected = [_lines_alike(escape_formula(each)) for each in (table.texts[place], label)]
    cells = record["label"], record["decision"].strip()
    for given, decision in (cells, [_renamed(cell, table, renamed) for cell in cells]):
        if expected == [_lines_alike(record["text"]), _lines_alike(given)]:
            return row, decision
    raise DataError(
        f"{path}: line {line} no longer matches row {number} of the data; "
        "use it with the table that was diagnosed"
    )


def _renamed(cell: str, table: Table, names: Mapping[str, str]) -> str:
    """Return a cell with the names that labels have got."""
    label = unescape_formula(cell)
    if label in names:
        return escape_formula(names[label])
    if not label or not table.multi_label:
        return cell
    try:
        found = [str(name) for name in names_in(label, table.form)]
    except DataError:  # which is told with its line where the decision is read
        return cell
    return escape_formula(table.written(set_text(names.get(name, name) for name in found)))


def _lines_alike(cell: str) -> str:
    """Return a cell with the line ends that any spreadsheet may have given it."""
    return cell.replace("\r\n", "\n").replace("\r", "\n")


def correct(table: Table, decisions: Decisions) -> tuple[Table, int, int]:
    """Return the rows with decisions applied, how many were corrected, and how many deleted."""
    chosen = [
        decisions.get(row, label) for row, label in zip(table.places, table.labels, strict=True)
    ]
    num_corrected = sum(
        new is not None and new != old for new, old in zip(chosen, table.labels, strict=True)
    )
    kept = table.take([place for place, label in enumerate(chosen) if label is not None])
    labels = [label for label in chosen if label is not None]
    return replace(kept, labels=labels), num_corrected, len(table) - len(kept)

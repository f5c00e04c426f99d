"""relabel.csv: rows for a person to check, and their decisions read back."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from remora.data.table import Table
from remora.errors import DataError
from remora.formatting import close_match, quote
from remora.runtime import files

COLUMNS = (
    *("row", "text", "label", "suggested", "p_wrong", "p_label", "p_suggested", "neighbours"),
    "decision",
)
DELETE = "delete"


@dataclass(frozen=True, kw_only=True)
class Suspect:
    """A row that may be mislabelled."""

    row: int  # from 1, without the header, of the table that was trained on
    text: str
    label: str
    suggested: str
    p_wrong: float  # probability that it is mislabelled
    p_label: float  # out of sample
    p_suggested: float
    neighbours: int  # of the nearest texts, how many have the suggested label


def write(path: Path, suspects: Sequence[Suspect]) -> None:
    """Write suspects for a person to decide, the most suspicious first.

    The last column is empty: a label there corrects the row, `delete` removes it, empty keeps it.
    """
    files.write_csv(
        path,
        COLUMNS,
        (
            (
                *(str(each.row), each.text, each.label, each.suggested),
                *(f"{each.p_wrong:.4f}", f"{each.p_label:.4f}", f"{each.p_suggested:.4f}"),
                *(str(each.neighbours), ""),
            )
            for each in suspects
        ),
    )


def apply(path: Path, table: Table) -> tuple[Table, int, int]:
    """Apply a person's decisions.

    Args:
        path: relabel.csv with decisions in its last column; rows may be left out or reordered.
        table: The rows that it was written for.

    Returns:
        The cleaned rows, how many were corrected, and how many deleted.

    Raises:
        DataError: If the file is no such table, its rows are not those of `table`, or a decision is
            no label.
    """
    known = {files.escape_formula(label): label for label in table.labels}
    labels: list[str | None] = list(table.labels)
    num_corrected = 0
    for line, record in _records(path):
        row = _row(path, line, record, table)
        decision = record["decision"].strip()
        if decision in known:
            num_corrected += known[decision] != table.labels[row]
            labels[row] = known[decision]
        elif decision.lower() == DELETE:
            labels[row] = None
        elif decision:
            close = close_match(decision, known)
            hint = f"did you mean {quote(close)}?" if close else f"give a label, or {DELETE}"
            raise DataError(
                f"{path}: line {line} has the decision {quote(decision)}, which is no label; {hint}"
            )
    kept = [(text, label) for text, label in zip(table.texts, labels, strict=True) if label]
    if not kept:
        raise DataError(f"{path} deletes every row; keep some")
    cleaned = Table([text for text, _ in kept], [label for _, label in kept])
    return cleaned, num_corrected, len(table) - len(kept)


def write_table(path: Path, table: Table) -> None:
    """Write rows to train on as CSV, exactly as they are."""
    temporary = path.with_name(path.name + ".tmp")
    with files.disk_errors(path):
        with temporary.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label"])
            writer.writerows(zip(table.texts, table.labels, strict=True))
        temporary.replace(path)


def _records(path: Path) -> list[tuple[int, dict[str, str]]]:
    """Return each row of the file with the line that it ends on."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            records = [(reader.line_num, record) for record in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path} cannot be read ({reason}); give a relabel.csv") from error
    needed = ("row", "text", "label", "decision")
    if missing := [name for name in needed if name not in (reader.fieldnames or ())]:
        raise DataError(f"{path} has no column {missing[0]}; give a relabel.csv with decisions")
    for line, record in records:
        if any(record[name] is None for name in needed) or None in record:
            raise DataError(f"{path}: line {line} has too few or too many fields; restore it")
    return records


def _row(path: Path, line: int, record: dict[str, str], table: Table) -> int:
    """Return the place of a record's row in the table."""
    number = record["row"].strip()
    row = int(number) - 1 if number.isdecimal() else -1
    if not 0 <= row < len(table):
        raise DataError(
            f"{path}: line {line} is for row {quote(number)}, which is not in the data; "
            "use it with the table that was diagnosed"
        )
    expected = files.escape_formula(table.texts[row]), files.escape_formula(table.labels[row])
    if expected != (record["text"], record["label"]):
        raise DataError(
            f"{path}: line {line} no longer matches row {number} of the data; "
            "use it with the table that was diagnosed"
        )
    return row

"""relabel.csv: rows for a person to check, written beside the decisions that were made before."""

from __future__ import annotations

import contextlib
import os
import platform
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from remora.data.corrections import RELABEL, Sheet, correct, read_corrections
from remora.data.table import Table
from remora.errors import ConfigError, DataError
from remora.runtime import files

FILE = RELABEL
COLUMNS = (
    *("row", "text", "label", "suggested", "p_wrong", "p_label", "p_suggested", "neighbours"),
    "decision",
)
ALMOST_SURE, WORTH_A_LOOK = 0.9, 0.5
"""The least probabilities of being mislabelled in the first two bands of the list."""
BANDS = ("almost surely wrong", "worth a look", "probably right")
"""In the last one are rows that are listed for another reason than their probability."""
SURE = 0.9
"""Such as judges that agree on another label with at least this pooled probability."""

_LOCK, _HOLDER = ".relabel.lock", ".relabel.holder"


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

    @property
    def band(self) -> str:
        """One of `BANDS`."""
        return band_of(self.p_wrong)


def band_of(p_wrong: float) -> str:
    """Return the band of a row that is listed, by the probability that it is mislabelled."""
    return BANDS[(p_wrong < ALMOST_SURE) + (p_wrong < WORTH_A_LOOK)]


def in_bands(suspects: Sequence[Suspect]) -> dict[str, int]:
    """Return how many suspects there are in each band."""
    found = Counter(each.band for each in suspects)
    return {band: found[band] for band in BANDS}


def write(path: Path, suspects: Sequence[Suspect], decided: Sheet | None = None) -> None:
    """Write suspects for a person to decide, the most suspicious first.

    The last column is empty: a label there corrects the row, its own label keeps it, `delete`
    removes it; a row that is left empty is not decided.

    Args:
        path: The file.
        suspects: The rows to decide.
        decided: Records that were decided before, which come last.
    """
    records = [_record(each) for each in suspects]
    more: list[str] = []
    if decided:
        records += [dict(zip(decided.columns, cells, strict=True)) for cells in decided.rows()]
        more = [name for name in decided.columns if name not in COLUMNS]
    columns = [*COLUMNS[:-1], *more, COLUMNS[-1]]
    files.write_csv(path, columns, ([each.get(name, "") for name in columns] for each in records))


def _record(suspect: Suspect) -> dict[str, str]:
    return {
        "row": str(suspect.row),
        "text": suspect.text,
        "label": suspect.label,
        "suggested": suspect.suggested,
        "p_wrong": f"{suspect.p_wrong:.4f}",
        "p_label": f"{suspect.p_label:.4f}",
        "p_suggested": f"{suspect.p_suggested:.4f}",
        "neighbours": str(suspect.neighbours),
    }


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
    cleaned, num_corrected, num_deleted = correct(table, read_corrections(path, table).decisions)
    if not len(cleaned):
        raise DataError(f"{path} deletes every row; keep some")
    return cleaned, num_corrected, num_deleted


@contextlib.contextmanager
def hold(directory: Path) -> Iterator[None]:
    """Keep other processes from writing a run's relabel.csv.

    Raises:
        ConfigError: If one writes it already.
    """
    from filelock import FileLock, Timeout

    lock, holder = FileLock(directory / _LOCK), directory / _HOLDER
    with files.disk_errors(directory / FILE, "review a copy of the run"):
        try:
            lock.acquire(blocking=False)
        except Timeout:
            other = holder.read_text(encoding="utf-8").strip() if holder.is_file() else "another"
            raise ConfigError(
                f"{directory / FILE} is being reviewed or written by {other}; go on there, or stop "
                "that"
            ) from None
    try:
        with files.disk_errors(holder, "review a copy of the run"):
            files.write_text(holder, f"process {os.getpid()} on {platform.node()}")
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()

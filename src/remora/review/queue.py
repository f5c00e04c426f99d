"""The rows of a relabel.csv that a person decides, in their order, and the decisions saved."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from remora.data.corrections import (
    DELETE,
    Sheet,
    known_labels,
    read_choice,
    read_decisions,
    read_sheet,
)
from remora.data.table import Table
from remora.diagnosis import duplicates, suspect_list
from remora.errors import DataError
from remora.evaluation.run_commands import command
from remora.formatting import escape_formula
from remora.runtime import files

NUM_NEIGHBOURS = 5
EXCERPT_CHARS = 120


@dataclass(frozen=True, kw_only=True)
class Item:
    """A row to decide."""

    row: int  # from 1, of the table that was trained on
    label: str  # or several, as the table writes them
    suggested: str | None
    band: str
    pair: int  # rows with the same two labels have the same number
    excerpt: str  # of the text


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What is decided so far."""

    run: str
    num_rows: int
    num_kept: int
    num_relabelled: int
    num_deleted: int
    num_open: int  # without those that are probably right
    num_probably_right: int  # of those, the rows that are not decided
    again: str  # the command that goes on with the review
    next: str  # the command that trains on the decisions

    @property
    def num_decided(self) -> int:
        """How many rows are decided."""
        return self.num_kept + self.num_relabelled + self.num_deleted

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as JSON holds them."""
        return asdict(self)


def need_list(run: Path) -> None:
    """Refuse a run that was not diagnosed; raises DataError."""
    if run.is_dir() and not (run / suspect_list.FILE).is_file():
        first = command("diagnose", run)
        raise DataError(f"{run} has no {suspect_list.FILE}; run `{first}` first")


class Queue:
    """The rows of a run's relabel.csv, and the decisions, which are saved in it one by one.

    The file is the only place of a decision: it is read again when something else has written it.
    """

    def __init__(self, run: Path, table: Table) -> None:
        """Read relabel.csv.

        Args:
            run: The run directory.
            table: The rows that the run's table gives, with their labels there.

        Raises:
            DataError: If its rows are not those of the table.
        """
        self._run, self._path, self._table = run, run / suspect_list.FILE, table
        self._lock = threading.Lock()
        self._place = {row: place for place, row in enumerate(table.places)}
        self._known = known_labels(table)
        self._read()
        suggested = map(self._suggested, self._sheet.records)
        written = map(table.written, set(table.labels))
        self.labels = sorted({*written, *(each for each in suggested if each is not None)})
        self.items = self._ordered()
        self._neighbours = self._nearest()

    @property
    def can_delete(self) -> bool:
        """Whether a row can be deleted: not where a label is named like the decision to do so."""
        return DELETE not in self._known.values()

    @property
    def multi_label(self) -> bool:
        """Whether a row has several labels, so that any set of them may be decided."""
        return self._table.multi_label

    def decisions(self) -> dict[int, dict[str, Any] | None]:
        """Return the decision on each row by its number, None if there is none."""
        with self._lock:
            self._refresh()
            return {item.row: self._spoken(item.row) for item in self.items}

    def decide(self, row: int, label: str | None, *, delete: bool = False) -> None:
        """Save a decision; without a label and a deletion, take one back.

        Raises:
            DataError: If the row is not listed, the label is none, or others broke the file.
            ResourceError: If it cannot be saved; then the decision is as before.
        """
        if delete and not self.can_delete:
            raise DataError(f"a label is named {DELETE}; no row can be deleted")
        if label is not None:
            label = self._checked(label)
        with self._lock:
            self._refresh()
            if row not in self._record:
                raise DataError(f"row {row} is no longer in {self._path}; start the review again")
            record = self._record[row]
            before = record["decision"]
            record["decision"] = DELETE if delete else escape_formula(label or "")
            try:
                files.write_csv(self._path, self._sheet.columns, self._sheet.rows())
            except BaseException:
                record["decision"] = before
                raise
            self._stamp = self._stat()

    def details(self, row: int) -> dict[str, Any]:
        """Return a row's text, why it is suspected, and the nearest texts with their labels now."""
        with self._lock:
            self._refresh()
            if row not in self._neighbours:
                raise DataError(f"row {row} is no longer in {self._path}; start the review again")
            record = self._record.get(row, {})
            return {
                "text": self._table.texts[self._place[row - 1]],
                **{name: _number(record.get(name)) for name in ("p_wrong", "p_label")},
                "p_suggested": _number(record.get("p_suggested")),
                "neighbours": [
                    {
                        "row": self._table.places[place] + 1,
                        "text": self._table.texts[place],
                        "label": self._label_now(place),
                        "is_near": cosine >= duplicates.NEAR,
                    }
                    for place, cosine in self._neighbours[row]
                ],
            }

    def summary(self) -> Summary:
        """Return what is decided so far."""
        with self._lock:
            self._refresh()
            spoken = {item.row: self._spoken(item.row) for item in self.items}
            kinds = Counter(
                "open"
                if (decision := spoken[item.row]) is None
                else "deleted"
                if decision["delete"]
                else "kept"
                if decision["label"] == item.label
                else "relabelled"
                for item in self.items
            )
            doubtful = sum(
                item.band == suspect_list.BANDS[-1] and spoken[item.row] is None
                for item in self.items
            )
        return Summary(
            run=str(self._run),
            num_rows=len(self.items),
            num_kept=kinds["kept"],
            num_relabelled=kinds["relabelled"],
            num_deleted=kinds["deleted"],
            num_open=kinds["open"] - doubtful,
            num_probably_right=doubtful,
            again=command("review", self._run),
            next=command("retrain", self._run),
        )

    def _read(self) -> None:
        stamp = self._stat()
        sheet = read_sheet(self._path)
        read_decisions(self._path, sheet, self._table)  # refuses other rows, and what is no label
        self._sheet: Sheet = sheet
        self._record = {int(record["row"]): record for record in sheet.records}
        self._stamp = stamp  # at last, so that a broken file is read again

    def _refresh(self) -> None:
        """Read the file again if something else, such as a spreadsheet, has written it."""
        if self._stat() != self._stamp:
            self._read()

    def _stat(self) -> tuple[int, int]:
        try:
            found = os.stat(self._path)
        except OSError as error:
            raise DataError(
                f"{self._path} cannot be read ({error.strerror}); restore it"
            ) from error
        return found.st_mtime_ns, found.st_size

    def _spoken(self, row: int) -> dict[str, Any] | None:
        """Return the decision on a row as the page knows it."""
        decision = self._record[row]["decision"].strip() if row in self._record else ""
        if not decision:
            return None
        label = self._chosen(decision)
        return {"label": label, "delete": label is None}

    def _chosen(self, decision: str) -> str | None:
        """Return the label of a decision, several as the table writes them; None deletes the row.

        Raises:
            DataError: If it is none.
        """
        choice = read_choice(decision, self._table, self._known)
        return None if choice is None else self._table.written(choice)

    def _checked(self, label: str) -> str:
        """Return a label that a person has chosen; raises DataError if it is none."""
        try:
            chosen = self._chosen(escape_formula(label))
        except DataError as error:
            if self.multi_label:
                raise DataError(f"there is {error}") from None
            chosen = None
        if chosen is None:
            raise DataError(f"{label} is no label of this table; choose one of its labels")
        return chosen

    def _suggested(self, record: Mapping[str, str]) -> str | None:
        """Return what is suggested for a row; None if someone has made it no label."""
        cell = (record.get("suggested") or "").strip()
        try:
            return self._chosen(cell) if cell else None
        except DataError:
            return None

    def _label_now(self, place: int) -> str | None:
        """Return the label of a row as decided, None if it was deleted."""
        decision = self._spoken(self._table.places[place] + 1)
        label: str | None = self._table.written(self._table.labels[place])
        return label if decision is None else decision["label"]

    def _ordered(self) -> tuple[Item, ...]:
        """Return the rows by band, then in batches of the same two labels, the largest first."""
        found = []
        for record in self._sheet.records:
            row = int(record["row"])
            band = suspect_list.band_of(_number(record.get("p_wrong")) or 0.0)
            label = self._table.written(self._table.labels[self._place[row - 1]])
            found.append((band, row, label, self._suggested(record)))
        pairs = Counter((band, frozenset((label, to))) for band, _, label, to in found)
        number: dict[frozenset[str | None], int] = {}
        ordered = sorted(  # stable: the most suspicious first within a batch
            found,
            key=lambda each: (
                suspect_list.BANDS.index(each[0]),
                -pairs[each[0], frozenset(each[2:])],
                sorted(map(str, each[2:])),
            ),
        )
        return tuple(
            Item(
                row=row,
                label=label,
                suggested=suggested,
                band=band,
                pair=number.setdefault(frozenset((label, suggested)), len(number)),
                excerpt=_excerpt(self._table.texts[self._place[row - 1]]),
            )
            for band, row, label, suggested in ordered
        )

    def _nearest(self) -> dict[int, list[tuple[int, float]]]:
        places = [self._place[item.row - 1] for item in self.items]
        found = duplicates.nearest_to(self._table.texts, places, NUM_NEIGHBOURS)
        return {item.row: near for item, near in zip(self.items, found, strict=True)}


def _excerpt(text: str) -> str:
    return text if len(text) <= EXCERPT_CHARS else text[:EXCERPT_CHARS].rstrip() + " …"


def _number(cell: str | None) -> float | None:
    """Return a cell's number, which a spreadsheet may have given a decimal comma."""
    try:
        return float((cell or "").replace(",", "."))
    except ValueError:
        return None

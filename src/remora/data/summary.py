"""Counts of a dataset, as a run prints them and keeps them."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from remora.data.table import Table
from remora.formatting import listed, quote

IMBALANCED_SHARE = 0.8
"""Share of the rows in the largest class from which on accuracy alone says little."""


@dataclass(frozen=True, kw_only=True)
class DataSummary:
    """Counts of a dataset, as a run prints them and keeps them in `data.json`.

    Classes, duplicates and conflicts are counted among the training rows, after the split.
    `sha256` is over split, text and label of every row in order, whatever the file format.
    """

    source: str
    text_column: str  # several are separated by commas
    label_column: str
    num_train: int
    num_validation: int
    num_test: int | None
    num_labels: int
    labels: tuple[str, ...]
    smallest_label: str
    smallest_label_rows: int
    largest_label: str
    largest_label_rows: int
    num_duplicates: int  # rows that repeat an earlier text and label
    num_conflicting: int  # rows whose text also occurs with another label
    num_train_validation_shared: int  # validation rows whose text is also in training
    num_train_test_shared: int
    longest_text_chars: int
    sha256: str
    text_columns: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()  # what else was found while reading
    rows_per_label: Mapping[str, int] = field(default_factory=dict)  # training rows
    multi_label: bool = False  # whether a row may have several labels, or none

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON knows them."""
        lists = {name: list(getattr(self, name)) for name in ("labels", "text_columns", "remarks")}
        values = asdict(self) | lists
        if not self.multi_label:
            del values["multi_label"]
        return values

    def lines(self) -> list[str]:
        """Return the counts worth reading, one sentence a line."""
        test = "no" if self.num_test is None else f"{self.num_test:,}"
        lines = [
            f"{self.num_train:,} training, {self.num_validation:,} validation and {test} test rows"
            f" from {self.source} (text: {listed(self.text_columns or [self.text_column])},"
            f" label: {quote(self.label_column)})",
            f"{self.num_labels:,} labels, from {spoken_rows(self.smallest_label_rows)}"
            f" ({quote(self.smallest_label)}) to {spoken_rows(self.largest_label_rows)}"
            f" ({quote(self.largest_label)})",
        ]
        remarks = (
            (self.num_duplicates, "in training repeat an earlier text and label"),
            (self.num_conflicting, "in training have a text that also occurs with another label"),
            (
                self.num_train_validation_shared,
                "in validation have a text that is also in training",
            ),
            (
                self.num_train_test_shared,
                "in test have a text that is also in training: test accuracy may be optimistic",
            ),
        )
        lines += [f"{spoken_rows(count)} {remark}" for count, remark in remarks if count]
        share = self.largest_label_rows / self.num_train
        if share >= IMBALANCED_SHARE and not self.multi_label:
            lines.append(
                f"imbalanced: always answering {quote(self.largest_label)} would be right for"
                f" {share:.1%} of the training rows; look at macro-F1, and try --class-weights"
                " balanced or --metric macro_f1"
            )
        return [*lines, *self.remarks]


def summarize(
    source: str,
    columns: list[str],
    tables: dict[str, Table],
    labels: tuple[str, ...],
    remarks: tuple[str, ...],
) -> DataSummary:
    """Count the rows of tables by their splits.

    Args:
        source: Where they are from.
        columns: Of the texts, and the last one of the labels.
        tables: By their splits, one of them `train`.
        labels: All labels, sorted.
        remarks: What else was found while reading.
    """
    # Duplicates and conflicts
    train = tables["train"]
    first: dict[str, str] = {}  # text -> its first label
    others: dict[str, set[str]] = {}  # text -> its other labels
    num_duplicates = 0
    for text, label in zip(train.texts, train.labels, strict=True):
        num_known = len(first)
        if first.setdefault(text, label) == label:
            num_duplicates += len(first) == num_known
        elif label in others.setdefault(text, set()):
            num_duplicates += 1
        else:
            others[text].add(label)

    def num_shared(split: str) -> int:
        """Return how many rows of another split have a text of the training rows."""
        return sum(text in first for text in tables[split].texts) if split in tables else 0

    # The hash of all rows
    digest = hashlib.sha256()
    for split in sorted(tables):
        digest.update(f"{split}:{len(tables[split])}\n".encode())
        for text, label in zip(tables[split].texts, tables[split].labels, strict=True):
            digest.update(f"{len(text)}:{text}{len(label)}:{label}".encode())

    found = Counter(dict.fromkeys(labels, 0))  # corrections may leave a label no training row
    found.update(train.each_label)
    counts = sorted(found.items(), key=lambda item: (item[1], item[0]))
    return DataSummary(
        source=source,
        text_column=", ".join(columns[:-1]),
        label_column=columns[-1],
        num_train=len(train),
        num_validation=len(tables["validation"]),
        num_test=len(tables["test"]) if "test" in tables else None,
        num_labels=len(labels),
        labels=labels,
        smallest_label=counts[0][0],
        smallest_label_rows=counts[0][1],
        largest_label=counts[-1][0],
        largest_label_rows=counts[-1][1],
        num_duplicates=num_duplicates,
        num_conflicting=sum(text in others for text in train.texts),
        num_train_validation_shared=num_shared("validation"),
        num_train_test_shared=num_shared("test"),
        longest_text_chars=max(len(text) for table in tables.values() for text in table.texts),
        sha256=digest.hexdigest(),
        text_columns=tuple(columns[:-1]),
        remarks=remarks,
        rows_per_label=dict(counts),
        multi_label=train.multi_label,
    )


def spoken_rows(count: int) -> str:
    """Return a number of rows in words."""
    return f"{count:,} row{'' if count == 1 else 's'}"

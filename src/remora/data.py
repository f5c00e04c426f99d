"""The splits of a source: which rows are trained on, which are held out, and what to know of them.

A source is a table, a folder of tables, a sample of this package or a dataset of the Hugging Face
Hub. Reading and checking the rows is `remora.table`'s, whose names are also here.
"""

import csv
import hashlib
import importlib.resources
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from remora.config import TrainConfig
from remora.errors import ConfigError, DataError
from remora.table import (
    FORMATS,
    Part,
    Pick,
    Row,
    Table,
    file_part,
    hub_splits,
    listed,
    quote,
    read_parts,
    read_table,
    stream_texts,
)

__all__ = [
    "DataSummary",
    "Dataset",
    "Table",
    "from_lists",
    "load",
    "load_dataset",
    "read_table",
    "stream_texts",
]

MAX_VALIDATION_ROWS = 2_000
MAX_TEST_ROWS = 10_000

_SPLITS = {
    **{"train": "train", "training": "train", "test": "test"},
    **{"validation": "validation", "val": "validation", "valid": "validation", "dev": "validation"},
}
_SHARD = re.compile(r"(?P<split>[a-z]+)(-\d+-of-(?P<num_shards>\d+))?")


@dataclass(frozen=True, kw_only=True)
class DataSummary:
    """What a run says about its data, and keeps in `data.json`.

    The counts of classes, duplicates and conflicts are of the training rows, after the split.
    `sha256` is over split, text and label of every row in order, whatever the file format.
    """

    source: str
    text_column: str
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
    num_duplicates: int  # rows that repeat an earlier text with its label
    num_conflicting: int  # rows whose text occurs with another label too
    num_train_validation_shared: int  # validation rows whose text is also a training text
    num_train_test_shared: int
    longest_text_chars: int
    sha256: str

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON knows them."""
        return asdict(self) | {"labels": list(self.labels)}

    def lines(self) -> list[str]:
        """Return what is worth telling a person, a sentence a line."""
        test = "no" if self.num_test is None else f"{self.num_test:,}"
        lines = [
            f"{self.num_train:,} training, {self.num_validation:,} validation and {test} test rows"
            f" from {self.source} (text: {quote(self.text_column)},"
            f" label: {quote(self.label_column)})",
            f"{self.num_labels:,} labels, from {_rows(self.smallest_label_rows)}"
            f" ({quote(self.smallest_label)}) to {_rows(self.largest_label_rows)}"
            f" ({quote(self.largest_label)})",
        ]
        remarks = (
            (self.num_duplicates, "in training repeat an earlier text and label"),
            (self.num_conflicting, "in training have a text that also occurs with another label"),
            (self.num_train_validation_shared, "in validation have a text that is in training too"),
            (
                self.num_train_test_shared,
                "in test have a text that is in training too: the test score may flatter",
            ),
        )
        return lines + [f"{_rows(count)} {remark}" for count, remark in remarks if count]


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """The splits of a source, its labels in sorted order, and what there is to say about it."""

    train: Table
    validation: Table  # empty when there is no file and `validation_fraction` is 0
    test: Table | None
    labels: tuple[str, ...]
    summary: DataSummary


def load(settings: TrainConfig) -> Dataset:
    """Return the dataset that a run's settings name; raises as `load_dataset` does."""
    dataset = load_dataset(
        settings.data,
        test=settings.test,
        validation=settings.validation,
        text_column=settings.text_column,
        label_column=settings.label_column,
        validation_fraction=settings.validation_fraction,
        test_fraction=settings.test_fraction,
        seed=settings.seed,
    )
    return limit(dataset, settings.num_per_class, settings.seed)


def limit(dataset: Dataset, per_class: int | None, seed: int) -> Dataset:
    """Return the dataset with so many training rows of each class, or all that it has.

    The rows are drawn by `seed`; those of a smaller number are among those of a larger one.
    """
    import numpy as np

    if per_class is None:
        return dataset
    rows, seen, kept = dataset.train, Counter[str](), []
    for row in np.random.default_rng(seed).permutation(len(rows)).tolist():
        seen[rows.labels[row]] += 1
        if seen[rows.labels[row]] <= per_class:
            kept.append(row)
    train = Table(*([column[i] for i in sorted(kept)] for column in (rows.texts, rows.labels)))
    tables = {"train": train, "validation": dataset.validation}
    if dataset.test is not None:
        tables["test"] = dataset.test
    old = dataset.summary
    found = _summarize(old.source, [old.text_column, old.label_column], tables, dataset.labels)
    return replace(dataset, train=train, summary=found)


def load_dataset(
    source: str,
    *,
    test: str | None = None,
    validation: str | None = None,
    text_column: str | None = None,
    label_column: str | None = None,
    validation_fraction: float = 0.1,
    test_fraction: float = 0.1,
    seed: int = 0,
) -> Dataset:
    """Read a source, check every row, and split off what it does not bring.

    Args:
        source: A table, a folder with a `train` file (and `validation`, `test`), `sample:support`,
            or `hf:owner/name[:config]`, the only form that may touch the network.
        test: A table of test rows, instead of the source's own.
        validation: A table of validation rows, instead of the source's own.
        text_column: The column of the messages; by default found by its usual names.
        label_column: The column of the labels; by default found by its usual names.
        validation_fraction: The share of the source's training rows to hold out, stratified by
            label, where there is no validation table. At most 2,000 rows.
        test_fraction: The same for the test table. At most 10,000 rows.
        seed: Decides which rows are held out.

    Raises:
        ConfigError: A fraction is outside [0, 1), or the two leave nothing to train on.
        DataError: A table is missing, broken, or cannot be learned from.

    """
    _check_fractions(validation_fraction, test_fraction)
    parts = _source_parts(source)
    for split, path in (("validation", validation), ("test", test)):
        if path is not None:
            parts[split] = [file_part(Path(path))]
    train, columns = read_parts(parts["train"], text_column, label_column)
    labels = _labels(source, train)
    given: dict[str, Table] = {
        split: read_parts(parts[split], text_column, label_column, known=labels)[0]
        for split in ("validation", "test")
        if split in parts
    }
    return _assemble(
        source,
        columns,
        train,
        given,
        validation_fraction=validation_fraction,
        test_fraction=test_fraction,
        seed=seed,
    )


def from_lists(
    texts: Sequence[str], labels: Sequence[str], *, validation_fraction: float, seed: int
) -> Dataset:
    """Check texts and labels that are in memory, and split off a validation set, but no test set.

    Args:
        texts: The messages, [N].
        labels: Their labels, [N], kept exactly as they are.
        validation_fraction: The share of the rows to hold out, stratified by label. At most 2,000.
        seed: Decides which rows are held out.

    Raises:
        ConfigError: The fraction is outside [0, 1).
        DataError: The lists differ in length, a value is blank or no string, or there is but one
            label.

    """
    _check_fractions(validation_fraction, 0)
    if len(texts) != len(labels):
        raise DataError(
            f"there are {len(texts):,} texts and {len(labels):,} labels; give one for each text"
        )
    table, columns = Table(list(texts), list(labels)), ["text", "label"]

    def rows(pick: Pick) -> Iterator[Row]:
        pick(columns)
        for row, pair in enumerate(zip(table.texts, table.labels, strict=True), 1):
            yield row, row, pair

    read_parts([("memory", rows)])
    return _assemble(
        "memory",
        columns,
        table,
        {},
        validation_fraction=validation_fraction,
        test_fraction=0,
        seed=seed,
    )


def batches(num_rows: int, batch_size: int, num_batches: int, seed: int) -> Iterator[list[int]]:
    """Yield the rows of each effective batch, each epoch in an order of its own from the seed."""
    import numpy as np

    done = 0
    for epoch in range(num_batches):
        order = np.random.default_rng((seed, epoch)).permutation(num_rows)
        for start in range(0, num_rows, batch_size):
            if done == num_batches:
                return
            yield order[start : start + batch_size].tolist()
            done += 1


def _check_fractions(validation_fraction: float, test_fraction: float) -> None:
    for split, value in (("validation", validation_fraction), ("test", test_fraction)):
        if not 0 <= value < 1:
            raise ConfigError(f"the {split} fraction is {value}; choose at least 0 and less than 1")
    if validation_fraction + test_fraction >= 1:
        raise ConfigError(
            f"the validation and test fractions sum to {validation_fraction + test_fraction:g};"
            " choose less than 1, so that rows are left to train on"
        )


def _labels(source: str, train: Table) -> tuple[str, ...]:
    labels = tuple(sorted(set(train.labels)))
    if len(labels) < 2:
        raise DataError(
            f"{source}: every training row has the label {quote(labels[0])};"
            " add rows of at least one other label"
        )
    return labels


def _assemble(
    source: str,
    columns: list[str],
    train: Table,
    given: dict[str, Table],
    *,
    validation_fraction: float,
    test_fraction: float,
    seed: int,
) -> Dataset:
    """Hold out the splits that are not given, and count."""
    labels = _labels(source, train)
    sizes = {
        split: min(max(1, round(fraction * len(train))), limit)
        for split, fraction, limit in (
            ("test", test_fraction, MAX_TEST_ROWS),
            ("validation", validation_fraction, MAX_VALIDATION_ROWS),
        )
        if split not in given and fraction > 0
    }
    train, held_out = _hold_out(train, sizes, seed)
    tables = {"train": train, "validation": Table([], []), **given, **held_out}
    return Dataset(
        train=train,
        validation=tables["validation"],
        test=tables.get("test"),
        labels=labels,
        summary=_summarize(source, columns, tables, labels),
    )


# Finding the tables of a source


def _source_parts(source: str) -> dict[str, list[Part]]:
    """Map each split that the source has to its parts; `train` is always there."""
    if source.startswith("hf:"):
        return _hub_parts(source)
    if source.startswith("sample:"):
        return _folder_parts(_sample_folder(source))
    path = Path(source)
    return _folder_parts(path) if path.is_dir() else {"train": [file_part(path)]}


def _sample_folder(source: str) -> Path:
    samples = Path(str(importlib.resources.files("remora") / "samples"))
    names = sorted(path.name for path in samples.iterdir() if path.is_dir())
    if (name := source.removeprefix("sample:")) not in names:
        raise DataError(f"there is no sample {quote(name)}; choose one of {listed(names)}")
    return samples / name


def planted_errors(source: str) -> dict[int, str]:
    """Return the right labels of a sample's training rows that are labelled wrong on purpose.

    Keys are row numbers from 1, without the header. Empty for any other source.
    """
    if not source.startswith("sample:"):
        return {}
    path = _sample_folder(source) / "planted_errors.csv"
    with path.open(encoding="utf-8", newline="") as file:
        return {int(row["row"]) + 1: row["true"] for row in csv.DictReader(file)}


def _hub_parts(source: str) -> dict[str, list[Part]]:
    found = hub_splits(source)
    parts: dict[str, list[Part]] = {}
    for split, part in found.items():
        if split in _SPLITS:
            parts.setdefault(_SPLITS[split], [part])
    if "train" not in parts:
        raise DataError(
            f"{source} has no train split (found {listed(list(found))});"
            " choose another dataset or configuration"
        )
    return parts


def _folder_parts(folder: Path) -> dict[str, list[Part]]:
    for place in (folder, folder / "data"):
        files: dict[str, list[Path]] = {}
        for path in sorted(place.glob("*")):
            match = _SHARD.fullmatch(path.stem.lower())
            split = _SPLITS.get(match["split"]) if match else None
            if split and FORMATS.get(path.suffix.lower(), "text") != "text":
                files.setdefault(split, []).append(path)
        if "train" in files:
            for paths in files.values():
                _check_shards(paths)
            return {split: [file_part(path) for path in paths] for split, paths in files.items()}
    found = listed(sorted(path.name for path in folder.iterdir())) or "nothing"
    raise DataError(
        f"the folder {folder} has no train file (found {found});"
        " expected train.csv, .tsv, .jsonl or .parquet, or name a file"
    )


def _check_shards(paths: list[Path]) -> None:
    """Refuse two files for one split, unless they are all the shards of one table."""
    matches = [match for match in (_SHARD.fullmatch(path.stem.lower()) for path in paths) if match]
    split, num_shards = matches[0]["split"], matches[0]["num_shards"]
    if any((match["split"], match["num_shards"]) != (split, num_shards) for match in matches) or (
        num_shards is None and len(paths) > 1
    ):
        raise DataError(
            f"{paths[0]} and {paths[-1].name} are both {_SPLITS[split]} tables;"
            " keep one, or name the file to use"
        )
    if num_shards is not None and not len({match[0] for match in matches}) == len(paths) == int(
        num_shards
    ):
        raise DataError(
            f"{paths[0]} is one of {int(num_shards)} shards, and {len(paths)} are there;"
            " put all of them in the folder, once each"
        )


# Splitting and counting


def _hold_out(table: Table, sizes: dict[str, int], seed: int) -> tuple[Table, dict[str, Table]]:
    """Split rows off, each class by its share; every class keeps a training row.

    scikit-learn's stratified splits refuse a class of one row and more classes than rows to hold
    out, so the rows are dealt here: whole shares first, then the largest remainders.

    Args:
        table: The rows to split.
        sizes: The number of rows to hold out for each split; fewer where classes run out.
        seed: Decides which rows go, and which of equal remainders count first.

    Returns:
        What is left, and the splits; all of them in the order of `table`.

    """
    import numpy as np

    rng = np.random.default_rng(seed)
    place = {label: i for i, label in enumerate(sorted(set(table.labels)))}
    codes = np.fromiter((place[label] for label in table.labels), np.int64, len(table))  # [N]
    counts = np.bincount(codes)  # [L] rows of each class
    order = rng.permutation(len(table))
    order = order[np.argsort(codes[order], kind="stable")]  # [N] by class, at random within each
    begin = np.cumsum(counts) - counts  # [L] where the next free row of each class is
    free = counts - 1
    owner = np.zeros(len(table), np.int8)  # [N] 0 is training
    for number, size in enumerate(sizes.values(), 1):
        share = size * counts / len(table)
        take = np.minimum(share.astype(np.int64), free)
        by_remainder = np.lexsort((rng.random(len(counts)), take - share))
        while (missing := min(size, free.sum()) - take.sum()) > 0:
            take[[i for i in by_remainder if take[i] < free[i]][:missing]] += 1
        for first, num_rows in zip(begin, take, strict=True):
            owner[order[first : first + num_rows]] = number
        begin, free = begin + take, free - take

    def rows(number: int) -> Table:
        places = np.flatnonzero(owner == number).tolist()
        return Table([table.texts[i] for i in places], [table.labels[i] for i in places])

    return rows(0), {split: rows(number) for number, split in enumerate(sizes, 1)}


def _summarize(
    source: str, columns: list[str], tables: dict[str, Table], labels: tuple[str, ...]
) -> DataSummary:
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
        return sum(text in first for text in tables[split].texts) if split in tables else 0

    digest = hashlib.sha256()
    for split in sorted(tables):
        digest.update(f"{split}:{len(tables[split])}\n".encode())
        for text, label in zip(tables[split].texts, tables[split].labels, strict=True):
            digest.update(f"{len(text)}:{text}{len(label)}:{label}".encode())

    counts = sorted(Counter(train.labels).items(), key=lambda item: (item[1], item[0]))
    return DataSummary(
        source=source,
        text_column=columns[0],
        label_column=columns[1],
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
    )


def _rows(count: int) -> str:
    return f"{count:,} row{'' if count == 1 else 's'}"

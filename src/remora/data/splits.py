"""Held-out rows, and the rows of each effective batch."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING

from remora.data.table import Table
from remora.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MAX_VALIDATION_ROWS = 2_000
MAX_TEST_ROWS = 10_000


def batches(num_rows: int, batch_size: int, num_batches: int, seed: int) -> Iterator[list[int]]:
    """Yield the rows of each effective batch; each epoch has its own order from the seed."""
    import numpy as np

    done = 0
    for epoch in range(num_batches):
        order = np.random.default_rng((seed, epoch)).permutation(num_rows)
        for start in range(0, num_rows, batch_size):
            if done == num_batches:
                return
            yield order[start : start + batch_size].tolist()
            done += 1


def check_fractions(validation_fraction: float, test_fraction: float) -> None:
    """Refuse fractions outside [0, 1), or that leave no training rows; raises ConfigError."""
    for split, value in (("validation", validation_fraction), ("test", test_fraction)):
        if not 0 <= value < 1:
            raise ConfigError(f"the {split} fraction is {value}; give a number from 0 to below 1")
    if validation_fraction + test_fraction >= 1:
        raise ConfigError(
            f"the validation and test fractions sum to {validation_fraction + test_fraction:g};"
            " give less than 1 in total, so that rows are left to train on"
        )


def hold_out(
    table: Table, sizes: dict[str, int], seed: int, seen: Collection[str] = ()
) -> tuple[Table, dict[str, Table]]:
    """Hold rows out, stratified by class; every class keeps a training row.

    Where rows have several labels, the class is the rarest of them.

    scikit-learn's stratified splits refuse classes of one row, and more classes than rows to hold
    out. So rows are allotted here by the largest remainder method.

    Args:
        table: The rows to split.
        sizes: The number of rows to hold out for each split; fewer where classes run out.
        seed: Selects the rows, and breaks ties between equal remainders.
        seen: Texts of rows that are never held out, since a model has learned them.

    Returns:
        The remaining rows, and the splits; all of them in the order of `table`.
    """
    import numpy as np

    rng = np.random.default_rng(seed)
    order, counts = _by_class(table, rng)
    begin = np.cumsum(counts) - counts  # [L] the next free row of each class
    free = counts - 1
    if seen:  # behind the others of their class
        is_seen = np.fromiter((table.texts[i] in seen for i in order), bool, len(table))  # [N]
        classes = np.repeat(np.arange(len(counts)), counts)
        order = order[np.lexsort((is_seen, classes))]
        free = np.minimum(free, np.bincount(classes, ~is_seen, len(counts)).astype(np.int64))
    owner = np.zeros(len(table), np.int8)  # [N] 0 is training
    for number, size in enumerate(sizes.values(), 1):
        take = _allot(size, counts, free, rng)
        for first, num_rows in zip(begin, take, strict=True):
            owner[order[first : first + num_rows]] = number
        begin, free = begin + take, free - take

    def rows(number: int) -> Table:
        return table.take(np.flatnonzero(owner == number).tolist())

    return rows(0), {split: rows(number) for number, split in enumerate(sizes, 1)}


def sample(table: Table, size: int, seed: int) -> Table:
    """Return some rows of a table in their order, stratified by class; all if it has no more."""
    import numpy as np

    if size >= len(table):
        return table
    rng = np.random.default_rng(seed)
    order, counts = _by_class(table, rng)
    take = _allot(size, counts, counts, rng)
    begin = np.cumsum(counts) - counts
    parts = [order[first : first + n] for first, n in zip(begin, take, strict=True)]
    return table.take(np.sort(np.concatenate(parts)).tolist())


def _by_class(
    table: Table, rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return rows by class, shuffled within each, [N], and the rows of each class, [L]."""
    import numpy as np

    strata = table.strata
    place = {label: i for i, label in enumerate(sorted(set(strata)))}
    codes = np.fromiter((place[label] for label in strata), np.int64, len(table))  # [N]
    order = rng.permutation(len(table))
    return order[np.argsort(codes[order], kind="stable")], np.bincount(codes)


def _allot(
    size: int, counts: NDArray[np.int64], free: NDArray[np.int64], rng: np.random.Generator
) -> NDArray[np.int64]:
    """Return how many rows each class gives, [L]: whole shares, then the largest remainders."""
    import numpy as np

    share = size * counts / counts.sum()
    take: NDArray[np.int64] = np.minimum(share.astype(np.int64), free)
    by_remainder = np.lexsort((rng.random(len(counts)), take - share))
    while (missing := min(size, free.sum()) - take.sum()) > 0:
        take[[i for i in by_remainder if take[i] < free[i]][:missing]] += 1
    return take


def sample_rows(labels: Sequence[str], max_rows: int, seed: int) -> list[int]:
    """Return at most `max_rows` places of rows; each label keeps its share to within one row."""
    import numpy as np

    if len(labels) <= max_rows:
        return list(range(len(labels)))
    shuffled = np.random.default_rng(seed).permutation(len(labels)).tolist()
    by_label = sorted(shuffled, key=lambda row: labels[row])
    return sorted(by_label[i * len(labels) // max_rows] for i in range(max_rows))


def deal_folds(
    true: NDArray[np.int64], num_folds: int, seed: int
) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Return stratified folds as pairs of other and own rows."""
    import numpy as np

    shuffled = np.random.default_rng(seed).permutation(len(true))
    by_label = shuffled[np.argsort(true[shuffled], kind="stable")]
    fold = np.empty(len(true), dtype=np.int64)
    fold[by_label] = np.arange(len(true)) % num_folds
    return [(np.flatnonzero(fold != k), np.flatnonzero(fold == k)) for k in range(num_folds)]

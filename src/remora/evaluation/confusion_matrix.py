"""The confusion matrix of a report: which labels, in what order, how shaded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from remora.evaluation.rendering import isolated
from remora.evaluation.results import Results

MAX_MATRIX_LABELS = 150

NUM_SHADES = 9


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A cell of the confusion matrix that is not empty."""

    count: int
    shade: str  # its class in the style sheet: d for right, e for wrong, then 1 to 9
    text: str


def confusion_counts(found: Results) -> NDArray[np.int64]:
    """Return the rows of each label and prediction, [true, predicted]."""
    place = {label: index for index, label in enumerate(found.labels)}
    counts = np.zeros((len(place), len(place)), dtype=np.int64)
    for (true, predicted), count in Counter(zip(found.true, found.predicted, strict=True)).items():
        counts[place[true], place[predicted]] = count
    return counts


def matrix_labels(counts: NDArray[np.int64]) -> list[int]:
    """Choose the labels of the matrix, those with most mistakes, and put like beside like.

    Labels that are taken for each other become neighbours (average linkage, the leaves ordered so
    that neighbours are as close as can be); those without mistakes come last.
    """
    from scipy.cluster.hierarchy import leaves_list, linkage
    from scipy.spatial.distance import squareform

    both = counts + counts.T
    np.fill_diagonal(both, 0)
    mistakes = both.sum(1)
    chosen = np.argsort(-mistakes, kind="stable")[:MAX_MATRIX_LABELS]
    confused = np.sort(chosen[mistakes[chosen] > 0])
    rest = np.sort(chosen[mistakes[chosen] == 0])
    if len(confused) > 2:
        distance = 1 / (1 + both[np.ix_(confused, confused)])
        np.fill_diagonal(distance, 0)
        tree = linkage(squareform(distance), "average", optimal_ordering=True)
        confused = confused[leaves_list(tree)]
    return [*confused.tolist(), *rest.tolist()]


def cells(
    counts: NDArray[np.int64], labels: Sequence[str], shown: Sequence[int]
) -> dict[tuple[int, int], Cell]:
    """Return the cells that are not empty, by their places (true, predicted)."""
    cells = {}
    num_rows = counts.sum(1)
    for i in shown:
        for j in shown:
            if not (count := int(counts[i, j])):
                continue
            share = count / num_rows[i]
            true, predicted = isolated(labels[i]), isolated(labels[j])
            text = f"{count:,} of {true} taken for {predicted} ({share:.0%})"
            shade = f"e{int(np.ceil(NUM_SHADES * np.sqrt(share)))}"  # a few rows shall be seen
            if i == j:
                text = f"{count:,} of {true} right ({share:.0%})"
                shade = f"d{int(np.ceil(NUM_SHADES * share))}"
            cells[i, j] = Cell(count=count, shade=shade, text=text)
    return cells

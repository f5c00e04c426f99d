"""The confusion matrix of a report: its labels, their order, and the shades of its cells."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from remora.evaluation.results import Results
from remora.report.rendering import isolated

MAX_MATRIX_LABELS = 150
NUM_SHADES = 9


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A non-empty cell of the confusion matrix."""

    count: int
    shade: str  # CSS class: d for correct or e for wrong, then 1 to 9
    text: str


def confusion_counts(run: Results) -> NDArray[np.int64]:
    """Return the number of rows for each label and prediction, [true, predicted]."""
    place = {label: index for index, label in enumerate(run.labels)}
    counts = np.zeros((len(place), len(place)), dtype=np.int64)
    for (true, predicted), count in Counter(zip(run.true, run.predicted, strict=True)).items():
        counts[place[true], place[predicted]] = count
    return counts


def matrix_labels(counts: NDArray[np.int64]) -> list[int]:
    """Return the labels with most mistakes, confused labels next to each other.

    The order is that of the leaves of a hierarchical clustering (average linkage, optimal leaf
    ordering); labels without mistakes come last.
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
    """Return the non-empty cells by their indices (true, predicted)."""
    cells = {}
    num_rows = counts.sum(1)
    for i in shown:
        for j in shown:
            if not (count := int(counts[i, j])):
                continue
            share = count / num_rows[i]
            true, predicted = isolated(labels[i]), isolated(labels[j])
            text = f"{count:,} of {true} predicted as {predicted} ({share:.0%})"
            shade = f"e{int(np.ceil(NUM_SHADES * np.sqrt(share)))}"  # so that few rows are visible
            if i == j:
                text = f"{count:,} of {true} correct ({share:.0%})"
                shade = f"d{int(np.ceil(NUM_SHADES * share))}"
            cells[i, j] = Cell(count=count, shade=shade, text=text)
    return cells

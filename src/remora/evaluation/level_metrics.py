"""Accuracy and macro-F1 at each level of labels that form a hierarchy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from remora.data.levels import Hierarchy
from remora.evaluation.metrics import LevelMetrics, Metrics

NUM_RESAMPLES = 1_000
"""Resamples of the rows for the interval of macro-F1."""


def with_levels(
    metrics: Metrics, hierarchy: Hierarchy | None, true: Sequence[str], predicted: Sequence[str]
) -> Metrics:
    """Return metrics with those of each level.

    The prediction at a level is the node above the predicted label, so that the levels of one row
    never contradict each other.

    Args:
        metrics: Those of the labels.
        hierarchy: The hierarchy of the labels; None to return the metrics as they are.
        true: The label of each row.
        predicted: The predicted label of each row.
    """
    if hierarchy is None:
        return metrics
    place = {label: index for index, label in enumerate(hierarchy.labels)}
    rows = np.array([[place[a], place[b]] for a, b in zip(true, predicted, strict=True)])  # [N, 2]
    levels = range(1, hierarchy.depth + 1)
    return replace(metrics, levels=tuple(_measure(hierarchy, level, rows) for level in levels))


def _measure(hierarchy: Hierarchy, level: int, rows: NDArray[np.int64]) -> LevelMetrics:
    """Measure one level; `rows` has the places of the true and the predicted label, [N, 2]."""
    from scipy.stats import binomtest

    nodes = hierarchy.places(level)[rows]  # [N, 2]
    num_correct = int((nodes[:, 0] == nodes[:, 1]).sum())
    interval = binomtest(num_correct, len(nodes)).proportion_ci(method="wilson")
    cells, counts = np.unique(nodes, axis=0, return_counts=True)  # [C, 2], [C]
    resampled = np.random.default_rng(0).multinomial(
        len(nodes), counts / len(nodes), size=NUM_RESAMPLES
    )
    low, high = np.quantile(_macro_f1(cells, resampled), (0.025, 0.975))
    return LevelMetrics(
        level=level,
        num_nodes=len(hierarchy.names(level)),
        num_correct=num_correct,
        accuracy=num_correct / len(nodes),
        accuracy_interval=(float(interval.low), float(interval.high)),
        macro_f1=float(_macro_f1(cells, counts[None])[0]),
        macro_f1_interval=(float(low), float(high)),
    )


def _macro_f1(cells: NDArray[np.int64], counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the macro-F1 over the classes that occur, [samples].

    Args:
        cells: Pairs of true and predicted class that occur, [C, 2].
        counts: Rows of each pair, [samples, C].
    """
    size = int(cells.max()) + 1
    totals = np.zeros((len(counts), size))  # of true and of predicted rows together
    right = np.zeros((len(counts), size))
    for (true, predicted), column in zip(cells, counts.T, strict=True):
        totals[:, true] += column
        totals[:, predicted] += column
        if true == predicted:
            right[:, true] += column
    f1 = np.divide(2 * right, totals, out=np.zeros_like(totals), where=totals > 0)
    result: NDArray[np.float64] = f1.sum(1) / (totals > 0).sum(1)
    return result

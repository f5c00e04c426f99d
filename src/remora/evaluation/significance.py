"""Significance of differences between classifiers measured on the same rows."""

from __future__ import annotations

import math
from collections.abc import Sequence


def mcnemar(true: Sequence[str], first: Sequence[str], second: Sequence[str]) -> float:
    """Return the two-sided p-value of the exact McNemar test for two sets of predictions.

    The null hypothesis is that both err equally often; only rows that exactly one of them gets
    right count (McNemar 1947, https://doi.org/10.1007/BF02295996).
    """
    from scipy.stats import binomtest

    only_first = sum(a == t != b for t, a, b in zip(true, first, second, strict=True))
    only_second = sum(b == t != a for t, a, b in zip(true, first, second, strict=True))
    if only_first + only_second == 0:
        return 1.0
    return float(binomtest(only_first, only_first + only_second).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted for multiple comparisons (Holm 1979)."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, p_values[i] * (len(p_values) - rank)))
        adjusted[i] = largest
    return adjusted


def difference_interval(only_first: int, only_second: int, num_rows: int) -> tuple[float, float]:
    """Return the 95% confidence interval of the difference of two accuracies on the same rows.

    Wald's interval with half a row added to each cell: Agresti and Min 2005,
    https://doi.org/10.1002/sim.1781.
    """
    b, c, n = only_first + 0.5, only_second + 0.5, num_rows + 2
    center = (b - c) / n
    half = 1.959964 * math.sqrt(b + c - (b - c) ** 2 / n) / n
    return center - half, center + half

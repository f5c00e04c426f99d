"""Tests and intervals of differences, against closed forms."""

from __future__ import annotations

import pytest

from remora.evaluation.significance import difference_interval, holm, mcnemar


def test_mcnemar_exact() -> None:
    """Nine rows against one: 2 * (1 + 10) / 2**10."""
    true = ["x"] * 20
    first = ["x"] * 9 + ["y"] * 1 + ["x"] * 10
    second = ["y"] * 9 + ["x"] * 1 + ["x"] * 10
    assert mcnemar(true, first, second) == pytest.approx(22 / 1024)
    assert mcnemar(true, first, first) == 1.0


def test_holm_by_hand() -> None:
    """Three p-values: 3 times the least, twice the second, and never below the one before."""
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_the_interval_of_a_difference() -> None:
    """Closed form of Agresti and Min's section 2: (10.5 - 2.5) / 102, give or take 1.96 s.e."""
    low, high = difference_interval(10, 2, 100)
    assert (low + high) / 2 == pytest.approx(8 / 102)
    assert high - low == pytest.approx(2 * 1.959964 * (13 - 64 / 102) ** 0.5 / 102)
    low, high = difference_interval(0, 0, 50)
    assert low < 0 < high

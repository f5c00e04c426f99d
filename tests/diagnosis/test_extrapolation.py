"""A power law through a learning curve, against curves whose end is known."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from remora.diagnosis.extrapolation import extrapolate

ROWS = (100, 200, 400, 800, 1600)


def wrong(*rates: float, num_test: int = 4000) -> NDArray[np.bool_]:
    """Which test rows each size gets wrong, those of a larger size among those of a smaller."""
    return np.arange(num_test)[None] < np.round(np.array(rates) * num_test)[:, None]


def law(rows: float) -> float:
    """An error of 10 % at the end of all rows, and 15 % more at 1,600."""
    return 0.1 + 0.15 * (rows / 1600) ** -0.5


def test_a_power_law_is_found_and_followed() -> None:
    found, caution = extrapolate(ROWS, wrong(*map(law, ROWS)), 1e-9)
    assert found
    assert (found.floor, found.exponent) == pytest.approx((0.1, 0.5), abs=0.02)
    assert found.num_rows == 3200
    assert found.accuracy == pytest.approx(1 - law(3200), abs=0.002)
    low, high = found.accuracy_interval
    assert low < found.accuracy < high
    assert 0.02 < high - low < 0.05  # 4 standard deviations of a share of 4,000 rows are 0.026
    assert found.foretold == pytest.approx(1 - law(1600), abs=0.002)
    assert "three parameters from 5 sizes" in caution


@pytest.mark.parametrize(
    ("rates", "rise", "told"),
    [
        ((0.5, 0.4, 0.3), 1e-9, "3 sizes are too few"),
        ((0.3, 0.3, 0.3, 0.3), 1.0, "does not rise significantly"),
        ((0.3, 0.29, 0.295, 0.291), 0.3, "does not rise significantly"),
        ((0.6, 0.3, 0.5, 0.25), 1e-9, "the sizes do not lie on a power law"),
        ((0.6, 0.5, 0.45, 0.25), 1e-9, "it misses 400 rows by 6.8 points"),
        (
            (0.6, 0.45, 0.37, 0.34, 0.26),
            1e-9,
            "predict 67.9% for the last one and 74.0% was measured",
        ),
    ],
)
def test_what_the_sizes_do_not_support_is_not_said(
    rates: tuple[float, ...], rise: float, told: str
) -> None:
    found, why = extrapolate(ROWS[: len(rates)], wrong(*rates), rise)
    assert found is None
    assert told in why


def test_few_test_rows_foretell_nothing() -> None:
    found, why = extrapolate(ROWS, wrong(*map(law, ROWS), num_test=80), 1e-9)
    assert found is None
    assert "twice the rows might give anything from" in why

"""A power law fitted to a learning curve, and whether it may be extrapolated."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

MIN_SIZES = 4
"""A power law with a floor has three parameters; with three sizes it fits anything."""
MAX_MISS = 0.03
"""Largest distance in accuracy of a size from the fitted curve, beyond chance."""
MAX_BACKTEST_MISS = 0.05
MAX_INTERVAL = 0.1
NUM_RESAMPLED = 200
SIGNIFICANT = 0.05


@dataclass(frozen=True, kw_only=True)
class Extrapolation:
    """Error rate = floor + scale (rows / rows of the last size)^-exponent, and where it leads."""

    floor: float
    scale: float
    exponent: float
    num_rows: int  # twice those of the last size
    accuracy: float
    accuracy_interval: tuple[float, float]  # 95 %, test rows resampled
    foretold: float  # accuracy of the last size, predicted by a fit without it


def extrapolate(
    num_rows: Sequence[int], wrong: NDArray[np.bool_], rise: float
) -> tuple[Extrapolation | None, str]:
    """Fit a power law with a floor and follow it to twice the rows.

    The form is the usual one: Cortes et al. 1994; Viering and Loog 2022,
    https://arxiv.org/abs/2103.10948. The interval comes from resampling the test rows, the same
    for all sizes; that other rows might have been drawn for training is not in it.

    Args:
        num_rows: Training rows of each size, rising.
        wrong: Which test rows each size gets wrong, [sizes, test rows].
        rise: p-value of the exact McNemar test of the last size against the first.

    Returns:
        The extrapolation and its limits; or None and why the sizes do not support one.
    """
    rates, num_test = wrong.mean(1), wrong.shape[1]
    if len(num_rows) < MIN_SIZES:
        return None, (
            f"{len(num_rows)} sizes are too few to extrapolate: the curve has three parameters; "
            f"give {MIN_SIZES} sizes or more"
        )
    if rates[-1] >= rates[0] or rise >= SIGNIFICANT:
        return (
            None,
            f"accuracy does not rise significantly, so nothing is extrapolated (p = {rise:.2g})",
        )
    rows, deviations = np.array(num_rows) / num_rows[-1], _deviations(rates, num_test)
    law, earlier = _fit(rows, rates, deviations), _fit(rows[:-1], rates[:-1], deviations[:-1])
    if law is None or earlier is None:
        return None, "no power law fits these sizes"
    foretold = float(1 - _error(1.0, *earlier))
    interval = _resampled(rows, wrong)
    objection = _objection(num_rows, rates, deviations, _error(rows, *law), foretold, interval)
    if objection:
        return None, objection
    found = Extrapolation(
        floor=law[0],
        scale=law[1],
        exponent=law[2],
        num_rows=2 * num_rows[-1],
        accuracy=float(1 - _error(2.0, *law)),
        accuracy_interval=interval,
        foretold=foretold,
    )
    return found, (
        f"three parameters from {len(num_rows)} sizes, one draw of rows and one seed each: the "
        "interval covers the test rows only, and nothing is said beyond twice the rows; fitted "
        f"without the last size, the curve predicts {foretold:.1%} for it, and "
        f"{1 - rates[-1]:.1%} was measured"
    )


def _objection(
    num_rows: Sequence[int],
    rates: NDArray[np.float64],
    deviations: NDArray[np.float64],
    fitted: NDArray[np.float64],
    foretold: float,
    interval: tuple[float, float],
) -> str | None:
    """Say why a fit should not be extrapolated, or return None."""
    beyond_chance = np.abs(fitted - rates) - np.maximum(MAX_MISS, 2 * deviations)
    worst = int(np.argmax(beyond_chance))
    if beyond_chance[worst] > 0:
        return (
            f"the sizes do not lie on a power law: it misses {num_rows[worst]:,} rows by "
            f"{100 * abs(fitted[worst] - rates[worst]):.1f} points"
        )
    measured = float(1 - rates[-1])
    if abs(foretold - measured) > max(MAX_BACKTEST_MISS, 2 * float(deviations[-1])):
        return (
            f"the earlier sizes predict {foretold:.1%} for the last one and {measured:.1%} was "
            "measured, so nothing is extrapolated"
        )
    low, high = interval
    if high - low > MAX_INTERVAL:
        return (
            f"twice the rows might give anything from {low:.1%} to {high:.1%}, so nothing is "
            "extrapolated; add sizes or test rows"
        )
    return None


def _resampled(rows: NDArray[np.float64], wrong: NDArray[np.bool_]) -> tuple[float, float]:
    """Return the 95 % interval of the accuracy with twice the rows, over draws of test rows."""
    num_test = wrong.shape[1]
    shares = np.full(num_test, 1 / num_test)
    draws = np.random.default_rng(0).multinomial(num_test, shares, NUM_RESAMPLED)
    rates = draws @ wrong.T / num_test  # [draws, sizes]
    laws = [_fit(rows, each, _deviations(each, num_test)) for each in rates]
    ends = [1 - _error(2.0, *law) for law in laws if law is not None]
    if not ends:
        return 0.0, 1.0
    low, high = np.percentile(ends, [2.5, 97.5])
    return float(low), float(high)


def _deviations(rates: NDArray[np.float64], num_test: int) -> NDArray[np.float64]:
    """Return the standard deviations of error rates, none of them 0."""
    rates = (rates * num_test + 1) / (num_test + 2)
    result: NDArray[np.float64] = np.sqrt(rates * (1 - rates) / num_test)
    return result


def _error(rows: Any, floor: float, scale: float, exponent: float) -> Any:
    return floor + scale * rows**-exponent


def _fit(
    rows: NDArray[np.float64], rates: NDArray[np.float64], deviations: NDArray[np.float64]
) -> tuple[float, float, float] | None:
    """Fit a power law by weighted least squares; None if that fails."""
    from scipy.optimize import OptimizeWarning, curve_fit

    start = (0.5 * rates[-1], 0.5 * rates[-1] + 1e-3, 0.5)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", OptimizeWarning)  # of the covariance, unused here
            law, _ = curve_fit(
                _error, rows, rates, start, deviations, bounds=([0, 0, 0.01], [1, 1, 3])
            )
    except RuntimeError:
        return None
    return float(law[0]), float(law[1]), float(law[2])

"""What a learning curve says: label more rows, clean the labels, or use a bigger model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from remora.diagnosis.extrapolation import Extrapolation

SIGNIFICANT = 0.05
WORTH = 0.01
"""Accuracy that doubling the rows must add to be worth the labelling."""
ALIKE = 0.5
"""From this share of mistakes that the baseline makes too, the labels are suspected."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """Results with one number of rows per class."""

    per_class: int | None  # None: all
    num_rows: int
    num_short: int  # classes that have fewer rows
    run: str  # its directory, in that of the curve
    accuracy: float
    accuracy_interval: tuple[float, float]  # 95 %, Wilson (1927)
    macro_f1: float
    baseline_accuracy: float
    baseline_interval: tuple[float, float]
    p_value: float  # exact McNemar test against the baseline
    num_steps: int
    train_seconds: float

    @property
    def spoken(self) -> str:
        """The size in words."""
        return "all rows" if self.per_class is None else f"{self.per_class:,} per class"

    @property
    def is_behind(self) -> bool:
        """Whether the baseline is better, and not by chance."""
        return self.baseline_accuracy > self.accuracy and self.p_value < SIGNIFICANT


@dataclass(frozen=True, kw_only=True)
class LearningCurve:
    """Results by size, in rising order, and what they say."""

    measured_on: str
    num_measured: int
    sizes: tuple[Size, ...]
    gain: float  # accuracy of the last size minus that of the one before
    gain_interval: tuple[float, float]  # 95 %, Agresti and Min (2005)
    extrapolation: Extrapolation | None
    caution: str  # limits of the extrapolation, or why there is none
    answer: str

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as JSON holds them."""
        return asdict(self)


def followed(
    last: Size, extrapolation: Extrapolation | None, caution: str
) -> tuple[Extrapolation | None, str]:
    """Drop the extrapolation where the last size does not lack rows but training."""
    if extrapolation and last.is_behind:
        return None, (
            "no extrapolation: the last size is worse than the baseline, so longer training may "
            "bring what the curve would attribute to more rows"
        )
    return extrapolation, caution


def answer(
    sizes: Sequence[Size],
    gain: float,
    gain_interval: tuple[float, float],
    extrapolation: Extrapolation | None,
    alike: float | None,
) -> str:
    """Say whether to label more rows, to clean the labels, or to use a bigger model.

    Args:
        sizes: The sizes, rising.
        gain: Accuracy of the last size minus that of the one before.
        gain_interval: Its 95 % interval.
        extrapolation: Where the curve leads, if it can be extrapolated.
        alike: Share of the last size's mistakes that the baseline makes too, with the same label.
    """
    first, before, last = sizes[0], sizes[-2], sizes[-1]
    doublings = math.log2(last.num_rows / before.num_rows)
    each, low, high = (100 * x / doublings for x in (gain, *gain_interval))
    worth = 100 * WORTH
    figures = (
        f"from {before.num_rows:,} to {last.num_rows:,} rows, accuracy changed by {each:+.1f} "
        f"points per doubling (95% interval {low:+.1f} to {high:+.1f})"
    )
    if last.is_behind:
        return (
            f"Train longer, or use a bigger model: with {last.spoken} this one has "
            f"{last.accuracy:.1%} accuracy and the baseline {last.baseline_accuracy:.1%}, so more "
            "rows are not what it needs."
        )
    if low > 0 and each >= worth:
        text = f"Label more rows: {figures}"
        if extrapolation:
            text += f"; {extrapolation.num_rows:,} rows should give about "
            text += f"{extrapolation.accuracy:.0%}"
        if first.baseline_accuracy >= first.accuracy or first.p_value >= SIGNIFICANT:
            text += (
                f". A bigger model may help too: with {first.spoken} this one is no better than "
                f"the baseline (p = {first.p_value:.2g}), and pretraining counts most where rows "
                "are few"
            )
        return f"{text}."
    if high >= worth:
        return f"Inconclusive: {figures}. Measure on more test rows, or with sizes further apart."
    if alike is not None and alike >= ALIKE:
        return (
            f"Clean the labels: {figures}, and the baseline makes {alike:.0%} of the same "
            "mistakes, so the labels themselves are suspect; run `remora diagnose`."
        )
    return (
        f"Use a bigger model: {figures}, and most mistakes are not those of the baseline, so "
        "neither more rows nor cleaner labels are likely to help much."
    )

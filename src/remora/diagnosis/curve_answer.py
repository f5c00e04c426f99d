"""What a learning curve says: label more, clean what there is, or take a bigger model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from remora.diagnosis.extrapolation import Extrapolation

SIGNIFICANT = 0.05
WORTH = 0.01
"""Accuracy that twice the rows must bring to be worth labelling them."""
ALIKE = 0.5
"""Share of mistakes that the baseline makes too, with the same label, from which labels are
suspected."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """What was trained on one number of rows per class has shown."""

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
    """Sizes in rising order, and what follows."""

    measured_on: str
    num_measured: int
    sizes: tuple[Size, ...]
    gain: float  # accuracy of the last size minus that of the one before
    gain_interval: tuple[float, float]  # 95 %, Agresti and Min (2005)
    extrapolation: Extrapolation | None
    caution: str  # what the extrapolation cannot say, or why there is none
    answer: str

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as JSON holds them."""
        return asdict(self)


def followed(
    last: Size, extrapolation: Extrapolation | None, caution: str
) -> tuple[Extrapolation | None, str]:
    """Leave out an extrapolation to more rows where it is not rows that the last size lacks."""
    if extrapolation and last.is_behind:
        return None, (
            "no extrapolation: the last size is worse than the baseline, so longer training may "
            "give what the curve would say of more rows"
        )
    return extrapolation, caution


def answer(
    sizes: Sequence[Size],
    gain: float,
    gain_interval: tuple[float, float],
    extrapolation: Extrapolation | None,
    alike: float | None,
) -> str:
    """Say whether to label more, to clean what there is, or to take a bigger model.

    Args:
        sizes: The sizes, rising.
        gain: Accuracy of the last size minus that of the one before.
        gain_interval: Its 95 % interval.
        extrapolation: Where the curve leads, if that can be told.
        alike: Share of the last size's mistakes that the baseline makes too, with the same label.
    """
    first, before, last = sizes[0], sizes[-2], sizes[-1]
    doublings = math.log2(last.num_rows / before.num_rows)
    each, low, high = (100 * x / doublings for x in (gain, *gain_interval))
    worth = 100 * WORTH
    figures = (
        f"from {before.num_rows:,} to {last.num_rows:,} rows, accuracy changed by {each:+.1f} "
        f"points for each doubling (95% interval {low:+.1f} to {high:+.1f})"
    )
    if last.is_behind:
        return (
            f"Train longer, or take a bigger model: with {last.spoken} this one gets "
            f"{last.accuracy:.1%} where the baseline gets {last.baseline_accuracy:.1%}, so it is "
            "not rows that it lacks."
        )
    if low > 0 and each >= worth:
        text = f"Label more: {figures}"
        if extrapolation:
            text += f", and {extrapolation.num_rows:,} rows should give about "
            text += f"{extrapolation.accuracy:.0%}"
        if first.baseline_accuracy >= first.accuracy or first.p_value >= SIGNIFICANT:
            text += (
                f". A bigger model may pay too: with {first.spoken} this one is no better than "
                f"the baseline (p = {first.p_value:.2g}), and what a model knows beforehand "
                "counts most where rows are few"
            )
        return f"{text}."
    if high >= worth:
        return (
            f"These test rows do not tell: {figures}. Measure on more rows, or with sizes that "
            "are further apart."
        )
    if alike is not None and alike >= ALIKE:
        return (
            f"Clean what there is: {figures}, and the baseline makes {alike:.0%} of the mistakes "
            "alike, so the labels themselves are suspect; see `remora diagnose`."
        )
    return (
        f"Take a bigger model: {figures}, and most mistakes are not those of the baseline, so "
        "neither more rows nor cleaner ones promise much."
    )

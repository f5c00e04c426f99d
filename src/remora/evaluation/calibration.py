"""How far probabilities can be trusted, and which messages to send to a person.

The confidence of a prediction is the probability of the predicted label.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from remora.evaluation.predictions import Scored

MAX_BINS = 15
MIN_BIN_ROWS = 20
NUM_COVERAGES = 20


@dataclass(frozen=True, kw_only=True)
class Bin:
    """One point of the reliability curve: rows of similar confidence."""

    confidence: float  # mean
    accuracy: float
    num_rows: int


@dataclass(frozen=True, kw_only=True)
class CoveragePoint:
    """The result of answering only rows whose confidence reaches a threshold."""

    threshold: float
    coverage: float  # share of rows answered
    accuracy: float  # of the answered rows


@dataclass(frozen=True, kw_only=True)
class Abstention:
    """A threshold below which messages go to a person, and its result on the measured rows."""

    wanted_accuracy: float
    threshold: float | None  # None if no threshold reaches the accuracy
    chosen_on: str  # "validation", or "the measured rows"
    num_chosen_on: int
    coverage: float
    accuracy: float | None  # of the answered rows; None if none is answered
    accuracy_interval: tuple[float, float] | None  # 95%, Wilson (1927)


@dataclass(frozen=True, kw_only=True)
class OutOfScope:
    """How well the confidence detects messages that no label fits."""

    num_rows: int
    auroc: (
        float  # probability that an in-scope message has more confidence than an out-of-scope one
    )
    refused: float | None  # share of them below the threshold of `abstention`


@dataclass(frozen=True, kw_only=True)
class Reliability:
    """Calibration, coverage and abstention of the probabilities of one set of rows."""

    calibration_error: float  # expected calibration error, bins of equal mass
    bins: tuple[Bin, ...]
    temperature: float | None  # fitted on validation rows; None without them
    num_validation: int
    scaled_calibration_error: float | None  # on the measured rows, at that temperature
    scaled_log_loss: float | None
    coverage: tuple[CoveragePoint, ...]
    area_under_risk_coverage: float
    abstention: Abstention | None = None
    out_of_scope: OutOfScope | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as JSON holds them."""
        return asdict(self)


def assess(
    measured: Scored,
    validation: Scored | None = None,
    *,
    abstain_at_accuracy: float | None = None,
    out_of_scope: NDArray[np.float64] | None = None,
) -> Reliability:
    """Measure calibration, coverage, and if asked abstention and out-of-scope detection.

    Args:
        measured: The rows to measure on.
        validation: Other rows, to fit the temperature and to choose the threshold on.
        abstain_at_accuracy: Accuracy that the answered rows should reach.
        out_of_scope: Probabilities of messages that no label fits, [rows, labels].
    """
    # Calibration, before and after temperature scaling
    error, bins = calibration_error(measured.confidence, measured.correct)
    temperature = None if validation is None else fit_temperature(validation)
    scaled = None if temperature is None else measured.at(temperature)

    # Abstention and out-of-scope messages, if asked for
    abstention = None
    if abstain_at_accuracy is not None:
        abstention = abstain(measured, validation, abstain_at_accuracy)
    outside = None
    if out_of_scope is not None:
        outside = _out_of_scope(measured.confidence, out_of_scope.max(1), abstention)

    return Reliability(
        calibration_error=error,
        bins=bins,
        temperature=temperature,
        num_validation=0 if validation is None else len(validation.true),
        scaled_calibration_error=(
            None if scaled is None else calibration_error(scaled.confidence, scaled.correct)[0]
        ),
        scaled_log_loss=None if scaled is None else scaled.log_loss,
        coverage=coverage_points(measured.confidence, measured.correct),
        area_under_risk_coverage=area_under_risk_coverage(measured.confidence, measured.correct),
        abstention=abstention,
        out_of_scope=outside,
    )


def calibration_error(
    confidence: NDArray[np.float64], correct: NDArray[np.bool_], num_bins: int | None = None
) -> tuple[float, tuple[Bin, ...]]:
    """Return the expected calibration error and the reliability curve, in bins of equal mass.

    The error is the mean over rows of abs(accuracy - mean confidence) of their bin (Naeini et al.
    2015), with quantiles as the bins' borders (Nixon et al. 2019, https://arxiv.org/abs/1904.01685)
    since most rows are confident. Rows of equal confidence share a bin.

    Args:
        confidence: [rows].
        correct: [rows].
        num_bins: By default 15, or fewer so that each bin has 20 rows.
    """
    num_bins = num_bins or max(1, min(MAX_BINS, len(confidence) // MIN_BIN_ROWS))
    borders = np.quantile(confidence, np.linspace(0, 1, num_bins + 1)[1:-1])
    place = np.searchsorted(borders, confidence)
    bins = tuple(
        Bin(
            confidence=float(confidence[place == b].mean()),
            accuracy=float(correct[place == b].mean()),
            num_rows=int((place == b).sum()),
        )
        for b in np.unique(place)
    )
    gaps = sum(b.num_rows * abs(b.accuracy - b.confidence) for b in bins)
    return gaps / len(confidence), bins


def fit_temperature(rows: Scored) -> float:
    """Return the temperature that minimizes the log-loss, from 0.05 to 20.

    Guo et al. 2017, https://arxiv.org/abs/1706.04599. It changes no prediction.
    """
    from scipy.optimize import minimize_scalar

    limits = (np.log(0.05), np.log(20))
    result = minimize_scalar(
        lambda log: rows.at(float(np.exp(log))).log_loss, bounds=limits, method="bounded"
    )
    return float(np.exp(result.x))


def _cumulative(
    confidence: NDArray[np.float64], correct: NDArray[np.bool_]
) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.float64]]:
    """Return each possible threshold, highest first, with the rows answered and their accuracy."""
    order = np.argsort(-confidence, kind="stable")
    ordered = confidence[order]
    last = np.flatnonzero(
        np.append(ordered[1:] != ordered[:-1], True)
    )  # ties are answered together
    answered = last + 1
    return ordered[last], answered, np.cumsum(correct[order])[last] / answered


def coverage_points(
    confidence: NDArray[np.float64], correct: NDArray[np.bool_]
) -> tuple[CoveragePoint, ...]:
    """Return accuracy against coverage at about 20 points."""
    thresholds, answered, accuracy = _cumulative(confidence, correct)
    wanted = np.arange(1, NUM_COVERAGES + 1) * len(confidence) / NUM_COVERAGES
    places = np.unique(np.searchsorted(answered, wanted).clip(max=len(answered) - 1))
    return tuple(
        CoveragePoint(
            threshold=float(thresholds[i]),
            coverage=float(answered[i] / len(confidence)),
            accuracy=float(accuracy[i]),
        )
        for i in places
    )


def area_under_risk_coverage(confidence: NDArray[np.float64], correct: NDArray[np.bool_]) -> float:
    """Return the mean error rate over all coverages; lower is better.

    Geifman, Uziel and El-Yaniv 2019, https://arxiv.org/abs/1805.08206.
    """
    _, answered, accuracy = _cumulative(confidence, correct)
    share = np.diff(answered, prepend=0) / len(confidence)
    return float(((1 - accuracy) * share).sum())


def choose_threshold(rows: Scored, accuracy: float) -> float | None:
    """Return the lowest threshold at which answers reach an accuracy, None if there is none."""
    thresholds, _, accuracies = _cumulative(rows.confidence, rows.correct)
    good = np.flatnonzero(accuracies >= accuracy)
    return float(thresholds[good[-1]]) if len(good) else None


def abstain(measured: Scored, validation: Scored | None, accuracy: float) -> Abstention:
    """Choose a threshold on validation rows, or else the measured ones, and measure its result."""
    from scipy.stats import binomtest

    chosen_on = measured if validation is None else validation
    threshold = choose_threshold(chosen_on, accuracy)
    answered = (
        np.zeros(len(measured.true), dtype=bool)
        if threshold is None
        else measured.confidence >= threshold
    )
    count, right = int(answered.sum()), int(measured.correct[answered].sum())
    interval = binomtest(right, count).proportion_ci(method="wilson") if count else None
    return Abstention(
        wanted_accuracy=accuracy,
        threshold=threshold,
        chosen_on="the measured rows" if validation is None else "validation",
        num_chosen_on=len(chosen_on.true),
        coverage=count / len(measured.true),
        accuracy=right / count if count else None,
        accuracy_interval=(float(interval.low), float(interval.high)) if interval else None,
    )


def _out_of_scope(
    inside: NDArray[np.float64], outside: NDArray[np.float64], abstention: Abstention | None
) -> OutOfScope:
    from sklearn.metrics import roc_auc_score

    in_scope = np.repeat([1, 0], [len(inside), len(outside)])
    threshold = None if abstention is None else abstention.threshold
    return OutOfScope(
        num_rows=len(outside),
        auroc=float(roc_auc_score(in_scope, np.concatenate([inside, outside]))),
        refused=None if threshold is None else float((outside < threshold).mean()),
    )

"""How likely each row is mislabelled, and the share of mislabelled rows.

Estimated by comparison with wrong labels that are planted.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

COPIES = 5
"""Wrong labels planted for each row, to learn what wrong labels look like."""
EXPONENT = 0.5
"""Wrong labels are planted in proportion to this power of their probability: docs/log.md."""
LEAST = 1e-9
RESAMPLES = 200


@dataclass(frozen=True)
class LabelNoise:
    """Mislabelled rows."""

    scores: NDArray[np.float64]  # [rows], higher for rows more likely mislabelled
    p_wrong: NDArray[np.float64]  # [rows]
    rate: float  # estimated share of mislabelled rows
    interval: tuple[float, float]  # 95 %


def estimate(
    probabilities: NDArray[np.float64], true: NDArray[np.int64], *, seed: int = 0
) -> LabelNoise:
    """Tell mislabelled rows from others by comparison with labels that are wrong on purpose.

    Out-of-sample probabilities of a row do not depend on its label. So wrong labels can be planted
    in each row at no cost: other labels, drawn in proportion to the square root of their
    probability, halfway between uniform mistakes and confusions. A logistic regression tells given
    labels from planted ones.

    The given labels are a mixture of right and wrong ones. If the wrong ones look like the planted
    ones, their share is at most (share of given labels above a score) / (share of planted ones
    above it), for any score. The minimum, with each count one standard error higher, is the
    estimate (Scott 2015, https://proceedings.mlr.press/v38/scott15.html). It is too high
    where judges are too weak to recognize any wrong label. The interval is from resampled rows, its
    lower end without the standard error, with judges and regression as they are.

    Args:
        probabilities: Of each label for each row, out of sample, [rows, labels].
        true: The given labels, [rows].
        seed: Of the planted labels and the resampled rows.
    """
    generator = np.random.default_rng(seed)
    num_rows, num_labels = probabilities.shape
    logs = np.log(np.maximum(probabilities, LEAST))
    chances = np.maximum(probabilities, LEAST) ** EXPONENT
    chances[np.arange(num_rows), true] = 0
    steps = np.cumsum(chances / chances.sum(1, keepdims=True), axis=1)
    planted = []
    for _ in range(COPIES):
        drawn = (steps < generator.random((num_rows, 1))).sum(1)
        planted.append(_features(logs, np.minimum(drawn, num_labels - 1)))
    scores, of_planted, ratio = _told_apart(_features(logs, true), np.concatenate(planted))

    edges = np.unique(np.quantile(of_planted, np.linspace(0, 0.8, 81)))
    bins, planted_bins = (np.searchsorted(edges, part) for part in (scores, of_planted))
    share_above = _above(planted_bins, np.ones(len(of_planted)), len(edges)) / len(of_planted)

    def least(counts: NDArray[np.float64], margin: float) -> float:
        """Return the least ratio for rows that count so often, with standard errors added."""
        above = _above(bins, counts, len(edges))
        shares = (above + margin * (np.sqrt(above) + 1)) / num_rows
        return float((shares[share_above > 0] / share_above[share_above > 0]).min(initial=1.0))

    ratio_wrong = least(np.ones(num_rows), 1.0)
    drawn = generator.multinomial(num_rows, np.full(num_rows, 1 / num_rows), RESAMPLES)
    low = float(np.quantile([least(counts, 0.0) for counts in drawn], 0.025))
    high = float(np.quantile([least(counts, 1.0) for counts in drawn], 0.975))
    # In a mislabelled row the planted label is mostly the right one, so the planted labels hold
    # fewer wrong ones by as much.
    rate, *interval = (x / (1 + x) for x in (ratio_wrong, low, max(high, ratio_wrong)))
    return LabelNoise(
        scores, np.minimum(1.0, ratio_wrong * ratio), rate, (interval[0], interval[1])
    )


def _features(logs: NDArray[np.float64], labels: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return features of labels: log-probability, that of the best other label, rank."""
    rows = np.arange(len(labels))
    own = logs[rows, labels]
    others = logs.copy()
    others[rows, labels] = -np.inf
    rank = (logs > own[:, None]).sum(1)
    return np.stack([own, others.max(1), np.log1p(rank)], axis=1)


def _told_apart(
    given: NDArray[np.float64], planted: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Return scores of given and planted labels, and for given ones the ratio of densities.

    The ratio is that of planted to given labels at the score, by isotonic regression.
    """
    from sklearn.isotonic import IsotonicRegression
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    features = np.concatenate([given, planted])
    is_planted = np.arange(len(features)) >= len(given)
    regression = make_pipeline(StandardScaler(), LogisticRegression())
    scores = regression.fit(features, is_planted).decision_function(features)
    weights = np.where(is_planted, 1 / COPIES, 1.0)
    curve = IsotonicRegression(out_of_bounds="clip")
    share = curve.fit(scores, is_planted, sample_weight=weights).predict(scores[: len(given)])
    return scores[: len(given)], scores[len(given) :], share / np.maximum(1 - share, LEAST)


def _above(
    bins: NDArray[np.int64], counts: NDArray[np.float64], num_edges: int
) -> NDArray[np.float64]:
    """Return counts above each edge, [edges]; a bin is the number of edges below it."""
    held = np.bincount(bins, counts, num_edges + 1)
    result: NDArray[np.float64] = held[::-1].cumsum()[::-1][1:]
    return result

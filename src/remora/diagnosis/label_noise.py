"""How likely each row's label is wrong, and what share of labels is: compared with planted ones."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

COPIES = 5
"""How often each row is given a wrong label, to learn what wrong labels look like."""
EXPONENT = 0.5
"""Wrong labels are planted in proportion to this power of their probability: docs/log.md."""
LEAST = 1e-9
RESAMPLES = 200


@dataclass(frozen=True)
class LabelNoise:
    """Labels that are wrong."""

    scores: NDArray[np.float64]  # [rows], the larger the likelier the label is wrong
    p_wrong: NDArray[np.float64]  # [rows]
    rate: float  # estimated share of wrong labels
    interval: tuple[float, float]  # 95 %


def estimate(
    probabilities: NDArray[np.float64], true: NDArray[np.int64], *, seed: int = 0
) -> LabelNoise:
    """Tell wrong labels from right ones by what labels look like that are wrong on purpose.

    What a judge says of a row does not depend on that row's label if it is out of sample. So each
    row can be given wrong labels at no cost: other labels, drawn in proportion to the square root
    of their probability, halfway between slips and confusions. A logistic regression tells the
    labels given from those planted.

    The labels given are a mixture of right and wrong ones. If the wrong ones look like the planted
    ones, their share is at most (share of given labels above a score) / (share of planted ones
    above it), for any score. The least of these, with each count taken one standard error higher,
    is the estimate (Scott 2015, https://proceedings.mlr.press/v38/scott15.html). It is too high
    where judges are too weak to tell any wrong label. The interval is from resampled rows, its
    lower end without the standard error, with judges and regression as they are.

    Args:
        probabilities: Of each label for each row, out of sample, [rows, labels].
        true: The labels as given, [rows].
        seed: Of the planted labels and of the resampled rows.
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

    found = least(np.ones(num_rows), 1.0)
    drawn = generator.multinomial(num_rows, np.full(num_rows, 1 / num_rows), RESAMPLES)
    low = float(np.quantile([least(counts, 0.0) for counts in drawn], 0.025))
    high = float(np.quantile([least(counts, 1.0) for counts in drawn], 0.975))
    # Where the label given is wrong, the one planted is mostly the right one. So of rows with wrong
    # labels there are, among those planted, as many fewer.
    rate, *interval = (each / (1 + each) for each in (found, low, max(high, found)))
    return LabelNoise(scores, np.minimum(1.0, found * ratio), rate, (interval[0], interval[1]))


def _features(logs: NDArray[np.float64], labels: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return what tells wrong labels: own log-probability, that of the best other one, rank."""
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
    """Return how many lie above each edge, [edges]; a bin is how many edges are below."""
    held = np.bincount(bins, counts, num_edges + 1)
    result: NDArray[np.float64] = held[::-1].cumsum()[::-1][1:]
    return result

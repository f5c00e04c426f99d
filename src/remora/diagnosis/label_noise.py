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
    least = _least_ratio(scores, of_planted, np.arange(num_rows), num_rows, generator)
    # In a mislabelled row the planted label is mostly the right one, so the planted labels hold
    # fewer wrong ones by as much.
    rate, low, high = (x / (1 + x) for x in least)
    return LabelNoise(scores, np.minimum(1.0, least[0] * ratio), rate, (low, high))


@dataclass(frozen=True)
class SetNoise:
    """Mislabelled rows where a row has several labels: given ones that are wrong, missing ones."""

    p_wrong: NDArray[np.float64]  # [rows, labels], that the row has the label wrongly, or lacks it
    rate: float  # estimated share of the given labels that are wrong
    interval: tuple[float, float]  # 95 %
    num_missing: float  # estimated number of labels that belong to rows that lack them
    missing_interval: tuple[float, float]  # 95 %


def estimate_sets(
    probabilities: NDArray[np.float64], given: NDArray[np.int64], *, seed: int = 0
) -> SetNoise:
    """Tell wrong labels of rows from right ones, and missing labels from those that rows lack.

    Each label of each row is judged by itself, one against the rest, as confident learning does
    with several labels (Thyagarajan et al. 2022, https://arxiv.org/abs/2211.13895, cleanlab's
    `multilabel_classification`): a given label is the less plausible the lower its probability, a
    missing one the more plausible the higher. Probabilities of a label are read beside their mean
    over the rows that have it, its threshold in confident learning (Northcutt et al. 2021,
    https://doi.org/10.1613/jair.1.12125). How likely and how many are wrong is then estimated as in
    `estimate`, for given and missing labels apart: wrong given labels resemble labels added to rows
    in proportion to the square root of their probability, missing ones resemble given ones.

    Args:
        probabilities: Of each label for each row, out of sample, [rows, labels].
        given: 1 for each label that a row has, else 0, [rows, labels].
        seed: Of the added labels and the resampled rows.
    """
    generator = np.random.default_rng(seed)
    has = given.astype(bool)
    odds = _log_odds(probabilities)
    usual = _log_odds((probabilities * has).sum(0) / np.maximum(has.sum(0), 1))  # [labels]
    features = np.stack([odds, odds - usual], axis=-1)  # [rows, labels, 2]

    # Labels added to rows that lack them
    chances = np.where(has, 0, np.maximum(probabilities, LEAST) ** EXPONENT)
    lacking = np.flatnonzero(~has.all(1))
    steps = np.cumsum(chances[lacking], axis=1)
    drawn = [
        features[lacking, (steps <= steps[:, -1:] * generator.random((len(lacking), 1))).sum(1)]
        for _ in range(COPIES)
    ]

    p_wrong, found = np.zeros(has.shape), []
    for cells, planted in ((has, np.concatenate(drawn)), (~has, features[has])):
        if not (cells.any() and len(planted)):  # every row has every label, or none
            found.append((0.0, 0.0, 0.0))
            continue
        scores, of_planted, ratio = _told_apart(features[cells], planted)
        least = _least_ratio(scores, of_planted, np.nonzero(cells)[0], len(has), generator)
        p_wrong[cells] = np.minimum(1.0, least[0] * ratio)
        found.append(least)
    # Of the labels that missing ones are compared with some are wrong, and the other way round.
    (rate, low, high), missing = (
        [own * (1 - other) / (1 - own * other) if own * other < 1 else own for own in of_kind]
        for of_kind, other in zip(found, (found[1][0], found[0][0]), strict=True)
    )
    count, least_count, most_count = (share * int((~has).sum()) for share in missing)
    return SetNoise(p_wrong, rate, (low, high), count, (least_count, most_count))


def _log_odds(probabilities: NDArray[np.float64]) -> NDArray[np.float64]:
    within = probabilities.clip(LEAST, 1 - LEAST)
    result: NDArray[np.float64] = np.log(within / (1 - within))
    return result


def _least_ratio(
    scores: NDArray[np.float64],
    of_planted: NDArray[np.float64],
    rows: NDArray[np.int64],
    num_rows: int,
    generator: np.random.Generator,
) -> tuple[float, float, float]:
    """Return the least ratio of given to planted labels above a score, and its 95 % interval.

    Each count of given ones is one standard error higher, but for the lower end. `rows` has the row
    of each score; the interval is from resampled rows.
    """
    edges = np.unique(np.quantile(of_planted, np.linspace(0, 0.8, 81)))
    bins, planted_bins = (np.searchsorted(edges, part) for part in (scores, of_planted))
    share_above = _above(np.bincount(planted_bins, minlength=len(edges) + 1)) / len(of_planted)
    width = len(edges) + 1
    by_row = np.bincount(rows * width + bins, minlength=num_rows * width).reshape(num_rows, width)

    def least(held: NDArray[np.int64], margin: float) -> float:
        """Return the least ratio for so many scores in each bin, with standard errors added."""
        above = _above(held)
        shares = (above + margin * (np.sqrt(above) + 1)) / max(1, held.sum())
        return float((shares[share_above > 0] / share_above[share_above > 0]).min(initial=1.0))

    ratio = least(by_row.sum(0), 1.0)
    resampled = [
        drawn @ by_row
        for drawn in generator.multinomial(num_rows, np.full(num_rows, 1 / num_rows), RESAMPLES)
    ]
    low = float(np.quantile([least(held, 0.0) for held in resampled], 0.025))
    high = float(np.quantile([least(held, 1.0) for held in resampled], 0.975))
    return ratio, low, max(high, ratio)


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
    weights = np.where(is_planted, len(given) / len(planted), 1.0)
    curve = IsotonicRegression(out_of_bounds="clip")
    share = curve.fit(scores, is_planted, sample_weight=weights).predict(scores[: len(given)])
    return scores[: len(given)], scores[len(given) :], share / np.maximum(1 - share, LEAST)


def _above(held: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return counts above each edge, [edges], of counts by the number of edges below."""
    result: NDArray[np.int64] = held[::-1].cumsum()[::-1][1:]
    return result

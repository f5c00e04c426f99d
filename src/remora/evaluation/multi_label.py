"""Rows with several labels: which labels to give, by a threshold each, and what they are worth.

A row's prediction is a set of labels, as `data.label_sets` writes it. It is right if it is the true
set: the accuracy is that of scikit-learn for several labels, also called exact match or subset
accuracy, and McNemar's test applies.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from remora.data.label_sets import labels_in, set_text
from remora.data.table import Table
from remora.evaluation.metrics import ClassMetrics, Metrics, measure
from remora.evaluation.predictions import DEFAULT_THRESHOLD, Scored, ScoredSets

MIN_POSITIVES = 5
"""Validation rows of a label below which it shares a threshold with the other rare labels: with
fewer the best one is chance."""

NUM_RESAMPLES = 1_000
"""Samples of the bootstrap; its intervals hold 95% of them."""

NUM_SHUFFLES = 10_000
"""Of a randomization test: more, since p-values of many pairs are adjusted."""

BLOCK_ELEMENTS = 1 << 21
"""Numbers that the bootstrap holds in one array, 16 MB: of few samples where rows are many."""


@dataclass(frozen=True, kw_only=True)
class MultiLabelMetrics(Metrics):
    """Metrics of rows with several labels; `accuracy` is the share of sets that are right."""

    micro_f1: float
    micro_f1_interval: tuple[float, float]  # 95%, bootstrap over rows
    macro_f1_interval: tuple[float, float]
    label_ranking: float | None  # label ranking average precision; None without probabilities
    label_ranking_interval: tuple[float, float] | None
    labels_per_row: float  # true ones, mean
    predicted_per_row: float
    thresholds: tuple[float, ...]  # of each label
    constant: str  # the most frequent set
    constant_accuracy: float  # of always answering it


def indicators(sets: Sequence[str], labels: Sequence[str]) -> NDArray[np.int64]:
    """Return which labels each set has, [rows, labels], 0 or 1."""
    place = {label: index for index, label in enumerate(labels)}
    found = np.zeros((len(sets), len(labels)), dtype=np.int64)
    for row, text in enumerate(sets):
        found[row, [place[label] for label in labels_in(text)]] = 1
    return found


def as_sets(given: NDArray[np.bool_], labels: Sequence[str]) -> list[str]:
    """Return the sets of labels that are given, of [rows, labels]."""
    return [set_text(labels[i] for i in np.flatnonzero(row).tolist()) for row in given]


def fit_thresholds(
    scores: NDArray[np.float64], true: NDArray[np.int64], default: float = DEFAULT_THRESHOLD
) -> NDArray[np.float64]:
    """Return for each label the threshold that maximizes its F1, [labels].

    Labels with fewer than `MIN_POSITIVES` rows share one that maximizes the F1 of all of them, or
    get that of all labels if it has no more rows either.

    Args:
        scores: Of rows, [rows, labels].
        true: Their labels, 0 or 1.
        default: Threshold of labels that nothing is known of.
    """
    num_labels = true.shape[1]
    thresholds = np.full(num_labels, default)
    if not true.sum():
        return thresholds
    rare = true.sum(0) < MIN_POSITIVES
    for label in np.flatnonzero(~rare):
        thresholds[label] = _best_threshold(scores[:, label], true[:, label])
    if rare.any():
        columns = rare if true[:, rare].sum() >= MIN_POSITIVES else np.ones(num_labels, bool)
        thresholds[rare] = _best_threshold(scores[:, columns].ravel(), true[:, columns].ravel())
    return thresholds


def with_thresholds(scores: Mapping[str, Scored]) -> dict[str, Scored]:
    """Return the splits of a run, sets with the thresholds that fit the validation rows."""
    fitted = scores.get("validation")
    if not isinstance(fitted, ScoredSets):
        return dict(scores)
    thresholds = fit_thresholds(fitted.probabilities, fitted.true)
    return {
        split: replace(each, thresholds=thresholds) if isinstance(each, ScoredSets) else each
        for split, each in scores.items()
    }


def labels_given(scored: Scored, labels: Sequence[str]) -> list[str]:
    """Return the label of each row, or its set of labels."""
    if isinstance(scored, ScoredSets):
        return as_sets(scored.given, labels)
    return [labels[i] for i in scored.probabilities.argmax(1)]


def measured(scored: Scored, table: Table, labels: Sequence[str]) -> Metrics:
    """Measure the rows of a table by their probabilities."""
    predicted = labels_given(scored, labels)
    if isinstance(scored, ScoredSets):
        return measure_sets(
            labels, table.labels, predicted, scored.probabilities, scored.thresholds.tolist()
        )
    return measure(labels, table.labels, predicted, scored.probabilities)


def at_best_threshold(scored: ScoredSets) -> ScoredSets:
    """Return rows with one threshold for all labels, the one with the best micro-F1 on them.

    Epochs are compared by it: early on no probability reaches a half.
    """
    best = _best_threshold(scored.probabilities.ravel(), scored.true.ravel())
    return replace(scored, thresholds=np.full(scored.true.shape[1], best))


def f1_scores(scored: ScoredSets) -> tuple[float, float]:
    """Return micro-F1 and macro-F1 of some rows."""
    true, given = scored.true, scored.given.astype(np.int64)
    counts = true.sum(0), given.sum(0), (true & given).sum(0)
    return float(_micro(*counts)), float(_macro(*counts))


def _best_threshold(scores: NDArray[np.float64], true: NDArray[np.int64]) -> float:
    """Return the threshold with the best F1, halfway between the scores on its two sides."""
    order = np.argsort(-scores, kind="stable")
    ordered = scores[order]
    last = np.flatnonzero(np.append(ordered[1:] != ordered[:-1], True))  # ties are given together
    hits = np.cumsum(true[order])[last]
    f1 = 2 * hits / (last + 1 + true.sum())
    best = int(f1.argmax())
    at = ordered[last[best]]
    below = ordered[last[best] + 1] if last[best] + 1 < len(ordered) else min(0.0, at)
    return float((at + below) / 2)


def measure_sets(
    labels: Sequence[str],
    true: Sequence[str],
    predicted: Sequence[str],
    probabilities: NDArray[np.float64] | None = None,
    thresholds: Sequence[float] = (),
    seed: int = 0,
) -> MultiLabelMetrics:
    """Measure predicted sets of labels against the true ones.

    Args:
        labels: The closed label set.
        true: The set of each row.
        predicted: The predicted set of each row.
        probabilities: [rows, labels], for the log-loss and the ranking.
        thresholds: From which on a label was given.
        seed: Of the bootstrap.
    """
    from scipy.stats import binomtest
    from sklearn.metrics import f1_score, precision_recall_fscore_support

    assert len(true) == len(predicted) > 0
    is_true, is_given = indicators(true, labels), indicators(predicted, labels)
    figures = precision_recall_fscore_support(is_true, is_given, zero_division=0.0)
    per_class = tuple(
        ClassMetrics(label=label, precision=float(p), recall=float(r), f1=float(f), support=int(n))
        for label, p, r, f, n in zip(labels, *figures, strict=True)
    )
    num_correct = sum(a == b for a, b in zip(true, predicted, strict=True))
    interval = binomtest(num_correct, len(true)).proportion_ci(method="wilson")
    constant, count = Counter(true).most_common(1)[0]
    intervals = _bootstrap(is_true, is_given, seed)
    log_loss, ranking, ranking_interval = None, None, None
    if probabilities is not None:
        ranking, ranking_interval = _ranking(is_true, probabilities, seed)
        log_loss = ScoredSets(
            probabilities=probabilities, true=is_true, thresholds=np.array([DEFAULT_THRESHOLD])
        ).log_loss
    return MultiLabelMetrics(
        num_rows=len(true),
        num_correct=num_correct,
        accuracy=num_correct / len(true),
        accuracy_interval=(float(interval.low), float(interval.high)),
        macro_f1=float(_macro(is_true.sum(0), is_given.sum(0), (is_true & is_given).sum(0))),
        log_loss=log_loss,
        per_class=per_class,
        confusions=(),
        confused_pairs=(),
        micro_f1=float(f1_score(is_true, is_given, average="micro", zero_division=0.0)),
        micro_f1_interval=intervals[0],
        macro_f1_interval=intervals[1],
        label_ranking=ranking,
        label_ranking_interval=ranking_interval,
        labels_per_row=float(is_true.sum(1).mean()),
        predicted_per_row=float(is_given.sum(1).mean()),
        thresholds=tuple(map(float, thresholds)),
        constant=constant,
        constant_accuracy=count / len(true),
    )


def micro_f1_difference(
    labels: Sequence[str],
    true: Sequence[str],
    first: Sequence[str],
    second: Sequence[str],
    seed: int = 0,
) -> tuple[float, tuple[float, float]]:
    """Return the micro-F1 of the first sets minus that of the second, with its 95% interval.

    Rows are resampled together for both: a paired bootstrap.
    """
    is_true = indicators(true, labels)
    both = [_resampled(is_true, indicators(given, labels), seed) for given in (first, second)]
    ones, others = (_micro(*counts) for counts in both)
    low, high = np.quantile(ones[1:] - others[1:], [0.025, 0.975])
    return float(ones[0] - others[0]), (float(low), float(high))


def micro_f1_p_value(
    labels: Sequence[str],
    true: Sequence[str],
    first: Sequence[str],
    second: Sequence[str],
    seed: int = 0,
) -> float:
    """Return the two-sided p-value of the approximate randomization test of two micro-F1.

    The null hypothesis is that it does not matter which of the two gave which set: in each of
    `NUM_SHUFFLES` shuffles they trade the sets of a row or do not, by chance (Noreen 1989; Yeh
    2000, https://aclanthology.org/C00-2137/). The smallest value is 1 in so many shuffles plus one.
    """
    is_true = indicators(true, labels)
    given = [indicators(each, labels) for each in (first, second)]
    hits = np.stack([(is_true & each).sum(1) for each in given])
    sizes = np.stack([is_true.sum(1) + each.sum(1) for each in given])
    differ = ((hits[0] != hits[1]) | (sizes[0] != sizes[1])).nonzero()[0]

    def difference(traded: NDArray[Any]) -> Any:
        """Return first minus second where each row of `traded` says which rows they trade."""
        more_hits = traded @ (hits[1] - hits[0])[differ].astype(np.float32)
        more = traded @ (sizes[1] - sizes[0])[differ].astype(np.float32)
        ones = 2 * (hits[0].sum() + more_hits) / np.maximum(sizes[0].sum() + more, 1)
        return ones - 2 * (hits[1].sum() - more_hits) / np.maximum(sizes[1].sum() - more, 1)

    found = abs(difference(np.zeros((1, len(differ)), np.float32))[0])
    rng, as_far = np.random.default_rng(seed), 0
    for samples in _blocks(NUM_SHUFFLES, len(differ)):
        traded = rng.integers(0, 2, (len(samples), len(differ)), dtype=np.int8).astype(np.float32)
        as_far += int((abs(difference(traded)) >= found - 1e-9).sum())
    return (1 + as_far) / (1 + NUM_SHUFFLES)


def _resampled(
    true: NDArray[np.int64], given: NDArray[np.int64], seed: int
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Return true, given and hit labels, [1 + resamples, labels]: of all rows, and of samples."""
    num_rows, num_labels = true.shape
    found = np.zeros((3, 1 + NUM_RESAMPLES, num_labels))
    found[:, 0] = true.sum(0), given.sum(0), np.einsum("rl,rl->l", true, given)
    rng, shares = np.random.default_rng(seed), np.full(num_rows, 1 / num_rows)
    for samples in _blocks(NUM_RESAMPLES, num_rows):
        weights = rng.multinomial(num_rows, shares, len(samples))
        for rows in _blocks(num_rows, max(num_labels, len(samples))):
            part = slice(rows.start, rows.stop)
            wide = weights[:, part].astype(np.float32)
            own = slice(1 + samples.start, 1 + samples.stop)
            for place, each in enumerate((true[part], given[part], true[part] & given[part])):
                found[place, own] += wide @ each.astype(np.float32)
    return found[0], found[1], found[2]


def _blocks(number: int, each: int) -> Iterator[range]:
    """Yield ranges that cover a number of things, of which each takes so many elements."""
    step = max(1, BLOCK_ELEMENTS // max(1, each))
    for start in range(0, number, step):
        yield range(start, min(number, start + step))


def _bootstrap(
    true: NDArray[np.int64], given: NDArray[np.int64], seed: int
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Return the 95% intervals of micro-F1 and macro-F1."""
    counts = _resampled(true, given, seed)
    found = []
    for values in (_micro(*counts), _macro(*counts)):
        low, high = np.quantile(values[1:], [0.025, 0.975])
        found.append((float(low), float(high)))
    return found[0], found[1]


def _micro(true: NDArray[Any], given: NDArray[Any], hits: NDArray[Any]) -> Any:
    """Return the F1 of all labels together; 0 if none occurs."""
    return 2 * hits.sum(-1) / np.maximum((true + given).sum(-1), 1)


def _macro(true: NDArray[Any], given: NDArray[Any], hits: NDArray[Any]) -> Any:
    """Return the mean F1 over labels that occur as true or predicted ones; 0 if none does."""
    occurs = (true + given) > 0
    f1 = 2 * hits / np.maximum(true + given, 1)
    return (f1 * occurs).sum(-1) / np.maximum(occurs.sum(-1), 1)


def _ranking(
    true: NDArray[np.int64], scores: NDArray[np.float64], seed: int
) -> tuple[float, tuple[float, float]]:
    """Return the label ranking average precision and its 95% interval, by the bootstrap.

    That is, over true labels, the share of true ones among those ranked as high (Schapire and
    Singer 2000, as in scikit-learn); a row without any counts as 1.
    """
    from scipy.stats import rankdata
    from sklearn.metrics import label_ranking_average_precision_score

    mean = float(label_ranking_average_precision_score(true, scores))
    is_true = true.astype(bool)
    ranks = rankdata(-scores, "max", axis=1)
    among = rankdata(np.where(is_true, -scores, np.inf), "max", axis=1)
    shares = np.where(is_true, among / ranks, 0.0).sum(1) / np.maximum(is_true.sum(1), 1)
    shares[~is_true.any(1) | is_true.all(1)] = 1.0
    low, high = np.quantile(_means_of_samples(shares, seed), [0.025, 0.975])
    return mean, (float(low), float(high))


def _means_of_samples(values: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    """Return the mean of the rows' values in each sample, [resamples]."""
    rng, num_rows = np.random.default_rng(seed), len(values)
    means = [
        values[rng.integers(num_rows, size=(len(samples), num_rows))].mean(1)
        for samples in _blocks(NUM_RESAMPLES, num_rows)
    ]
    return np.concatenate(means)

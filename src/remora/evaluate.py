"""Metrics, and the near-free baseline that every result is shown beside."""

from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

BYTES_PER_CHARACTER = 150
"""What the baseline takes of memory for each character that it trains on: 127 to 150 were measured
on 10,003 and 5,000 rows of Banking77, 51 to 53 on messages of 1,000 characters."""
MIN_BASELINE_ROWS = 1_000
"""So many rows it gets in any case; fewer would be no baseline."""


@dataclass(frozen=True, kw_only=True)
class ClassMetrics:
    """Figures of one class; 0 where a figure has no rows to be computed on."""

    label: str
    precision: float
    recall: float
    f1: float
    support: int  # rows that have the label in truth


@dataclass(frozen=True, kw_only=True)
class Confusion:
    """Rows of one label that were taken for another."""

    true: str
    predicted: str
    count: int
    share: float  # of the rows of the true label


@dataclass(frozen=True, kw_only=True)
class ConfusedPair:
    """Two labels that are taken for each other, in both directions."""

    first: str
    second: str
    first_as_second: int  # rows
    second_as_first: int
    num_rows: int  # rows that have one of the two labels in truth

    @property
    def count(self) -> int:
        """Rows confused in either direction."""
        return self.first_as_second + self.second_as_first


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """Figures of one set of predictions."""

    num_rows: int
    num_correct: int
    accuracy: float
    accuracy_interval: tuple[float, float]  # 95 %, Wilson (1927)
    macro_f1: float  # over the classes that occur in truth or among the predictions
    log_loss: float | None  # mean, in nats
    per_class: tuple[ClassMetrics, ...]
    confusions: tuple[Confusion, ...]  # the largest first
    confused_pairs: tuple[ConfusedPair, ...]  # the largest first

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as JSON holds them."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """What a classifier that costs next to nothing gets on the same rows."""

    metrics: Metrics
    predictions: list[str]
    num_train_rows: int
    num_all_train_rows: int
    seconds: float
    description: str = "TF-IDF + linear SVM"


def measure(
    labels: Sequence[str],
    true: Sequence[str],
    predicted: Sequence[str],
    probabilities: NDArray[np.float64] | None = None,
) -> Metrics:
    """Compare predictions with the truth.

    Args:
        labels: The closed label set.
        true: The label of each row.
        predicted: The predicted label of each row.
        probabilities: [rows, labels], for the log-loss.
    """
    from scipy.stats import binomtest
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

    assert len(true) == len(predicted) > 0
    assert len(labels) > 1
    assert set(labels) >= {*true, *predicted}
    matrix = confusion_matrix(true, predicted, labels=list(labels))  # [true, predicted]
    num_correct = int(np.trace(matrix))
    interval = binomtest(num_correct, len(true)).proportion_ci(method="wilson")
    figures = precision_recall_fscore_support(
        true, predicted, labels=list(labels), zero_division=0.0
    )
    per_class = tuple(
        ClassMetrics(label=label, precision=float(p), recall=float(r), f1=float(f), support=int(n))
        for label, p, r, f, n in zip(labels, *figures, strict=True)
    )
    occurs = matrix.sum(0) + matrix.sum(1) > 0
    log_loss = None
    if probabilities is not None:
        assert probabilities.shape == (len(true), len(labels))
        place = {label: index for index, label in enumerate(labels)}
        chosen = probabilities[np.arange(len(true)), [place[label] for label in true]]
        log_loss = float(-np.log(np.maximum(chosen, np.finfo(np.float64).tiny)).mean())
    return Metrics(
        num_rows=len(true),
        num_correct=num_correct,
        accuracy=num_correct / len(true),
        accuracy_interval=(float(interval.low), float(interval.high)),
        macro_f1=float(np.array([row.f1 for row in per_class])[occurs].mean()),
        log_loss=log_loss,
        per_class=per_class,
        confusions=_confusions(labels, matrix),
        confused_pairs=_confused_pairs(labels, matrix),
    )


def _confusions(labels: Sequence[str], matrix: NDArray[np.int64]) -> tuple[Confusion, ...]:
    found = [
        Confusion(
            true=labels[i],
            predicted=labels[j],
            count=int(matrix[i, j]),
            share=float(matrix[i, j] / matrix[i].sum()),
        )
        for i, j in np.argwhere(matrix)
        if i != j
    ]
    return tuple(sorted(found, key=lambda cell: (-cell.count, cell.true, cell.predicted)))


def _confused_pairs(labels: Sequence[str], matrix: NDArray[np.int64]) -> tuple[ConfusedPair, ...]:
    found = [
        ConfusedPair(
            first=labels[i],
            second=labels[j],
            first_as_second=int(matrix[i, j]),
            second_as_first=int(matrix[j, i]),
            num_rows=int(matrix[i].sum() + matrix[j].sum()),
        )
        for i, j in np.argwhere(np.triu(matrix + matrix.T, 1))
    ]
    return tuple(sorted(found, key=lambda pair: (-pair.count, pair.first, pair.second)))


def baseline(
    train_texts: Sequence[str],
    train_labels: Sequence[str],
    test_texts: Sequence[str],
    test_labels: Sequence[str],
    labels: Sequence[str],
    *,
    seed: int = 0,
    max_rows: int = 50_000,
    max_bytes: int | None = None,
) -> Baseline:
    """Train TF-IDF over character n-grams with a linear SVM, and measure it.

    The recipe is fixed: n-grams of 2 to 5 characters within words did best in cross-validation on
    Banking77's training rows. Of a larger table, `max_rows` rows stratified by label and chosen by
    `seed` are used, and fewer where they would not fit into `max_bytes`, but at least
    `MIN_BASELINE_ROWS`. Where all texts are blank or there is one class only, the most frequent
    label is predicted.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.pipeline import make_pipeline
    from sklearn.svm import LinearSVC

    assert len(train_texts) == len(train_labels) > 0
    assert len(test_texts) == len(test_labels)
    began = time.perf_counter()
    if max_bytes is not None:
        characters_each = max(1, sum(map(len, train_texts)) // len(train_texts))
        fitting = max_bytes // (BYTES_PER_CHARACTER * characters_each)
        max_rows = min(max_rows, max(MIN_BASELINE_ROWS, fitting))
    rows = _stratified_rows(train_labels, max_rows, seed)
    texts = [train_texts[i] for i in rows]
    targets = [train_labels[i] for i in rows]
    characters = TfidfVectorizer(
        analyzer="char_wb", ngram_range=(2, 5), sublinear_tf=True, dtype=np.float32
    )
    pipeline = make_pipeline(characters, LinearSVC(C=1.0, random_state=seed, max_iter=5_000))
    if any(text.strip() for text in texts) and len(set(targets)) > 1:
        with warnings.catch_warnings():  # a baseline that has not quite converged is still one
            warnings.simplefilter("ignore", ConvergenceWarning)
            pipeline.fit(texts, targets)
        predictions = [str(label) for label in pipeline.predict(test_texts)]
    else:
        most_frequent = Counter(targets).most_common(1)[0][0]
        predictions = [most_frequent] * len(test_texts)
    return Baseline(
        metrics=measure(labels, test_labels, predictions),
        predictions=predictions,
        num_train_rows=len(texts),
        num_all_train_rows=len(train_texts),
        seconds=time.perf_counter() - began,
    )


def _stratified_rows(labels: Sequence[str], max_rows: int, seed: int) -> list[int]:
    """Choose at most `max_rows` rows; each label keeps its share of them, give or take one row."""
    if len(labels) <= max_rows:
        return list(range(len(labels)))
    shuffled = np.random.default_rng(seed).permutation(len(labels)).tolist()
    by_label = sorted(shuffled, key=lambda row: labels[row])
    return sorted(by_label[i * len(labels) // max_rows] for i in range(max_rows))


def mcnemar(true: Sequence[str], first: Sequence[str], second: Sequence[str]) -> float:
    """Return the two-sided p-value of the exact McNemar test for two sets of predictions.

    The hypothesis is that both err equally often; only rows that one of them gets right and the
    other wrong count (McNemar 1947, https://doi.org/10.1007/BF02295996).
    """
    from scipy.stats import binomtest

    only_first = sum(a == t != b for t, a, b in zip(true, first, second, strict=True))
    only_second = sum(b == t != a for t, a, b in zip(true, first, second, strict=True))
    if only_first + only_second == 0:
        return 1.0
    return float(binomtest(only_first, only_first + only_second).pvalue)


def verdict(accuracy: float, baseline: float, p_value: float) -> str:
    """Say in a sentence whether a model is worth its cost, from its accuracy and the baseline's."""
    difference = 100 * (accuracy - baseline)
    p = f"p = {p_value:.2g}, exact McNemar test"
    if p_value >= 0.05:
        return f"the difference of {difference:+.1f} points may be chance ({p})"
    if difference > 0:
        return f"the adapter is {difference:.1f} points better ({p})"
    return (
        f"the baseline is {-difference:.1f} points better: this model is not worth its cost ({p})"
    )

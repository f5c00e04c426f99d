"""Accuracy, precision, recall, F1, log-loss and confusions of a set of predictions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class ClassMetrics:
    """Metrics of one class; 0 where one is undefined."""

    label: str
    precision: float
    recall: float
    f1: float
    support: int  # rows of the true label


@dataclass(frozen=True, kw_only=True)
class Confusion:
    """Rows of one label that were predicted as another."""

    true: str
    predicted: str
    count: int
    share: float  # of the rows of the true label


@dataclass(frozen=True, kw_only=True)
class ConfusedPair:
    """Two labels that are confused with each other, counted in both directions."""

    first: str
    second: str
    first_as_second: int  # rows
    second_as_first: int
    num_rows: int  # rows of either true label

    @property
    def count(self) -> int:
        """Rows confused in either direction."""
        return self.first_as_second + self.second_as_first


@dataclass(frozen=True, kw_only=True)
class LevelMetrics:
    """Metrics of one level of labels that form a hierarchy."""

    level: int  # from 1, the first part of the labels
    num_nodes: int
    num_correct: int
    accuracy: float
    accuracy_interval: tuple[float, float]  # 95%, Wilson (1927)
    macro_f1: float  # over nodes that occur as true or predicted ones
    macro_f1_interval: tuple[float, float]  # 95%, percentiles of resampled rows


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """Metrics of one set of predictions."""

    num_rows: int
    num_correct: int
    accuracy: float
    accuracy_interval: tuple[float, float]  # 95%, Wilson (1927)
    macro_f1: float  # over classes that occur as true or predicted labels
    log_loss: float | None  # mean, in nats
    per_class: tuple[ClassMetrics, ...]
    confusions: tuple[Confusion, ...]  # the largest first
    confused_pairs: tuple[ConfusedPair, ...]  # the largest first
    levels: tuple[LevelMetrics, ...] = ()  # of labels that form a hierarchy

    def to_dict(self) -> dict[str, Any]:
        """Return the metrics as JSON holds them; levels only if there are any."""
        values = asdict(self)
        if not self.levels:
            del values["levels"]
        return values


def measure(
    labels: Sequence[str],
    true: Sequence[str],
    predicted: Sequence[str],
    probabilities: NDArray[np.float64] | None = None,
) -> Metrics:
    """Measure predictions against the true labels.

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

    # Accuracy and figures of each class
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

    # Log-loss
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
    confusions = [
        Confusion(
            true=labels[i],
            predicted=labels[j],
            count=int(matrix[i, j]),
            share=float(matrix[i, j] / matrix[i].sum()),
        )
        for i, j in np.argwhere(matrix)
        if i != j
    ]
    return tuple(sorted(confusions, key=lambda cell: (-cell.count, cell.true, cell.predicted)))


def _confused_pairs(labels: Sequence[str], matrix: NDArray[np.int64]) -> tuple[ConfusedPair, ...]:
    pairs = [
        ConfusedPair(
            first=labels[i],
            second=labels[j],
            first_as_second=int(matrix[i, j]),
            second_as_first=int(matrix[j, i]),
            num_rows=int(matrix[i].sum() + matrix[j].sum()),
        )
        for i, j in np.argwhere(np.triu(matrix + matrix.T, 1))
    ]
    return tuple(sorted(pairs, key=lambda pair: (-pair.count, pair.first, pair.second)))

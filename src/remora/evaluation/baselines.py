"""The cheap baseline shown beside every result."""

from __future__ import annotations

import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from remora.data import splits
from remora.data.table import Table
from remora.evaluation.metrics import Metrics, measure
from remora.evaluation.multi_label import as_sets, fit_thresholds, indicators, measure_sets

BYTES_PER_CHARACTER = 150
"""Memory that the baseline needs per training character: 127 to 150 were measured on 10,003 and
5,000 rows of Banking77, 51 to 53 on messages of 1,000 characters."""

MIN_BASELINE_ROWS = 1_000
"""Rows that it gets whatever the memory; fewer would be no baseline."""


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """The metrics and predictions of a near-free classifier on the same rows."""

    metrics: Metrics
    predictions: list[str]
    num_train_rows: int
    num_all_train_rows: int
    seconds: float
    description: str = "TF-IDF + linear SVM"


def train_baseline(
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
    """Train a linear SVM on TF-IDF of character n-grams, and measure it.

    The recipe is fixed: n-grams of 2 to 5 characters within words did best in cross-validation on
    Banking77's training rows. A larger table is sampled to `max_rows` rows, stratified by label,
    and to fewer if they do not fit into `max_bytes`, but to no fewer than `MIN_BASELINE_ROWS`.
    If all texts are blank or there is only one class, it predicts the most frequent label.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.pipeline import make_pipeline

    assert len(train_texts) == len(train_labels) > 0
    assert len(test_texts) == len(test_labels)
    began = time.perf_counter()

    # As many rows as the limits allow
    max_rows = _fitting_rows(train_texts, max_rows, max_bytes)
    rows = splits.sample_rows(train_labels, max_rows, seed)
    texts = [train_texts[i] for i in rows]
    targets = [train_labels[i] for i in rows]

    # Fit, or fall back to the most frequent label
    pipeline = make_pipeline(_tf_idf(), _svm(seed))
    if any(text.strip() for text in texts) and len(set(targets)) > 1:
        with warnings.catch_warnings():  # not quite converged is good enough for a baseline
            warnings.simplefilter("ignore", ConvergenceWarning)
            in_thread(lambda: pipeline.fit(texts, targets))
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


def train_set_baseline(
    train: Table,
    validation: Table,
    test: Table,
    labels: Sequence[str],
    *,
    seed: int = 0,
    max_rows: int = 50_000,
    max_bytes: int | None = None,
) -> Baseline:
    """Train one linear SVM a label on the same TF-IDF, for rows with several labels.

    A label is given where its SVM's decision reaches a threshold: as for the trained model the one
    with the best F1 on the validation rows, 0 without any.

    Args:
        train: Rows to train on; sampled as in `train_baseline`.
        validation: Rows to fit the thresholds on; may be empty.
        test: Rows to measure on.
        labels: The closed label set.
        seed: Of the sample.
        max_rows: Most training rows.
        max_bytes: Memory to keep within.
    """
    from sklearn.multiclass import OneVsRestClassifier
    from sklearn.pipeline import make_pipeline

    began = time.perf_counter()
    rows = splits.sample_rows(train.strata, _fitting_rows(train.texts, max_rows, max_bytes), seed)
    texts = [train.texts[i] for i in rows]
    targets = indicators([train.labels[i] for i in rows], labels)
    several = [i for i in range(len(labels)) if 0 < targets[:, i].sum() < len(rows)]
    always = targets.all(0)
    scores = {
        split: np.tile(np.where(always, np.inf, -np.inf), (len(table), 1))
        for split, table in (("validation", validation), ("test", test))
    }
    if any(text.strip() for text in texts) and several:
        pipeline = make_pipeline(_tf_idf(), OneVsRestClassifier(_svm(seed)))
        with warnings.catch_warnings():  # not quite converged is good enough for a baseline
            warnings.simplefilter("ignore")
            wanted = targets[:, several] if len(several) > 1 else targets[:, several[0]]
            in_thread(lambda: pipeline.fit(texts, wanted))
        for split, table in (("validation", validation), ("test", test)):
            if len(table):
                found = pipeline.decision_function(table.texts)
                scores[split][:, several] = found.reshape(len(table), len(several))
    thresholds = np.zeros(len(labels))
    if len(validation):
        true = indicators(validation.labels, labels)
        finite = np.clip(scores["validation"], -1e3, 1e3)
        thresholds = fit_thresholds(finite, true, default=0.0)
    predictions = as_sets(scores["test"] >= thresholds, labels)
    return Baseline(
        metrics=measure_sets(labels, test.labels, predictions),
        predictions=predictions,
        num_train_rows=len(texts),
        num_all_train_rows=len(train),
        seconds=time.perf_counter() - began,
        description="TF-IDF + linear SVMs" + ("" if len(validation) else ", threshold 0"),
    )


def _fitting_rows(texts: Sequence[str], max_rows: int, max_bytes: int | None) -> int:
    """Return the most rows within a limit and a memory, but no fewer than `MIN_BASELINE_ROWS`."""
    if max_bytes is None:
        return max_rows
    characters_each = max(1, sum(map(len, texts)) // len(texts))
    fitting = max_bytes // (BYTES_PER_CHARACTER * characters_each)
    return min(max_rows, max(MIN_BASELINE_ROWS, fitting))


def _tf_idf() -> Any:
    from sklearn.feature_extraction.text import TfidfVectorizer

    return TfidfVectorizer(
        analyzer="char_wb", ngram_range=(2, 5), sublinear_tf=True, dtype=np.float32
    )


def _svm(seed: int) -> Any:
    from sklearn.svm import LinearSVC

    return LinearSVC(C=1.0, random_state=seed, max_iter=5_000)


def in_thread(compute: Callable[[], object]) -> None:
    """Compute in a thread, so that a signal is answered while a library computes for long in C.

    Python answers signals in the main thread, between its own operations: 15,000 rows of 150 labels
    keep liblinear for ten seconds and more. After a signal what was begun ends with the process.
    """
    failed: list[BaseException] = []

    def run() -> None:
        try:
            compute()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, name="remora-baseline", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.1)  # without a limit, Windows would not answer signals
    if failed:
        raise failed[0]

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
5,000 rows of Banking77, a quarter of it for coefficients, 51 to 53 on messages of 1,000
characters."""

NUMBER_BYTES = 8
"""Of a coefficient, a score, or whether a row has a label: all are 64-bit numbers."""

MIN_BASELINE_ROWS = 1_000
"""Rows that it gets if they fit into the memory at all; fewer would be no baseline."""


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

    Raises:
        torch.OutOfMemoryError: If the coefficients do not fit into the free memory.
    """
    assert len(train_texts) == len(train_labels) > 0
    assert len(test_texts) == len(test_labels)
    began = time.perf_counter()

    # As many rows as the limits allow
    num_classes = len(set(train_labels))
    sample = _sample(
        train_texts,
        train_labels,
        seed,
        max_rows,
        max_bytes,
        # liblinear's coefficients are copied, and so are those that predict
        bytes_per_n_gram=2 * NUMBER_BYTES * (1 if num_classes == 2 else num_classes),
        other_bytes=NUMBER_BYTES * num_classes * len(test_texts),
    )
    targets = [train_labels[i] for i in sample.rows]

    # Fit, or fall back to the most frequent label
    if sample.features is not None and len(set(targets)) > 1:
        svm = _svm(seed)
        with warnings.catch_warnings():  # not quite converged, or few rows a label, is good enough
            warnings.simplefilter("ignore")
            in_thread(lambda: svm.fit(sample.features, targets))
        predictions = [str(label) for label in svm.predict(sample.tf_idf.transform(test_texts))]
    else:
        most_frequent = Counter(targets).most_common(1)[0][0]
        predictions = [most_frequent] * len(test_texts)
    return Baseline(
        metrics=measure(labels, test_labels, predictions),
        predictions=predictions,
        num_train_rows=len(sample.rows),
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

    Raises:
        torch.OutOfMemoryError: If the coefficients do not fit into the free memory.
    """
    from sklearn.multiclass import OneVsRestClassifier

    began = time.perf_counter()
    of_row = NUMBER_BYTES * len(labels)
    sample = _sample(
        train.texts,
        train.strata,
        seed,
        max_rows,
        max_bytes,
        bytes_per_row=2 * of_row,
        bytes_per_n_gram=of_row,  # liblinear's own are those of one label at a time
        other_bytes=2 * of_row * (len(validation) + len(test)),
    )
    num_rows = len(sample.rows)
    targets = indicators([train.labels[i] for i in sample.rows], labels)
    several = [i for i in range(len(labels)) if 0 < targets[:, i].sum() < num_rows]
    always = targets.all(0)
    scores = {
        split: np.tile(np.where(always, np.inf, -np.inf), (len(table), 1))
        for split, table in (("validation", validation), ("test", test))
    }
    if sample.features is not None and several:
        svms = OneVsRestClassifier(_svm(seed))
        with warnings.catch_warnings():  # not quite converged is good enough for a baseline
            warnings.simplefilter("ignore")
            wanted = targets[:, several] if len(several) > 1 else targets[:, several[0]]
            in_thread(lambda: svms.fit(sample.features, wanted))
        for split, table in (("validation", validation), ("test", test)):
            if len(table):
                found = svms.decision_function(sample.tf_idf.transform(table.texts))
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
        num_train_rows=num_rows,
        num_all_train_rows=len(train),
        seconds=time.perf_counter() - began,
        description="TF-IDF + linear SVMs" + ("" if len(validation) else ", threshold 0"),
    )


@dataclass(frozen=True, kw_only=True)
class _Sample:
    """Training rows, and the TF-IDF of their texts."""

    rows: Sequence[int]
    tf_idf: Any
    features: Any  # [rows, n-grams], sparse; None if all texts are blank


def _sample(
    texts: Sequence[str],
    strata: Sequence[str],
    seed: int,
    max_rows: int,
    max_bytes: int | None,
    *,
    bytes_per_row: int = 0,
    bytes_per_n_gram: int,
    other_bytes: int,
) -> _Sample:
    """Return the rows that fit into a memory, but no fewer than `MIN_BASELINE_ROWS`.

    How many n-grams they have is known afterwards only. If their coefficients do not fit, half of
    the rows are tried, which have fewer.

    Args:
        texts: Of all rows.
        strata: What they are stratified by.
        seed: Of the sample.
        max_rows: Most rows.
        max_bytes: Memory to keep within; None if it is unknown.
        bytes_per_row: Memory of a row beside its text.
        bytes_per_n_gram: Memory of an n-gram's coefficients.
        other_bytes: Memory that depends on neither.

    Raises:
        torch.OutOfMemoryError: If the coefficients of the least rows do not fit into what is free.
    """
    import torch

    from remora.runtime import memory

    if max_bytes is not None:
        characters_each = max(1, sum(map(len, texts)) // len(texts))
        of_row = BYTES_PER_CHARACTER * characters_each + bytes_per_row
        max_rows = min(max_rows, max(MIN_BASELINE_ROWS, (max_bytes - other_bytes) // of_row))
    while True:
        rows = splits.sample_rows(strata, max_rows, seed)
        own, tf_idf = [texts[i] for i in rows], _tf_idf()
        if not any(text.strip() for text in own):
            return _Sample(rows=rows, tf_idf=tf_idf, features=None)
        features = tf_idf.fit_transform(own)
        coefficients = bytes_per_n_gram * features.shape[1] + other_bytes
        needed = BYTES_PER_CHARACTER * sum(map(len, own)) + bytes_per_row * len(rows) + coefficients
        if max_bytes is None or needed <= max_bytes or len(rows) <= MIN_BASELINE_ROWS:
            break
        max_rows = max(MIN_BASELINE_ROWS, len(rows) // 2)
    memory.refuse_to_exhaust(torch.device("cpu"), coefficients)
    return _Sample(rows=rows, tf_idf=tf_idf, features=features)


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

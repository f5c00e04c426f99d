"""The cheap baseline shown beside every result."""

from __future__ import annotations

import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from remora.data import splits
from remora.evaluation.metrics import Metrics, measure

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
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.pipeline import make_pipeline
    from sklearn.svm import LinearSVC

    assert len(train_texts) == len(train_labels) > 0
    assert len(test_texts) == len(test_labels)
    began = time.perf_counter()

    # Sample as many rows as the limits allow
    if max_bytes is not None:
        characters_each = max(1, sum(map(len, train_texts)) // len(train_texts))
        fitting = max_bytes // (BYTES_PER_CHARACTER * characters_each)
        max_rows = min(max_rows, max(MIN_BASELINE_ROWS, fitting))
    rows = splits.sample_rows(train_labels, max_rows, seed)
    texts = [train_texts[i] for i in rows]
    targets = [train_labels[i] for i in rows]

    # Fit, or fall back to the most frequent label
    characters = TfidfVectorizer(
        analyzer="char_wb", ngram_range=(2, 5), sublinear_tf=True, dtype=np.float32
    )
    pipeline = make_pipeline(characters, LinearSVC(C=1.0, random_state=seed, max_iter=5_000))
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

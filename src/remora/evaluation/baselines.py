"""The near-free baseline that every result is shown beside."""

from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from remora.evaluation.metrics import Metrics, measure

BYTES_PER_CHARACTER = 150
"""What the baseline takes of memory for each character that it trains on: 127 to 150 were measured
on 10,003 and 5,000 rows of Banking77, 51 to 53 on messages of 1,000 characters."""
MIN_BASELINE_ROWS = 1_000
"""So many rows it gets in any case; fewer would be no baseline."""


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """What a classifier that costs next to nothing gets on the same rows."""

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

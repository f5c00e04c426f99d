"""Logistic regression on features, its strength of regularization chosen by cross-validation."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from remora.data.splits import deal_folds, sample_rows
from remora.runtime import threads

STRENGTHS = (0.001, 0.01, 0.1, 1.0)
"""Values of C, the inverse strength, that are tried; more regularization comes first."""

NUM_FOLDS = 3
MAX_FOLD_ROWS = 3_000
"""Rows that C is chosen on; more hardly change it, and take longer than the fit itself."""

MAX_WORK = 4_000_000_000
"""Most multiplications of one pass over the rows, a few seconds on a CPU. A fit takes up to
`MAX_PASSES` of them."""

MAX_PASSES = 100


def max_rows(width: int, num_labels: int) -> int:
    """Return the most rows of `width` features that are fitted within `MAX_WORK`."""
    return max(1_000, MAX_WORK // (width * num_labels))


def predict(
    train: NDArray[Any], labels: Sequence[str], held_out: NDArray[Any], *, seed: int = 0
) -> list[str]:
    """Fit a logistic regression, and predict the labels of other rows.

    Features are standardized. With one class alone, that is predicted.

    Args:
        train: Features of the training rows, [rows, width].
        labels: Their labels, [rows].
        held_out: Features of the rows to predict, [others, width].
        seed: Deals the rows into folds.

    Raises:
        ValueError: If a feature is not finite.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.preprocessing import StandardScaler

    assert len(train) == len(labels) > 0
    if not (np.isfinite(train).all() and np.isfinite(held_out).all()):
        raise ValueError("features are not finite")
    classes, true = np.unique(np.asarray(labels), return_inverse=True)
    if len(classes) == 1:
        return [str(classes[0])] * len(held_out)
    scaler = StandardScaler()
    features = scaler.fit_transform(train.astype(np.float32))
    with warnings.catch_warnings():  # not quite converged is good enough for a baseline
        warnings.simplefilter("ignore", ConvergenceWarning)
        strength = _strength(features, true, labels, seed)
        with threads.by_itself():
            regression = _fitted(features, true, strength)
    return [
        str(classes[i]) for i in regression.predict(scaler.transform(held_out.astype(np.float32)))
    ]


def _strength(
    features: NDArray[np.float32], true: NDArray[np.int64], labels: Sequence[str], seed: int
) -> float:
    """Return the C whose fits predict most rows of the other folds right."""
    rows = np.array(sample_rows(labels, MAX_FOLD_ROWS, seed))
    features, true = features[rows], true[rows]
    folds = [
        (others, own)
        for others, own in deal_folds(true, NUM_FOLDS, seed)
        if len(own) and len(np.unique(true[others])) > 1
    ]

    def right(strength: float, fold: tuple[NDArray[np.int64], NDArray[np.int64]]) -> int:
        others, own = fold
        regression = _fitted(features[others], true[others], strength)
        return int((regression.predict(features[own]) == true[own]).sum())

    each = list(product(STRENGTHS, folds))
    found = list(threads.each(lambda pair: right(*pair), each, 3 * features.nbytes))
    return STRENGTHS[int(np.array(found).reshape(len(STRENGTHS), -1).sum(1).argmax())]


def _fitted(features: NDArray[np.float32], true: NDArray[np.int64], strength: float) -> Any:
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=strength, max_iter=MAX_PASSES, tol=1e-3).fit(features, true)

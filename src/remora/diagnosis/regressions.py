"""Cross-validated regressions, and the pooling of judges."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


def pool(parts: Sequence[NDArray[np.float64]], true: NDArray[np.int64]) -> NDArray[np.float64]:
    """Pool the scores of judges: softmax(sum of weight * score), [rows, labels].

    The weights minimize the log-loss, so a weak judge counts little and the result is calibrated.
    With one weight per judge, fitted on all rows, the rows stay out of sample for practical
    purposes. With log-probabilities as scores it is a logarithmic pool: Genest and Zidek
    1986, https://doi.org/10.1214/ss/1177013825
    """
    from scipy.optimize import minimize

    scores = np.stack(parts)  # [judges, rows, labels]

    def pooled(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        total = np.tensordot(weights, scores, axes=1)
        scaled = np.exp(total - total.max(1, keepdims=True))
        result: NDArray[np.float64] = scaled / scaled.sum(1, keepdims=True)
        return result

    def log_loss(weights: NDArray[np.float64]) -> float:
        chosen = pooled(weights)[np.arange(len(true)), true]
        return float(-np.log(np.maximum(chosen, 1e-12)).mean())

    start = np.full(len(parts), 1 / len(parts))
    found = minimize(log_loss, start, bounds=[(0.0, 100.0)] * len(parts), method="L-BFGS-B")
    return pooled(found.x)


def ridge(
    features: Any,
    penalty: float,
    true: NDArray[np.int64],
    num_labels: int,
    folds: Sequence[tuple[NDArray[np.int64], NDArray[np.int64]]],
) -> NDArray[np.float64]:
    """Return out-of-fold scores of ridge regressions, [rows, labels]: near 1 for the label."""
    from sklearn.linear_model import Ridge

    targets = np.eye(num_labels, dtype=np.float32)[true]
    result = np.empty((len(true), num_labels))
    solver = "cholesky" if isinstance(features, np.ndarray) else "sparse_cg"
    for others, own in folds:
        regression = Ridge(alpha=penalty, solver=solver, tol=1e-2)
        regression.fit(features[others], targets[others])
        result[own] = regression.predict(features[own])
    return result


def logistic(
    features: Any,
    true: NDArray[np.int64],
    num_labels: int,
    folds: Sequence[tuple[NDArray[np.int64], NDArray[np.int64]]],
) -> NDArray[np.float64]:
    """Return out-of-fold log-probabilities of logistic regressions, [rows, labels]."""
    import warnings

    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    result = np.full((len(true), num_labels), 1e-9)
    for others, own in folds:
        known = np.unique(true[others])
        if len(known) == 1:
            result[own, known[0]] = 1
            continue
        regression = LogisticRegression(C=10.0, max_iter=100)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            regression.fit(features[others], true[others])
        result[np.ix_(own, regression.classes_)] = regression.predict_proba(features[own])
    logs: NDArray[np.float64] = np.log(np.maximum(result, 1e-12))
    return logs

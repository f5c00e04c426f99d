"""Cross-validated regressions, and the pooling of judges."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

MOST_LOG_ODDS = 10.0
"""Of a label that every row has, or none, in a fold's other rows."""


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
    targets: NDArray[np.float32],
    folds: Sequence[tuple[NDArray[np.int64], NDArray[np.int64]]],
) -> NDArray[np.float64]:
    """Return out-of-fold scores of ridge regressions, [rows, labels]: near 1 for a row's labels.

    `targets` has 1 for each label of a row, else 0, [rows, labels].
    """
    from sklearn.linear_model import Ridge

    result = np.empty(targets.shape)
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


def logistic_of_each(
    features: Any,
    given: NDArray[np.int64],
    folds: Sequence[tuple[NDArray[np.int64], NDArray[np.int64]]],
) -> NDArray[np.float64]:
    """Return out-of-fold log-odds of a logistic regression for each label, [rows, labels].

    One label against the rest; `given` has 1 for each label of a row, else 0, [rows, labels].
    """
    import warnings

    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    result = np.empty(given.shape)
    for others, own in folds:
        for label, known in enumerate(given[others].T):
            if len(np.unique(known)) == 1:  # every row has it, or none does
                result[own, label] = MOST_LOG_ODDS if known[0] else -MOST_LOG_ODDS
                continue
            regression = LogisticRegression(C=10.0, tol=1e-3)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)
                regression.fit(features[others], known)
            result[own, label] = regression.decision_function(features[own])
    return result.clip(-MOST_LOG_ODDS, MOST_LOG_ODDS)


def pool_each(parts: Sequence[NDArray[np.float64]], given: NDArray[np.int64]) -> Any:
    """Pool the scores of judges for each label by itself: probabilities, [rows, labels].

    The logistic function of a weighted sum of the scores, the log-odds of the label's share of the
    rows, and a constant, fitted on all labels of all rows together (Platt 1999): labels of few rows
    have too few of their own.
    """
    from sklearn.linear_model import LogisticRegression

    shares = (given.sum(0) + 0.5) / (len(given) + 1)
    prior = np.broadcast_to(np.log(shares / (1 - shares)), given.shape)
    features = np.stack([*parts, prior], axis=-1).reshape(-1, len(parts) + 1)
    fitted = LogisticRegression(C=1e3, max_iter=1_000).fit(features, given.ravel())
    return fitted.predict_proba(features)[:, 1].reshape(given.shape)

"""Cross-validated regressions, and the pooling of judges."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from remora.runtime import threads

Fold = tuple[NDArray[np.int64], NDArray[np.int64]]
"""The rows to fit on, and the rows to predict."""

Predict = Callable[[Fold], NDArray[np.float64]]

COPIES = 3
"""Of a fold's rows that a fit holds at a time: taken out, centered, and one to spare."""

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
    folds: Sequence[Fold],
    advance: Callable[[int], object] = lambda count: None,
) -> NDArray[np.float64]:
    """Return out-of-fold scores of ridge regressions, [rows, labels]: near 1 for a row's labels.

    `targets` has 1 for each label of a row, else 0, [rows, labels].
    """
    from sklearn.linear_model import Ridge

    solver = "cholesky" if isinstance(features, np.ndarray) else "sparse_cg"

    def predict(fold: Fold) -> NDArray[np.float64]:
        others, own = fold
        regression = Ridge(alpha=penalty, solver=solver, tol=1e-2)
        regression.fit(features[others], targets[others])
        found: NDArray[np.float64] = regression.predict(features[own])
        return found.reshape(len(own), -1)

    return _by_fold(predict, features, folds, targets.shape, advance)


def logistic(
    features: Any,
    true: NDArray[np.int64],
    num_labels: int,
    folds: Sequence[Fold],
    advance: Callable[[int], object] = lambda count: None,
) -> NDArray[np.float64]:
    """Return out-of-fold log-probabilities of logistic regressions, [rows, labels]."""
    from sklearn.linear_model import LogisticRegression

    def predict(fold: Fold) -> NDArray[np.float64]:
        others, own = fold
        result = np.full((len(own), num_labels), 1e-9)
        known = np.unique(true[others])
        if len(known) == 1:
            result[:, known[0]] = 1
            return result
        regression = LogisticRegression(C=10.0, max_iter=100)
        regression.fit(features[others], true[others])
        result[:, regression.classes_] = regression.predict_proba(features[own])
        return result

    result = _by_fold(predict, features, folds, (len(true), num_labels), advance)
    logs: NDArray[np.float64] = np.log(np.maximum(result, 1e-12))
    return logs


def logistic_of_each(
    features: Any,
    given: NDArray[np.int64],
    folds: Sequence[Fold],
    advance: Callable[[int], object] = lambda count: None,
) -> NDArray[np.float64]:
    """Return out-of-fold log-odds of a logistic regression for each label, [rows, labels].

    One label against the rest; `given` has 1 for each label of a row, else 0, [rows, labels].
    """
    from sklearn.linear_model import LogisticRegression

    def predict(fold: Fold) -> NDArray[np.float64]:
        others, own = fold
        result = np.empty((len(own), given.shape[1]))
        for label, known in enumerate(given[others].T):
            if len(np.unique(known)) == 1:  # every row has it, or none does
                result[:, label] = MOST_LOG_ODDS if known[0] else -MOST_LOG_ODDS
                continue
            regression = LogisticRegression(C=10.0, tol=1e-3)
            regression.fit(features[others], known)
            result[:, label] = regression.decision_function(features[own])
        return result

    result = _by_fold(predict, features, folds, given.shape, advance)
    return result.clip(-MOST_LOG_ODDS, MOST_LOG_ODDS)


def _by_fold(
    predict: Predict,
    features: Any,
    folds: Sequence[Fold],
    shape: tuple[int, ...],
    advance: Callable[[int], object],
) -> NDArray[np.float64]:
    """Return what is predicted of each row by the fold that holds it, [rows, labels]."""
    from sklearn.exceptions import ConvergenceWarning

    result = np.empty(shape)
    item_bytes = COPIES * (features.nbytes if isinstance(features, np.ndarray) else 0)
    with warnings.catch_warnings():  # not quite converged is good enough for a judge
        warnings.simplefilter("ignore", ConvergenceWarning)
        predicted = threads.each(predict, folds, item_bytes)
        for (_, own), found in zip(folds, predicted, strict=True):
            result[own] = found
            advance(len(own))
    return result


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

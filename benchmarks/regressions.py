"""Time of logistic regressions by how the threads of BLAS are used, alone and beside other work.

numpy and scipy bring an OpenBLAS each. The folds of a judge are fitted to the words of
`sample:support`, sparse, and to as many random columns as a small model's hidden states have. All
arms fit the same rows and must find the same coefficients.

    python benchmarks/regressions.py
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

import workload
from busy import other_work
from remora.data.dataset import load_data
from remora.data.splits import deal_folds
from remora.diagnosis.features import tfidf
from remora.runtime import threads

WIDTH = 2_880
LOADS = ("none", "one")


def main() -> None:
    from remora.config import TrainConfig

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folds", type=int, default=10)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = load_data(TrainConfig("sample:support", model="nano")).train
    _, true = np.unique(rows.labels, return_inverse=True)
    folds = [others for others, _ in deal_folds(true, options.folds, 0)]
    made = np.random.default_rng(0)
    centers = made.normal(size=(true.max() + 1, WIDTH))[true]
    words = tfidf(rows.texts, pairs=False)
    dense = (0.3 * centers + made.normal(size=centers.shape)).astype(np.float32)
    kinds = {"sparse": words, "dense": dense}
    runs = []
    for number in range(options.rounds):
        for load in LOADS:
            with other_work(int(load == "one"), 0):
                for kind, features in kinds.items():
                    runs += round_of(features, true, folds, number, {"load": load, "kind": kind})
    workload.write("regressions", {"folds": options.folds, "runs": runs})
    show(runs)


def round_of(
    features: Any, true: Any, folds: Sequence[Any], number: int, about: dict[str, str]
) -> list[dict[str, Any]]:
    """Fit all folds with each arm, in an order of the round's own."""

    def fit(others: Any) -> Any:
        from sklearn.linear_model import LogisticRegression

        return LogisticRegression(C=10.0, max_iter=100).fit(features[others], true[others]).coef_

    runs: list[dict[str, Any]] = []
    found: list[Any] = []
    for arm in random.Random(number).sample(list(ARMS), len(ARMS)):
        began = time.perf_counter()
        coefficients = np.stack(ARMS[arm](fit, folds))
        runs.append({**about, "round": number, "arm": arm, "seconds": time.perf_counter() - began})
        found.append(coefficients)
    assert all(np.allclose(each, found[0], atol=1e-2) for each in found)
    return runs


def as_it_is(fit: Callable[[Any], Any], folds: Sequence[Any]) -> list[Any]:
    return [fit(others) for others in folds]


def numpys_alone(fit: Callable[[Any], Any], folds: Sequence[Any]) -> list[Any]:
    with threads.by_itself():
        return as_it_is(fit, folds)


def one_each(fit: Callable[[Any], Any], folds: Sequence[Any]) -> list[Any]:
    return list(threads.each(fit, folds))


ARMS = {
    "as it is": as_it_is,
    "threads for numpy's alone": numpys_alone,
    "one each, side by side": one_each,
}


def show(runs: Sequence[dict[str, Any]]) -> None:
    """Print the median seconds of each arm."""
    for kind in ("sparse", "dense"):
        for arm in ARMS:
            cells = []
            for load in LOADS:
                own = [
                    run["seconds"]
                    for run in runs
                    if (run["kind"], run["arm"], run["load"]) == (kind, arm, load)
                ]
                cells.append(f"{load} {statistics.median(own):6.1f} s")
            print(f"{kind:7} {arm:26} {'  '.join(cells)}")


if __name__ == "__main__":
    main()

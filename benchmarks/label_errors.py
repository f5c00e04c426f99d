"""Wrong labels found: 5 % of the training labels flipped, Remora's ranking beside cleanlab's.

CLINC150 with craftgpt-5m, which has not seen it, and Banking77 with nano; all training rows. The
tokenizer of craftgpt-5m has no digits, so two labels of CLINC150 get other texts. Peers: logistic
regression on TF-IDF, five folds, through cleanlab; and cleanlab's default ranking, by
self-confidence, of the probabilities that Remora ranks by. Labels that were wrong before the flips
count as right.

    python benchmarks/label_errors.py
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from typing import Any

import numpy as np

import workload

SETS = {"clinc150": workload.SHARED / "models" / "craftgpt-5m", "banking77": "nano"}
LABEL_TEXTS = {"rollover_401k": "rollover retirement plan", "w2": "wage statement"}
FLIPPED = 0.05
RECALL = 0.85
WAYS = ("Remora", "cleanlab on the same", "cleanlab on TF-IDF")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    options = parser.parse_args()

    from remora.config import TrainConfig
    from remora.diagnosis import out_of_sample
    from remora.runtime.reporter import Reporter

    runs = []
    for name in options.sets:
        texts, labels = workload.intents(name, "train")
        settings = TrainConfig(
            name,
            model=str(SETS[name]),
            label_texts=LABEL_TEXTS if name == "clinc150" else {},
            device="cpu",
            precision="float32",
        )
        features = out_of_sample.frozen_features(texts, sorted(set(labels)), settings, Reporter())
        for seed in options.seeds:
            runs.append(measure(settings, features, texts, labels, seed))
            print(runs[-1], file=sys.stderr, flush=True)
    columns = ("average_precision", "precision_at_recall", "recall_in_first_tenth")
    columns += ("list_precision", "list_recall", "listed")
    rows = []
    for name in options.sets:
        for way in WAYS:
            own = [run["ways"][way] for run in runs if run["set"] == name]
            means = [statistics.mean(each[column] for each in own) for column in columns]
            spread = [each["average_precision"] for each in own]
            shown = [f"{value:.3f}" for value in means[:-1]] + [f"{means[-1]:,.0f}"]
            rows.append([name, way, *shown, f"{min(spread):.3f} to {max(spread):.3f}"])
    header = ["set", "ranked by", "average precision", f"precision at recall {RECALL}"]
    header += [
        "recall in the first 10 %",
        "list: precision",
        "recall",
        "rows",
        "range of the first",
    ]
    workload.print_table(header, rows)
    workload.write("label_errors", {"flipped": FLIPPED, "runs": runs})


def measure(
    settings: Any, features: Any, texts: list[str], labels: list[str], seed: int
) -> dict[str, Any]:
    """Flip labels, rank all rows, and say where the flipped ones are."""
    from cleanlab.filter import find_label_issues
    from cleanlab.rank import get_label_quality_scores

    from remora.data.dataset import dataset_from_lists
    from remora.diagnosis import diagnose, label_noise, out_of_sample
    from remora.runtime.reporter import Reporter

    names = sorted(set(labels))
    given = np.array([names.index(label) for label in labels])
    generator = np.random.default_rng(seed)
    flipped = np.zeros(len(given), dtype=bool)
    flipped[generator.choice(len(given), round(FLIPPED * len(given)), replace=False)] = True
    shift = generator.integers(1, len(names), flipped.sum())
    given[flipped] = (given[flipped] + shift) % len(names)

    start = time.perf_counter()
    out_of_sample.frozen_features = lambda *_: features  # computed once, since no label is in them
    dataset = dataset_from_lists(texts, [names[i] for i in given], validation_fraction=0.0, seed=0)
    judged = out_of_sample.judge(dataset, settings, "fast", None, Reporter())
    noise = label_noise.estimate(judged.probabilities, given)
    seconds = time.perf_counter() - start
    peer = tfidf_probabilities(texts, given)
    ways = {
        "Remora": (noise.scores, noise.p_wrong >= diagnose.LIST_FROM),
        "cleanlab on the same": (
            -get_label_quality_scores(given, judged.probabilities),
            find_label_issues(given, judged.probabilities, n_jobs=1),
        ),
        "cleanlab on TF-IDF": (
            -get_label_quality_scores(given, peer),
            find_label_issues(given, peer, n_jobs=1),
        ),
    }
    return {
        "set": settings.data,
        "seed": seed,
        "rows": len(given),
        "flipped": int(flipped.sum()),
        "remora_seconds": seconds,
        "ways": {way: figures(*found, flipped) for way, found in ways.items()},
    }


def tfidf_probabilities(texts: list[str], given: Any) -> Any:
    """Return out-of-sample probabilities as anyone would get them, [rows, labels]."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import cross_val_predict

    features = TfidfVectorizer(sublinear_tf=True).fit_transform(texts)
    regression = LogisticRegression(C=10.0, max_iter=300)
    return cross_val_predict(regression, features, given, cv=5, method="predict_proba")


def figures(scores: Any, listed: Any, flipped: Any) -> dict[str, float]:
    """Return what a ranking and a list are worth."""
    from sklearn.metrics import average_precision_score, precision_recall_curve

    precision, recall, _ = precision_recall_curve(flipped, scores)
    first = np.argsort(-scores, kind="stable")[: len(scores) // 10]
    return {
        "average_precision": float(average_precision_score(flipped, scores)),
        "precision_at_recall": float(precision[recall >= RECALL].max()),
        "recall_in_first_tenth": float(flipped[first].sum() / flipped.sum()),
        "listed": int(listed.sum()),
        "list_precision": float(flipped[listed].mean()),
        "list_recall": float(flipped[listed].sum() / flipped.sum()),
    }


if __name__ == "__main__":
    main()

"""Wrong labels found where rows have several: errors planted in CLINC150's messages in pairs.

The rows are those that several_labels.py trains on. A share of them gets one error: a label is
taken away, added, or replaced by another, each kind as often as the others. Then the labels that
`diagnose` lists are compared with those planted. Labels that were wrong before count as right. No
run is trained, since the judges do not need one.

    python benchmarks/wrong_label_sets.py
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

import several_labels
import workload
from remora.config import TrainConfig
from remora.data.dataset import load_dataset
from remora.data.label_sets import labels_in, set_text
from remora.data.table import Table
from remora.diagnosis import duplicates, label_noise, out_of_sample
from remora.diagnosis import several_labels as diagnosis
from remora.evaluation.multi_label import indicators
from remora.runtime.reporter import Reporter

KINDS = ("taken away", "added", "replaced")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="nano")
    parser.add_argument("--method", default="fast", choices=("fast", "frozen", "tfidf"))
    parser.add_argument("--intents", type=int, default=30, help="the first ones by name")
    parser.add_argument("--rows", type=int, default=1_500)
    parser.add_argument("--wrong", type=float, default=0.08, help="share of the rows")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/several-labels"))
    options = parser.parse_args()
    found = [measure(options, seed) for seed in options.seeds]
    names = ["listed", "precision", "recall", "suggestion right", *KINDS, "estimated", "seconds"]
    rows = [[str(each["seed"]), *(_shown(each[name]) for name in names)] for each in found]
    means = (statistics.mean(each[name] for each in found) for name in names)
    workload.print_table(["seed", *names], [*rows, ["mean", *map(_shown, means)]])
    workload.write(
        f"wrong-label-sets-{Path(options.model).name}-{options.method}-{options.intents}",
        {k: v for k, v in vars(options).items() if k != "runs"} | {"found": found},
    )


def measure(options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Plant errors, diagnose, and count the rows and labels that are found."""
    folder = options.runs / f"data-{options.intents}-{options.rows}-{seed}"
    sizes = {"train": options.rows, "val": 300, "test": 1_000}
    several_labels.write_rows(folder, options.intents, sizes, seed)
    path = folder / "train.jsonl"
    dataset = load_dataset(str(path), validation_fraction=0.0, test_fraction=0.0)
    right, kinds = dataset.train, dict[int, str]()
    rows = plant(right, list(dataset.labels), options.wrong, seed, kinds)
    settings = TrainConfig(
        str(path),
        model=options.model,
        multi_label="on",
        answer="classes",
        seed=seed,
        device="cpu",
        precision="float32",
    )

    begun = time.perf_counter()
    probabilities, judges = out_of_sample.judge_sets(
        replace(dataset, train=rows),
        settings,
        options.method,
        None,
        Reporter(),
    )
    given = indicators(rows.labels, dataset.labels)
    noise = label_noise.estimate_sets(probabilities, given)
    neighbours, _ = duplicates.nearest(rows.texts, duplicates.NUM_NEIGHBOURS)
    same = duplicates.same(rows.texts)
    conflicts = [(i, j) for i, j in same if rows.labels[i] != rows.labels[j]]
    doubted = diagnosis.list_labels(probabilities, judges, given, noise, conflicts)
    suspects = diagnosis.find_suspects(
        rows, dataset.labels, probabilities, given, noise, doubted, neighbours
    )
    seconds = time.perf_counter() - begun

    listed = {each.row - 1: each.suggested for each in suspects}
    hits = listed.keys() & kinds.keys()
    of_kind = {
        kind: float(np.mean([row in listed for row, each in kinds.items() if each == kind]))
        for kind in KINDS
    }
    return {
        "seed": seed,
        "planted": len(kinds),
        "listed": len(listed),
        "precision": len(hits) / max(1, len(listed)),
        "recall": len(hits) / len(kinds),
        "suggestion right": sum(listed[row] == right.labels[row] for row in hits) / len(kinds),
        **of_kind,
        "estimated": (noise.rate * given.sum() + noise.num_missing) / given.sum(),
        "wrong": noise.rate,
        "wrong_interval": noise.interval,
        "missing": noise.num_missing / given.sum(),
        "seconds": seconds,
    }


def plant(rows: Table, labels: list[str], share: float, seed: int, kinds: dict[int, str]) -> Table:
    """Return the rows with errors; which row has which is added to `kinds`."""
    rng = random.Random(f"wrong {seed}")
    sets = [set(labels_in(text)) for text in rows.labels]
    for row in rng.sample(range(len(rows)), round(share * len(rows))):
        kind = rng.choice(KINDS) if sets[row] else "added"
        kinds[row] = kind
        others = [label for label in labels if label not in sets[row]]
        if kind != "added":
            sets[row].remove(rng.choice(sorted(sets[row])))
        if kind != "taken away":
            sets[row].add(rng.choice(others))
    return replace(rows, labels=[set_text(each) for each in sets])


def _shown(value: float) -> str:
    return f"{value:.1%}" if value <= 1 else f"{value:.0f}"


if __name__ == "__main__":
    main()

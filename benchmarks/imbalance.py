"""Classes of very different size: macro-F1 with and without balanced class weights, on Banking77.

Of `--intents` intents half keep `--rows` training rows and the others a ninth of them; which ones,
the seed draws. The test rows are all 40 of each intent. Finished runs are read, not repeated, and
what is cut off resumes.

    python benchmarks/imbalance.py
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

import workload
from remora.config import TrainConfig
from remora.display import TerminalReporter
from remora.training.run import train

RATIO = 9
WEIGHTS = {"same": None, "balanced": "balanced"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="nano")
    parser.add_argument("--intents", type=int, default=10)
    parser.add_argument("--rows", type=int, default=90, help="of each frequent intent")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-steps", type=int, default=120)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/imbalance"))
    options = parser.parse_args()
    options.runs.mkdir(parents=True, exist_ok=True)
    found = []
    for seed in options.seeds:
        given = options.runs / f"{options.intents}-{options.rows}-{seed}"
        rare = thinned(options.intents, options.rows, seed, given)
        for name, class_weights in WEIGHTS.items():
            directory = options.runs / f"{given.name}-{name}"
            if not (directory / "evaluation.json").is_file():
                config = TrainConfig(
                    str(given),
                    model=options.model,
                    batch_size=options.batch_size,
                    max_steps=options.max_steps,
                    class_weights=class_weights,
                    seed=seed,
                    baselines=("svm",),
                    name=directory.name,
                    output=options.runs,
                )
                reporter = TerminalReporter()
                with reporter.live():
                    train(config, reporter=reporter)
            found.append({"seed": seed, "weights": name, **measured(directory, rare)})
    header = ["weights", "seed", "macro-F1", "frequent", "rare", "accuracy", "macro-F1 of the SVM"]
    names = ["macro_f1", "frequent", "rare", "accuracy", "svm"]
    rows = [
        [each["weights"], str(each["seed"]), *(f"{each[name]:.2%}" for name in names)]
        for each in sorted(found, key=lambda each: each["weights"], reverse=True)
    ]
    for weights in WEIGHTS:
        own = [each for each in found if each["weights"] == weights]
        means = (statistics.mean(each[name] for each in own) for name in names)
        rows.append([weights, "mean", *(f"{mean:.2%}" for mean in means)])
    workload.print_table(header, rows)
    workload.write(f"imbalance-{options.intents}-{options.rows}", {"ratio": RATIO, "runs": found})


def thinned(num_intents: int, num_rows: int, seed: int, folder: Path) -> set[str]:
    """Write the thinned training rows and the test rows; return the intents that are rare."""
    train = list(zip(*workload.banking77("train"), strict=True))
    test = list(zip(*workload.banking77("test"), strict=True))
    draw, counts = random.Random(seed), Counter(label for _, label in train)
    intents = draw.sample(sorted(each for each in counts if counts[each] >= num_rows), num_intents)
    rare = set(intents[::2])
    draw.shuffle(train)
    left = {intent: num_rows // RATIO if intent in rare else num_rows for intent in intents}
    kept = []
    for text, label in train:
        if left.get(label):
            left[label] -= 1
            kept.append((text, label))
    folder.mkdir(exist_ok=True)
    for name, rows in (("train", kept), ("test", [row for row in test if row[1] in left])):
        with (folder / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "category"])
            writer.writerows(rows)
    return rare


def measured(directory: Path, rare: set[str]) -> dict[str, Any]:
    """Return a run's macro-F1 over all, frequent and rare intents, accuracy, and the SVM's F1."""
    figures = json.loads((directory / "evaluation.json").read_text("utf-8"))
    metrics = figures["metrics"]
    f1: dict[bool, list[float]] = {False: [], True: []}
    for each in metrics["per_class"]:
        f1[each["label"] in rare].append(each["f1"])
    return {
        "macro_f1": metrics["macro_f1"],
        "frequent": statistics.mean(f1[False]),
        "rare": statistics.mean(f1[True]),
        "accuracy": metrics["accuracy"],
        "svm": figures["baseline"]["metrics"]["macro_f1"],
        "steps": figures["num_steps"],
        "train_seconds": figures["train_seconds"],
    }


if __name__ == "__main__":
    main()

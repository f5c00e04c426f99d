"""What corrected labels are worth: trained on clean labels, on flipped ones, and on corrected ones.

The sample table, its planted errors put right first; then 20 % of the training labels are flipped.
`diagnose` lists rows, and of those listed that were flipped the true label is given as decision and
taken back with `--apply`. Rows that are not listed stay wrong. All runs have nano as their base.

    python benchmarks/relabelled.py
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import workload

FLIPPED = 0.2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    from remora.data import sources
    from remora.data.dataset import load_dataset

    dataset = load_dataset("sample:support", validation_fraction=0.0)
    rows, right = dataset.train, sources.planted_errors("sample:support")
    true = [right.get(number, label) for number, label in enumerate(rows.labels, 1)]
    generator = np.random.default_rng(options.seed)
    flipped = list(true)
    chosen = generator.choice(len(true), round(FLIPPED * len(true)), replace=False)
    for row in chosen:
        others = [label for label in dataset.labels if label != true[row]]
        flipped[row] = others[generator.integers(len(others))]

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write(folder / "test.csv", dataset.test.texts, dataset.test.labels)
        write(folder / "true.csv", rows.texts, true)
        write(folder / "flipped.csv", rows.texts, flipped)
        accuracy = {name: train(folder, name, options) for name in ("true", "flipped")}
        remora("diagnose", folder / "flipped")
        listed = decide(folder / "flipped" / "relabel.csv", set(chosen.tolist()), true)
        remora(
            *("diagnose", folder / "flipped", "--apply", folder / "flipped" / "relabel.csv"),
            *("--output", folder / "corrected.csv"),
        )
        accuracy["corrected"] = train(folder, "corrected", options)
    lost = accuracy["true"] - accuracy["flipped"]
    recovered = (accuracy["corrected"] - accuracy["flipped"]) / lost
    workload.print_table(
        ["labels", "test accuracy"], [[name, f"{value:.2%}"] for name, value in accuracy.items()]
    )
    print(
        f"\n{len(chosen)} labels flipped; {listed['rows']} rows listed, {listed['found']} of them "
        f"flipped; {recovered:.0%} of the lost accuracy recovered"
    )
    settings = {"flipped": FLIPPED, "epochs": options.epochs, "seed": options.seed}
    found: dict[str, Any] = {"accuracy": accuracy, "recovered": recovered, **listed}
    workload.write("relabelled", {"settings": settings, "num_flipped": len(chosen), **found})


def write(path: Path, texts: list[str], labels: list[str]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *zip(texts, labels, strict=True)])


def train(folder: Path, name: str, options: argparse.Namespace) -> float:
    """Train on NAME.csv and return the accuracy on the test rows."""
    remora(
        *("train", folder / f"{name}.csv", "--test", folder / "test.csv", "--model", "nano"),
        *("--epochs", options.epochs, "--seed", options.seed, "--device", "cpu"),
        *("--output", folder, "--name", name),
    )
    found = json.loads((folder / name / "evaluation.json").read_text(encoding="utf-8"))
    print(name, found["metrics"]["accuracy"], file=sys.stderr, flush=True)
    return float(found["metrics"]["accuracy"])


def decide(path: Path, flipped: set[int], true: list[str]) -> dict[str, int]:
    """Write the true label of each flipped row that is listed into the last column."""
    with path.open(encoding="utf-8", newline="") as file:
        records = list(csv.DictReader(file))
    found = 0
    for record in records:
        row = int(record["row"]) - 1
        if row in flipped:
            record["decision"] = true[row]
            found += 1
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(records[0]))
        writer.writeheader()
        writer.writerows(records)
    return {"rows": len(records), "found": found}


def remora(*arguments: Any) -> None:
    command = [sys.executable, "-m", "remora", *map(str, arguments)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "NO_COLOR": "1"}
    )
    if done.returncode != 0:
        raise SystemExit(f"{done.stderr}\nerror: {' '.join(command)} ended in {done.returncode}")


if __name__ == "__main__":
    main()

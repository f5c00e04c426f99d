"""Whether the default learning rate, rank and epochs hold: other settings of the same run beside.

Every run is one of `remora train` on Banking77 with its defaults, but for what is named. Settings
are compared by validation accuracy, so the test rows stay unseen: one of each intent is scored
where a run wants test rows. Finished runs are read, not repeated, and what is cut off resumes, so
the runs can be made a few at a time:

    python benchmarks/defaults.py --models smollm2 --rows-per-class 10 --epochs 3 10 --rates 1
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
from pathlib import Path
from typing import Any

import real_models
import workload
from remora.config import TrainConfig
from remora.config.schedule import default_learning_rate
from remora.display import TerminalReporter
from remora.training.run import train

BANKING77 = workload.SHARED / "data" / "banking77"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    models = [*real_models.MODELS, "nano"]
    parser.add_argument("--models", nargs="+", default=["nano", "smollm2"], choices=models)
    parser.add_argument("--rows-per-class", default="10", help="a number, or all")
    parser.add_argument("--rates", nargs="+", type=float, default=[0.5, 1, 2], metavar="FACTOR")
    parser.add_argument("--ranks", nargs="+", type=int, default=[16])
    parser.add_argument("--epochs", nargs="+", type=float, default=[3.0])
    parser.add_argument("--list-labels", action="store_true", help="list them in the prompt")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/defaults"))
    options = parser.parse_args()
    options.runs.mkdir(parents=True, exist_ok=True)
    test = one_of_each(options.runs / "test.csv")
    tried = itertools.product(
        options.models, options.epochs, options.rates, options.ranks, options.seeds
    )
    per_class = None if options.rows_per_class == "all" else int(options.rows_per_class)
    found = {}
    for model, epochs, factor, rank, seed in tried:
        path = model if model == "nano" else str(real_models.fetch(model))
        rate = factor * default_learning_rate(WIDTHS[model], "lora")
        name = f"{model}-{options.rows_per_class}-{epochs:g}-epochs-{rate:.2g}-r{rank}-{seed}"
        name += "-listed" * options.list_labels
        config = TrainConfig(
            str(BANKING77 / "train.csv"),
            test=str(test),
            model=path,
            rows_per_class=per_class,
            learning_rate=rate,
            rank=rank,
            alpha=2 * rank,
            list_labels=options.list_labels,
            epochs=epochs,
            seed=seed,
            baselines=("none",),
            name=name,
            output=options.runs,
        )
        if not (options.runs / name / "evaluation.json").is_file():
            reporter = TerminalReporter()
            with reporter.live():
                train(config, reporter=reporter)
        found[name] = evaluations(options.runs / name)
        print(f"{name}: {found[name]}", flush=True)
    rows = [
        [name, f"{max(each):.2%}", f"{1 + each.index(max(each))} of {len(each)}"]
        for name, each in found.items()
    ]
    workload.print_table(["run", "validation accuracy", "best evaluation"], rows)
    workload.write(f"defaults-{options.rows_per_class}", found)


WIDTHS = {"nano": 256, "smollm2": 576, "gemma3-270m": 640}


def one_of_each(path: Path) -> Path:
    """Write the first test row of each intent, and return where."""
    with (BANKING77 / "test.csv").open(encoding="utf-8", newline="") as file:
        rows = {row["category"]: row for row in reversed(list(csv.DictReader(file)))}
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["text", "category"])
        writer.writeheader()
        writer.writerows(rows.values())
    return path


def evaluations(directory: Path) -> list[Any]:
    """Return the validation accuracy of each evaluation of a run."""
    lines = (directory / "metrics.jsonl").read_text("utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    return [r["validation_accuracy"] for r in records if "validation_accuracy" in r]


if __name__ == "__main__":
    main()

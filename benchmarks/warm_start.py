"""Labels that join a trained classifier: `train --from RUN` beside training anew, on Banking77.

A run learns all intents but seven. Then all 77 are trained, once beginning with its adapter and
once anew. All are measured on the same test rows, those of the 70 old intents and of the seven new
ones apart. Finished runs are read, not repeated, and what is cut off resumes.

    python benchmarks/warm_start.py
"""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path
from typing import Any

import workload
from remora.config import TrainConfig
from remora.display import TerminalReporter
from remora.training.run import train

NUM_NEW = 7


def main() -> None:
    parser = workload.parser(__doc__, "warm-start")
    parser.add_argument("--rates", nargs="+", type=float, default=[None], metavar="RATE")
    parser.add_argument("--epochs", nargs="+", type=float, default=[None])
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.runs.mkdir(parents=True, exist_ok=True)
    intents = sorted({*workload.banking77("train")[1]})
    new = set(random.Random(options.seed).sample(intents, NUM_NEW))
    old_train, old_test = (
        without(split, new, options.runs / f"old-{split}-{options.seed}.csv")
        for split in ("train", "test")
    )
    whole = workload.SHARED / "data" / "banking77"

    def run(name: str, data: Path, test: Path, **settings: Any) -> Path:
        directory = options.runs / f"{name}-{options.seed}"
        if not (directory / "evaluation.json").is_file():
            config = TrainConfig(
                str(data),
                test=str(test),
                model=options.model,
                seed=options.seed,
                baselines=("none",),
                name=directory.name,
                output=options.runs,
                **settings,
            )
            reporter = TerminalReporter()
            with reporter.live():
                train(config, reporter=reporter)
        return directory

    before = run("old", old_train, old_test)
    runs = {"the old intents alone": before}
    for rate in options.rates:
        for epochs in options.epochs:
            told = "".join(f"-{value:g}" for value in (rate, epochs) if value is not None)
            runs[f"--from that run{told}"] = run(
                f"from{told}",
                whole / "train.csv",
                whole / "test.csv",
                start_from=str(before),
                learning_rate=rate,
                epochs=epochs,
            )
    runs["anew"] = run("anew", whole / "train.csv", whole / "test.csv")
    found = {name: measured(directory, new) for name, directory in runs.items()}
    rows = [
        [
            name,
            f"{each['old']:.2%}",
            "" if each["new"] is None else f"{each['new']:.2%}",
            f"{each['steps']:,}",
            f"{each['train_seconds']:.0f} s",
        ]
        for name, each in found.items()
    ]
    header = ["run", "70 old intents", f"{NUM_NEW} new ones", "steps", "training"]
    workload.print_table(header, rows)
    workload.write(f"warm-start-{options.seed}", {"new": sorted(new), "runs": found})


def without(split: str, new: set[str], path: Path) -> Path:
    """Write a split without the rows of some intents, and return where."""
    texts, labels = workload.banking77(split)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "category"])
        writer.writerows(row for row in zip(texts, labels, strict=True) if row[1] not in new)
    return path


def measured(directory: Path, new: set[str]) -> dict[str, Any]:
    """Return a run's accuracy on the test rows of old and of new intents, its steps and time."""
    from remora.evaluation.predictions import read_predictions

    labels = json.loads((directory / "data.json").read_text("utf-8"))["labels"]
    rows = read_predictions(directory / "predictions.csv", labels)
    right: dict[bool, list[bool]] = {False: [], True: []}
    for label, predicted in zip(rows.true, rows.predicted, strict=True):
        right[label in new].append(label == predicted)
    figures = json.loads((directory / "evaluation.json").read_text("utf-8"))
    share = {key: sum(each) / len(each) if each else None for key, each in right.items()}
    return {
        "old": share[False],
        "new": share[True],
        "steps": figures["num_steps"],
        "train_seconds": figures["train_seconds"],
    }


if __name__ == "__main__":
    main()

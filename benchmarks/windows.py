"""Long documents whose deciding sentence stands in the middle, or anywhere: head, both, windows.

A document is made of messages of sample:support: one of the `NUM_LABELS` intents that are the
labels, among messages of the other intents, which say nothing about it. Each way to cut documents
trains and is measured on the same ones. Of windows, other ways to pool their answers are measured
too. Finished runs are read, not repeated.

    python benchmarks/windows.py
"""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

import workload
from remora.config import TrainConfig
from remora.data.dataset import load_dataset
from remora.data.table import Table, read_table
from remora.display import TerminalReporter
from remora.models.saved import open_trained
from remora.training.run import train
from remora.tree import scoring

NUM_LABELS = 6
PLACES = ("middle", "random")
WAYS = ("head", "both", "windows")


def main() -> None:
    parser = workload.parser(__doc__, "windows")
    parser.add_argument("--messages", type=int, default=5, help="of each document")
    parser.add_argument("--max-length", type=int, default=80)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-steps", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.runs.mkdir(parents=True, exist_ok=True)
    found = []
    for place in PLACES:
        folder = options.runs / f"{place}-{options.messages}-{options.seed}"
        write_documents(folder, place, options.messages, options.seed)
        for way in WAYS:
            directory = options.runs / f"{folder.name}-{way}"
            if not (directory / "evaluation.json").is_file():
                config = TrainConfig(
                    str(folder),
                    model=options.model,
                    truncate=way,
                    max_length=options.max_length,
                    batch_size=options.batch_size,
                    max_steps=options.max_steps,
                    seed=options.seed,
                    baselines=("svm",),
                    name=directory.name,
                    output=options.runs,
                )
                reporter = TerminalReporter()
                with reporter.live():
                    train(config, reporter=reporter)
            figures = json.loads((directory / "evaluation.json").read_text("utf-8"))
            found.append({"place": place, "truncate": way, **measured(figures)})
            if way == "windows":
                found[-1]["pooled_by"] = poolings(directory, folder / "test.csv")
    rows = [
        [
            each["place"],
            each["truncate"],
            f"{each['accuracy']:.1%}",
            "{:.1%} to {:.1%}".format(*each["interval"]),
            f"{each['svm']:.1%}",
            f"{each['train_seconds']:.0f} s",
        ]
        for each in found
    ]
    header = ["sentence", "truncate", "accuracy", "95% interval", "SVM", "training"]
    workload.print_table(header, rows)
    for each in found:
        for name, accuracy in each.get("pooled_by", {}).items():
            print(f"{each['place']}, windows pooled by {name}: {accuracy:.1%}")
    workload.write(f"windows-{options.messages}-{options.seed}", {"runs": found})


def write_documents(folder: Path, place: str, num_messages: int, seed: int) -> None:
    """Write training and test documents."""
    dataset = load_dataset("sample:support", validation_fraction=0)
    labels = set(random.Random(seed).sample(dataset.labels, NUM_LABELS))
    assert dataset.test is not None
    folder.mkdir(exist_ok=True)
    for name, table in (("train", dataset.train), ("test", dataset.test)):
        with (folder / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label"])
            writer.writerows(documents(table, labels, place, num_messages, seed))


def documents(
    table: Table, labels: set[str], place: str, num_messages: int, seed: int
) -> list[tuple[str, str]]:
    """Return a document for each message of the labels."""
    draw = random.Random(seed)
    rows = list(zip(table.texts, table.labels, strict=True))
    others = [text for text, label in rows if label not in labels]
    found = []
    for text, label in rows:
        if label in labels:
            around = draw.sample(others, num_messages - 1)
            at = num_messages // 2 if place == "middle" else draw.randrange(num_messages)
            around.insert(at, text)
            found.append((" ".join(each.rstrip(".!?") + "." for each in around), label))
    return found


def measured(figures: dict[str, Any]) -> dict[str, Any]:
    """Return what a run's figures say."""
    return {
        "accuracy": figures["metrics"]["accuracy"],
        "interval": figures["metrics"]["accuracy_interval"],
        "svm": figures["baseline"]["metrics"]["accuracy"],
        "train_seconds": figures["train_seconds"],
        "num_rows": figures["metrics"]["num_rows"],
    }


def poolings(run: Path, data: Path) -> dict[str, float]:
    """Return the accuracy with the answers to windows pooled in several ways."""
    trained = open_trained(run, device="cpu")
    table = read_table(data, known=trained.card.labels)
    true = np.array([trained.card.labels.index(label) for label in table.labels])
    parts: list[Any] = []

    def kept(of_windows: Any, num_windows: list[int]) -> Any:
        parts.extend(np.split(of_windows, np.cumsum(num_windows)[:-1]))
        return np.stack([of_windows[0]] * len(num_windows))

    with mock.patch.object(scoring, "pooled", kept):
        trained.scorer(tolerance=1e-4).probabilities(table.texts)
    ways = {
        "the mean of probabilities": lambda part: part.mean(0),
        "the mean of log-probabilities": lambda part: np.log(np.maximum(part, 1e-9)).mean(0),
        "the largest probability": lambda part: part.max(0),
    }
    return {
        name: float(np.mean(np.array([pool(part).argmax() for part in parts]) == true))
        for name, pool in ways.items()
    }


if __name__ == "__main__":
    main()

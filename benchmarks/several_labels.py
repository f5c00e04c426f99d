"""Several labels a row: an adapter beside one-versus-rest SVMs, on CLINC150's messages in pairs.

Two messages with different intents become one text with two labels, a message alone has one, and
one that is out of scope has none: half, three tenths and a fifth of the rows. Rows to train on, to
validate and to test come from CLINC150's own splits, so no message is in two of them. Finished runs
are read, not repeated, and what is cut off resumes.

    python benchmarks/several_labels.py
    python benchmarks/several_labels.py --intents 30 --train-rows 1500 --seeds 0 1 2
"""

from __future__ import annotations

import argparse
import csv
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import workload
from remora.config import TrainConfig
from remora.evaluation import results
from remora.training.run import train

SHARES = {2: 0.5, 1: 0.3, 0: 0.2}
"""Shares of the rows by their number of labels."""


def main() -> None:
    parser = workload.parser(__doc__, "several-labels")
    parser.add_argument("--intents", type=int, default=30, help="the first ones by name")
    parser.add_argument("--train-rows", type=int, default=1_500)
    parser.add_argument("--test-rows", type=int, default=1_000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--epochs", type=float, default=None)
    parser.add_argument("--learning-rate", type=float, default=None)
    options = parser.parse_args()
    found = [run(options, seed) for seed in options.seeds]
    report(found)
    workload.write(
        f"several-labels-{Path(options.model).name}-{options.intents}",
        {k: v for k, v in vars(options).items() if k != "runs"} | {"runs": found},
    )


def run(options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Train, unless that is done, and return the run's figures."""
    name = f"{Path(options.model).name}-{options.intents}-{options.train_rows}-{seed}"
    if options.learning_rate is not None:
        name += f"-{options.learning_rate:g}"
    directory = options.runs / name
    if not (directory / "evaluation.json").is_file():
        folder = options.runs / f"data-{options.intents}-{options.train_rows}-{seed}"
        sizes = {"train": options.train_rows, "val": 300, "test": options.test_rows}
        write_rows(folder, options.intents, sizes, seed)
        train(
            TrainConfig(
                str(folder / "train.jsonl"),
                validation=str(folder / "val.jsonl"),
                test=str(folder / "test.jsonl"),
                model=options.model,
                seed=seed,
                epochs=options.epochs,
                learning_rate=options.learning_rate,
                name=name,
                output=options.runs,
                checkpoint_minutes=1.0,
            )
        )
    figures = results.read(directory).figures
    print(f"{name}: micro-F1 {figures['metrics']['micro_f1']:.2%}", flush=True)
    return dict(figures)


def write_rows(folder: Path, num_intents: int, sizes: dict[str, int], seed: int) -> None:
    """Write the rows of each split as JSON lines with lists of labels."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, size in sizes.items():
        texts, labels = workload.intents("clinc150", split)
        intents = sorted(set(labels))[:num_intents]
        messages = [pair for pair in zip(texts, labels, strict=True) if pair[1] in intents]
        rows = combined(messages, out_of_scope(split), size, random.Random(f"{seed} {split}"))
        lines = [json.dumps({"text": text, "labels": names}) for text, names in rows]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def out_of_scope(split: str) -> list[str]:
    """Return the messages of a split that no intent fits."""
    path = workload.SHARED / "data" / "clinc150" / f"oos_{split}.csv"
    with path.open(encoding="utf-8", newline="") as file:
        return [row["text"] for row in csv.DictReader(file)]


def combined(
    messages: list[tuple[str, str]], others: list[str], size: int, rng: random.Random
) -> list[tuple[str, list[str]]]:
    """Return rows of two messages with different intents, of one, or of one out of scope."""
    rows: list[tuple[str, list[str]]] = []
    counts = Counter(rng.choices(list(SHARES), list(SHARES.values()), k=size))
    for _ in range(counts[2]):
        (one, first), (other, second) = rng.sample(messages, 2)
        while first == second:
            other, second = rng.choice(messages)
        rows.append((f"{one}. {other}", sorted([first, second])))
    rows += [(text, [label]) for text, label in rng.choices(messages, k=counts[1])]
    rows += [(text, []) for text in rng.choices(others, k=counts[0])]
    rng.shuffle(rows)
    return rows


def report(found: list[dict[str, Any]]) -> None:
    """Print the adapter beside the SVMs for each run."""
    table = []
    for figures in found:
        ours, (svm,) = figures["metrics"], figures["rivals"]
        low, high = svm["micro_f1_difference_interval"]
        for name, each, seconds in (
            ("adapter", ours, figures["train_seconds"] + figures["test_seconds"]),
            (svm["description"], svm, svm["seconds"]),
        ):
            table.append(
                [
                    name,
                    f"{each['micro_f1']:.2%}",
                    "{:.1%} to {:.1%}".format(*each["micro_f1_interval"]),
                    f"{each['macro_f1']:.2%}",
                    f"{each['accuracy']:.2%}",
                    f"{seconds:.0f} s",
                ]
            )
        print(
            f"SVMs minus adapter: micro-F1 {100 * svm['micro_f1_difference']:+.2f} points "
            f"(95% interval {100 * low:+.2f} to {100 * high:+.2f}, paired bootstrap); all labels "
            f"right {100 * svm['difference']:+.2f} points, p = {svm['p_value']:.2g} (exact McNemar "
            f"test); label ranking of the adapter {ours['label_ranking']:.2%}"
        )
    workload.print_table(
        ["", "micro-F1", "95% interval", "macro-F1", "all labels right", "time"], table
    )


if __name__ == "__main__":
    main()

"""The story on real models: which base, which method, and is the model or the data to blame?

Banking77, 77 intents of a bank's customers. Part 1 updates all weights of Gemma 3 270M; part 2
trains LoRA, r=16, on SmolLM2-135M-Instruct, which writes the label, and once more with a linear
head in the place of the label's words; part 3 the first again on weights in 4 bits, with `nano` of
the package beside it; part 4 compares them with each other and with near-free rivals, and diagnoses
the best. Every run is one of `remora train`, with its defaults but for what is named here. All of
it takes hours on two cores: finished runs are read, not repeated, and what is cut off resumes, so
parts and seeds can be run one at a time. README's table is made from the first one.

    python benchmarks/story.py --parts lora --rows-per-class 10
    python benchmarks/story.py
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

import real_models
import workload
from remora import display
from remora.config import CompareConfig, DiagnoseConfig, TrainConfig
from remora.diagnosis import diagnose
from remora.evaluation import compare
from remora.evaluation.rivals import Rival, of_figures
from remora.formatting import spoken_time
from remora.training import resume
from remora.training.run import train

PARTS: dict[str, dict[str, Any]] = {
    "full": {"model": "gemma3-270m", "method": "full"},
    "lora": {"model": "smollm2", "method": "lora", "baselines": ("auto", "embeddings")},
    "classes": {"model": "smollm2", "method": "lora", "answer": "classes"},
    "qlora": {"model": "smollm2", "method": "qlora"},
    "nano": {"model": "nano", "method": "lora"},
}
TOLD = {
    "full": "Gemma 3 270M, all weights",
    "lora": "SmolLM2-135M, LoRA",
    "classes": "SmolLM2-135M, LoRA, `--answer classes`",
    "qlora": "SmolLM2-135M, QLoRA",
    "nano": "`nano`, LoRA",
}
PAIR = ("card_arrival", "card_delivery_estimate")
"""The confusion that stayed in the first telling of the story, whatever the model."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rows-per-class", type=int, help="by default all rows")
    parser.add_argument("--max-time", help="save and stop after this time, as in remora train")
    parser.add_argument("--runs", type=Path, default=Path("runs/story"))
    options = parser.parse_args()
    folder = options.runs / (f"{options.rows_per_class}-rows" if options.rows_per_class else "all")
    directories = [
        run(part, seed, folder, options) for part in options.parts for seed in options.seeds
    ]

    # Part 4
    told = {directory.name: measured(directory) for directory in directories}
    show_summary(told)
    rows = [row(name, entry) for name, entry in told.items()]
    header = ["run", "test accuracy", "95% interval", "p against SVM", "trained", "artifact"]
    header += ["examples/s", "training", "peak / planned", f"{PAIR[0]} / {PAIR[1]}"]
    workload.print_table(header, rows)
    results: dict[str, Any] = {
        "runs": {
            name: {**entry, "rivals": [each.to_dict() for each in entry["rivals"]]}
            for name, entry in told.items()
        }
    }
    if len(directories) > 1:
        comparison = compare.compare_runs(CompareConfig(tuple(directories)))
        display.show_comparison(comparison)
        results["comparison"] = comparison.to_dict()
    best = max(directories, key=lambda each: told[each.name]["accuracy"])
    with display.TerminalReporter().live() as reporter:
        diagnosis = diagnose.diagnose_run(DiagnoseConfig(best), reporter=reporter)
    display.show_diagnosis(diagnosis, best)
    results["diagnosis"] = diagnosis.to_dict()
    workload.write(f"story-{folder.name}", results)


def run(part: str, seed: int, output: Path, options: argparse.Namespace) -> Path:
    """Train a part with one seed, unless that is done, and return the run's directory."""
    name = f"{part}-{seed}"
    if not resume.is_finished(output / name):
        chosen = PARTS[part]
        config = TrainConfig(
            str(workload.SHARED / "data" / "banking77" / "train.csv"),
            test=str(workload.SHARED / "data" / "banking77" / "test.csv"),
            model=path(chosen["model"]),
            method=chosen["method"],
            answer=chosen.get("answer", "words"),
            baselines=chosen.get("baselines", ("auto",)),
            embedding_model=str(real_models.fetch("minilm")),
            rows_per_class=options.rows_per_class,
            max_time=options.max_time,
            seed=seed,
            output=output,
            name=name,
        )
        train(config, reporter=display.TerminalReporter())
    return output / name


def path(model: str) -> str:
    return str(real_models.fetch(model)) if model in real_models.MODELS else model


def measured(directory: Path) -> dict[str, Any]:
    """Return the figures of a run, and what it makes of the pair of labels."""
    found = json.loads((directory / "evaluation.json").read_text(encoding="utf-8"))
    plan = json.loads((directory / "plan.json").read_text(encoding="utf-8"))
    with (directory / "predictions.csv").open(encoding="utf-8", newline="") as file:
        rows = [(row["label"], row["predicted"]) for row in csv.DictReader(file)]
    wrong = Counter(frozenset(pair) for pair in rows if pair[0] != pair[1])
    ranks = [pair for pair, _ in wrong.most_common()]
    return {
        "accuracy": found["metrics"]["accuracy"],
        "interval": found["metrics"]["accuracy_interval"],
        "baseline": found["baseline"]["metrics"]["accuracy"],
        "rivals": of_figures(found),
        "p_value": found["p_value"],
        "parameters": found["parameters"],
        "adapter_bytes": found["adapter_bytes"],
        "examples_per_second": found["examples_per_second"],
        "train_seconds": found["train_seconds"],
        "peak_bytes": plan["measured_peak_bytes"],
        "planned_bytes": plan["peak_bytes"],
        "pair": [rows.count(PAIR), rows.count(PAIR[::-1])],
        "pair_rank": ranks.index(frozenset(PAIR)) + 1 if frozenset(PAIR) in wrong else None,
        "num_wrong": sum(wrong.values()),
    }


def show_summary(told: dict[str, dict[str, Any]]) -> None:
    """Print a row for each part, the mean of its seeds, and one for each rival."""
    rows = []
    for part in PARTS:
        runs = [entry for name, entry in told.items() if name.rpartition("-")[0] == part]
        if runs:
            share = runs[0]["parameters"]["trainable"] / runs[0]["parameters"]["total"]
            rows.append(
                [
                    TOLD[part],
                    *accuracies([(run["accuracy"], run["interval"]) for run in runs]),
                    ", ".join(f"{run['p_value']:.1g}" for run in runs),
                    f"{share:.1%}",
                    f"{runs[0]['adapter_bytes'] / 1e6:.1f} MB",
                    spoken_time(statistics.median(run["train_seconds"] for run in runs)),
                ]
            )
    rivals: dict[tuple[str, str], dict[str, Rival]] = {}  # of one seed the same beside each part
    for name, entry in told.items():
        for rival in entry["rivals"]:
            by_seed = rivals.setdefault((rival.description, rival.rows), {})
            by_seed.setdefault(name.rpartition("-")[2], rival)
    for (description, measured_on), by_seed in rivals.items():
        found = [(each.accuracy, each.accuracy_interval) for each in by_seed.values()]
        rows.append(
            [
                f"{description} ({measured_on})" if measured_on else description,
                *accuracies(found),
                *("", "", ""),
                spoken_time(statistics.median(each.seconds for each in by_seed.values())),
            ]
        )
    header = ["", "test accuracy, mean", "by seed", "95 % interval, first seed"]
    workload.print_table([*header, "p against the SVM", "trained", "saved", "training"], rows)
    print()


def accuracies(found: list[tuple[float, Any]]) -> list[str]:
    """Return the mean over seeds, the accuracy of each, and the interval of the first."""
    mean = f"{statistics.mean(accuracy for accuracy, _ in found):.2%}"
    by_seed = ", ".join(f"{accuracy:.2%}" for accuracy, _ in found)
    low, high = found[0][1]
    return [mean, by_seed if len(found) > 1 else "", f"{low:.1%} to {high:.1%}"]


def row(name: str, entry: dict[str, Any]) -> list[str]:
    low, high = entry["interval"]
    share = entry["parameters"]["trainable"] / entry["parameters"]["total"]
    rank = f"rank {entry['pair_rank']}" if entry["pair_rank"] else "none"
    return [
        name,
        f"{entry['accuracy']:.2%}",
        f"{low:.1%} to {high:.1%}",
        f"{entry['p_value']:.2g} ({entry['baseline']:.2%})",
        f"{share:.2%}",
        f"{entry['adapter_bytes'] / 1e6:.1f} MB",
        f"{entry['examples_per_second']:.1f}",
        f"{entry['train_seconds'] / 60:.0f} min",
        f"{entry['peak_bytes'] / 1e9:.2f} / {entry['planned_bytes'] / 1e9:.2f} GB",
        f"{entry['pair'][0]} + {entry['pair'][1]} ({rank})",
    ]


if __name__ == "__main__":
    main()

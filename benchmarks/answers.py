"""Labels that the model writes against classes that a linear head scores, on many intents.

Every run is one of `remora train` with its defaults, but for the answer, the seed and the rows per
class. Finished runs are read, not repeated, and what is cut off resumes, so the runs can be made a
few at a time. Speeds are of the machine as it was; their ratio is of runs made one after the other.

    python benchmarks/answers.py
    python benchmarks/answers.py --seeds 0 --rows-per-class 10
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

import workload
from remora.config import TrainConfig
from remora.config.checks import Answer
from remora.evaluation import results
from remora.evaluation.significance import mcnemar
from remora.training.run import train

ANSWERS: tuple[Answer, ...] = ("words", "classes")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="nano")
    parser.add_argument("--data", default="banking77", choices=["banking77", "clinc150"])
    parser.add_argument("--rows-per-class", type=int, default=10, help="0 for all rows")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/answers"))
    options = parser.parse_args()
    found: dict[str, list[Path]] = {answer: [] for answer in ANSWERS}
    for seed in options.seeds:
        for answer in ANSWERS:
            directory = run(options, answer, seed)
            found[answer].append(directory)
    rows = {answer: [measured(each) for each in runs] for answer, runs in found.items()}
    report(rows)
    for seed, pair in zip(options.seeds, zip(*found.values(), strict=True), strict=True):
        print(f"seed {seed}: {against(*pair)}")
    workload.write(
        f"answers-{options.data}-{Path(options.model).name}-{options.rows_per_class or 'all'}",
        {"model": options.model, "seeds": options.seeds, "runs": rows},
    )


def run(options: argparse.Namespace, answer: Answer, seed: int) -> Path:
    """Train, unless that is done, and return the run's directory."""
    model, rows_per_class = options.model, options.rows_per_class
    name = f"{Path(model).name}-{answer}-{rows_per_class or 'all'}-{seed}"
    name += f"-{options.data}" * (options.data != "banking77")
    directory, folder = options.runs / name, workload.SHARED / "data" / options.data
    if not (directory / "evaluation.json").is_file():
        config = TrainConfig(
            str(folder / "train.csv"),
            test=str(folder / "test.csv"),
            model=model,
            answer=answer,
            rows_per_class=rows_per_class or None,
            seed=seed,
            name=directory.name,
            output=options.runs,
            baselines=("none",),
            checkpoint_minutes=1.0,
        )
        train(config)
    print(f"{directory.name}: {measured(directory)}", flush=True)
    return directory


def measured(directory: Path) -> dict[str, Any]:
    """Return what counts of a finished run."""
    finished = results.read(directory)
    figures, plan = finished.figures, results.read_json(directory / "plan.json") or {}
    return {
        "accuracy": figures["metrics"]["accuracy"],
        "interval": figures["metrics"]["accuracy_interval"],
        "macro_f1": figures["metrics"]["macro_f1"],
        "log_loss": figures["metrics"]["log_loss"],
        "examples_per_second": figures["examples_per_second"],
        "scored_rows_per_second": plan["num_scored_rows"] / figures["test_seconds"],
        "train_seconds": figures["train_seconds"],
        "peak_memory_bytes": figures["peak_memory_bytes"],
    }


def report(rows: dict[str, list[dict[str, Any]]]) -> None:
    """Print a table of the means over seeds."""
    names = ("accuracy", "macro_f1", "log_loss", "examples_per_second", "scored_rows_per_second")
    means = {
        answer: {name: float(np.mean([each[name] for each in runs])) for name in names}
        for answer, runs in rows.items()
    }
    table = []
    for answer, runs in rows.items():
        own, words = means[answer], means["words"]
        table.append(
            [
                answer,
                f"{own['accuracy']:.2%}",
                ", ".join(f"{each['accuracy']:.2%}" for each in runs),
                f"{own['macro_f1']:.2%}",
                f"{own['log_loss']:.3f}",
                *(f"{own[name]:.1f} ({own[name] / words[name]:.2f})" for name in names[3:]),
            ]
        )
    workload.print_table(
        [
            *("answer", "accuracy, mean", "by seed", "macro-F1", "log-loss"),
            *("examples/s in training (ratio)", "rows/s in scoring (ratio)"),
        ],
        table,
    )


def against(words: Path, classes: Path) -> str:
    """Compare two runs on the same test rows."""
    one, other = results.read(words), results.read(classes)
    right = [np.array(each.true) == np.array(each.predicted) for each in (one, other)]
    lost, won = int((right[0] & ~right[1]).sum()), int((~right[0] & right[1]).sum())
    p = mcnemar(one.true, other.predicted, one.predicted)
    return (
        f"classes are right alone on {won:,} rows, words alone on {lost:,} "
        f"({(won - lost) / len(right[0]):+.2%}), p = {p:.2g} (exact McNemar test)"
    )


if __name__ == "__main__":
    main()

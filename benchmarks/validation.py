"""What measuring costs a run beside its training, and whether the time told at the start holds.

Every run is one of `remora train` with its defaults on Banking77 (or --data), trained on a few rows
per class, once with the validation rows that Remora chooses and once with all of them. Accuracy on
the test rows shows whether fewer rows still choose the weights as well. Finished runs are read, not
repeated, and what is cut off resumes, so the runs can be made a piece at a time:

    python benchmarks/validation.py
    python benchmarks/validation.py --model path/to/SmolLM2-135M-Instruct --seeds 0 --max-time 7m
    python benchmarks/validation.py --data sample:support --rows-per-class all
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

import workload
from remora.config import TrainConfig
from remora.display.progress import TerminalReporter
from remora.errors import Stopped
from remora.training.run import train

ALL = 1_000_000


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default=str(workload.SHARED / "data" / "banking77"))
    parser.add_argument("--model", default="nano")
    parser.add_argument("--rows-per-class", default="10", help="a number, or all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--eval-rows", nargs="+", default=["chosen", "all"])
    parser.add_argument("--max-steps", type=int)
    parser.add_argument("--max-time", help="stop after this time, such as 7m")
    parser.add_argument("--runs", type=Path, default=Path("runs/validation"))
    options = parser.parse_args()
    found = {}
    for seed in options.seeds:
        for rows in options.eval_rows:
            name = f"{Path(options.data).name.replace(':', '-')}-{Path(options.model).name}"
            name += f"-{options.rows_per_class}-{rows}-{seed}"
            config = TrainConfig(
                options.data,
                model=options.model,
                rows_per_class=per_class(options.rows_per_class),
                eval_rows=None if rows == "chosen" else ALL if rows == "all" else int(rows),
                max_steps=options.max_steps,
                max_time=options.max_time,
                seed=seed,
                name=name,
                output=options.runs,
                device="cpu",
            )
            found[f"{rows}, seed {seed}"] = measured(config)
    header = ["eval rows", "training", "validation", "of training", "test", "told", "took"]
    rows = []
    for name, each in found.items():
        training = each["train_seconds"] - each["validation_seconds"]
        rows.append(
            [
                name,
                f"{training:.0f} s",
                f"{each['validation_seconds']:.0f} s",
                f"{each['validation_seconds'] / training:.0%}",
                f"{each['test_seconds']:.0f} s",
                f"{each['told_seconds']:.0f} s",
                f"{each['train_seconds'] + each['test_seconds']:.0f} s",
            ]
        )
    workload.print_table(header, rows)
    for way in options.eval_rows:
        tests = [found[f"{way}, seed {seed}"]["accuracy"] for seed in options.seeds]
        print(f"{way}: test accuracy {np.mean(tests):.2%}: {', '.join(f'{t:.2%}' for t in tests)}")
    workload.write(f"validation-{next(iter(found.values()))['run'].rsplit('-', 2)[0]}", found)


def per_class(text: str) -> int | None:
    return None if text == "all" else int(text)


def measured(config: TrainConfig) -> dict[str, Any]:
    """Train, unless that is done, and return what counts of the run."""
    assert config.name is not None
    directory = config.output / config.name
    if not (directory / "evaluation.json").is_file():
        reporter = TerminalReporter()
        with reporter.live():
            try:
                train(config, reporter=reporter)
            except Stopped as stopped:
                raise SystemExit(str(stopped)) from None
    figures = json.loads((directory / "evaluation.json").read_text("utf-8"))
    plan = json.loads((directory / "plan.json").read_text("utf-8"))
    lines = (directory / "metrics.jsonl").read_text("utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    told = [plan[name] for name in ("seconds", "validation_seconds", "test_seconds")]
    return {
        "run": directory.name,
        "accuracy": figures["metrics"]["accuracy"],
        "log_loss": figures["metrics"]["log_loss"],
        "best_step": figures["best_step"],
        "evaluations": [record for record in records if "validation_accuracy" in record],
        **{k: figures[k] for k in ("train_seconds", "validation_seconds", "test_seconds")},
        "told": told,
        "told_seconds": sum(told),
    }


if __name__ == "__main__":
    main()

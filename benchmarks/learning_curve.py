"""A learning curve in as many steps for each size, and in as many epochs.

The first is what `remora train --learning-curve` does. For the second, every size but the last is
trained again with the epochs of the last one, evaluated as often. What is cut off goes on.

    python benchmarks/learning_curve.py
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import workload
from remora import display
from remora.config import TrainConfig
from remora.data.dataset import load_data
from remora.diagnosis import learning_curve
from remora.evaluation import results
from remora.runtime.reporter import Reporter
from remora.training import resume
from remora.training.run import train


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default="sample:support")
    parser.add_argument("--model", default="nano")
    parser.add_argument("--sizes", default="5,10,20,all")
    parser.add_argument("--epochs", type=float, default=3.0)
    parser.add_argument("--runs", type=Path, default=Path("runs/learning_curve"))
    options = parser.parse_args()
    config = TrainConfig(
        options.data,
        model=options.model,
        learning_curve=options.sizes,
        epochs=options.epochs,
        output=options.runs,
        name="curve",
    )
    reporter: Reporter = display.TerminalReporter()
    directory = options.runs / "curve"
    if not resume.is_finished(directory):
        _, curve = learning_curve.learn(config, reporter=reporter)
        display.show_learning_curve(curve)
    found = json.loads((directory / learning_curve.FILE).read_text(encoding="utf-8"))
    rows = []
    for size in found["sizes"]:
        same = figures(config, size["per_class"], reporter)
        rows.append(
            [
                str(size["per_class"] or "all"),
                f"{size['num_rows']:,}",
                percent(size["accuracy"]),
                f"{size['num_steps']:,}",
                percent(same["metrics"]["accuracy"]),
                f"{same['num_steps']:,}",
                percent(size["baseline_accuracy"]),
            ]
        )
    heads = ["rows per class", "rows", "as many steps", "steps", "as many epochs", "steps"]
    workload.print_table([*heads, "baseline"], rows)
    workload.write("learning_curve", {"data": options.data, "model": options.model, **found})


def figures(config: TrainConfig, per_class: int | None, reporter: Reporter) -> dict[str, Any]:
    """Return evaluation.json of a size that is trained with the epochs of the last one."""
    directory = config.output / ("curve" if per_class is None else f"epochs-{per_class}")
    if not resume.is_finished(directory):
        alone = replace(config, learning_curve=None, rows_per_class=per_class, name=directory.name)
        steps = alone.num_steps(len(load_data(alone).train))
        evaluations = max(1, math.ceil(config.epochs))
        train(replace(alone, eval_steps=math.ceil(steps / evaluations)), reporter=reporter)
    return results.read(directory).figures


def percent(share: float) -> str:
    return f"{100 * share:.2f} %"


if __name__ == "__main__":
    main()

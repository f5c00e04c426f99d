"""Full fine-tuning, LoRA and QLoRA of one base on Banking77, each at its best learning rate.

Every run is one of `remora train` with its defaults, but for the method and the learning rate. The
rate is the one that validates best with the first seed. Finished runs are read, not repeated, and
what is cut off goes on, so the runs can be made a few at a time.

    python benchmarks/methods.py
    python benchmarks/methods.py --methods qlora --rates 4e-3 --seeds 0
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import binomtest

import workload
from remora.config import TrainConfig
from remora.evaluation import results
from remora.evaluation.significance import mcnemar
from remora.training.run import train

RATES = {
    "full": (2.5e-4, 5e-4, 1e-3, 2e-3),
    "lora": (2e-3, 4e-3, 8e-3),
    "qlora": (2e-3, 4e-3, 8e-3),
}
PAIRS = (("full", "lora"), ("lora", "qlora"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="nano")
    parser.add_argument("--methods", nargs="+", default=list(RATES), choices=RATES)
    parser.add_argument("--rates", type=float, nargs="+", help="instead of those of each method")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/methods"))
    options = parser.parse_args()
    first, *others = options.seeds
    found: dict[str, Any] = {}
    for method in options.methods:
        rates = options.rates or RATES[method]
        tried = {rate: run(options.model, method, rate, first, options.runs) for rate in rates}
        rate = max(tried, key=lambda rate: validation_accuracy(tried[rate]))
        chosen = [tried[rate]]
        chosen += [run(options.model, method, rate, seed, options.runs) for seed in others]
        found[method] = {
            "learning_rate": rate,
            "validation_by_rate": {f"{r:g}": validation_accuracy(d) for r, d in tried.items()},
            "runs": [measured(directory) for directory in chosen],
            "directory": chosen[0],
        }
    print(
        "\n| method | learning rate | test accuracy, mean | by seed | 95 % interval, first seed |"
    )
    print("|---|---:|---:|---|---|")
    for method, entry in found.items():
        tests = [each["accuracy"] for each in entry["runs"]]
        low, high = entry["runs"][0]["interval"]
        print(
            f"| {method} | {entry['learning_rate']:g} | {np.mean(tests):.2%} | "
            f"{', '.join(f'{test:.2%}' for test in tests)} | {low:.1%} to {high:.1%} |"
        )
    for better, worse in PAIRS:
        if better in found and worse in found:
            print(f"{worse} against {better}, first seed: {against(found, better, worse)}")
    for entry in found.values():
        entry["directory"] = str(entry["directory"])
    if not options.rates and set(options.methods) == set(RATES):
        workload.write("methods", found)


def run(model: str, method: Any, rate: float, seed: int, output: Path) -> Path:
    """Train, unless that is done, and return the run's directory."""
    directory = output / f"{Path(model).name}-{method}-{rate:g}-{seed}"
    if not (directory / "evaluation.json").is_file():
        config = TrainConfig(
            str(workload.SHARED / "data" / "banking77"),
            model=model,
            method=method,
            learning_rate=rate,
            seed=seed,
            name=directory.name,
            output=output,
        )
        train(config)
    print(f"{directory.name}: {measured(directory)}", flush=True)
    return directory


def measured(directory: Path) -> dict[str, Any]:
    """Return what counts of a finished run."""
    figures = results.read(directory).figures
    return {
        "accuracy": figures["metrics"]["accuracy"],
        "interval": figures["metrics"]["accuracy_interval"],
        "validation": validation_accuracy(directory),
        "train_seconds": figures["train_seconds"],
        "peak_memory_bytes": figures["peak_memory_bytes"],
    }


def validation_accuracy(directory: Path) -> float:
    """Return the best validation accuracy of a run."""
    lines = (directory / "metrics.jsonl").read_text("utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    return max(r["validation_accuracy"] for r in records if "validation_accuracy" in r)


def against(found: dict[str, Any], better: str, worse: str) -> str:
    """Compare two methods on the same test rows."""
    one, other = (results.read(found[name]["directory"]) for name in (better, worse))
    right = [np.array(each.true) == np.array(each.predicted) for each in (one, other)]
    lost, won = int((right[0] & ~right[1]).sum()), int((~right[0] & right[1]).sum())
    low, high = binomtest(won, max(1, lost + won)).proportion_ci(method="exact")
    share = (lost + won) / len(right[0])
    p = mcnemar(one.true, other.predicted, one.predicted)
    return (
        f"{(won - lost) / len(right[0]):+.2%} (95 % interval {(2 * low - 1) * share:+.2%} to "
        f"{(2 * high - 1) * share:+.2%}), p = {p:.2g}"
    )


if __name__ == "__main__":
    main()

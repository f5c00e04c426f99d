"""LoRA, full fine-tuning and the baseline on the sample table: what `compare` says of them.

Both runs are `remora train` with its defaults but for the method. The p-values are computed again
by scipy from predictions.csv, and must be the same. Finished runs are read, not repeated.

    python benchmarks/comparison.py
"""

from __future__ import annotations

import argparse
import csv
import itertools
from pathlib import Path

from scipy.stats import binomtest

import workload
from remora import display
from remora.config import CompareConfig, Method, TrainConfig
from remora.evaluation import compare
from remora.report import pages
from remora.training import resume
from remora.training.run import train


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default="sample:support")
    parser.add_argument("--model", default="nano")
    parser.add_argument("--runs", type=Path, default=Path("runs/comparison"))
    options = parser.parse_args()
    methods: tuple[Method, ...] = ("lora", "full")
    for method in methods:
        if not resume.is_finished(options.runs / method):
            config = TrainConfig(
                options.data, model=options.model, method=method, output=options.runs, name=method
            )
            train(config, reporter=display.TerminalReporter())
    directories = tuple(options.runs / method for method in methods)
    found = compare.compare_runs(CompareConfig(directories))
    display.show_comparison(found)
    page = options.runs / "comparison.html"
    pages.write_comparison(page, found, directories)
    again = p_values(options.runs)
    rows = []
    for pair in found.pairs:
        p = again[frozenset((pair.first, pair.second))]
        assert abs(p - pair.p_value) <= 1e-12 * p
        rows.append([f"{pair.first} over {pair.second}", f"{pair.p_value:.6g}", f"{p:.6g}"])
    print()
    workload.print_table(["pair", "compare", "scipy"], rows)
    print(f"\n{page}: {page.stat().st_size / 1e3:.0f} kB")
    workload.write("comparison", found.to_dict())


def p_values(folder: Path) -> dict[frozenset[str], float]:
    """Return scipy's exact binomial p-value of each pair, from the files of the runs."""
    tables = {}
    for name in ("lora", "full"):
        with (folder / name / "predictions.csv").open(encoding="utf-8", newline="") as file:
            tables[name] = list(csv.DictReader(file))
    right = {name: [r["predicted"] == r["label"] for r in rows] for name, rows in tables.items()}
    right["TF-IDF + linear SVM"] = [r["baseline"] == r["label"] for r in tables["lora"]]
    found = {}
    for first, second in itertools.combinations(right, 2):
        pairs = list(zip(right[first], right[second], strict=True))
        only_first, only_second = pairs.count((True, False)), pairs.count((False, True))
        test = binomtest(only_first, only_first + only_second)
        found[frozenset((first, second))] = float(test.pvalue)
    return found


if __name__ == "__main__":
    main()

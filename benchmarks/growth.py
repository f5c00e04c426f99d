"""What a large table costs: memory, time to the first step, time per row.

The same run on 10,000 and on 1,000,000 rows, by the command line, as processes of their own; the
rows are made from the sample table's messages, each with a number of its own. Then `predict` on a
stream of few and of many messages.

    python benchmarks/growth.py --model path/to/model
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import workload

STEPS = 40
NUM_MEASURED = 500


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(workload.SHARED / "models" / "craftgpt-5m"))
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 1_000_000])
    parser.add_argument("--messages", type=int, nargs="+", default=[2_000, 20_000])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        trained = [train(folder, options.model, rows) for rows in options.rows]
        streamed = [predict(folder, rows) for rows in options.messages]
    workload.print_table(
        ["rows", "first step after", "a row in training", "peak memory"],
        [
            [
                f"{run['rows']:,}",
                f"{run['first_step_seconds']:.0f} s",
                f"{1e3 / run['examples_per_second']:.1f} ms",
                f"{run['peak_bytes'] / 1e9:.2f} GB",
            ]
            for run in trained
        ],
    )
    print()
    workload.print_table(
        ["messages to predict", "rows/s", "peak memory"],
        [
            [
                f"{run['rows']:,}",
                f"{run['rows_per_second']:.0f}",
                f"{run['peak_bytes'] / 1e9:.2f} GB",
            ]
            for run in streamed
        ],
    )
    workload.write("growth", {"train": trained, "predict": streamed})


def messages(count: int) -> Any:
    """Yield rows of a text and a label, all different."""
    path = workload.ROOT / "src" / "remora" / "samples" / "support" / "train.csv"
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    for number, row in enumerate(itertools.islice(itertools.cycle(rows), count)):
        yield f"{row['text']} {number}", row["category"]


def train(folder: Path, model: str, rows: int) -> dict[str, Any]:
    table = folder / "table.csv"
    with table.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *messages(rows)])
    share = str(NUM_MEASURED / rows)
    run = folder / f"run-{rows}"
    command = ["train", table, "--model", model, "--output", folder, "--name", run.name]
    command += ["--max-steps", str(STEPS), "--test-fraction", share, "--validation-fraction", share]
    began = time.time()
    peak = remora([str(part) for part in command])
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if "loss" in record]
    first = run / "environment.json"  # written right before the first step
    evaluation = json.loads((run / "evaluation.json").read_text())
    return {
        "rows": rows,
        "first_step_seconds": first.stat().st_mtime - began,
        "examples_per_second": steps[-1]["examples_per_second"],
        "accuracy": evaluation["metrics"]["accuracy"],
        "peak_bytes": peak,
    }


def predict(folder: Path, rows: int) -> dict[str, Any]:
    (run,) = sorted(folder.glob("run-*"))[:1]
    lines = folder / "lines.txt"
    with lines.open("w", encoding="utf-8") as file:
        file.writelines(f"{' '.join(text.split())}\n" for text, _ in messages(rows))
    began = time.time()
    with lines.open("rb") as given:
        peak = remora(["predict", str(run)], stdin=given)
    return {"rows": rows, "rows_per_second": rows / (time.time() - began), "peak_bytes": peak}


def remora(arguments: list[str], **streams: Any) -> int:
    """Run the command line; return the most memory that it used, in bytes."""
    process = subprocess.Popen(
        [sys.executable, "-m", "remora", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        **streams,
    )
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"error: remora {' '.join(arguments)} ended with {status}")
    return usage.ru_maxrss * 1024


if __name__ == "__main__":
    main()

"""Two processes against one: examples per second, and the memory of each.

Each row of the table is a whole `remora train` on a processor, one thread to a process, so two
processes have two cores where one has one. Efficiency is the speed-up over the processes; beside
it stands what the run itself tells, an estimate from the time that each process computes. The model
has the shape of Qwen2.5-0.5B with fewer layers and words, and random weights.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import memory
import workload

SETTINGS = ((1, "off"), (2, "off"), (2, "on"))
"""Processes, and whether their weights are sharded; each with both methods."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=12)
    options = parser.parse_args()
    runs = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        memory.write_rows(folder / "rows", memory.NUM_ROWS["cpu"])
        memory.start(["--make", "cpu", "Qwen2", str(folder / "model")], show=False)
        for method in ("lora", "full"):
            for count, sharded in SETTINGS:
                runs.append(train(folder, method, count, sharded, options.steps))
                print(json.dumps(runs[-1]), file=sys.stderr)
    alone = {run["method"]: run for run in runs if run["processes"] == 1}
    rows = []
    for run in runs:
        speed_up = run["examples_per_second"] / alone[run["method"]]["examples_per_second"]
        rows.append(
            [
                *(str(run[key]) for key in ("method", "processes", "shard")),
                f"{run['examples_per_second']:.1f}",
                f"{speed_up:.2f}",
                f"{speed_up / run['processes']:.0%}",
                "" if run["told"] is None else f"{run['told'] / run['processes']:.0%}",
                f"{run['planned_bytes'] / 1e6:.0f} MB",
                f"{run['measured_bytes'] / 1e6:.0f} MB",
            ]
        )
    header = ["method", "processes", "sharded", "examples/s", "speed-up", "efficiency", "as told"]
    workload.print_table([*header, "planned", "measured"], rows)
    workload.write("devices", {"steps": options.steps, "runs": runs})


def train(folder: Path, method: str, count: int, sharded: str, steps: int) -> dict[str, Any]:
    """Train once; return the speed, and the memory of the first process as planned and measured."""
    name = f"{method}-{count}-{sharded}"
    settings = {
        "--model": str(folder / "model"),
        "--output": str(folder / "runs"),
        "--name": name,
        "--method": method,
        "--devices": str(count),
        "--shard": sharded,
        "--max-steps": str(steps),
        "--learning-rate": "1e-5",
        "--device": "cpu",
    }
    flags = [part for pair in settings.items() for part in pair]
    command = [sys.executable, "-m", "remora", "train", str(folder / "rows"), *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode != 0:
        raise SystemExit(f"{done.stderr}\nerror: {' '.join(command)} ended with {done.returncode}")
    run = folder / "runs" / name
    plan = json.loads((run / "plan.json").read_text(encoding="utf-8"))
    found = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
    return {
        "method": method,
        "processes": count,
        "shard": sharded,
        "examples_per_second": found["examples_per_second"],
        "told": found.get("speed_up"),
        "planned_bytes": plan["peak_bytes"],
        "measured_bytes": found["peak_memory_bytes"],
        "planned": plan["memory"],
    }


if __name__ == "__main__":
    main()

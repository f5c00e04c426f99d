"""Two processes against one: examples per second, and the memory of each.

Each row of the table is a whole `remora train` on a CPU, one thread to a process, so two
processes have two cores where one has one. Efficiency is the speed-up over the processes; beside
it stands what the run itself tells, an estimate from the time that each process computes. The
models have the shapes of `memory.py`, with fewer layers and words, and random weights.

    python benchmarks/devices.py
    python benchmarks/devices.py --shapes Qwen2 Llama "Gemma 3" --shard on
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
    parser.add_argument("--shapes", nargs="+", default=["Qwen2"], choices=memory.SMALL)
    parser.add_argument("--shard", choices=["on", "off"], help="only two such processes")
    options = parser.parse_args()
    settings = [(2, options.shard)] if options.shard else SETTINGS
    runs = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        memory.write_rows(folder / "rows", memory.NUM_ROWS["cpu"])
        for number, shape in enumerate(options.shapes):
            base = folder / f"model-{number}"
            memory.start(["--make", "cpu", shape, str(base)], show=False)
            for method in ("lora", "full"):
                for count, sharded in settings:
                    run = train(folder, base, method, count, sharded, options.steps)
                    runs.append({"shape": shape, **run})
                    print(json.dumps(runs[-1]), file=sys.stderr)
    alone = {(run["shape"], run["method"]): run for run in runs if run["processes"] == 1}
    rows = []
    for run in runs:
        one = alone.get((run["shape"], run["method"]))
        speed_up = run["examples_per_second"] / one["examples_per_second"] if one else None
        rows.append(
            [
                *(str(run[key]) for key in ("shape", "method", "processes", "shard")),
                f"{run['examples_per_second']:.1f}",
                "" if speed_up is None else f"{speed_up:.2f}",
                "" if speed_up is None else f"{speed_up / run['processes']:.0%}",
                "" if run["told"] is None else f"{run['told'] / run['processes']:.0%}",
                f"{run['planned_bytes'] / 1e6:.0f} MB",
                f"{run['measured_bytes'] / 1e6:.0f} MB",
                f"{run['planned_bytes'] / run['measured_bytes']:.2f}",
            ]
        )
    header = ["shape", "method", "processes", "sharded", "examples/s", "speed-up", "efficiency"]
    workload.print_table([*header, "as told", "planned", "measured", "ratio"], rows)
    name = f"devices-shard-{options.shard}" if options.shard else "devices"
    workload.write(name, {"steps": options.steps, "runs": runs})


def train(
    folder: Path, base: Path, method: str, count: int, sharded: str, steps: int
) -> dict[str, Any]:
    """Train once; return the speed, and the largest process's memory as planned and measured."""
    name = f"{base.name}-{method}-{count}-{sharded}"
    settings = {
        "--model": str(base),
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

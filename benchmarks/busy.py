"""Training beside other work: examples per second by how OpenMP's threads wait for each other.

Each setting is a process of its own, loaded once, since OpenMP reads its variables when it is
loaded; then they train in turns, some steps each, a round with the machine to themselves and one
beside each kind of other work. All see the same batches. So whatever else the machine does falls on
all of them, and each round's rate is divided by that of the first setting in the same round.

    python benchmarks/busy.py
    python benchmarks/busy.py --rounds 5 --arms default spin-1000 threads-1 --loads none one
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import workload

BATCH = 32
ARMS: dict[str, dict[str, str]] = {
    "default": {},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
    **{f"spin-{n}": {"GOMP_SPINCOUNT": str(n)} for n in (100, 300, 1_000, 3_000, 10_000, 30_000)},
    "threads-1": {"OMP_NUM_THREADS": "1"},
    "remora": {},
}
"""Environment of each process. `remora` is the default with Remora's own change of threads."""

SETTLING_SECONDS = 4.0
"""Time before what is measured, in which Remora notices the load: before, others had their turn."""

LOADS = {"none": (0, 0), "one": (1, 0), "four-niced": (4, 10)}
"""Other processes that compute without end: how many, and how much nicer they are."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=4, help="steps of a setting in a round")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--loads", nargs="+", default=["none", "one"], choices=LOADS)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options)
        return
    workers = {arm: start(arm, options) for arm in options.arms}
    runs: list[dict[str, Any]] = []
    try:
        for worker in workers.values():
            ask(worker, 2)  # the first steps set up the libraries
        for number in range(options.rounds):
            for load in options.loads:
                order = random.Random(number).sample(options.arms, len(options.arms))
                with other_work(*LOADS[load]):
                    for arm in order:
                        settle(workers[arm], arm)
                        found = ask(workers[arm], options.steps)
                        runs.append({"round": number, "load": load, "arm": arm, **found})
    finally:
        for worker in workers.values():
            worker.kill()
            worker.wait()
    show(runs, options)
    workload.write("busy", {"model": options.model, "steps": options.steps, "runs": runs})


def start(arm: str, options: argparse.Namespace) -> subprocess.Popen[str]:
    """Start the process of a setting."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_", "KMP_"))}
    command = [sys.executable, __file__, "--worker", "--model", options.model, "--arms", arm]
    return subprocess.Popen(
        command,
        env={**clean, "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore", **ARMS[arm]},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def settle(worker: subprocess.Popen[str], arm: str) -> None:
    """Take steps that do not count."""
    began = time.monotonic()
    ask(worker, 1)
    while arm == "remora" and time.monotonic() - began < SETTLING_SECONDS:
        ask(worker, 1)


def ask(worker: subprocess.Popen[str], steps: int) -> dict[str, Any]:
    """Let a process take some steps; return its figures, and what others took of the machine."""
    assert worker.stdin
    assert worker.stdout
    before = _busy_seconds()
    worker.stdin.write(f"{steps}\n")
    worker.stdin.flush()
    found: dict[str, Any] = json.loads(worker.stdout.readline())
    others = (_busy_seconds() - before - found["cpu_seconds"]) / found["seconds"]
    return {**found, "other_cores": round(others, 2)}


def _busy_seconds() -> float:
    """Return the CPU time that all processes of the machine have had, in seconds."""
    import psutil

    times = psutil.cpu_times()
    return float(sum(times) - times.idle - getattr(times, "iowait", 0.0) - times.guest)


@contextlib.contextmanager
def other_work(count: int, niceness: int) -> Iterator[None]:
    """Keep the machine busy with processes that compute without end."""
    endless = f"import os; os.nice({niceness})\nwhile True: pass"
    processes = [subprocess.Popen([sys.executable, "-c", endless]) for _ in range(count)]
    time.sleep(0.3 if count else 0.0)
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def work(options: argparse.Namespace) -> None:
    """Train some steps for each line of standard input, which says how many."""
    import tempfile

    import torch

    from remora.config import TrainConfig
    from remora.data.dataset import load_data
    from remora.data.splits import batches
    from remora.runtime import threads
    from remora.training.micro_batches import MicroBatches
    from remora.training.session import open_session

    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(data="sample:support", model=options.model, output=Path(folder))
        dataset = load_data(config)
        with open_session(config, dataset) as session:
            parameters = [p for p in session.model.parameters() if p.requires_grad]
            optimizer = torch.optim.AdamW(parameters, lr=1e-4)
            micro_batches = MicroBatches(
                session.model,
                session.plan.micro_batch_tokens,
                session.accelerator,
                None,
                session.group,
                session.reporter,
            )
            session.model.train()
            train = dataset.train
            chosen = batches(len(train), BATCH, 10**6, 0)
            for line in sys.stdin:
                began, cpu = time.perf_counter(), time.process_time()
                for _ in range(int(line)):
                    if options.arms == ["remora"]:
                        threads.adapt(session.device)
                    indices = next(chosen)
                    rows = session.prompt.rows(
                        [train.texts[i] for i in indices], [train.labels[i] for i in indices]
                    )
                    micro_batches.add_gradients(rows)
                    session.accelerator.clip_grad_norm_(parameters, 1.0)
                    optimizer.step()
                    optimizer.zero_grad()
                seconds = time.perf_counter() - began
                found = {"seconds": seconds, "examples_per_second": int(line) * BATCH / seconds}
                found |= {"cpu_seconds": time.process_time() - cpu}
                found |= {"threads": torch.get_num_threads()}
                print(json.dumps(found), flush=True)


def show(runs: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Print medians over the rounds, and the ratios to the first setting in the same round."""
    rates = {(r["round"], r["load"], r["arm"]): r["examples_per_second"] for r in runs}
    first = options.arms[0]
    table = []
    for arm in options.arms:
        cells = [arm]
        for load in options.loads:
            own = [rates[i, load, arm] for i in range(options.rounds)]
            quiet = [rates[i, "none", first] for i in range(options.rounds)]
            ratio = statistics.median(a / b for a, b in zip(own, quiet, strict=True))
            others = [r["other_cores"] for r in runs if (r["load"], r["arm"]) == (load, arm)]
            cells += [f"{statistics.median(own):.0f}", f"{ratio:.2f}"]
            cells += [f"{statistics.median(others):.2f}"]
        table.append(cells)
    header = ["setting"]
    for load in options.loads:
        header += [f"{load}: examples/s", f"of {first} alone", "others' cores"]
    workload.print_table(header, table)


if __name__ == "__main__":
    main()

"""Everything that only a GPU can answer, in one run of at most ten minutes.

Parts, in the order of what they are worth: training steps of Remora and of the stock trainers, a
profile of one step, the tests that need a device, memory planned against measured. Each is a
process of its own with a limit of its own. After each, benchmarks/results/gpu.json is written, and
what a part said is in benchmarks/results/gpu/. The same command run again repeats what failed or
was cut off, and no test that has passed.

    pip install -e '.[dev,bench]' liger-kernel      # with torch for the device
    REMORA_SHARED=../shared python benchmarks/gpu.py
    python benchmarks/gpu.py --parts profile tests --again
    python benchmarks/gpu.py --device cpu --size tiny    # to see that the script works
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import workload

HERE = Path(__file__).parent
STEPS = {"cuda": (20, 5), "cpu": (2, 1)}
"""Measured steps of a trainer, and those before them."""


@dataclass(frozen=True)
class Part:
    """One question: the command that answers it, and the most seconds that it may take."""

    name: str
    limit_seconds: float
    command: tuple[str, ...]


def parts(options: argparse.Namespace) -> list[Part]:
    """Return all parts, the most valuable first."""
    device, size = options.device, options.size
    steps, warm_up = STEPS[device]

    def arm(name: str, limit: float, micro_batch: int = 32, *more: str) -> Part:
        command = ["speed.py", "--arm", name, "--micro-batch", str(micro_batch), *more]
        command += ["--steps", str(steps), "--warm-up", str(warm_up)]
        command += ["--device", device, "--size", size]
        label = f"{name}, labels listed" if more else name
        return Part(label, limit, (sys.executable, str(HERE / command[0]), *command[1:]))

    own = (sys.executable, str(HERE / "gpu.py"), "--device", device, "--size", size)
    tests = ("-m", "pytest", "-v", "-p", "no:cacheprovider", "-n", "4", "tests/test_cuda.py")
    memory = (sys.executable, str(HERE / "memory.py"), "--device", device, "--at-once", "4")
    shapes = ("Qwen2.5-1.5B",) if device == "cuda" else ("Qwen2",)
    return [
        arm("remora", 60),
        arm("remora", 60, 32, "--list-labels"),
        Part("profile", 60, (*own, "--profile")),
        arm("recipe", 60),
        arm("trl-padding-free", 45),
        Part("tests", 240, (sys.executable, *tests)),
        arm("trl-packed", 45),
        arm("liger", 45),
        arm("padded", 45),
        arm("recipe", 60, 8, "--list-labels"),
        Part("memory", 150, (*memory, "--shapes", *shapes)),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=STEPS)
    parser.add_argument("--size", default="1.5B", choices=workload.QWEN)
    parser.add_argument("--limit", type=float, default=600, help="seconds for all parts")
    parser.add_argument("--parts", nargs="+", help="only these")
    parser.add_argument("--again", action="store_true", help="repeat what is done")
    parser.add_argument("--output", type=Path, default=workload.RESULTS / "gpu.json")
    parser.add_argument("--profile", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.profile:
        print(json.dumps(profile(options)))
        return
    chosen = parts(options)
    names = [part.name for part in chosen]
    if unknown := set(options.parts or ()) - set(names):
        raise SystemExit(f"error: no parts {sorted(unknown)}; choose from {', '.join(names)}")
    run([p for p in chosen if p.name in (options.parts or names)], options)


def run(chosen: list[Part], options: argparse.Namespace) -> None:
    """Run the parts that are not done, within the time for all, and write after each."""
    folder = options.output.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {}
    if options.output.exists():
        found = json.loads(options.output.read_text(encoding="utf-8"))
    ends = time.monotonic() + options.limit
    for part in chosen:
        before = found.get(part.name, {})
        if before.get("code") == 0 and not options.again:
            print(f"{part.name}: done before")
            continue
        left = min(part.limit_seconds, ends - time.monotonic())
        if left <= 0:
            print(f"{part.name}: no time left; run the same command again")
            continue
        found[part.name] = start(part, left, folder, {} if options.again else before)
        temporary = options.output.with_suffix(".part")
        temporary.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        temporary.replace(options.output)
        print(f"{part.name}: {said(found[part.name])}", flush=True)


def start(part: Part, limit: float, folder: Path, before: dict[str, Any]) -> dict[str, Any]:
    """Run a part for so many seconds; return its exit code, its time and its figures."""
    passed = [name for name, how in before.get("tests", {}).items() if how == "PASSED"]
    command = [*part.command, *(f"--deselect={name}" for name in passed)]
    log = folder / f"{part.name.replace(', ', '-').replace(' ', '-')}.log"
    environment = {**os.environ, "PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1"}
    began = time.monotonic()
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=workload.ROOT,
            env=environment,
            start_new_session=True,  # so that what it has started ends with it
        )
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            code = None
    text = log.read_text(encoding="utf-8", errors="replace")
    result = {"code": code, "seconds": round(time.monotonic() - began, 1), **figures(text)}
    if passed:
        result["tests"] = {**before["tests"], **result.get("tests", {})}
        if code == 5:  # none was left to run
            result["code"] = 0
    return result


def figures(text: str) -> dict[str, Any]:
    """Return what a part has said, also one that was cut off: JSON lines, and tests by name."""
    lines = [line for line in text.splitlines() if line.startswith("{")]
    values = []
    for line in lines:
        try:
            values.append(json.loads(line))
        except json.JSONDecodeError:  # another's, or cut off
            continue
    found: dict[str, Any] = {"values": values} if values else {}
    tests = {}
    for line in text.splitlines():
        how = re.search(r"\b(PASSED|FAILED|ERROR|SKIPPED)\b", line)
        name = re.search(r"(tests/\S+::.+?)(?: (?:PASSED|FAILED|ERROR|SKIPPED)|\s*$| - )", line)
        if how and name:
            tests[name[1]] = how[1]
    if tests:
        found["tests"] = tests
    if "liger" in text and "ImportError" in text:
        found["missing"] = "liger-kernel"
    return found


def said(result: dict[str, Any]) -> str:
    """Return a part's result in a line."""
    end = "cut off" if result["code"] is None else f"exit code {result['code']}"
    words = [f"{result['seconds']:.0f} s, {end}"]
    if result.get("missing"):
        words.append(f"{result['missing']} is not installed")
    if tests := result.get("tests"):
        counts = {how: list(tests.values()).count(how) for how in sorted(set(tests.values()))}
        words.append(", ".join(f"{count} {how.lower()}" for how, count in counts.items()))
    for value in result.get("values", ()):
        if "examples_per_second" in value:
            words.append(f"{value['examples_per_second']:.1f} examples/s")
        if "planned_bytes" in value:
            words.append(f"{value['planned_bytes'] / value['peak_bytes']:.2f} of planned memory")
        if "step_seconds" in value:
            words.append(
                f"a step of {1e3 * value['step_seconds']:.1f} ms, the device computes for "
                f"{1e3 * value['device_seconds']:.1f} ms in {value['kernels']:,.0f} kernels"
            )
    return "; ".join(words)


def profile(options: argparse.Namespace) -> dict[str, Any]:
    """Return where the time of a step goes: its operations by the device's own time."""
    import contextlib
    from collections.abc import Iterator

    import torch
    from torch.profiler import ProfilerActivity

    import speed

    steps, warm_up = 2, STEPS[options.device][1]
    on_cuda = options.device == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    profiler = torch.profiler.profile(activities=activities)

    @contextlib.contextmanager
    def watch(step: int) -> Iterator[None]:
        if step == warm_up:
            profiler.start()
        yield
        if step == warm_up + steps - 1:
            profiler.stop()

    settings = argparse.Namespace(
        **{"device": options.device, "size": options.size, "layers": None, "list_labels": False},
        **{"steps": steps, "warm_up": warm_up, "micro_batch": [32], "arm": "remora"},
        micro_batch_tokens=None,
    )
    measured = speed.run_arm(settings, watch)
    key = "self_device_time_total" if on_cuda else "self_cpu_time_total"
    events = profiler.key_averages()
    total = sum(getattr(event, key) for event in events)
    top = sorted(events, key=lambda event: -getattr(event, key))[:30]
    launches = [e for e in events if e.key in ("cudaLaunchKernel", "cuLaunchKernel")]
    return {
        "step_seconds": sum(measured["seconds"][warm_up:]) / steps,
        "device_seconds": total / 1e6 / steps,
        "kernels": sum(e.count for e in (launches if on_cuda else events)) / steps,
        "operations": [
            {"name": e.key, "count": e.count / steps, "ms": getattr(e, key) / 1e3 / steps}
            for e in top
        ],
    }


if __name__ == "__main__":
    main()

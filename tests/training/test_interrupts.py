"""Every command obeys Ctrl-C within five seconds, at whatever it is.

python -m pytest -m durability tests/training/test_interrupts.py
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from data.test_table import write_csv

pytestmark = pytest.mark.durability

SECONDS = 5.0
MOMENTS = 6
"""Moments at which each command is interrupted, spread over its time."""

COMMANDS = {
    "train": ("train", "data.csv", "--model", "nano", "--max-steps", "6", "--output", "new"),
    "classes": (
        *("train", "data.csv", "--model", "nano", "--max-steps", "3", "--output", "new"),
        *("--answer", "classes"),
    ),
    "eval": ("eval", "runs/made", "short.csv"),
    "predict": ("predict", "runs/made", "short.csv", "--output", "out.csv"),
    "diagnose": ("diagnose", "runs/made"),
    "merge": ("export", "runs/made", "--merge", "--output", "merged"),
    "compress": ("export", "runs/made", "--compress", "--output", "compressed"),
    "report": ("report", "runs/made"),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run, and a table whose SVM takes long."""
    # a process that a shell put in the background ignores Ctrl-C, and so would those it starts
    signal.signal(signal.SIGINT, signal.default_int_handler)
    folder = tmp_path_factory.mktemp("interrupts")
    draw = random.Random(0)
    words = ["card", "refund", "payment", "top", "cash", "lost", "late", "fee", "pin", "address"]
    rows = [
        (" ".join(draw.choices(words, k=12)) + f" {i}", f"{draw.choice(words)} {i % 8}")
        for i in range(6_000)
    ]
    write_csv(folder / "data.csv", rows)
    write_csv(folder / "short.csv", rows[:300])
    made = ("train", "data.csv", "--model", "nano", "--max-steps", "2", "--name", "made")
    few = ("--test-fraction", "0.02", "--validation-fraction", "0.02", "--baselines", "svm")
    assert run([*made, *few], folder)[0] == 0
    return folder


def run(
    arguments: Sequence[str], folder: Path, after: float | None = None
) -> tuple[int, float, str]:
    """Run a command, and interrupt it; return its code, the seconds until it ended, its errors."""
    process = subprocess.Popen(
        [sys.executable, "-m", "remora", *arguments],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    began = time.monotonic()
    if after is not None:
        try:
            process.wait(after)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            began = time.monotonic()
    _, errors = process.communicate(timeout=600)
    return process.returncode, time.monotonic() - began, errors


@pytest.mark.parametrize("name", COMMANDS)
def test_ctrl_c_is_obeyed_within_seconds(name: str, place: Path) -> None:
    arguments = [*COMMANDS[name]]

    def fresh(attempt: str) -> list[str]:
        """A new run or folder each time, so that no attempt finds the work of another."""
        return [
            f"{each}-{attempt}" if each in {"new", "merged", "compressed"} else each
            for each in arguments
        ]

    code, whole, _ = run(fresh("whole"), place)
    assert code == 0
    for moment in range(MOMENTS):
        after = 1.0 + whole * moment / MOMENTS  # Python itself starts before that
        code, seconds, errors = run(fresh(str(moment)), place, after)
        told = f"{name} after {after:.1f} of {whole:.1f} s: code {code}, {seconds:.1f} s\n{errors}"
        print(told.splitlines()[0])  # noqa: T201
        assert seconds <= SECONDS, told
        assert code in {0, 75, 130, -signal.SIGINT}, told
        assert "Traceback" not in errors, told

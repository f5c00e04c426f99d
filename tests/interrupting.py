"""A run that is interrupted at a step or while it scores, and one that is not, to compare with."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from conftest import made_once, two_epochs
from remora.config import TrainConfig
from remora.errors import Stopped
from remora.runtime.reporter import Reporter, Step
from remora.training import checkpoint, resume
from remora.training.run import train

TIMED = {"examples_per_second", "supervised_tokens_per_second", "peak_memory_bytes"}


class Interrupter(Reporter):
    """Sends this process a real signal when something is told for the n-th time."""

    def __init__(self, *, step: int = 0, scoring: int = 0) -> None:
        self.step, self.scorings, self.lines = step, scoring, []

    def say(self, line: str) -> None:
        self.lines.append(line)

    def stepped(self, step: Step) -> None:
        self.last = step
        if step.step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)

    def scoring(self, what: str, done: int, total: int) -> None:
        self.scorings -= 1
        if self.scorings == 0:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture
def keep_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resume, "finish", lambda directory: None)


def outcome(directory: Path) -> dict[str, Any]:
    """Return all of a finished run that must not depend on interruptions."""
    (last,) = (directory / "checkpoints").iterdir()
    log = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    evaluation = json.loads((directory / "evaluation.json").read_text())
    return {
        "checkpoint": last.name,
        # weights, best weights, optimizer, random numbers
        "tensors": hashlib.sha256((last / checkpoint.TENSORS).read_bytes()).hexdigest(),
        "adapter": hashlib.sha256(
            (directory / "adapter" / "adapter_model.safetensors").read_bytes()
        ).hexdigest(),
        "log": [{k: v for k, v in record.items() if k not in TIMED} for record in log],
        "metrics": evaluation["metrics"],
        "predictions": (directory / "predictions.csv").read_text(),
    }


@pytest.fixture(scope="session")
def whole(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The outcome of a run that nothing interrupts."""

    def make(folder: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(resume, "finish", lambda directory: None)
            assert train(two_epochs(base, folder)).num_steps == 20

    (directory,) = (made_once(tmp_path_factory, "undisturbed", make) / "runs").iterdir()
    return outcome(directory)


@pytest.fixture
def undisturbed(whole: dict[str, Any], keep_checkpoints: None) -> dict[str, Any]:
    return whole


def interrupted(config: TrainConfig, reporter: Interrupter) -> Path:
    with pytest.raises(Stopped, match="run the same command again"):
        train(config, reporter=reporter)
    (directory,) = config.output.iterdir()
    return directory

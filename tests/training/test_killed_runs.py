"""Processes that are stopped or killed at any moment save or lose nothing."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import forked
import interrupting
from interrupting import Interrupter, outcome
from remora.config import TrainConfig
from remora.errors import Stopped
from remora.runtime import files
from remora.runtime.stop import Stop
from remora.training import resume
from remora.training.run import train
from service import wait

whole, undisturbed = interrupting.whole, interrupting.undisturbed
keep_checkpoints = interrupting.keep_checkpoints


def command(config: TrainConfig) -> list[str]:
    config.output.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(config.output.parent / "settings.toml", config.to_toml())
    settings = config.output.parent / "settings.toml"
    return [sys.executable, "-m", "remora", "train", "--config", str(settings)]


def killed(config: TrainConfig, number: int, wait: Callable[[], bool]) -> tuple[int, str, float]:
    """Run the real command, send it a signal when a condition holds; return how it ended."""
    with subprocess.Popen(
        command(config), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as p:
        while not wait() and p.poll() is None:
            time.sleep(0.005)
        sent = time.monotonic()
        p.send_signal(number)
        _, errors = p.communicate()
    return p.returncode, errors, time.monotonic() - sent


def has_logged(config: TrainConfig, num_lines: int) -> Callable[[], bool]:
    def look() -> bool:
        return any(
            path.read_text().count("\n") >= num_lines
            for path in config.output.glob("*/metrics.jsonl")
        )

    return look


def test_the_command_line_saves_on_sigterm_and_goes_on(
    config: TrainConfig, undisturbed: dict[str, Any]
) -> None:
    code, errors, _ = killed(config, signal.SIGTERM, has_logged(config, 3))
    assert code == 75, errors
    assert errors.splitlines()[-1] == (
        "error: stopped (SIGTERM); run the same command again to resume"
    )
    assert "Traceback" not in errors
    result = train(config)
    assert outcome(result.directory) == undisturbed


@pytest.mark.parametrize(("verb", "code"), [("train", 75), ("predict", -signal.SIGTERM)])
def test_sigterm_before_the_command_line_is_read(verb: str, code: int) -> None:
    body = (
        "import os, signal, sys\n"
        "class AtImport:\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name == 'remora.cli': os.kill(os.getpid(), signal.SIGTERM)\n"
        f"sys.meta_path.insert(0, AtImport()); sys.argv = ['remora', {verb!r}, 'data.csv']\n"
        "from remora.__main__ import run\n"
        "sys.exit(run())\n"
    )
    done = subprocess.run([sys.executable, "-c", body], capture_output=True, text=True, check=False)
    assert done.returncode == code
    told = "error: stopped (SIGTERM); run the same command again to resume\n"
    assert done.stderr == (told if verb == "train" else "")


def test_a_killed_process_goes_on_from_its_last_checkpoint(
    config: TrainConfig, undisturbed: dict[str, Any]
) -> None:
    config = replace(config, checkpoint_minutes=0)
    _, _, *arguments = command(config)
    with tempfile.TemporaryFile("w+") as told:
        process = forked.start(forked.remora(*arguments[1:]), told)
        wait(has_logged(config, 4))
        process.kill()
        assert process.wait() == -signal.SIGKILL
    reporter = Interrupter()
    result = train(config, reporter=reporter)
    assert any("resuming after step" in line for line in reporter.lines)
    assert outcome(result.directory) == undisturbed


@pytest.mark.durability
def test_sigterm_at_any_moment_saves_and_is_out_at_once(
    config: TrainConfig, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    def begin_and_stop(number: int) -> tuple[TrainConfig, int, str, float]:
        attempt = replace(config, output=tmp_path / str(number) / "runs")
        moment = time.monotonic() + random.Random(number).uniform(0.2, 8)
        return attempt, *killed(attempt, signal.SIGTERM, lambda: time.monotonic() > moment)

    with ThreadPoolExecutor(1) as pool:  # what was stopped goes on meanwhile, on another core
        for number, begun in enumerate([pool.submit(begin_and_stop, n) for n in range(30)]):
            attempt, code, errors, seconds = begun.result()
            (directory,) = attempt.output.glob("*") if attempt.output.exists() else [None]
            if directory is None or not resume.is_finished(directory):
                assert code == 75, errors
                assert seconds < 2.5, errors  # a step takes less than half a second here
                assert outcome(train(attempt).directory) == undisturbed, number


@pytest.mark.durability
def test_sigkill_at_any_moment_loses_nothing(
    config: TrainConfig, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    def begin_and_kill(number: int) -> TrainConfig:
        attempt = replace(
            config, output=tmp_path / str(number) / "runs", checkpoint_minutes=0, name="mine"
        )
        moment = time.monotonic() + random.Random(number).uniform(0.5, 8)
        killed(attempt, signal.SIGKILL, lambda: time.monotonic() > moment)
        return attempt

    with ThreadPoolExecutor(2) as pool:
        for number, attempt in enumerate(pool.map(begin_and_kill, range(30))):
            finished = attempt.output / "mine" / "evaluation.json"
            if not finished.is_file() or (finished.parent / "checkpoints").is_dir():
                assert outcome(train(attempt).directory) == undisturbed, number


def test_a_signal_before_training_is_not_taken_by_a_library() -> None:
    def library() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
        except Exception:
            pytest.fail("it was caught on the way")

    stop = Stop()
    with pytest.raises(Stopped, match="SIGTERM"), stop.listening():
        library()

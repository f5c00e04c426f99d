"""Runs that are interrupted go on as if nothing had happened."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import interrupting
from interrupting import Interrupter, interrupted, outcome
from remora.config import TrainConfig
from remora.errors import ConfigError, ModelError, ResourceError, Stopped
from remora.runtime import run_directory
from remora.runtime.reporter import Reporter, Step, Validation
from remora.training import checkpoint, resume
from remora.training.run import train
from remora.tree import scoring

whole, undisturbed = interrupting.whole, interrupting.undisturbed
keep_checkpoints = interrupting.keep_checkpoints


@pytest.mark.parametrize("steps", [(1,), (4,), (3, 5, 9)])
def test_a_run_stopped_after_a_step_ends_with_the_bits_of_one_that_was_not(
    config: TrainConfig, undisturbed: dict[str, Any], steps: tuple[int, ...]
) -> None:
    for step in steps:
        reporter = Interrupter(step=step)
        interrupted(config, reporter)
        assert reporter.last.step == step
    result = train(config)
    assert outcome(result.directory) == undisturbed


@pytest.mark.durability
def test_a_run_stopped_after_any_step_ends_with_the_same_bits(
    config: TrainConfig, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    num_steps = undisturbed["log"][-1]["step"]
    for step in range(1, num_steps + 1):
        attempt = replace(config, output=tmp_path / f"stopped-{step}")
        interrupted(attempt, Interrupter(step=step))
        result = train(attempt)
        assert outcome(result.directory) == undisturbed, step


@pytest.mark.durability
def test_two_processes_stopped_after_any_step_end_with_the_same_bits(
    config: TrainConfig, tmp_path: Path
) -> None:
    """A sample of this is in test_ranks, through the command line."""
    steps = range(1, 21)
    (tmp_path / "config.toml").write_text(config.to_toml(), encoding="utf-8")
    with contextlib.ExitStack() as stack:
        found = [stack.enter_context(socket.socket()) for _ in range(1 + 2 * len(steps))]
        for each in found:
            each.bind(("127.0.0.1", 0))
        ports = [each.getsockname()[1] for each in found]
    call = f"stop_at_each({str(tmp_path)!r}, {[*steps]}, {ports})"
    body = f"from training import test_resume; test_resume.{call}"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", body],
            cwd=Path(__file__).parents[1],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
            | {"WORLD_SIZE": "2", "RANK": str(rank)},
        )
        for rank in range(2)
    ]
    told = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], told
    undisturbed, *others = [outcome(config.output / f"{n}" / "run") for n in (0, *steps)]
    assert undisturbed["log"][-1]["step"] == 20
    for step, other in zip(steps, others, strict=True):
        assert other == undisturbed, step


def stop_at_each(folder: str, steps: Sequence[int], ports: Sequence[int]) -> None:
    """What one of two processes does: a run undisturbed, and one stopped after each of some steps.

    Args:
        folder: Where the settings of the runs are.
        steps: Where to stop.
        ports: Where the processes meet, one for each time.
    """
    resume.finish = lambda directory: None  # keeps checkpoints
    meeting = iter(ports)
    config = replace(run_directory.read_settings(Path(folder)), name="run")

    def attempt(number: int, reporter: Interrupter) -> None:
        os.environ["MASTER_PORT"] = str(next(meeting))
        with contextlib.suppress(SystemExit):  # of the process that has no results
            train(replace(config, output=config.output / str(number)), reporter=reporter)

    attempt(0, Interrupter())
    for step in steps:
        reporter = Interrupter(step=step)
        with pytest.raises(Stopped):
            attempt(step, reporter)
        assert os.environ["RANK"] == "1" or reporter.last.step == step
        attempt(step, Interrupter())


def test_a_run_stopped_while_it_evaluates_ends_with_the_same_bits(
    config: TrainConfig, undisturbed: dict[str, Any]
) -> None:
    directory = interrupted(config, Interrupter(scoring=1))
    (saved,) = (directory / "checkpoints").iterdir()
    assert saved.name == "step-00000004"  # the evaluation after it is still to come
    interrupted(config, Interrupter(scoring=2))
    result = train(config)
    assert outcome(result.directory) == undisturbed


def test_a_run_stopped_while_it_measures_does_not_train_again(
    config: TrainConfig, undisturbed: dict[str, Any]
) -> None:
    class AtTheEnd(Interrupter):
        def scoring(self, what: str, done: int, total: int) -> None:
            if what == "test":
                os.kill(os.getpid(), signal.SIGINT)

    interrupted(config, AtTheEnd())

    class Trained(Reporter):
        def stepped(self, step: Step) -> None:
            pytest.fail("it took another step")

    result = train(config, reporter=Trained())
    assert outcome(result.directory) == undisturbed


def test_the_adapter_is_of_the_best_step_though_another_was_best_before(
    config: TrainConfig, keep_checkpoints: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After resuming an evaluation may differ in rounding, and no longer be the best."""
    accuracies = iter([0.5, 0.9, 0.4, 0.3, 0.2, 0.1])
    monkeypatch.setattr(scoring, "evaluate_rows", lambda *_: (next(accuracies), 1.0))

    class Killer(Reporter):
        def validated(self, validation: Validation) -> None:
            if validation.accuracy == 0.9:
                assert validation.best
                raise KeyboardInterrupt  # after the adapter is saved, before the next checkpoint

    config = replace(config, checkpoint_minutes=0, patience=0)
    with pytest.raises(KeyboardInterrupt):
        train(config, reporter=Killer())
    result = train(config)
    assert result.best_step == 4
    (last,) = (result.directory / "checkpoints").iterdir()
    best = load_file(last / checkpoint.TENSORS)
    adapter = load_file(result.directory / "adapter" / "adapter_model.safetensors")
    assert adapter
    for name, weight in adapter.items():
        path, kind = name.rsplit(".", 1)
        assert torch.equal(weight, best[f"best/{path}.default.{kind}"]), name


def test_a_run_may_be_resumed_with_another_tolerance(config: TrainConfig) -> None:
    directory = interrupted(config, Interrupter(step=3))
    result = train(replace(config, tolerance=1.0))
    assert result.directory == directory


def test_a_second_signal_while_it_saves_does_no_harm(
    config: TrainConfig, undisturbed: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    save = checkpoint.save

    def disturbed(*arguments: Any) -> Path:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        return save(*arguments)

    monkeypatch.setattr(checkpoint, "save", disturbed)
    interrupted(config, Interrupter(step=2))
    monkeypatch.setattr(checkpoint, "save", save)
    assert outcome(train(config).directory) == undisturbed


def test_a_finished_run_keeps_no_checkpoints_and_is_not_gone_on_with(config: TrainConfig) -> None:
    config = replace(config, max_steps=2, checkpoint_minutes=0)
    first = train(config).directory
    assert not (first / "checkpoints").exists()
    assert not (first / "holder.json").exists()
    second = train(config).directory
    assert second != first
    with pytest.raises(ConfigError, match="exists already"):
        train(replace(config, name=first.name))


def test_a_run_that_the_disk_has_no_room_for_does_not_begin(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=20_000))
    with pytest.raises(ResourceError, match=r"needs .* of disk, 20 kB are free in .*--output"):
        train(config)
    assert not config.output.exists()


def test_the_time_limit_saves_and_stops(config: TrainConfig) -> None:
    with pytest.raises(Stopped, match="time limit reached"):
        train(replace(config, max_time="0s"))
    (directory,) = config.output.iterdir()
    assert [p.name for p in (directory / "checkpoints").iterdir()] == ["step-00000001"]


@pytest.mark.parametrize(("text", "seconds"), [("11h30m", 41_400), ("45m", 2_700), ("90s", 90)])
def test_a_time_limit_is_read_as_people_write_it(
    config: TrainConfig, text: str, seconds: float
) -> None:
    assert replace(config, max_time=text).max_seconds == seconds


@pytest.mark.parametrize("text", ["", "h", "11", "1d", "-3m", "3m2h"])
def test_what_is_no_time_is_refused(config: TrainConfig, text: str) -> None:
    with pytest.raises(ConfigError, match="11h30m"):
        replace(config, max_time=text)


def changed_table(config: TrainConfig) -> TrainConfig:
    path = Path(config.data)
    other = config.output.parent / path.name  # of the same name, so that the run's is the same
    other.write_text(path.read_text().replace("Still", "No longer", 1))
    return replace(config, data=str(other))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda config: replace(config, name="mine", seed=1), "seed 0 there, 1 here"),
        (lambda config: replace(config, name="mine", batch_size=8), "batch_size 5 there, 8 here"),
        (changed_table, "data [0-9a-f]{12} there, [0-9a-f]{12} here"),
    ],
)
def test_another_run_is_refused_with_the_difference(
    config: TrainConfig, change: Callable[[TrainConfig], TrainConfig], told: str
) -> None:
    other = change(config)
    config = replace(config, name=other.name)
    directory = interrupted(config, Interrupter(step=1))
    before = {p: p.read_bytes() for p in directory.rglob("*") if p.is_file()}
    with pytest.raises(ConfigError, match=told):
        train(other)
    assert {p: p.read_bytes() for p in directory.rglob("*") if p.is_file()} == before


def test_another_base_is_refused(config: TrainConfig, tmp_path: Path, base: Path) -> None:
    copied = shutil.copytree(base, tmp_path / base.name)
    interrupted(replace(config, model=str(copied)), Interrupter(step=1))
    weights = copied / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(bytes(content))
    with pytest.raises(ConfigError, match="a base model with the hash"):
        train(replace(config, model=str(copied)))


def test_other_settings_begin_another_run_beside_an_unfinished_one(config: TrainConfig) -> None:
    first = interrupted(config, Interrupter(step=1))
    reporter = Interrupter()
    result = train(replace(config, learning_rate=5e-3, max_steps=1), reporter=reporter)
    assert result.directory != first
    assert any("learning_rate 0.01 there, 0.005 here" in line for line in reporter.lines)
    assert (first / "checkpoints").is_dir()


def test_a_start_that_was_cut_off_is_begun_again(config: TrainConfig) -> None:
    config = replace(config, name="mine", max_steps=1)
    (config.output / "mine").mkdir(parents=True)
    (config.output / "mine" / "environment.json").write_text("{}")
    assert train(config).directory == config.output / "mine"


@pytest.mark.parametrize("content", ["", "data = 'sample:support'\nmodel = "])
def test_damaged_settings_stop_no_other_run(config: TrainConfig, content: str) -> None:
    config = replace(config, max_steps=1)
    names = run_directory.paths(config.output, None, config.data, config.model)
    usual, second = next(names), next(names)
    for folder in (usual, config.output / "mine"):
        folder.mkdir(parents=True)
        (folder / "config.toml").write_text(content)
    with pytest.raises(ConfigError, match=r"\(config\.toml cannot be read\); .* another --name"):
        train(replace(config, name="mine"))
    reporter = Interrupter()
    assert train(config, reporter=reporter).directory == second
    assert any("left as it is: config.toml cannot be read" in line for line in reporter.lines)
    assert (usual / "config.toml").read_text() == content


def test_a_name_that_another_process_has_just_taken_is_not_to_be_removed(tmp_path: Path) -> None:
    taken = run_directory.create(tmp_path, "mine", "d", "m")
    with (
        resume.hold(taken),
        pytest.raises(ConfigError, match=r"another process is training in .*mine; wait for it"),
    ):
        run_directory.create(tmp_path, "mine", "d", "m")
    with pytest.raises(ConfigError, match="exists already; give another --name or remove it"):
        run_directory.create(tmp_path, "mine", "d", "m")


def test_a_folder_of_something_else_is_refused_or_passed_over(config: TrainConfig) -> None:
    config = replace(config, max_steps=1)
    mine, (usual, second) = (
        config.output / "mine",
        [
            path
            for path, _ in zip(
                run_directory.paths(config.output, None, config.data, config.model),
                "12",
                strict=False,
            )
        ],
    )
    for folder in (mine, usual):
        folder.mkdir(parents=True)
        (folder / "thesis.txt").write_text("dear")
    with pytest.raises(ConfigError, match="other files and no config"):
        train(replace(config, name="mine"))
    assert train(config).directory == second
    assert [path.name for path in usual.iterdir()] == ["thesis.txt"]


def test_a_run_that_another_process_holds_is_refused(config: TrainConfig) -> None:
    directory = interrupted(config, Interrupter(step=1))
    code = (
        "import sys, time, pathlib; from remora.training import resume\n"
        "with resume.hold(pathlib.Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(directory)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout is not None
            assert other.stdout.readline() == "held\n"
            with pytest.raises(ConfigError, match=f"locked by process {other.pid} on"):
                train(config)
        finally:
            other.kill()
    train(replace(config))  # the lock goes with its process


def test_a_run_on_a_disk_that_is_only_read_is_told(config: TrainConfig, monkeypatch) -> None:
    directory = interrupted(config, Interrupter(step=1))

    def fail(lock: object, **_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(directory / ".lock"))

    monkeypatch.setattr("filelock.FileLock.acquire", fail)
    with pytest.raises(ResourceError, match=f"^cannot write to {directory} .Read-only file system"):
        train(config)


def test_a_run_directory_that_is_removed_ends_the_run(config: TrainConfig) -> None:
    class Remover(Reporter):
        def stepped(self, step: Step) -> None:
            for run in config.output.iterdir():
                shutil.rmtree(run)

    with pytest.raises(ResourceError, match=r"is gone|No such file"):
        train(replace(config, max_steps=2), reporter=Remover())
    assert not [path for path in config.output.iterdir() if (path / "adapter").exists()]


def test_damaged_checkpoints_are_told_about_and_not_skipped_to_zero(config: TrainConfig) -> None:
    directory = interrupted(config, Interrupter(step=2))
    (saved,) = (directory / "checkpoints").iterdir()
    tensors = saved / checkpoint.TENSORS
    content = bytearray(tensors.read_bytes())
    content[len(content) // 2] ^= 1
    tensors.write_bytes(bytes(content))
    reporter = Interrupter()
    with pytest.raises(ModelError, match=r"every checkpoint in .* is damaged"):
        train(config, reporter=reporter)
    assert any("tensors.safetensors is not what was written" in line for line in reporter.lines)


def test_the_log_loses_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    records = [{"step": 1}, {"step": 2}, {"step": 2, "validation_accuracy": 1.0}, {"step": 3}]
    whole = "".join(json.dumps(r) + "\n" for r in records)
    for broken in (b'{"step": 4, "lo', b"\xff\xfe", b"123\n[]\nnull\n"):
        path.write_bytes(whole.encode() + broken)
        resume.cut_log(path, step=2, evaluated=0)
        assert [json.loads(line) for line in path.read_text().splitlines()] == records[:2]

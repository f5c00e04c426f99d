"""Several processes train as one would, stop together, and none is left when one is lost.

Also covers remora.runtime.stop.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

import forked
from remora.config import TrainConfig
from remora.data.dataset import load_data
from remora.errors import ConfigError, DataError, Stopped
from remora.runtime import heartbeat, launch
from remora.runtime.heartbeat import BEAT_SECONDS, LOST_BEATS
from remora.runtime.process_group import ProcessGroup
from remora.training import resume
from remora.training.run import train

WITH_SIGNALS = pytest.mark.skipif(os.name == "nt", reason="needs signals, as Unix has them")
TIMED = {"examples_per_second", "supervised_tokens_per_second", "peak_memory_bytes"}


@pytest.fixture
def config(config: TrainConfig) -> TrainConfig:
    return replace(config, name="run")


def command(config: TrainConfig, *, module: tuple[str, ...] = ("remora",)) -> list[str]:
    path = config.output.with_name(f"{config.output.name}-{config.seed}.toml")
    path.write_text(config.to_toml(), encoding="utf-8")
    return [sys.executable, "-m", *module, "train", "--config", str(path)]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def ended(config: TrainConfig) -> tuple[int, list[str]]:
    """Train in as many processes as the settings ask for; return the worst code, and what was said.

    The launcher is left out; `begun` starts it.
    """
    done = forked.together([program(config)] * config.devices)
    return max(code for code, _ in done), [line for _, said in done for line in said.splitlines()]


def program(config: TrainConfig) -> str:
    _, _, _, *arguments = command(config)
    return forked.remora(*arguments)


@contextlib.contextmanager
def begun(config: TrainConfig) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """Give a run that has taken a few steps, and its processes in their order."""
    with subprocess.Popen(
        command(config), stderr=subprocess.PIPE, text=True, env=environment()
    ) as parent:
        log = config.output / "run" / "metrics.jsonl"
        while not log.is_file() or log.read_text(encoding="utf-8").count("\n") < 3:
            assert parent.poll() is None, parent.stderr and parent.stderr.read()
            time.sleep(0.05)
        children = psutil.Process(parent.pid).children()
        yield parent, [p.pid for p in sorted(children, key=lambda p: (p.create_time(), p.pid))]


def records(config: TrainConfig) -> list[dict[str, Any]]:
    text = (config.output / "run" / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def outcome(config: TrainConfig) -> tuple[str, list[dict[str, Any]]]:
    weights = config.output / "run" / "adapter" / "adapter_model.safetensors"
    log = [{k: v for k, v in record.items() if k not in TIMED} for record in records(config)]
    return hashlib.sha256(weights.read_bytes()).hexdigest(), log


def test_three_processes_take_the_steps_of_one(config: TrainConfig, tmp_path: Path) -> None:
    """The last batch of an epoch has fewer rows than there are processes."""
    config = replace(config, dropout=0.0, batch_size=23, epochs=4)
    assert len(load_data(config).train) % config.batch_size in {1, 2}
    train(config)
    together = replace(config, output=tmp_path / "three", devices=3)
    code, said = ended(together)
    assert code == 0, "\n".join(said)
    assert sum("computing on 3 times cpu" in line for line in said) == 1
    alone, several = records(config), records(together)
    assert len(alone) == len(several)
    for one, other in zip(alone, several, strict=True):
        assert one.keys() == other.keys()
        for name in one.keys() - TIMED:
            assert one[name] == pytest.approx(other[name], rel=1e-5), name
    evaluations = [
        json.loads((one.output / "run" / "evaluation.json").read_text(encoding="utf-8"))
        for one in (config, together)
    ]
    assert "speed_up" not in evaluations[0]
    assert evaluations[1]["num_processes"] == 3
    assert 0 < evaluations[1]["speed_up"] <= 3
    left = {path.name for path in (together.output / "run").iterdir()}
    assert left == {path.name for path in (config.output / "run").iterdir()}


@WITH_SIGNALS
def test_two_processes_stopped_together_go_on_to_the_same_bits(
    config: TrainConfig, tmp_path: Path
) -> None:
    config = replace(config, devices=2, epochs=4)
    undisturbed = replace(config, output=tmp_path / "undisturbed")
    code, said = ended(undisturbed)
    assert code == 0, "\n".join(said)
    with begun(config) as (parent, _):
        parent.send_signal(signal.SIGTERM)
        assert parent.stderr is not None
        said = parent.stderr.read().splitlines()
    assert parent.returncode == Stopped.exit_code
    assert [line for line in said if line.startswith("error")] == [
        "error: stopped (SIGTERM); run the same command again to resume"
    ]
    assert len(records(config)) < len(records(undisturbed))
    code, said = ended(config)
    assert code == 0, "\n".join(said)
    assert outcome(config) == outcome(undisturbed)


@WITH_SIGNALS
@pytest.mark.parametrize(
    ("name", "rank"),
    [("SIGKILL", 1), pytest.param("SIGSTOP", 0, marks=pytest.mark.durability)],
)
def test_a_lost_process_ends_all(config: TrainConfig, name: str, rank: int) -> None:
    lost(replace(config, devices=2, epochs=1_000), getattr(signal, name), rank)


@WITH_SIGNALS
@pytest.mark.durability
def test_any_lost_process_ends_all(config: TrainConfig, tmp_path: Path) -> None:
    def attempt(seed: int) -> None:
        draw = random.Random(seed)
        number = draw.choice([signal.SIGKILL, signal.SIGSTOP])
        own = replace(config, devices=2, epochs=1_000, output=tmp_path / str(seed) / "runs")
        own.output.parent.mkdir()
        lost(own, number, draw.randrange(2))

    with ThreadPoolExecutor(4) as pool:  # they wait most of the time
        list(pool.map(attempt, range(20)))


def lost(config: TrainConfig, number: signal.Signals, rank: int) -> None:
    with begun(config) as (parent, children):
        began = time.monotonic()
        os.kill(children[rank], number)
        assert parent.stderr is not None
        said = parent.stderr.read().splitlines()
        parent.wait()
        seconds = time.monotonic() - began
    assert parent.returncode == 7
    assert seconds < 30
    assert not any(psutil.pid_exists(pid) for pid in children)
    errors = [line for line in said if line.startswith("error")]
    assert len(errors) == 1
    assert errors[0].startswith(f"error: process {rank} of 2 ")
    assert "Traceback" not in "".join(said)


@WITH_SIGNALS
@pytest.mark.durability
def test_processes_that_all_slept_go_on(config: TrainConfig) -> None:
    """As on a laptop that is shut, or after Ctrl-Z."""
    with begun(replace(config, devices=2, epochs=1_000)) as (parent, children):
        for pid in children:
            os.kill(pid, signal.SIGSTOP)
        time.sleep(BEAT_SECONDS * LOST_BEATS + 5)
        taken = len(records(config))
        for pid in children:
            os.kill(pid, signal.SIGCONT)
        deadline = time.monotonic() + 60
        while len(records(config)) <= taken:
            assert parent.poll() is None, parent.stderr and parent.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        parent.send_signal(signal.SIGTERM)
        assert parent.stderr is not None
        said = parent.stderr.read()
    assert parent.returncode == Stopped.exit_code, said


def test_nothing_is_left_when_the_launcher_is_killed(config: TrainConfig) -> None:
    with begun(replace(config, devices=2, epochs=1_000)) as (parent, children):
        parent.kill()
        deadline = time.monotonic() + 30
        while any(psutil.pid_exists(pid) for pid in children):
            assert time.monotonic() < deadline
            time.sleep(0.1)


def test_processes_with_other_settings_or_data_are_refused(
    config: TrainConfig, tmp_path: Path
) -> None:
    other = replace(config, seed=1)
    codes, told = zip(*forked.together([program(config), program(other)]), strict=True)
    assert codes == (2, 2)
    errors = [line for text in told for line in text.splitlines() if line.startswith("error")]
    assert len(errors) == 1
    assert "process 1 of 2 has" in errors[0]
    assert "give all processes the same" in errors[0]
    assert not config.output.exists()


def test_an_error_of_one_is_told_once_and_ends_all(config: TrainConfig) -> None:
    other = replace(config, data="missing.csv", output=config.output.with_name("others"))
    codes, told = zip(*forked.together([program(config), program(other)]), strict=True)
    assert codes == (3, 3)
    errors = [line for text in told for line in text.splitlines() if line.startswith("error")]
    assert len(errors) == 1
    assert errors[0].startswith("error: process 1 of 2: ")
    assert "missing.csv" in errors[0]


class SlowStore:
    """A store whose process gets no time: a call returns when it is let go."""

    def __init__(self) -> None:
        self.called, self.let_go = threading.Event(), threading.Event()

    def set_timeout(self, _: object) -> None: ...

    def set(self, *_: str) -> None: ...

    def multi_get(self, names: list[str]) -> list[bytes]:
        self.called.set()
        self.let_go.wait(20)
        return [b"1"] * len(names)


@pytest.mark.parametrize("answers", [True, False])
def test_no_thread_is_left_in_the_store_when_python_shuts_down(
    answers: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """There the process would be aborted; it was, where the store answered after a second."""
    monkeypatch.setattr(heartbeat, "BEAT_SECONDS", 0.02)
    monkeypatch.setattr(heartbeat, "LOST_BEATS", 100 if answers else 10)
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    store = SlowStore()
    pulse = heartbeat.Heartbeat(store, 1, 2)
    threading.Thread.start(pulse)  # without the second thread, which would see the store hang
    assert store.called.wait(10)
    if answers:
        threading.Timer(0.3, store.let_go.set).start()
    pulse.stop()
    assert pulse.is_alive() is not answers
    assert codes == ([] if answers else [7])
    assert ("process 0 of 2 is gone or hangs" in capsys.readouterr().err) is not answers
    store.let_go.set()
    pulse.join()


ENDS_LATE = """
import faulthandler, os, signal, subprocess, time
from remora.runtime.heartbeat import Heartbeat
from remora.runtime.process_group import join

faulthandler.enable()
stock = Heartbeat.stop
with join() as group:
    first, _ = group.gather(os.getpid())

    def stop(self):
        if group.rank == 0:
            time.sleep(60)  # until it is killed
        os.kill(first, signal.SIGSTOP)
        time.sleep(1.6)  # the next heartbeat waits for an answer
        killed = f"sleep {os.environ['DELAY']}; kill -CONT {first}; sleep 0.05; kill -KILL {first}"
        subprocess.Popen(["sh", "-c", killed])
        stock(self)

    Heartbeat.stop = stop
"""


@WITH_SIGNALS
@pytest.mark.durability
@pytest.mark.parametrize("delay", ["1.05", "1.1", "1.2", "1.3"])
def test_a_process_that_ends_while_the_store_waits_is_not_aborted(delay: str) -> None:
    """It ended with SIGABRT at all four of these times, in a thread without a Python frame."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        common = {
            **{"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "DELAY": delay},
            "MASTER_PORT": str(listener.getsockname()[1]),
            launch.LISTENER: str(listener.fileno()),
        }
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", ENDS_LATE],
                env={**environment(), **common, "RANK": str(rank)},
                pass_fds=() if rank else (listener.fileno(),),
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(2)
        ]
    said = [process.communicate(timeout=100)[1] for process in processes]
    assert [process.returncode for process in processes] == [-signal.SIGKILL, 0], said


def test_a_process_alone_sends_nothing() -> None:
    group = ProcessGroup()
    assert group.is_first
    assert group.total(2.5) == 2.5
    assert group.any(True)
    assert not group.any(False)
    assert group.share({"a": 1}) == {"a": 1}
    (array,) = group.gather_arrays(np.arange(3))
    assert array.tolist() == [0, 1, 2]
    with pytest.raises(DataError, match="as it is"), group.together():
        raise DataError("as it is")


@pytest.mark.parametrize("count", [0, 1, 2, 5, 7, 32])
def test_parts_in_order_are_all_rows(count: int) -> None:
    rows = list(range(count))
    parts = [ProcessGroup(rank, 3).part(rows) for rank in range(3)]
    assert [row for part in parts for row in part] == rows
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_wrong_numbers_of_devices_are_refused(config: TrainConfig) -> None:
    with pytest.raises(ConfigError, match="devices is 0"):
        replace(config, devices=0)
    with pytest.raises(ConfigError, match="devices is 2 and there are 1 processes"):
        train(replace(config, devices=2))


def test_the_number_of_devices_may_change_when_a_run_goes_on(config: TrainConfig) -> None:
    assert "devices" not in resume.fixed(config)


@pytest.mark.durability
def test_two_hosts_under_torchrun_take_the_steps_of_one(
    config: TrainConfig, tmp_path: Path, hosts: list[str]
) -> None:
    config = replace(config, dropout=0.0)
    train(config)
    together = replace(config, output=tmp_path / "hosts")
    processes = []
    for rank, host in enumerate(hosts):
        torchrun = ["torch.distributed.run", "--nnodes", "2", "--node-rank", str(rank)]
        torchrun += ["--master-addr", "10.77.0.1", "--master-port", "29577", "-m", "remora"]
        line = command(together, module=tuple(torchrun))
        processes.append(
            subprocess.Popen(
                ["ip", "netns", "exec", host, *line],
                stderr=subprocess.PIPE,
                text=True,
                env=environment() | {"GLOO_SOCKET_IFNAME": host},
            )
        )
    told = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], told
    for one, other in zip(records(config), records(together), strict=True):
        for name in one.keys() - TIMED:
            assert one[name] == pytest.approx(other[name], rel=1e-5), name

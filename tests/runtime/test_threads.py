"""Fewer threads while other processes keep cores busy, and all of them again afterwards."""

from __future__ import annotations

import importlib
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import psutil
import pytest
import torch
from threadpoolctl import ThreadpoolController

from remora.config import TrainConfig
from remora.data.dataset import load_data
from remora.runtime import threads
from remora.runtime.reporter import Reporter
from remora.training import loop
from remora.training.session import open_session


class Machine:
    """A machine on which others compute with so many cores."""

    def __init__(self, cores: int) -> None:
        self.cores, self.others = cores, 0.0
        self.now, self.busy, self.own = 0.0, 0.0, 0.0

    def times(self) -> tuple[float, float, float]:
        return self.now, self.busy, self.own

    def pass_time(self, seconds: float) -> None:
        own = torch.get_num_threads() * seconds
        self.now += seconds
        self.own += own
        self.busy += own + self.others * seconds


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    made = Machine(4)
    monkeypatch.setattr(threads, "_times", made.times)
    monkeypatch.setattr(threads, "_cores", lambda: range(made.cores))
    monkeypatch.setattr(threads.time, "perf_counter", lambda: made.now)
    before = torch.get_num_threads()
    yield made
    torch.set_num_threads(before)


def after(machine: Machine, adapter: threads.Adapter, seconds: float) -> list[str | None]:
    """Take steps of 0.6 s for so long; return what was said."""
    said = []
    for _ in range(round(seconds / 0.6)):
        machine.pass_time(0.6)
        said.append(adapter.adapt())
    return [each for each in said if each]


def test_threads_are_as_many_as_cores_are_free(machine: Machine) -> None:
    torch.set_num_threads(4)
    adapter = threads.Adapter(4, {})
    assert after(machine, adapter, 6) == []
    assert torch.get_num_threads() == 4
    machine.others = 0.9
    (said,) = after(machine, adapter, 3)
    assert said == "1 core is busy with other work: computing with 3 threads of 4 while that lasts"
    assert torch.get_num_threads() == 3
    machine.others = 6.0  # more than there are cores
    assert after(machine, adapter, 3) == []  # said before
    assert torch.get_num_threads() == 1
    machine.others = 0.2
    assert after(machine, adapter, 2) == []
    assert torch.get_num_threads() == 1  # a pause of the others is no end
    after(machine, adapter, 4)
    assert torch.get_num_threads() == 4


def test_cores_that_are_free_count_not_those_that_are_busy(machine: Machine) -> None:
    machine.cores, machine.others = 64, 30.0
    torch.set_num_threads(8)
    adapter = threads.Adapter(8, {})
    after(machine, adapter, 6)
    assert torch.get_num_threads() == 8
    machine.others = 60.0
    after(machine, adapter, 6)
    assert torch.get_num_threads() == 4


@pytest.mark.parametrize("name", threads.FIXED_BY)
def test_what_the_user_has_set_stays(name: str, machine: Machine) -> None:
    torch.set_num_threads(4)
    adapter = threads.Adapter(4, {name: "4"})
    machine.others = 3.0
    assert after(machine, adapter, 6) == []
    assert torch.get_num_threads() == 4


def test_one_thread_and_other_devices_measure_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def measured() -> None:
        raise AssertionError("measured")

    monkeypatch.setattr(threads, "_times", measured)
    assert threads.Adapter(1, {}).adapt() is None
    assert threads.adapt(torch.device("cuda")) is None


@pytest.mark.parametrize("error", [FileNotFoundError("/proc/stat"), psutil.Error(), IndexError()])
def test_a_system_that_does_not_say_changes_nothing(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(**_: object) -> None:
        raise error

    monkeypatch.setattr(psutil, "cpu_times", missing)
    assert threads.Adapter(4, {}).adapt() is None


def test_a_run_says_so(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    class Told(Reporter):
        def say(self, line: str) -> None:
            said.append(line)

    answers = iter(["1 core is busy"])
    asked = []

    def adapt(device: torch.device) -> str | None:
        asked.append(device)
        return next(answers, None)

    monkeypatch.setattr(loop.threads, "adapt", adapt)
    short = replace(config, max_steps=2)
    with open_session(short, load_data(short), reporter=Told()) as session:
        loop.fit(session)
    assert "1 core is busy" in said
    assert len(asked) > 2  # scoring asks too


def blas() -> dict[str, int]:
    """The threads of each BLAS, by its file."""
    scipy = importlib.import_module("scipy.linalg")  # loads its library
    assert scipy
    loaded = ThreadpoolController().select(user_api="blas").info()
    return {each["filepath"]: each["num_threads"] for each in loaded}


def test_independent_fits_run_side_by_side_in_order_with_one_thread_of_blas_each(
    machine: Machine,
) -> None:
    before = blas()
    torch.set_num_threads(3)
    together = threading.Barrier(3, timeout=30)

    def fit(item: int) -> tuple[int, set[int]]:
        if item < 3:
            together.wait()
        return item, set(blas().values())

    found = list(threads.each(fit, range(7)))
    assert [item for item, _ in found] == list(range(7))
    assert all(counts <= {1} for _, counts in found)
    assert blas() == before


@pytest.mark.parametrize("item_bytes", [10, 1_000])
def test_fewer_fits_run_at_once_where_memory_is_short(
    item_bytes: int, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(4)
    monkeypatch.setattr(threads.memory, "free_bytes", lambda device: 25)
    running, most, lock = 0, 0, threading.Lock()

    def fit(item: int) -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.02)
        with lock:
            running -= 1

    list(threads.each(fit, range(8), item_bytes))
    assert most == (2 if item_bytes == 10 else 1)


def test_a_fit_that_fails_is_told_and_leaves_blas_as_it_was() -> None:
    before = blas()

    def fit(item: int) -> int:
        return 1 // item

    with pytest.raises(ZeroDivisionError):
        list(threads.each(fit, [1, 0, 1]))
    assert blas() == before


def test_a_fit_by_itself_leaves_its_threads_to_numpy(machine: Machine) -> None:
    before = blas()
    torch.set_num_threads(1)
    with threads.by_itself():
        assert set(blas().values()) <= {1}
    torch.set_num_threads(64)
    with threads.by_itself():
        for path, count in blas().items():
            assert count == (1 if "scipy.libs" in path else before[path])
    assert blas() == before


@pytest.mark.durability
def test_a_process_that_computes_is_noticed() -> None:
    cores = len(threads._cores())
    adapter = threads.Adapter(cores, {})
    endless = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(cores)]
    before = torch.get_num_threads()
    torch.set_num_threads(cores)
    try:
        time.sleep(2)
        adapter.adapt()
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
        for process in endless:
            process.kill()
            process.wait()

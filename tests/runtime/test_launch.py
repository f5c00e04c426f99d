"""`--devices`: how its processes are started, and the exit code of all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from torch import distributed

from remora.errors import DataError, DivergedError, ResourceError, Stopped
from remora.runtime import launch, process_group


@pytest.mark.parametrize(
    ("codes", "code"),
    [
        ((0, 0), 0),
        ((75, 75), 75),
        ((3, 3), 3),
        ((7, 5), 5),
        ((7, -9), 7),
        ((75, -9), 7),
        ((0, 7), 7),
    ],
)
def test_the_code_of_a_run_is_that_of_its_cause(codes: tuple[int, ...], code: int) -> None:
    if os.name == "nt" and min(codes) < 0:
        pytest.skip("needs signals, as Unix has them")

    def process(returned: int) -> subprocess.Popen[bytes]:
        body = f"import os; os._exit({returned})"
        if returned < 0:
            body = f"import os; os.kill(os.getpid(), {-returned})"
        return subprocess.Popen([sys.executable, "-c", body])

    assert launch._wait([process(returned) for returned in codes]) == code


@pytest.mark.parametrize(
    ("error", "first", "other"),
    [
        (DataError("x"), True, True),
        (Stopped("x"), True, False),
        (DivergedError("x"), True, False),
        (ResourceError("x"), True, True),
    ],
)
def test_who_prints_an_error(
    error: Any, first: bool, other: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert launch.speaks(error)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert launch.speaks(error) is first
    monkeypatch.setenv("RANK", "1")
    assert launch.speaks(error) is other
    error.is_shared = True
    assert not launch.speaks(error)


class Recorded:
    """A process that is not started."""

    def __init__(self, command: list[str], **settings: Any) -> None:
        self.command, self.settings = command, settings
        self.signals: list[int] = []
        self.returncode: int | None = None

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, number: int) -> None:
        assert number != signal.SIGINT or os.name != "nt", "Windows raises ValueError"
        self.signals.append(number)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Recorded]:
    """The processes that `launch.run` starts, which end by themselves at once."""
    all_of_them: list[Recorded] = []

    def start(command: list[str], **settings: Any) -> Recorded:
        all_of_them.append(Recorded(command, **settings))
        return all_of_them[-1]

    def wait(processes: list[Recorded]) -> int:
        signal.raise_signal(signal.SIGINT)
        for process in processes:
            process.returncode = 0
        return 0

    monkeypatch.setattr(launch.subprocess, "Popen", start)
    monkeypatch.setattr(launch, "_wait", wait)
    return all_of_them


def test_the_first_process_inherits_the_open_socket(started: list[Recorded]) -> None:
    assert launch.run(2, ["train", "x.csv"]) == 0
    first, second = (process.settings for process in started)
    assert first["pass_fds"] == (int(first["env"][launch.LISTENER]),)
    assert second["pass_fds"] == ()
    assert [s["env"]["RANK"] for s in (first, second)] == ["0", "1"]
    assert [process.signals for process in started] == [[signal.SIGINT]] * 2


def test_on_windows_only_the_port_is_handed_on(
    started: list[Recorded], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch.os, "name", "nt")
    assert launch.run(2, ["train", "x.csv"]) == 0
    for process in started:
        assert process.settings["pass_fds"] == ()  # anything else raises there
        assert launch.LISTENER not in process.settings["env"]
        assert process.signals == []  # Ctrl-C comes from the console
    port = int(started[0].settings["env"]["MASTER_PORT"])
    launch.socket.create_server(("127.0.0.1", port)).close()  # it is free again


def test_without_an_open_socket_the_processes_meet_at_the_port(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with launch.socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    body = (
        "import datetime; from remora.runtime import process_group;"
        "store, rank, size = process_group._meet(datetime.timedelta(seconds=60));"
        "store.set(str(rank), 'here'); store.wait(['0', '1']); print(rank, size)"
    )
    own = {k: v for k, v in os.environ.items() if k != launch.LISTENER}
    own |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", body],
            env=own | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    # The store ends with the first process, so the other may see it go.
    assert processes[0].communicate(timeout=120)[0] == "0 2\n"
    assert processes[1].communicate(timeout=120)[0] == "1 2\n"


def test_threads_are_shared_out_on_every_system(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch.os, "sched_getaffinity", lambda _: {0, 2, 4, 6}, raising=False)
    assert launch._threads(2) == 2
    monkeypatch.delattr(launch.os, "sched_getaffinity")  # macOS and Windows
    monkeypatch.setattr(launch.os, "cpu_count", lambda: 9)
    assert launch._threads(2) == 4
    assert launch._threads(20) == 1
    monkeypatch.setattr(launch.os, "cpu_count", lambda: None)
    assert launch._threads(1) == 1


def test_a_process_that_crashed_on_windows_was_ended_from_outside() -> None:
    assert launch._killer(0xC0000005) == "Windows (0xc0000005)"
    assert launch._killer(7) is None
    assert launch._killer(-9) == "SIGKILL"


def test_the_launcher_runs_until_it_is_gone() -> None:
    launcher = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    process = psutil.Process(launcher.pid)
    # It began after this process, as one with the id of the real launcher would have.
    assert not process_group._is_running(process)
    parent = psutil.Process(os.getppid())
    assert process_group._is_running(parent)
    process._create_time = 0.0
    assert process_group._is_running(process)
    launcher.kill()
    gone = threading.Event()
    while process_group._is_running(process):  # until it is a zombie; nobody has waited for it
        assert not gone.wait(0.05)
    launcher.communicate()
    assert not process_group._is_running(process)


def test_a_launcher_that_says_nothing_is_taken_to_run() -> None:
    def denied() -> float:
        raise psutil.AccessDenied

    assert process_group._is_running(SimpleNamespace(create_time=denied))


def test_nccl_is_used_where_it_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    assert process_group._backend() == (
        "gloo" if not torch.cuda.is_available() else "cpu:gloo,cuda:nccl"
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(distributed, "is_nccl_available", lambda: True)
    assert process_group._backend() == "cpu:gloo,cuda:nccl"
    monkeypatch.setattr(distributed, "is_nccl_available", lambda: False)  # Windows
    assert process_group._backend() == "gloo"

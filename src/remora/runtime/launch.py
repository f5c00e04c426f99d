"""`--devices N`: starts one process for each device on this machine, and ends them together."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn

from remora.errors import ConfigError, DivergedError, PeerLostError, RemoraError, Stopped

LAUNCHER = "REMORA_LAUNCHER"
"""Environment variable with the id of the launching process, without which this one ends."""

MAX_PROCESSES = 8
"""Processes that a machine of few cores may start, to try what several devices do."""

LISTENER = "REMORA_LISTENER"
"""Environment variable with the first process's open socket, where the others connect."""

GRACE_SECONDS = 5.0
"""Time for the other processes to end by themselves after one has failed."""


def world_size() -> int:
    """Return the number of processes that torchrun, accelerate or `--devices` has started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def speaks(error: RemoraError) -> bool:
    """Return whether this process prints an error: the first one, or the only one that has it."""
    if world_size() == 1:
        return True
    if isinstance(error, PeerLostError):
        return LAUNCHER not in os.environ  # the launcher knows which process it was
    everywhere = error.is_shared or isinstance(error, DivergedError | Stopped)
    return os.environ.get("RANK") == "0" or not everywhere


def leave(code: int) -> NoReturn:
    """End this process, one of several, at once with an exit code.

    After another is gone, collective calls may hang in torch's threads, and Python cannot shut down
    in order.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run(num_processes: int, arguments: Sequence[str]) -> int:
    """Run `remora` in several processes; return the exit code of the run.

    That is the code of the process that failed first; 7 if it was killed. None is left running.

    Args:
        num_processes: How many, one for each device.
        arguments: The command line of each.

    Raises:
        ConfigError: If they are far more than a machine has devices.
    """
    if num_processes > (most := max(MAX_PROCESSES, os.cpu_count() or 1)):
        raise ConfigError(
            f"devices is {num_processes} on a machine with {os.cpu_count()} CPU cores; give at most"
            f" {most}"
        )
    processes: list[subprocess.Popen[bytes]] = []

    def forward(number: int, frame: FrameType | None) -> None:
        del frame
        # Windows' console sends Ctrl-C to all of its processes by itself.
        if not (os.name == "nt" and number == signal.SIGINT):
            for process in processes:
                process.send_signal(number)

    before = {s: signal.signal(s, forward) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        _start(processes, num_processes, arguments)
        return _wait(processes)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()
        for number, handler in before.items():
            signal.signal(number, handler)


def _start(
    processes: list[subprocess.Popen[bytes]], num_processes: int, arguments: Sequence[str]
) -> None:
    """Start the processes one after the other, each in the list as soon as it runs."""
    host = "127.0.0.1"
    common = {
        "WORLD_SIZE": str(num_processes),
        "LOCAL_WORLD_SIZE": str(num_processes),
        "MASTER_ADDR": host,
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(_threads(num_processes))),
        LAUNCHER: str(os.getpid()),
    }
    command = [sys.executable, "-m", "remora", *arguments]
    with socket.create_server((host, 0)) as listener:
        common["MASTER_PORT"] = str(listener.getsockname()[1])
        inherited: tuple[int, ...] = ()
        if os.name == "nt":  # a socket cannot be inherited there, so the first opens the port again
            listener.close()
        else:  # it is inherited open, so that nobody takes the port
            inherited = (listener.fileno(),)
            common[LISTENER] = str(listener.fileno())
        for rank in range(num_processes):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            processes.append(
                subprocess.Popen(
                    command,
                    env={**os.environ, **common, **own},
                    pass_fds=() if rank else inherited,
                )
            )


def _wait(processes: Sequence[subprocess.Popen[bytes]]) -> int:
    """Wait for all processes, at most GRACE_SECONDS after one failed; return the run's code."""
    codes: list[int] = []  # in the order in which they ended
    running, deadline = list(processes), None
    while running and (deadline is None or time.monotonic() < deadline):
        time.sleep(0.05)
        for process in list(running):
            if (code := process.poll()) is not None:
                running.remove(process)
                codes.append(code)
                if code not in (0, Stopped.exit_code) and deadline is None:
                    deadline = time.monotonic() + GRACE_SECONDS
    _report_killed(processes)
    lost = PeerLostError.exit_code
    failed = [code for code in codes if code != 0]
    own = [code for code in failed if code != lost and not _killer(code)]  # not by another's end
    if running:
        return own[0] if own else lost
    if causes := [code for code in own if code != Stopped.exit_code]:
        return causes[0]
    if len(own) < len(failed):
        return lost
    return failed[0] if failed else 0


def _report_killed(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for rank, process in enumerate(processes):
        if process.returncode is not None and (killer := _killer(process.returncode)):
            print(  # noqa: T201
                f"error: process {rank} of {len(processes)} was ended by {killer}; run the same "
                "command again to resume",
                file=sys.stderr,
            )


def _killer(code: int) -> str | None:
    """Return what ended a process from outside, by its return code; None if it ended by itself."""
    if code < 0:
        return signal.Signals(-code).name
    # Windows has no signals. A process that crashes there returns an NTSTATUS, an error from here.
    return f"Windows ({code:#x})" if code >= 0xC0000000 else None


def _threads(num_processes: int) -> int:
    """Return how many threads each of several processes computes with."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, (available or 1) // num_processes)

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

from remora.errors import DivergedError, PeerLostError, RemoraError, Stopped

LAUNCHER = "REMORA_LAUNCHER"
"""Environment variable with the process that started this one, and without which it ends."""

LISTENER = "REMORA_LISTENER"
"""Environment variable with the first process's open socket, at which the others find it."""

GRACE_SECONDS = 5.0
"""So long the others have to end by themselves after the first has failed."""


def world_size() -> int:
    """Return the number of processes that torchrun, accelerate or `--devices` has started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def speaks(error: RemoraError) -> bool:
    """Return whether this process is to print an error: the first one, or who alone has it."""
    if world_size() == 1:
        return True
    if isinstance(error, PeerLostError):
        return LAUNCHER not in os.environ  # the launcher knows which process it was
    everywhere = error.is_shared or isinstance(error, DivergedError | Stopped)
    return os.environ.get("RANK") == "0" or not everywhere


def leave(code: int) -> NoReturn:
    """End this process, one of several, with an exit code, and at once.

    Where another is gone, calls to it may be under way, and with them torch's threads do not let
    Python shut down in order.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run(num_processes: int, arguments: Sequence[str]) -> int:
    """Run `remora` in several processes; return the exit code of the run.

    That is the code of the process that failed first; 7 if it was killed. None is left behind.

    Args:
        num_processes: How many, one for each device.
        arguments: The command line of each.
    """
    host = "127.0.0.1"
    listener = socket.create_server((host, 0))  # handed on open, so that nobody takes the port
    common = {
        "WORLD_SIZE": str(num_processes),
        "LOCAL_WORLD_SIZE": str(num_processes),
        "MASTER_ADDR": host,
        "MASTER_PORT": str(listener.getsockname()[1]),
        LISTENER: str(listener.fileno()),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(_threads(num_processes))),
        LAUNCHER: str(os.getpid()),
    }
    command = [sys.executable, "-m", "remora", *arguments]
    processes: list[subprocess.Popen[bytes]] = []

    def forward(number: int, frame: FrameType | None) -> None:
        del frame
        for process in processes:
            process.send_signal(number)

    before = {s: signal.signal(s, forward) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        for rank in range(num_processes):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            processes.append(
                subprocess.Popen(
                    command,
                    env={**os.environ, **common, **own},
                    pass_fds=() if rank else (listener.fileno(),),
                )
            )
        listener.close()
        return _wait(processes)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(processes: Sequence[subprocess.Popen[bytes]]) -> int:
    """Wait for all; once one has failed, not for long. Return the code of the run."""
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
    lost = PeerLostError.exit_code
    _tell_killed(processes)
    if running:
        return next((code for code in codes if code > 0 and code != lost), lost)
    failed = [code for code in codes if code != 0]
    causes = [code for code in failed if code > 0 and code not in (lost, Stopped.exit_code)]
    if causes:
        return causes[0]
    if any(code < 0 or code == lost for code in failed):
        return lost
    return failed[0] if failed else 0


def _tell_killed(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for rank, process in enumerate(processes):
        if process.returncode is not None and process.returncode < 0:
            how = signal.Signals(-process.returncode).name
            print(  # noqa: T201
                f"error: process {rank} of {len(processes)} was ended by {how}; run the same "
                "command again to go on",
                file=sys.stderr,
            )


def _threads(num_processes: int) -> int:
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, (available or 1) // num_processes)

"""Processes forked from this one, which has imported their libraries.

Where a fork is not safe with torch, on macOS, and where there is none, on Windows, new interpreters
take their place.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import IO, NoReturn

import torch

from remora.runtime import launch

FORKS = sys.platform == "linux"


def remora(*arguments: object) -> str:
    """Return a program that runs the command line."""
    words = ["remora", *map(str, arguments)]
    return f"import sys; sys.argv = {words!r}; from remora.__main__ import run; sys.exit(run())"


def together(programs: Sequence[str], seconds: float = 100) -> list[tuple[int, str]]:
    """Run each program in a process of its own; return their exit codes and what they wrote.

    They find each other as processes that torchrun has started do.
    """
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        common = {
            **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(listener.getsockname()[1])},
            **{"WORLD_SIZE": str(len(programs)), "LOCAL_WORLD_SIZE": str(len(programs))},
        }
        if FORKS:
            common[launch.LISTENER] = str(listener.fileno())
        else:
            listener.close()
        written = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in programs]
        started = [
            start(program, file, **common, RANK=str(rank), LOCAL_RANK=str(rank))
            for rank, (program, file) in enumerate(zip(programs, written, strict=True))
        ]
        listener.close()
        try:
            codes = [process.wait(seconds) for process in started]
        finally:
            for process in started:
                if process.poll() is None:
                    process.kill()
                    process.wait()
        for file in written:
            file.seek(0)
        return [(code, file.read()) for code, file in zip(codes, written, strict=True)]


def start(program: str, written: IO[str], **environment: str) -> Child | subprocess.Popen[str]:
    """Run a program, which writes its output and its errors into a file."""
    if FORKS:
        return Child(program, written, environment)
    own = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    own["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    command = [sys.executable, "-c", program]
    return subprocess.Popen(
        command, env={**os.environ, **environment, **own}, stdout=written, stderr=written, text=True
    )


class Child:
    """A fork that runs a program, used as a `subprocess.Popen`."""

    def __init__(self, program: str, written: IO[str], environment: dict[str, str]) -> None:
        self.returncode: int | None = None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # this process has other threads
            self.pid = os.fork()
        if self.pid == 0:
            _become(program, written, environment)

    def poll(self) -> int | None:
        if self.returncode is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            if ended:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float = 100) -> int:
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("a fork", timeout)
            time.sleep(0.01)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _become(program: str, written: IO[str], environment: dict[str, str]) -> NoReturn:
    """Run a program in this process, a fork, in place of what it was forked from."""
    code = 1
    try:
        os.environ.update(environment)
        for stream, name in enumerate(("stdout", "stderr"), 1):
            os.dup2(written.fileno(), stream)
            setattr(sys, name, os.fdopen(stream, "w", buffering=1, closefd=False))
        warnings.simplefilter("ignore")
        torch.set_num_threads(1)  # a fork has none of the other threads
        exec(program, {"__name__": "__main__"})
        code = 0
    except SystemExit as end:
        if isinstance(end.code, str):
            sys.stderr.write(f"{end.code}\n")
        code = 1 if isinstance(end.code, str) else int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        launch.leave(code)

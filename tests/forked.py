"""Processes that train together, forked from this one, which has imported their libraries."""

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
from typing import IO

import torch

from remora.runtime import launch


def remora(*arguments: object) -> str:
    """Return a program that runs the command line."""
    words = ["remora", *map(str, arguments)]
    return f"import sys; sys.argv = {words!r}; from remora.__main__ import run; sys.exit(run())"


def together(programs: Sequence[str], seconds: float = 100) -> list[tuple[int, str]]:
    """Run each program in a process of its own; return their exit codes and what they wrote.

    They find each other as processes that torchrun has started do. Where a fork is not safe with
    torch, on macOS, and where there is none, on Windows, new interpreters run them.
    """
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        common = {
            **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(listener.getsockname()[1])},
            **{"WORLD_SIZE": str(len(programs)), "LOCAL_WORLD_SIZE": str(len(programs))},
        }
        if forks := sys.platform == "linux":
            common[launch.LISTENER] = str(listener.fileno())
        else:
            listener.close()
        written = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in programs]
        started = [
            (_fork if forks else _start)(
                program, file, common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            )
            for rank, (program, file) in enumerate(zip(programs, written, strict=True))
        ]
        listener.close()
        codes = _wait(started, seconds) if forks else [each.wait(seconds) for each in started]
        for file in written:
            file.seek(0)
        return [(code, file.read()) for code, file in zip(codes, written, strict=True)]


def _start(program: str, written: IO[str], environment: dict[str, str]) -> subprocess.Popen[str]:
    """Run a program in an interpreter of its own."""
    own = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    own["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    command = [sys.executable, "-c", program]
    return subprocess.Popen(
        command, env={**os.environ, **environment, **own}, stdout=written, stderr=written, text=True
    )


def _fork(program: str, written: IO[str], environment: dict[str, str]) -> int:
    """Run a program in a child of this process; return its id."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # this process has other threads
        pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.environ.update(environment)
        for stream, name in enumerate(("stdout", "stderr"), 1):
            os.dup2(written.fileno(), stream)
            setattr(sys, name, os.fdopen(stream, "w", closefd=False))
        warnings.simplefilter("ignore")
        torch.set_num_threads(1)  # a fork has none of the other threads
        exec(program, {"__name__": "__main__"})
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        launch.leave(code)


def _wait(started: Sequence[int], seconds: float) -> list[int]:
    """Wait for children; return their exit codes. What takes too long is killed."""
    codes: dict[int, int] = {}
    deadline = time.monotonic() + seconds
    while len(codes) < len(started):
        for pid in {*started} - codes.keys():
            if time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
            ended, status = os.waitpid(pid, 0 if time.monotonic() > deadline else os.WNOHANG)
            if ended:
                codes[pid] = os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    return [codes[pid] for pid in started]

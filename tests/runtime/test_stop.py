from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from remora.runtime import stop

SWALLOWED = """
import os, signal, sys, time
from remora import cli
from remora.evaluation import compare

class Swallows:
    def __del__(self):
        os.kill(os.getpid(), int(sys.argv[1]))
        time.sleep(0.1)

def work(*arguments, **settings):
    Swallows()
    time.sleep(30)
    print("done")

signal.signal(signal.SIGINT, signal.default_int_handler)
compare.compare_runs = work
sys.exit(cli.main(["compare", "runs/a"]))
"""


@pytest.fixture(autouse=True)
def default_handler() -> Iterator[None]:
    """A shell that starts the tests in the background has them ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("number", "code", "told"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "stopped (SIGTERM)")],
)
def test_a_signal_that_a_destructor_swallows_is_obeyed(number: int, code: int, told: str) -> None:
    began = time.monotonic()
    process = subprocess.run(
        [sys.executable, "-c", SWALLOWED, str(int(number))],
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == code, process.stderr
    assert time.monotonic() - began < 15
    assert process.stdout == ""
    assert process.stderr.splitlines()[-1] == f"error: {told}; run the same command again"


def obeyed(number: int) -> None:
    with stop.interruptible():
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(number)
        time.sleep(30)


def test_sigterm_is_obeyed_where_interrupts_are_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in a shell's background
    try:
        with pytest.raises(stop.Terminated):
            obeyed(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def interrupted(work: Callable[[], None]) -> None:
    with pytest.raises(KeyboardInterrupt), stop.interruptible():
        work()


def test_an_interrupt_that_a_library_catches_is_sent_until_it_is_out() -> None:
    def work() -> None:
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        with contextlib.suppress(KeyboardInterrupt):
            time.sleep(30)
        time.sleep(30)

    began = time.monotonic()
    interrupted(work)
    assert time.monotonic() - began < 10
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    names = [thread.name for thread in threading.enumerate()]
    assert not any("send_again" in name for name in names), names


def test_what_is_done_on_the_way_out_is_not_disturbed() -> None:
    done = []

    def work() -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            with contextlib.suppress(OSError):
                raise OSError
            time.sleep(2.5 * stop.AGAIN_SECONDS)
            done.append("cleaning")

    interrupted(work)
    assert done == ["cleaning"]


def test_the_user_may_end_what_is_done_on_the_way_out() -> None:
    done = []

    def work() -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            signal.raise_signal(signal.SIGINT)
            done.append("cleaning")

    interrupted(work)
    assert not done


def test_a_process_that_ignores_interrupts_goes_on_ignoring_them() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stop.interruptible():
            os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)

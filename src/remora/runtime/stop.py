"""Requests to stop a run: by a signal or a time limit."""

from __future__ import annotations

import _thread
import contextlib
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import TYPE_CHECKING

from remora.errors import Stopped

if TYPE_CHECKING:  # a request may come before torch is imported
    from remora.runtime.process_group import ProcessGroup


AGAIN_SECONDS = 1.0
"""Time after which an interrupt that was not obeyed is sent again."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, obeyed as Ctrl-C is: what was begun is cleaned up."""


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Have Ctrl-C or SIGTERM end what runs here, even if a library swallows it.

    Python raises KeyboardInterrupt wherever the main thread is. In a destructor or a bare `except`
    it is lost, and the program goes on. So it is sent again every second until it is out of here. A
    `finally` that it passes is not disturbed, unless the user presses Ctrl-C again.

    Nothing is done about a signal that is ignored or has a handler already, or in another thread.

    Raises:
        KeyboardInterrupt: On SIGINT.
        Terminated: On SIGTERM.
    """
    defaults = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    taken = {number: it for number, it in defaults.items() if signal.getsignal(number) == it}
    if not taken or threading.current_thread() is not threading.main_thread():
        yield
        return
    over, sent, asked = threading.Event(), threading.Event(), list[int]()

    def send_again() -> None:
        while not over.wait(AGAIN_SECONDS):
            sent.set()
            if hasattr(signal, "pthread_kill"):  # it ends a wait of the main thread too
                signal.pthread_kill(threading.main_thread().ident or 0, asked[0])
            else:  # Windows
                _thread.interrupt_main(signal.Signals(asked[0]))

    sender = threading.Thread(target=send_again, daemon=True)

    def interrupt(number: int, frame: FrameType | None) -> None:
        del frame
        by_us = sent.is_set()
        sent.clear()
        if by_us and _is_leaving(sys.exc_info()[1]):
            return
        asked.append(number)
        if not sender.is_alive() and not over.is_set():
            sender.start()
        raise Terminated if asked[0] == signal.SIGTERM else KeyboardInterrupt

    for number in taken:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        over.set()
        if sender.is_alive():
            sender.join()
        for number, default in taken.items():
            signal.signal(number, default)


def _is_leaving(error: BaseException | None) -> bool:
    """Return whether what is handled now is an interrupt, or came of one."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error is not None


class _StopNow(BaseException):
    """Raised anywhere by a signal; no `except Exception` of a library catches it."""


class Stop:
    """Whether a run was asked to stop; the run checks this wherever its state can be saved.

    Args:
        max_seconds: Time limit of the run; None for no limit.

    Attributes:
        group: The processes that stop together when one of them is asked to, if there are several.
    """

    def __init__(self, max_seconds: float | None = None) -> None:
        self.group: ProcessGroup | None = None
        self._reason: str | None = None
        self._deferred = False
        self._deadline = None if max_seconds is None else time.monotonic() + max_seconds

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Treat SIGTERM and SIGINT as requests to stop; only the main thread can.

        Raises:
            Stopped: If one came while there was nothing to save.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {s: signal.signal(s, self._take) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        except _StopNow:
            raise self._stopped() from None
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Keep requests until `check`; outside of this they stop the run at once."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def check(self) -> None:
        """Stop the run if that was requested; all processes call this together.

        Raises:
            Stopped: If it was requested.
        """
        if self._deadline is not None and time.monotonic() > self._deadline:
            self._reason = self._reason or "time limit reached"
        asked = self._reason is not None
        if self.group.any(asked) if self.group else asked:
            raise self._stopped()

    def _stopped(self) -> Stopped:
        reason = self._reason or "another process stopped"
        return Stopped(f"stopped ({reason}); run the same command again to resume")

    def _take(self, number: int, frame: FrameType | None) -> None:
        del frame
        self._reason = signal.Signals(number).name
        if not self._deferred:
            raise _StopNow

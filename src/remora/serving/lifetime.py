"""The start, the signals and the end of a process that serves pages or answers."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from types import FrameType

from remora.serving import protocol

STOPPING = ("SIGTERM", "SIGINT", "SIGBREAK")  # Windows sends the last where others send the first
"""Names of the signals that ask a process to stop."""


async def serve(server: protocol.Server, bound: socket.socket, started: Callable[[], None]) -> None:
    """Serve on a bound socket until the server is asked to exit; call `started` when it listens."""
    serving = asyncio.ensure_future(server.serve(sockets=[bound]))
    while not (server.started or serving.done()):
        await asyncio.sleep(0.01)
    started()
    await serving


@contextlib.contextmanager
def handling(actions: Mapping[str, Callable[[], None]]) -> Iterator[None]:
    """Handle signals by their names.

    Only those that the system has, and only in the main thread, as Python does.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    by_number = {
        int(getattr(signal, name)): action
        for name, action in actions.items()
        if hasattr(signal, name)
    }

    def handle(number: int, frame: FrameType | None) -> None:
        del frame
        by_number[number]()

    before = {number: signal.signal(number, handle) for number in by_number}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

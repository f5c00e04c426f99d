"""uvicorn's server and HTTP protocol, with a time limit on every wait for a client."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Iterator
from typing import Any

import uvicorn
import uvicorn.server
from uvicorn.protocols.http.h11_impl import H11Protocol

BEHIND_SECONDS = 0.5
"""A server is behind if its tick, due every tenth of a second, comes later than this."""

TIMED_OUT = b"HTTP/1.1 408 Request Timeout\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"


def configure(application: Any, *, read_seconds: float, ending_seconds: float) -> uvicorn.Config:
    """Return the configuration of a server that logs nothing.

    Args:
        application: What answers, an ASGI application.
        read_seconds: The longest wait for a client.
        ending_seconds: The longest wait for open requests when the server is stopped.
    """
    return uvicorn.Config(
        application,
        http=Protocol,
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="error",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=read_seconds,  # type: ignore[arg-type]  # any number
        timeout_graceful_shutdown=int(ending_seconds) + 1,
        backlog=65_535,  # the kernel lowers it to its own limit
    )


class Server(uvicorn.Server):
    """uvicorn's server; it notes when it was behind, and leaves signals to the service.

    uvicorn raises the signal that stopped it once more at its end, so the process would not exit
    with 0.
    """

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.server_state: ServerState = ServerState()

    async def on_tick(self, counter: int) -> bool:
        """Note the tick, which comes every tenth of a second."""
        self.server_state.tick()
        return await super().on_tick(counter)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture none."""
        yield


class ServerState(uvicorn.server.ServerState):
    """uvicorn's state, and when the server was last behind its work."""

    _ticked = math.inf
    _behind = -math.inf

    def tick(self) -> None:
        """Note that a tenth of a second should have passed."""
        self.was_behind_within(0)
        self._ticked = time.monotonic()

    def was_behind_within(self, seconds: float) -> bool:
        """Whether the server is behind, or was within the last seconds."""
        now = time.monotonic()
        if now - self._ticked > BEHIND_SECONDS:
            self._behind = now
        return now - self._behind <= seconds


class Protocol(H11Protocol):
    """uvicorn's protocol; it closes connections that send no request or read no answer.

    uvicorn itself waits without limit for the headers of a first request, and for those of a later
    one as soon as their first byte has come.
    """

    _without_headers: asyncio.TimerHandle | None = None
    _without_reader: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the clock for the first headers."""
        super().connection_made(transport)
        self._await_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop all clocks."""
        _cancel(self._without_headers)
        _cancel(self._without_reader)
        super().connection_lost(exc)

    def handle_events(self) -> None:
        """Stop the clock once headers have come; limits.BodyReader times the body."""
        super().handle_events()
        if self.cycle is not None and not self.cycle.response_complete:
            _cancel(self._without_headers)

    def on_response_complete(self) -> None:
        """Start the clock for the next request's headers."""
        self._await_headers()
        super().on_response_complete()

    def pause_writing(self) -> None:
        """Start the clock for a client that reads too slowly."""
        super().pause_writing()
        _cancel(self._without_reader)
        self._without_reader = self.loop.call_later(self.timeout_keep_alive, self.transport.abort)

    def resume_writing(self) -> None:
        """Stop that clock."""
        super().resume_writing()
        _cancel(self._without_reader)

    def _await_headers(self) -> None:
        _cancel(self._without_headers)
        self._without_headers = self.loop.call_later(self.timeout_keep_alive, self._time_out)

    def _time_out(self) -> None:
        if self.transport.is_closing():
            return
        state = self.server_state
        assert isinstance(state, ServerState)
        if state.was_behind_within(self.timeout_keep_alive):
            self._await_headers()  # the service is the slow one, under many requests
            return
        if self.conn.trailing_data[0]:  # a part of the headers
            self.transport.write(TIMED_OUT)
        self.transport.close()


def _cancel(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()

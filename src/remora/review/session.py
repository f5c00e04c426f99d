"""The process of a review: its lock, its address, the browser, and its end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import sys
import webbrowser
from collections.abc import Callable

from remora.config import DiagnoseConfig, ReviewConfig
from remora.diagnosis import diagnose, suspect_list
from remora.errors import ConfigError
from remora.review.queue import Queue, Summary, need_list

try:
    from remora.review import app
    from remora.serving import lifetime, protocol, sockets
except ModuleNotFoundError as missing:
    raise ConfigError(
        f"review needs {missing.name}, which is not installed; pip install 'remora[serve]', or "
        f"write decisions into {suspect_list.FILE} by hand"
    ) from missing

HOST = "127.0.0.1"
READ_SECONDS, ENDING_SECONDS = 30.0, 2.0


class Review:
    """A review that listens on this machine, and its rows."""

    def __init__(
        self, config: ReviewConfig, *, say: Callable[[str], None] = lambda _: None
    ) -> None:
        """Read the run's rows, and bind the port.

        Args:
            config: The settings.
            say: Called with each line for the person.

        Raises:
            ConfigError: If another process reviews the run, or the port is in use.
            DataError: If the run has no diagnosis, or its rows have changed.
        """
        self._config, self._say = config, say
        self._loop: asyncio.AbstractEventLoop | None = None
        need_list(config.run)
        settings, _, everything = diagnose.load(DiagnoseConfig(config.run))
        table = diagnose.rows_as_given(settings, everything)
        with contextlib.ExitStack() as stack:
            stack.enter_context(suspect_list.hold(config.run))
            self.queue = Queue(config.run, table)
            advice = "choose another --port, or leave it out"
            self._socket = sockets.bind(HOST, config.port, has_token=True, advice=advice)
            self._held = stack.pop_all()
        self._token = secrets.token_urlsafe(16)
        self._server = protocol.Server(
            protocol.configure(
                app.application(self.queue, self._token, self._end),
                read_seconds=READ_SECONDS,
                ending_seconds=ENDING_SECONDS,
            )
        )

    @property
    def url(self) -> str:
        """The address of the page."""
        return f"{sockets.url_of(self._socket)}/{self._token}/"

    def run(self) -> Summary:
        """Show the page until it is ended there or by a signal; return what is decided."""
        with self._held:
            if self.queue.items:
                asyncio.run(self._run())
            else:
                self._socket.close()
                self._say(f"no row of {self._config.run} is listed, so there is nothing to review")
            return self.queue.summary()

    def stop(self) -> None:
        """End `run`; from any thread."""
        assert self._loop is not None, "stop is for a review that runs"
        self._loop.call_soon_threadsafe(self._end)

    def _end(self) -> None:
        self._server.should_exit = True

    async def _run(self) -> None:
        self._loop = asyncio.get_running_loop()
        with lifetime.handling(dict.fromkeys(lifetime.STOPPING, self._end)):
            await lifetime.serve(self._server, self._socket, self._announce)

    def _announce(self) -> None:
        self._say(f"review of {self._config.run}: {self.url}")
        if not (self._config.browser and open_browser(self.url)):
            self._say("open this address in a browser of this machine")
        self._say("every decision is saved at once; Ctrl-C ends the review")


def open_browser(url: str) -> bool:
    """Open a page in the person's browser; return whether there is one.

    Without a screen none is opened, since it would be one of the terminal's.
    """
    has_screen = sys.platform in {"win32", "darwin"} or any(
        os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY")
    )
    try:
        return has_screen and webbrowser.open(url)
    except (webbrowser.Error, OSError):
        return False

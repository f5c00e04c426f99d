"""The process of the HTTP service: its socket, its signals, its start and its end."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator

from remora.config import ServeConfig
from remora.errors import ConfigError, ModelError
from remora.models import metadata
from remora.runtime.device import choose_device, choose_precision
from remora.serving import sockets
from remora.serving.engine import Engine
from remora.serving.sockets import TOKEN_VARIABLE

try:
    import uvicorn

    from remora.serving import app, lifetime, protocol, state
except ModuleNotFoundError as missing:
    raise ConfigError(
        f"serve needs {missing.name}, which is not installed; pip install 'remora[serve]'"
    ) from missing


OPEN_FILES = 10_240
"""The most open files that macOS lets a process have, though its hard limit may be infinite."""


class Service:
    """A service that listens, and its engine."""

    def __init__(self, config: ServeConfig, *, say: Callable[[str], None] = lambda _: None) -> None:
        """Bind the port, then load the models.

        Args:
            config: The settings.
            say: Called with each line for the operator.

        Raises:
            ConfigError: If the port is in use, the address is not one of this machine, or a token
                is missing.
            ModelError: If an adapter or the base model cannot be used.
        """
        token = _token(config)
        self._say = say
        self._loop: asyncio.AbstractEventLoop | None = None
        self._socket = sockets.bind(
            config.host,
            config.port,
            has_token=token is not None,
            advice="choose another --port or --host",
        )
        metrics = state.Metrics()
        try:
            self._engine = _load_engine(config, metrics)
        except BaseException:
            self._socket.close()
            raise
        metrics.watch(self._engine)
        self._state = state.State(
            config=config, token=token, engine=self._engine, metrics=metrics, reload=self.reload
        )
        self._server = protocol.Server(_uvicorn_config(config, self._state))

    @property
    def url(self) -> str:
        """The address that the service listens on."""
        return sockets.url_of(self._socket)

    def run(self) -> None:
        """Serve until a signal or `stop`, and finish open requests before it returns.

        In the main thread, SIGTERM and SIGINT stop it, and SIGHUP reloads all adapters.
        """
        _raise_file_limit()
        try:
            with _without_long_collections():
                asyncio.run(self._run())
        finally:
            self._engine.stop()

    def stop(self) -> None:
        """Refuse new requests, and end `run` once open ones are finished; from any thread."""
        assert self._loop is not None, "stop is for a service that runs"
        self._loop.call_soon_threadsafe(self._drain)

    def reload(self, name: str) -> bool:
        """Read an adapter's folder again; return whether its files have changed.

        Raises:
            ModelError: If the new files cannot be used.
        """
        reloads = self._state.metrics.reloads
        try:
            changed = self._engine.reload(name)
        except ModelError as error:
            reloads.labels(name, "failed").inc()
            self._say(f"warning: {error}; still serving the adapter loaded before")
            raise
        reloads.labels(name, "changed" if changed else "unchanged").inc()
        if changed:
            self._say(f"{name} is now {self._engine.generations[name].sha256}")
        return changed

    def reload_all(self) -> None:
        """Read all adapters' folders again; those that cannot be used are reported and skipped."""
        for name in self._engine.generations:
            with contextlib.suppress(ModelError):
                self.reload(name)

    def _start_reload(self) -> None:
        threading.Thread(target=self.reload_all, daemon=True).start()

    async def _run(self) -> None:
        self._loop = asyncio.get_running_loop()
        with self._signals():
            await lifetime.serve(self._server, self._socket, self._announce)

    def _announce(self) -> None:
        names = ", ".join(self._engine.generations)
        self._say(f"serving {names} on {self.url} (docs: {self.url}/docs)")

    def _signals(self) -> contextlib.AbstractContextManager[None]:
        # Windows has no SIGHUP; there is POST /v1/adapters/ID/reload
        actions = dict.fromkeys(lifetime.STOPPING, self.stop) | {"SIGHUP": self._start_reload}
        return lifetime.handling(actions)

    def _drain(self) -> None:
        if self._state.is_draining:  # a second request to stop ends it at once
            self._server.should_exit = self._server.force_exit = True
            return
        self._state.is_draining = True
        self._say(f"stopping once {self._state.num_in_flight} open requests are finished")
        self._draining = asyncio.ensure_future(self._exit_when_idle())

    async def _exit_when_idle(self) -> None:
        while self._state.num_in_flight:
            await asyncio.sleep(0.02)
        self._server.should_exit = True


def _load_engine(config: ServeConfig, metrics: state.Metrics) -> Engine:
    device = choose_device(config.device)
    folders = config.folders()
    is_full = any(metadata.is_full(folder) for folder in folders.values())
    return Engine(
        folders,
        base=config.model,
        precision=choose_precision(device, config.precision, trains_base=is_full),
        device=device,
        micro_batch_tokens=config.micro_batch_tokens,
        tolerance=config.tolerance,
        max_queue=config.max_queue,
        on_batch=metrics.batch,
    )


def _uvicorn_config(config: ServeConfig, shared: state.State) -> uvicorn.Config:
    return protocol.configure(
        app.application(shared),
        read_seconds=config.read_seconds,
        ending_seconds=config.timeout_seconds + config.read_seconds,
    )


@contextlib.contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Let SIGTERM end the process with 0 while the models are still being loaded."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _token(config: ServeConfig) -> bytes | None:
    """Return the token that clients must send, from the file or the environment.

    Raises:
        ConfigError: If the file cannot be read or the token is empty.
    """
    token = os.environ.get(TOKEN_VARIABLE)
    source = f"the environment variable {TOKEN_VARIABLE}"
    if config.token_file is not None:
        source = str(config.token_file)
        try:
            token = config.token_file.read_text(encoding="utf-8").strip()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(f"{source} cannot be read ({reason}); correct --token-file") from None
    if token is None:
        return None
    if not token or not token.isascii() or not token.isprintable():
        raise ConfigError(f"the token in {source} is empty or not plain ASCII; write another")
    return token.encode()


@contextlib.contextmanager
def _without_long_collections() -> Iterator[None]:
    """Leave the objects loaded so far to no garbage collection, in a process of the service's own.

    A full collection looks at every object of torch and the models, and stops all requests for
    0.2 to 0.4 seconds.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _raise_file_limit() -> None:
    """Allow as many open connections as the system lets the process have."""
    if sys.platform == "win32":  # it has no such limit
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for limit in (hard, min(hard, OPEN_FILES)):
        if limit <= soft:
            return
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
            return

"""The HTTP service: the life of its process. `routes` answers requests, `engine` computes."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

from remora.config import ServeConfig
from remora.errors import ConfigError, ModelError
from remora.models import adapter_card
from remora.runtime.device import choose_device, choose_precision
from remora.serving.engine import Engine

try:
    import uvicorn
    import uvicorn.server
    from uvicorn.protocols.http.h11_impl import H11Protocol

    from remora.serving import app, state
except ModuleNotFoundError as missing:
    raise ConfigError(
        f"serve needs {missing.name}, which is not installed; pip install 'remora[serve]'"
    ) from missing


TOKEN_VARIABLE = "REMORA_TOKEN"

BEHIND_SECONDS = 0.5
"""A server is behind if what it does every tenth of a second takes longer to come round."""

TIMED_OUT = b"HTTP/1.1 408 Request Timeout\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"


class Service:
    """A service that listens, and its engine."""

    def __init__(self, config: ServeConfig, *, say: Callable[[str], None] = lambda _: None) -> None:
        """Take the port, then load the models.

        Args:
            config: The settings.
            say: Told what a person should know, in sentences.

        Raises:
            ConfigError: If the port is taken, the address is none of this machine's, or a token is
                missing.
            ModelError: If an adapter or the base model cannot be used.
        """
        token = _token(config)
        self._say = say
        self._loop: asyncio.AbstractEventLoop | None = None
        self._socket = _bind(config, has_token=token is not None)
        try:
            device = choose_device(config.device)
            metrics = state.Metrics()
            folders = config.folders()
            is_full = any(adapter_card.is_full(folder) for folder in folders.values())
            self._engine = Engine(
                folders,
                base=config.model,
                precision=choose_precision(device, config.precision, trains_base=is_full),
                device=device,
                micro_batch_tokens=config.micro_batch_tokens,
                tolerance=config.tolerance,
                max_queue=config.max_queue,
                on_batch=metrics.batch,
            )
        except BaseException:
            self._socket.close()
            raise
        metrics.watch(self._engine)
        self._state = state.State(
            config=config, token=token, engine=self._engine, metrics=metrics, reload=self.reload
        )
        self._server = _Server(
            uvicorn.Config(
                app.application(self._state),
                http=_Protocol,
                ws="none",
                lifespan="off",
                log_config=None,
                log_level="error",
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=config.read_seconds,  # type: ignore[arg-type]  # any number
                timeout_graceful_shutdown=int(config.timeout_seconds + config.read_seconds) + 1,
                backlog=65_535,  # the kernel lowers it to its own limit
            )
        )

    @property
    def url(self) -> str:
        """Where the service listens."""
        host, port = self._socket.getsockname()[:2]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"

    def run(self) -> None:
        """Serve until a signal or `stop`, and answer what was taken before it returns.

        SIGTERM and SIGINT stop it, SIGHUP reads all adapters again; for that it has to run in the
        main thread.
        """
        _raise_file_limit()
        try:
            asyncio.run(self._run())
        finally:
            self._engine.stop()

    def stop(self) -> None:
        """Take no more requests, and end `run` once those taken are answered; from any thread."""
        assert self._loop is not None, "stop is for a service that runs"
        self._loop.call_soon_threadsafe(self._drain)

    def reload(self, name: str) -> bool:
        """Read an adapter's folder again; return whether there was something new.

        Raises:
            ModelError: If what is there cannot be used.
        """
        reloads = self._state.metrics.reloads
        try:
            changed = self._engine.reload(name)
        except ModelError as error:
            reloads.labels(name, "failed").inc()
            self._say(f"warning: {error}; the adapter before it goes on being served")
            raise
        reloads.labels(name, "changed" if changed else "unchanged").inc()
        if changed:
            self._say(f"{name} is now {self._engine.generations[name].sha256}")
        return changed

    def reload_all(self) -> None:
        """Read all adapters' folders again; what cannot be used is said and left as it was."""
        for name in self._engine.generations:
            with contextlib.suppress(ModelError):
                self.reload(name)

    def _reload_aside(self) -> None:
        threading.Thread(target=self.reload_all, daemon=True).start()

    async def _run(self) -> None:
        self._loop = asyncio.get_running_loop()
        with self._signals():
            serving = asyncio.ensure_future(self._server.serve(sockets=[self._socket]))
            while not (self._server.started or serving.done()):
                await asyncio.sleep(0.01)
            names = ", ".join(self._engine.generations)
            self._say(f"serving {names} on {self.url}, described on {self.url}/docs")
            await serving

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        actions = {signal.SIGTERM: self.stop, signal.SIGINT: self.stop}
        if hasattr(signal, "SIGHUP"):
            actions[signal.SIGHUP] = self._reload_aside

        def take(number: int, frame: FrameType | None) -> None:
            del frame
            actions[signal.Signals(number)]()

        before = {number: signal.signal(number, take) for number in actions}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _drain(self) -> None:
        if self._state.is_draining:  # asked again: no more patience
            self._server.should_exit = self._server.force_exit = True
            return
        self._state.is_draining = True
        self._say(f"stopping, with {self._state.num_in_flight} requests still to be answered")
        self._draining = asyncio.ensure_future(self._end_when_idle())

    async def _end_when_idle(self) -> None:
        while self._state.num_in_flight:
            await asyncio.sleep(0.02)
        self._server.should_exit = True


@contextlib.contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Let SIGTERM end the process with 0 while it still loads, too."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _State(uvicorn.server.ServerState):
    """uvicorn's state, and when the server was last behind its work."""

    _ticked = math.inf
    _behind = -math.inf

    def tick(self) -> None:
        """Note that a tenth of a second should have passed."""
        self.was_behind_within(0)
        self._ticked = time.monotonic()

    def was_behind_within(self, seconds: float) -> bool:
        """Whether the server was behind in the last seconds, or is."""
        now = time.monotonic()
        if now - self._ticked > BEHIND_SECONDS:
            self._behind = now
        return now - self._behind <= seconds


class _Server(uvicorn.Server):
    """uvicorn's server; it leaves signals alone, after which it would not end with 0.

    It notes when it was last behind, which its protocol has to know.
    """

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.server_state: _State = _State()

    async def on_tick(self, counter: int) -> bool:
        """Note that it came round, which it should each tenth of a second."""
        self.server_state.tick()
        return await super().on_tick(counter)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Take none."""
        yield


class _Protocol(H11Protocol):
    """uvicorn's protocol; it closes connections that send no request or take no answer.

    uvicorn itself waits for the headers of a first request for ever, and for those of the next one
    as soon as a byte of them has come.
    """

    _without_headers: asyncio.TimerHandle | None = None
    _without_reader: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        _cancel(self._without_headers)
        _cancel(self._without_reader)
        super().connection_lost(exc)

    def handle_events(self) -> None:
        super().handle_events()
        if self.cycle is not None and not self.cycle.response_complete:
            _cancel(self._without_headers)  # they are there; who reads the body, times it

    def on_response_complete(self) -> None:
        self._await_headers()
        super().on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        _cancel(self._without_reader)
        self._without_reader = self.loop.call_later(self.timeout_keep_alive, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        _cancel(self._without_reader)

    def _await_headers(self) -> None:
        _cancel(self._without_headers)
        self._without_headers = self.loop.call_later(self.timeout_keep_alive, self._give_up)

    def _give_up(self) -> None:
        if self.transport.is_closing():
            return
        state = self.server_state
        assert isinstance(state, _State)
        if state.was_behind_within(self.timeout_keep_alive):
            self._await_headers()  # so many have come at once that a client may well be slow
            return
        if self.conn.trailing_data[0]:  # a part of the headers
            self.transport.write(TIMED_OUT)
        self.transport.close()


def _cancel(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()


def _token(config: ServeConfig) -> bytes | None:
    """Return the token that clients must show, from the file or the environment.

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


def _bind(config: ServeConfig, *, has_token: bool) -> socket.socket:
    """Take the port.

    Raises:
        ConfigError: If it is taken or cannot be, or the address needs a token and there is none.
    """
    where = f"{config.host}, port {config.port}"
    try:
        found = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        family, kind, protocol, _, address = found[0]
        if not has_token and not ipaddress.ip_address(address[0]).is_loopback:
            raise ConfigError(
                f"{config.host} can be reached from other machines and there is no token; set "
                f"{TOKEN_VARIABLE} or give --token-file"
            )
        taken = socket.socket(family, kind, protocol)
        try:
            if os.name != "nt":  # there it would let two processes have one port
                taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            taken.bind(address)
        except BaseException:
            taken.close()
            raise
    except ConfigError:
        raise
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"cannot listen on {where} ({reason}); choose another --port or --host"
        ) from None
    return taken


def _raise_file_limit() -> None:
    """Let the process have as many connections as the system lets it."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))

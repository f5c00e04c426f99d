"""Limits on what a client may send: token and host, bytes, seconds, JSON, queue."""

from __future__ import annotations

import asyncio
import hmac
import json
import time
from collections.abc import Callable
from typing import Any

from fastapi import HTTPException, Request, Response
from fastapi.routing import APIRoute

from remora.serving.state import State

OPEN_ROUTES = ("/health", "/")
"""The routes that need no token: the page holds nothing, and asks for it."""

CLASSIFYING = ("/v1/classify", "/classify", "/v1/chat/completions")
"""The routes whose texts wait in the queue."""

LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")
RETRY_SECONDS = 1
OTHER_HOST = "the Host header does not name this machine"
FULL = "too many texts are waiting"
HELD_BODIES = 64
"""Most bodies of the largest size that are held at a time, complete or not."""


class RefusedError(HTTPException):
    """An error answer, on one line."""

    def __init__(self, status: int, detail: str, **headers: str) -> None:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        super().__init__(status, detail, headers=named)


def busy(detail: str) -> RefusedError:
    """Return the answer 503 with Retry-After."""
    return RefusedError(503, detail, retry_after=str(RETRY_SECONDS))


def problem(status: int, detail: str, headers: dict[str, str] | None = None) -> Response:
    """Return an error answer, its text on one line."""
    # In ASCII, since a client's own words may hold what cannot be encoded.
    content = json.dumps({"error": " ".join(detail.split())[:500]})
    return Response(content, status, headers, "application/json")


def host_of(scope: Any) -> str:
    """Return the name in the Host header of a request, without its port."""
    host = dict(scope["headers"]).get(b"host", b"").decode("latin-1").rsplit(":", 1)
    name = host[0] if len(host) > 1 and host[1].isdigit() else ":".join(host)
    return str(name.strip("[]").lower())


class Guard:
    """ASGI middleware for all routes: token, Host header, shutdown, full queue, and counting."""

    def __init__(self, app: Any, state: State) -> None:
        self._app = app
        self._state = state

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer a request, or refuse it before anything is spent on it."""
        began = time.perf_counter()
        status = 500

        async def watch(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        state = self._state
        refusal = self._refusal(scope)
        state.num_in_flight += 1
        try:
            await (refusal or self._app)(scope, receive, watch)
        finally:
            state.num_in_flight -= 1
            route = "refused" if refusal else getattr(scope.get("route"), "path", "other")
            state.metrics.requests.labels(route, str(status)).inc()
            state.metrics.seconds.labels(route).observe(time.perf_counter() - began)

    def _refusal(self, scope: Any) -> Response | None:
        headers = dict(scope["headers"])
        state, path = self._state, scope["path"]
        if state.token is None:
            if host_of(scope) not in (*LOCAL_NAMES, state.config.host.lower()):
                # DNS rebinding: a web page may point a name of its own at this machine.
                return problem(403, OTHER_HOST)
        elif path not in OPEN_ROUTES:
            wanted = b"Bearer " + state.token
            if not hmac.compare_digest(headers.get(b"authorization", b""), wanted):
                return problem(401, "the token is missing or wrong", {"www-authenticate": "Bearer"})
        if state.is_draining and (path.startswith("/v1/") or path in CLASSIFYING):
            headers_back = {"retry-after": str(RETRY_SECONDS), "connection": "close"}
            return problem(503, "the service is stopping", headers_back)
        if path in CLASSIFYING and state.engine.is_full:
            return problem(503, FULL, {"retry-after": str(RETRY_SECONDS)})
        return None


class BodyReader:
    """Reads bodies within their limits of bytes and time."""

    def __init__(self, max_bytes: int, seconds: float) -> None:
        self._limit = max_bytes
        self._seconds = seconds
        self._held_bytes = 0  # of all bodies that are being read

    async def read(self, request: Request) -> bytes:
        """Return the body of a request; raises RefusedError."""
        length = request.headers.get("content-length", "0")
        if int(length) > self._limit:  # h11 lets nothing through that is no number
            raise self._too_large()
        chunks: list[bytes] = []
        try:
            await asyncio.wait_for(self._fill(request, chunks), self._seconds)
        except asyncio.TimeoutError:
            raise RefusedError(
                408, f"the body took longer than {self._seconds:g} seconds", connection="close"
            ) from None
        finally:
            self._held_bytes -= sum(map(len, chunks))
        return b"".join(chunks)

    async def _fill(self, request: Request, chunks: list[bytes]) -> None:
        num_bytes = 0
        async for chunk in request.stream():
            num_bytes += len(chunk)
            if num_bytes > self._limit:
                raise self._too_large()
            if self._held_bytes + len(chunk) > HELD_BODIES * self._limit:
                raise busy("too many bodies are being read")
            self._held_bytes += len(chunk)
            chunks.append(chunk)

    def _too_large(self) -> RefusedError:
        return RefusedError(
            413, f"the body is larger than {self._limit} bytes; send less at a time"
        )


class StrictRoute(APIRoute):
    """A route whose requests are read within the limits, and as strict JSON."""

    def get_route_handler(self) -> Callable[[Request], Any]:
        """Return FastAPI's handler of a request, which gets a strict one."""
        handle = super().get_route_handler()

        async def handle_strictly(request: Request) -> Response:
            return await handle(_StrictRequest(request.scope, request.receive))

        return handle_strictly


class _StrictRequest(Request):
    async def body(self) -> bytes:
        if not hasattr(self, "_body"):
            bodies: BodyReader = self.app.state.bodies
            self._body = await bodies.read(self)
        return self._body

    async def json(self) -> Any:
        return strict_json(await self.body())


def strict_json(body: bytes) -> Any:
    """Return the value of a JSON text without repeated names and without NaN.

    Raises:
        RefusedError: If it is none.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        members = dict(pairs)
        if len(members) < len(pairs):
            raise ValueError("a name stands twice in one object")
        return members

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is no JSON")

    try:
        return json.loads(body.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse)
    except RecursionError:
        raise RefusedError(400, "the body is nested too deeply") from None
    except ValueError as error:
        raise RefusedError(400, f"the body cannot be read as JSON: {error}") from None

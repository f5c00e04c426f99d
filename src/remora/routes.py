"""The routes of the service, and the limits of what a client may send.

Nothing that a client sends is a path, and everything is bounded: the body in bytes and seconds, the
texts in number and length, the waiting in texts and seconds.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any

import numpy as np
import prometheus_client
from fastapi import Depends, FastAPI, HTTPException, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer
from prometheus_client.core import GaugeMetricFamily
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException as AnyHTTPException

import remora
from remora import memory
from remora.config import ServeConfig
from remora.engine import Answer, Batch, Engine, QueueFullError
from remora.errors import ModelError
from remora.store import is_text

OPEN_ROUTE = "/health"
"""The one route that needs no token."""

LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")
RETRY_SECONDS = 1
FULL = "too many texts are waiting"
HELD_BODIES = 64
"""How many bodies of the largest size may be held at a time, whole or in part."""

PAGE_HEADERS = {
    "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'",
    "x-content-type-options": "nosniff",
}


class Classify(BaseModel):
    """What to classify."""

    model_config = ConfigDict(extra="forbid", strict=True)

    texts: list[str] = Field(min_length=1, description="The messages.", examples=[["my card"]])
    top_k: int = Field(
        default=1,
        ge=1,
        description="How many labels to give for each message, the likeliest first.",
    )
    adapter: str | None = Field(
        default=None, description="Which adapter to ask; may be left out where there is one only."
    )


class Label(BaseModel):
    """A label and its probability."""

    label: str
    probability: float


class Result(BaseModel):
    """What is found for one message."""

    labels: list[Label] = Field(description="The likeliest labels, the likeliest first.")


class Classified(BaseModel):
    """Results in the order of the texts, all from one generation of the adapter."""

    adapter: str
    sha256: str = Field(description="SHA-256 over the adapter's files.")
    results: list[Result]


class Labels(BaseModel):
    """The labels of an adapter."""

    adapter: str
    sha256: str
    labels: list[str]


class AdapterState(BaseModel):
    """An adapter as it is served."""

    id: str
    sha256: str
    num_labels: int


class Adapters(BaseModel):
    """All adapters, and the base model that they share."""

    base_sha256: str
    adapters: list[AdapterState]


class Reloaded(BaseModel):
    """What reading an adapter's folder again has led to."""

    id: str
    sha256: str
    changed: bool


class Status(BaseModel):
    """How the service is."""

    status: str


class Problem(BaseModel):
    """What was wrong, in one line."""

    error: str


class Metrics:
    """What is counted, in Prometheus' format."""

    def __init__(self) -> None:
        self._registry = prometheus_client.CollectorRegistry()
        kwargs: dict[str, Any] = {"registry": self._registry}
        self.requests = prometheus_client.Counter(
            "remora_requests", "Requests answered.", ["route", "status"], **kwargs
        )
        self.seconds = prometheus_client.Histogram(
            "remora_request_seconds", "Time from headers to answer.", ["route"], **kwargs
        )
        self.texts = prometheus_client.Counter(
            "remora_texts", "Texts classified.", ["adapter"], **kwargs
        )
        self.batch_requests = prometheus_client.Histogram(
            "remora_batch_requests",
            "Requests computed together.",
            buckets=(1, 2, 4, 8, 16, 32, 64),
            **kwargs,
        )
        self.batch_seconds = prometheus_client.Histogram(
            "remora_batch_seconds", "Time to compute a batch.", **kwargs
        )
        self.reloads = prometheus_client.Counter(
            "remora_reloads", "Adapters read again.", ["adapter", "result"], **kwargs
        )
        prometheus_client.ProcessCollector(registry=self._registry)

    def watch(self, engine: Engine) -> None:
        """Read the queue and the generations whenever metrics are asked for."""
        metrics = self

        class _State:
            def collect(self) -> Iterator[GaugeMetricFamily]:
                yield GaugeMetricFamily(
                    "remora_queue_texts", "Texts that wait.", value=engine.num_waiting
                )
                info = GaugeMetricFamily(
                    "remora_adapter_info", "Adapters that are served.", labels=["adapter", "sha256"]
                )
                for name, generation in engine.generations.items():
                    info.add_metric([name, generation.sha256], 1)
                yield info

        metrics._registry.register(_State())

    def batch(self, batch: Batch) -> None:
        """Count a batch."""
        self.texts.labels(batch.adapter).inc(batch.num_texts)
        self.batch_requests.observe(batch.num_requests)
        self.batch_seconds.observe(batch.seconds)

    def write(self) -> bytes:
        """Return all figures as text."""
        return prometheus_client.generate_latest(self._registry)


@dataclass(kw_only=True)
class State:
    """What the routes have to do with, and what the process has to know of them."""

    config: ServeConfig
    token: bytes | None
    engine: Engine
    metrics: Metrics
    reload: Callable[[str], bool]
    is_draining: bool = False
    num_in_flight: int = field(default=0, init=False)


def application(state: State) -> Any:
    """Return the service as an ASGI application."""
    return _Guard(_routes(state), state)


class _Refused(HTTPException):
    """An answer that is an error, in one line."""

    def __init__(self, status: int, detail: str, **headers: str) -> None:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        super().__init__(status, detail, headers=named)


def _busy(detail: str) -> _Refused:
    return _Refused(503, detail, retry_after=str(RETRY_SECONDS))


class _Guard:
    """Everything that holds for all routes: the token, the end of the service, and counting."""

    def __init__(self, app: Any, state: State) -> None:
        self._app = app
        self._state = state

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
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
            host = headers.get(b"host", b"").decode("latin-1").rsplit(":", 1)
            name = host[0] if len(host) > 1 and host[1].isdigit() else ":".join(host)
            if name.strip("[]").lower() not in (*LOCAL_NAMES, state.config.host.lower()):
                # A web page may lead a browser here under a name of its own.
                return _problem(403, "the Host header does not name this machine")
        elif path != OPEN_ROUTE:
            wanted = b"Bearer " + state.token
            if not hmac.compare_digest(headers.get(b"authorization", b""), wanted):
                return _problem(
                    401, "the token is missing or wrong", {"www-authenticate": "Bearer"}
                )
        if state.is_draining and path.startswith("/v1/"):
            headers_back = {"retry-after": str(RETRY_SECONDS), "connection": "close"}
            return _problem(503, "the service is stopping", headers_back)
        if path == "/v1/classify" and state.engine.is_full:  # before anything is spent on it
            return _problem(503, FULL, {"retry-after": str(RETRY_SECONDS)})
        return None


class _BodyReader:
    """Reads bodies within their limits of bytes and time."""

    def __init__(self, config: ServeConfig) -> None:
        self._limit = config.body_bytes()
        self._seconds = config.read_seconds
        self._held = 0

    async def read(self, request: Request) -> bytes:
        length = request.headers.get("content-length", "0")
        if int(length) > self._limit:  # h11 lets nothing through that is no number
            raise self._too_large()
        chunks: list[bytes] = []
        try:
            await asyncio.wait_for(self._fill(request, chunks), self._seconds)
        except asyncio.TimeoutError:
            raise _Refused(
                408, f"the body took longer than {self._seconds:g} seconds", connection="close"
            ) from None
        finally:
            self._held -= sum(map(len, chunks))
        return b"".join(chunks)

    async def _fill(self, request: Request, chunks: list[bytes]) -> None:
        num_bytes = 0
        async for chunk in request.stream():
            num_bytes += len(chunk)
            if num_bytes > self._limit:
                raise self._too_large()
            if self._held + len(chunk) > HELD_BODIES * self._limit:
                raise _busy("too many bodies are being read")
            self._held += len(chunk)
            chunks.append(chunk)

    def _too_large(self) -> _Refused:
        return _Refused(413, f"the body is larger than {self._limit} bytes; send less at a time")


def _strict_json(body: bytes) -> Any:
    """Return what JSON says, if it says one thing only: no names twice, no NaN."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a name stands twice in one object")
        return found

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is no JSON")

    try:
        return json.loads(body.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse)
    except RecursionError:
        raise _Refused(400, "the body is nested too deeply") from None
    except ValueError as error:
        raise _Refused(400, f"the body cannot be read as JSON: {error}") from None


def _problem(status: int, detail: str, headers: dict[str, str] | None = None) -> Response:
    # In ASCII, since a client's own words may hold what cannot be encoded.
    content = json.dumps({"error": " ".join(detail.split())[:500]})
    return Response(content, status, headers, "application/json")


def _problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": Problem} for status in statuses}


def _routes(state: State) -> FastAPI:  # noqa: PLR0915 - the routes, one after the other
    config, engine = state.config, state.engine
    bodies = _BodyReader(config)

    class StrictRequest(Request):
        async def body(self) -> bytes:
            if not hasattr(self, "_body"):
                self._body = await bodies.read(self)
            return self._body

        async def json(self) -> Any:
            return _strict_json(await self.body())

    class StrictRoute(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Any]:
            handle = super().get_route_handler()

            async def strict(request: Request) -> Response:
                return await handle(StrictRequest(request.scope, request.receive))

            return strict

    app = FastAPI(
        title="Remora",
        version=remora.__version__,
        description="Text classification with adapters of one language model.",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        dependencies=[Depends(HTTPBearer(auto_error=False))] if state.token else [],
    )
    app.router.route_class = StrictRoute

    def known(adapter: str | None) -> str:
        names = list(engine.generations)
        if adapter is None and len(names) == 1:
            return names[0]
        if adapter is None:
            raise _Refused(422, f"no adapter is named; name one of {', '.join(names)}")
        if adapter not in names:
            raise _Refused(404, f"there is no adapter {adapter[:64]!r}; see /v1/adapters")
        return adapter

    @app.post("/v1/classify", responses=_problems(400, 404, 408, 413, 422, 503))
    async def classify(body: Classify) -> Classified:
        """Give the likeliest labels for each text."""
        name = known(body.adapter)
        if len(body.texts) > config.max_texts:
            raise _Refused(
                413, f"there are {len(body.texts)} texts; send {config.max_texts} at a time"
            )
        for place, text in enumerate(body.texts):
            if len(text) > config.max_text_length:
                raise _Refused(
                    413,
                    f"text {place} has {len(text)} characters; "
                    f"at most {config.max_text_length} are taken",
                )
            if not text.strip():
                raise _Refused(422, f"text {place} is blank; leave it out")
            if not is_text(text):
                raise _Refused(422, f"text {place} holds half of a surrogate pair; correct it")
        answer = await _answer(state, name, body.texts)
        num_labels = len(answer.labels)
        if body.top_k > num_labels:
            raise _Refused(422, f"top_k is {body.top_k}; the adapter has {num_labels} labels")
        order = np.argsort(-answer.probabilities, axis=1, kind="stable")[:, : body.top_k]
        results = [
            Result(
                labels=[
                    Label(label=answer.labels[i], probability=round(float(row[i]), 6)) for i in best
                ]
            )
            for row, best in zip(answer.probabilities, order, strict=True)
        ]
        return Classified(adapter=name, sha256=answer.sha256, results=results)

    @app.get("/v1/labels", responses=_problems(404, 422))
    async def labels(
        adapter: Annotated[str | None, Query(description="As in /v1/classify.")] = None,
    ) -> Labels:
        """List the labels of an adapter."""
        name = known(adapter)
        generation = engine.generations[name]
        return Labels(adapter=name, sha256=generation.sha256, labels=list(generation.labels))

    @app.get("/v1/adapters")
    async def adapters() -> Adapters:
        """List the adapters, and the generation that each is at."""
        return Adapters(
            base_sha256=engine.base_sha256,
            adapters=[
                AdapterState(id=name, sha256=g.sha256, num_labels=len(g.labels))
                for name, g in engine.generations.items()
            ],
        )

    reloading = asyncio.Lock()

    @app.post("/v1/adapters/{adapter}/reload", responses=_problems(404, 409, 503))
    async def reload(adapter: str) -> Reloaded:
        """Read an adapter's folder again; requests that follow are answered by what is there."""
        name = known(adapter)
        if reloading.locked():
            raise _busy("another adapter is being read")
        async with reloading:
            try:
                changed = await asyncio.to_thread(state.reload, name)
            except ModelError:
                raise _Refused(
                    409,
                    "the adapter's folder cannot be used, the service's output says why; the one "
                    "before goes on being served",
                ) from None
        return Reloaded(id=name, sha256=engine.generations[name].sha256, changed=changed)

    @app.get("/health")
    async def health() -> Status:
        """Say that the process lives."""
        return Status(status="ok")

    @app.get("/ready", responses={503: {"model": Status}})
    async def ready(response: Response) -> Status:
        """Say whether requests are taken."""
        if state.is_draining:
            response.status_code = 503
        return Status(status="stopping" if state.is_draining else "ready")

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Give the service's figures in Prometheus' text format."""
        return Response(state.metrics.write(), media_type=prometheus_client.CONTENT_TYPE_LATEST)

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return Response(_describe(app.openapi()), headers=PAGE_HEADERS, media_type="text/html")

    @app.exception_handler(AnyHTTPException)
    async def refuse(request: Request, error: AnyHTTPException) -> Response:
        return _problem(error.status_code, str(error.detail), dict(error.headers or {}))

    @app.exception_handler(Exception)  # which is also written to the service's output
    async def fail(request: Request, error: Exception) -> Response:
        return _problem(500, "the service failed; its output says why")

    @app.exception_handler(RequestValidationError)
    async def refuse_shape(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        place = ".".join(str(part)[:64] for part in first["loc"])
        return _problem(422, f"{place}: {first['msg']}")

    return app


async def _answer(state: State, adapter: str, texts: list[str]) -> Answer:
    try:
        future = state.engine.classify(adapter, texts)
    except QueueFullError:
        raise _busy(FULL) from None
    try:
        return await asyncio.wait_for(asyncio.wrap_future(future), state.config.timeout_seconds)
    except asyncio.TimeoutError:
        raise _busy("the answer took too long") from None
    except (MemoryError, RuntimeError) as error:
        if not memory.is_exhausted(error):
            raise
        raise _busy("the memory does not suffice for this request") from None


def _describe(description: dict[str, Any]) -> str:
    """Return the OpenAPI description as a page, which needs no script and fetches nothing."""
    from jinja2 import Environment, PackageLoader

    environment = Environment(loader=PackageLoader("remora"), autoescape=True)
    return environment.get_template("openapi.html").render(description=description)

"""The routes of the service, and the limits of what a client may send.

Nothing that a client sends is a path, and everything is bounded: the body in bytes and seconds, the
texts in number and length, the waiting in texts and seconds.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Annotated, Any

import numpy as np
import prometheus_client
from fastapi import Depends, FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException as AnyHTTPException

import remora
from remora.errors import ModelError
from remora.models.adapter_card import is_text
from remora.runtime import memory
from remora.serving.engine import Answer, QueueFullError
from remora.serving.limits import FULL, BodyReader, Guard, RefusedError, busy, problem, strict_json
from remora.serving.schemas import (
    Adapters,
    AdapterState,
    Classified,
    Classify,
    Label,
    Labels,
    Problem,
    Reloaded,
    Result,
    Status,
)
from remora.serving.state import State

PAGE_HEADERS = {
    "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'",
    "x-content-type-options": "nosniff",
}


def application(state: State) -> Any:
    """Return the service as an ASGI application."""
    return Guard(_routes(state), state)


def _problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": Problem} for status in statuses}


def _routes(state: State) -> FastAPI:  # noqa: PLR0915 - the routes, one after the other
    config, engine = state.config, state.engine
    bodies = BodyReader(config)

    class StrictRequest(Request):
        async def body(self) -> bytes:
            if not hasattr(self, "_body"):
                self._body = await bodies.read(self)
            return self._body

        async def json(self) -> Any:
            return strict_json(await self.body())

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
            raise RefusedError(422, f"no adapter is named; name one of {', '.join(names)}")
        if adapter not in names:
            raise RefusedError(404, f"there is no adapter {adapter[:64]!r}; see /v1/adapters")
        return adapter

    @app.post("/v1/classify", responses=_problems(400, 404, 408, 413, 422, 503))
    async def classify(body: Classify) -> Classified:
        """Give the likeliest labels for each text."""
        name = known(body.adapter)
        if len(body.texts) > config.max_texts:
            raise RefusedError(
                413, f"there are {len(body.texts)} texts; send {config.max_texts} at a time"
            )
        for place, text in enumerate(body.texts):
            if len(text) > config.max_text_length:
                raise RefusedError(
                    413,
                    f"text {place} has {len(text)} characters; "
                    f"at most {config.max_text_length} are taken",
                )
            if not text.strip():
                raise RefusedError(422, f"text {place} is blank; leave it out")
            if not is_text(text):
                raise RefusedError(422, f"text {place} holds half of a surrogate pair; correct it")
        answer = await _answer(state, name, body.texts)
        num_labels = len(answer.labels)
        if body.top_k > num_labels:
            raise RefusedError(422, f"top_k is {body.top_k}; the adapter has {num_labels} labels")
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
            raise busy("another adapter is being read")
        async with reloading:
            try:
                changed = await asyncio.to_thread(state.reload, name)
            except ModelError:
                raise RefusedError(
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
        return problem(error.status_code, str(error.detail), dict(error.headers or {}))

    @app.exception_handler(Exception)  # which is also written to the service's output
    async def fail(request: Request, error: Exception) -> Response:
        return problem(500, "the service failed; its output says why")

    @app.exception_handler(RequestValidationError)
    async def refuse_shape(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        place = ".".join(str(part)[:64] for part in first["loc"])
        return problem(422, f"{place}: {first['msg']}")

    return app


async def _answer(state: State, adapter: str, texts: list[str]) -> Answer:
    try:
        future = state.engine.classify(adapter, texts)
    except QueueFullError:
        raise busy(FULL) from None
    try:
        return await asyncio.wait_for(asyncio.wrap_future(future), state.config.timeout_seconds)
    except asyncio.TimeoutError:
        raise busy("the answer took too long") from None
    except (MemoryError, RuntimeError) as error:
        if not memory.is_exhausted(error):
            raise
        raise busy("the memory does not suffice for this request") from None


def _describe(description: dict[str, Any]) -> str:
    """Return the OpenAPI description as a page, which needs no script and fetches nothing."""
    from jinja2 import Environment, PackageLoader

    environment = Environment(loader=PackageLoader("remora"), autoescape=True)
    return environment.get_template("openapi.html").render(description=description)

"""The page of a review as an ASGI application, behind its token."""

from __future__ import annotations

import hmac
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict
from starlette.exceptions import HTTPException

from remora.diagnosis.suspect_list import BANDS
from remora.errors import RemoraError, ResourceError
from remora.review.queue import Queue
from remora.serving.limits import (
    LOCAL_NAMES,
    OTHER_HOST,
    BodyReader,
    StrictRoute,
    host_of,
    problem,
)
from remora.serving.pages import render_page

MAX_BODY_BYTES, BODY_SECONDS = 1_000_000, 10.0


class Decision(BaseModel):
    """What was decided on a row: a label, its deletion, or neither, which takes it back."""

    model_config = ConfigDict(extra="forbid", strict=True)

    row: int
    label: str | None = None
    delete: bool = False


def application(queue: Queue, token: str, end: Callable[[], None]) -> Any:
    """Return the page of a review as an ASGI application.

    Args:
        queue: The rows to decide.
        token: The first part of every path, without which nothing is answered.
        end: Called when the person has ended the review on the page.
    """
    app = FastAPI(
        openapi_url=None,
        redirect_slashes=False,
        exception_handlers={
            HTTPException: _refuse,
            RequestValidationError: _refuse_shape,
            RemoraError: _refuse_decision,
        },
    )
    app.state.bodies = BodyReader(MAX_BODY_BYTES, BODY_SECONDS)
    app.include_router(_routes(queue, end))
    return _Guard(app, token)


def _routes(queue: Queue, end: Callable[[], None]) -> APIRouter:
    router = APIRouter(route_class=StrictRoute)

    @router.get("/")
    def page() -> Response:
        return render_page("review.html", "review.css", "review.js")

    @router.get("/rows")
    def rows() -> Response:
        decisions = queue.decisions()
        return JSONResponse(
            {
                "labels": queue.labels,
                "can_delete": queue.can_delete,
                "multi_label": queue.multi_label,
                "bands": BANDS,
                "items": [asdict(each) | {"decision": decisions[each.row]} for each in queue.items],
                "summary": queue.summary().to_dict(),
            }
        )

    @router.get("/rows/{row}")
    def details(row: int) -> Response:
        return JSONResponse(queue.details(row))

    @router.post("/decisions")
    def decide(decision: Decision) -> Response:
        queue.decide(decision.row, decision.label, delete=decision.delete)
        decided = {"decision": queue.decisions().get(decision.row)}
        return JSONResponse(queue.summary().to_dict() | decided)

    @router.post("/end")
    def end_review() -> Response:
        end()
        return JSONResponse(queue.summary().to_dict())

    return router


class _Guard:
    """ASGI middleware: only this machine's names, and only with the token."""

    def __init__(self, app: Any, token: str) -> None:
        self._app, self._token = app, token.encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer a request, or refuse it."""
        refusal = None
        given, _, path = scope["path"][1:].partition("/")
        if host_of(scope) not in LOCAL_NAMES:
            # DNS rebinding: a web page may point a name of its own at this machine.
            refusal = problem(403, OTHER_HOST)
        elif not hmac.compare_digest(given.encode("utf-8", "replace"), self._token):
            refusal = problem(404, "nothing is here; open the address that `remora review` printed")
        inside = {**scope, "path": f"/{path}", "raw_path": f"/{path}".encode("utf-8", "replace")}
        await (refusal or self._app)(inside, receive, send)


async def _refuse(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return problem(error.status_code, str(error.detail), dict(error.headers or {}))


async def _refuse_shape(request: Request, error: Exception) -> Response:
    return problem(400, "the request is no decision on a row")


async def _refuse_decision(request: Request, error: Exception) -> Response:
    return problem(507 if isinstance(error, ResourceError) else 409, str(error))

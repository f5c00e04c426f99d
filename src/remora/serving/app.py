"""The service as one ASGI application: its routes, behind its limits and error handlers.

A client never names a path, and everything it sends is bounded: the body in bytes and seconds, the
texts in number and length, the queue in texts and seconds.
"""

from __future__ import annotations

from typing import Any

from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException as AnyHTTPException

import remora
from remora.formatting import quote
from remora.serving import compatible, pages, routes
from remora.serving.limits import BodyReader, Guard, problem
from remora.serving.state import State


def application(state: State) -> Any:
    """Return the service as an ASGI application."""
    app = FastAPI(
        title="Remora",
        version=remora.__version__,
        description="Text classification with adapters of one language model.",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        dependencies=[Depends(HTTPBearer(auto_error=False))] if state.token else [],
        exception_handlers={
            AnyHTTPException: _refuse,
            RequestValidationError: _refuse_shape,
            Exception: _fail,
        },
    )
    app.state.service = state
    app.state.bodies = BodyReader(state.config.body_bytes(), state.config.read_seconds)
    for module in (routes, compatible, pages):
        app.include_router(module.router)
    return Guard(app, state)


async def _refuse(request: Request, error: AnyHTTPException) -> Response:
    return problem(error.status_code, str(error.detail), dict(error.headers or {}))


async def _refuse_shape(request: Request, error: RequestValidationError) -> Response:
    """Name the first value that the description does not allow, or what the body was read as."""
    if isinstance(error.body, bytes):  # FastAPI reads what is not said to be JSON as bytes
        kind = quote(request.headers.get("content-type", ""))
        return problem(
            422, f"the content-type is {kind}; send it with content-type: application/json"
        )
    first = error.errors()[0]
    place = ".".join(str(part)[:64] for part in first["loc"])
    return problem(422, f"{place}: {first['msg']}")


async def _fail(request: Request, error: Exception) -> Response:
    """Hide an error of our own from the client; the service's output has its traceback."""
    return problem(500, "the service failed; its output says why")

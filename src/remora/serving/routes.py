"""The routes of the service: classify, list, reload, and say how the service is."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Annotated, Any

import prometheus_client
from fastapi import APIRouter, Depends, Query, Request, Response

from remora.data.columns import has_names, joined
from remora.data.label_sets import labels_in
from remora.data.values import is_text
from remora.errors import ModelError
from remora.formatting import listed
from remora.runtime import memory
from remora.serving.engine import Answer, QueueFullError
from remora.serving.limits import FULL, RefusedError, StrictRoute, busy
from remora.serving.predictor import levels_above, rank, rank_given
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

# The docstrings of the routes are their descriptions in /openapi.json.
router = APIRouter(route_class=StrictRoute)


async def _state(request: Request) -> State:
    state: State = request.app.state.service
    return state


SharedState = Annotated[State, Depends(_state)]


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the description of error answers."""
    return {status: {"model": Problem} for status in statuses}


@router.post(
    "/v1/classify",
    responses=problems(400, 404, 408, 413, 422, 503),
    response_model_exclude_none=True,
)
async def classify(body: Classify, state: SharedState) -> Classified:
    """Give the likeliest labels for each text."""
    name = adapter_name(state, body.adapter)
    columns = state.engine.generations[name].text_columns
    texts = [_text(columns, place, given) for place, given in enumerate(body.texts)]
    check_texts(state, name, texts)
    answer = await wait_for_answer(state, name, texts)
    num_labels = len(answer.labels)
    if body.top_k > num_labels:
        raise RefusedError(422, f"top_k is {body.top_k}; the adapter has {num_labels} labels")
    if answer.thresholds:
        given = rank_given(answer.labels, answer.probabilities, answer.thresholds, body.top_k)
        results = [
            Result(labels=_labels(ranked), predicted=list(labels_in(text)))
            for ranked, text in given
        ]
        return Classified(adapter=name, sha256=answer.sha256, results=results)
    ranked = rank(answer.labels, answer.probabilities, body.top_k)
    levels = levels_above(answer.hierarchy, answer.probabilities)
    results = [
        Result(labels=_labels(best), levels=_labels(above) or None)
        for best, above in zip(ranked, levels, strict=True)
    ]
    return Classified(adapter=name, sha256=answer.sha256, results=results)


def _labels(ranked: Sequence[tuple[str | None, float]]) -> list[Label]:
    return [Label(label=label or "", probability=round(p, 6)) for label, p in ranked]


@router.get("/v1/labels", responses=problems(404, 422))
async def labels(
    state: SharedState,
    adapter: Annotated[str | None, Query(description="As in /v1/classify.")] = None,
) -> Labels:
    """List the labels of an adapter."""
    name = adapter_name(state, adapter)
    generation = state.engine.generations[name]
    return Labels(adapter=name, sha256=generation.sha256, labels=list(generation.labels))


@router.get("/v1/adapters")
async def adapters(state: SharedState) -> Adapters:
    """List the adapters, and the generation that each is at."""
    return Adapters(
        base_sha256=state.engine.base_sha256,
        adapters=[
            AdapterState(
                id=name,
                sha256=g.sha256,
                num_labels=len(g.labels),
                text_columns=list(g.text_columns),
            )
            for name, g in state.engine.generations.items()
        ],
    )


@router.post("/v1/adapters/{adapter}/reload", responses=problems(404, 409, 503))
async def reload(adapter: str, state: SharedState) -> Reloaded:
    """Read an adapter's folder again; requests that follow are answered by what is there."""
    name = adapter_name(state, adapter)
    if state.reloading.locked():
        raise busy("another adapter is being read")
    async with state.reloading:
        try:
            changed = await asyncio.to_thread(state.reload, name)
        except ModelError:
            raise RefusedError(
                409,
                "the adapter's folder cannot be used, the service's output says why; the one "
                "before goes on being served",
            ) from None
    return Reloaded(id=name, sha256=state.engine.generations[name].sha256, changed=changed)


@router.get("/health")
async def health() -> Status:
    """Say that the process lives."""
    return Status(status="ok")


@router.get("/ready", responses={503: {"model": Status}})
async def ready(response: Response, state: SharedState) -> Status:
    """Say whether requests are taken."""
    if state.is_draining:
        response.status_code = 503
    return Status(status="stopping" if state.is_draining else "ready")


@router.get("/metrics", response_class=Response)
async def metrics(state: SharedState) -> Response:
    """Give the service's figures in Prometheus' text format."""
    return Response(state.metrics.write(), media_type=prometheus_client.CONTENT_TYPE_LATEST)


def adapter_name(state: State, wanted: str | None) -> str:
    """Return the adapter that a request asks, which may name none where there is only one."""
    names = list(state.engine.generations)
    if wanted is None and len(names) == 1:
        return names[0]
    if wanted is None:
        raise RefusedError(422, f"no adapter is named; name one of {', '.join(names)}")
    if wanted not in names:
        raise RefusedError(404, f"there is no adapter {wanted[:64]!r}; see /v1/adapters")
    return wanted


def _text(columns: tuple[str, ...], place: int, given: str | dict[str, str | None]) -> str:
    """Return a message as the adapter's training rows were written."""
    if isinstance(given, str):
        return given
    if not columns or given.keys() != {*columns}:
        wanted = f"an object of {listed(columns)}" if columns else "a string"
        raise RefusedError(
            422, f"text {place} has {listed(list(given)) or 'nothing'}; send {wanted}"
        )
    return joined(columns, [given[column] or "" for column in columns])


def check_texts(state: State, adapter: str, texts: list[str]) -> None:
    """Refuse more or longer texts than the settings allow, and blank or broken ones."""
    config, columns = state.config, state.engine.generations[adapter].text_columns
    if len(texts) > config.max_texts:
        raise RefusedError(413, f"there are {len(texts)} texts; send {config.max_texts} at a time")
    for place, text in enumerate(texts):
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
        if not has_names(text, columns):
            raise RefusedError(
                422,
                f"text {place} is one text, and the adapter reads {listed(columns)}; begin a line "
                f"with each, such as {columns[0][:64]!r} and a colon, or send an object to "
                "/v1/classify",
            )


async def wait_for_answer(state: State, adapter: str, texts: list[str]) -> Answer:
    """Wait for the engine's answer; a full queue, memory or clock gets 503 with Retry-After."""
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

"""Routes that other servers' clients know: vLLM's `/classify` and OpenAI's chat completions.

Sources: `ClassificationRequest` of vLLM's server, and OpenAI's API reference of chat completions.
A request's settings of sampling have no meaning for a closed set of labels and are ignored; what
would change the answer's form is refused.
"""

from __future__ import annotations

import math
import secrets
import time
from typing import Any, Literal

import numpy as np
from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field

from remora.serving.engine import Answer
from remora.serving.limits import RefusedError, StrictRoute
from remora.serving.routes import SharedState, adapter_name, check_texts, problems, wait_for_answer

LEAST_LOG = -9999.0
"""The log-probability of what has none, as OpenAI gives it."""

router = APIRouter(route_class=StrictRoute)


class _Lenient(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)


class Input(_Lenient):
    """What to classify, as vLLM's server takes it."""

    model: str | None = Field(default=None, description="Which adapter to ask.")
    input: str | list[str] = Field(description="The messages.", examples=[["my card"]])


class Message(_Lenient):
    """A message of a conversation."""

    role: str
    content: str | list[dict[str, Any]]


class Chat(_Lenient):
    """A conversation of one message, which is classified."""

    model: str = Field(description="Which adapter to ask.")
    messages: list[Message] = Field(
        description="One message of the user's; the prompt is the adapter's own.",
        examples=[[{"role": "user", "content": "my card"}]],
    )
    logprobs: bool | None = Field(default=None, description="Whether to give probabilities.")
    top_logprobs: int | None = Field(
        default=None, ge=0, le=20, description="How many labels to give probabilities of."
    )
    n: Literal[1] | None = Field(default=None, description="One answer is given.")
    stream: Literal[False] | None = Field(default=None, description="An answer comes whole.")


class Class(BaseModel):
    """What is found for one message."""

    index: int
    label: str
    probs: list[float] = Field(description="The probability of each label, as in /v1/labels.")
    num_classes: int


class Classes(BaseModel):
    """What is found, in the order of the messages."""

    id: str
    object: Literal["list"] = "list"
    created: int = Field(description="Seconds since 1970.")
    model: str
    data: list[Class]


class LogProbability(BaseModel):
    """The natural logarithm of a label's probability."""

    token: str = Field(description="The whole label.")
    logprob: float
    bytes: list[int]


class BestLogProbability(LogProbability):
    """That of the likeliest label, and those of others."""

    top_logprobs: list[LogProbability]


class LogProbabilities(BaseModel):
    """Probabilities, in which a whole label takes the place of a token."""

    content: list[BestLogProbability]
    refusal: None = None


class Written(BaseModel):
    """The label as the assistant's message."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class Choice(BaseModel):
    """The answer."""

    index: int = 0
    message: Written
    logprobs: LogProbabilities | None
    finish_reason: Literal["stop"] = "stop"


class Completion(BaseModel):
    """A label as an answer of OpenAI's API."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int = Field(description="Seconds since 1970.")
    model: str
    choices: list[Choice]


class Model(BaseModel):
    """An adapter as a model of OpenAI's API."""

    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "remora"


class Models(BaseModel):
    """The adapters."""

    object: Literal["list"] = "list"
    data: list[Model]


@router.post("/classify", responses=problems(400, 404, 408, 413, 422, 503))
async def classify(body: Input, state: SharedState) -> Classes:
    """Give the likeliest label and all probabilities, as vLLM's server does."""
    name = adapter_name(state, body.model)
    texts = [body.input] if isinstance(body.input, str) else body.input
    if not texts:
        raise RefusedError(422, "input is empty; give at least one message")
    check_texts(state, name, texts)
    answer = await wait_for_answer(state, name, texts)
    data = [
        Class(
            index=index,
            label=answer.labels[int(row.argmax())],
            probs=[round(float(p), 6) for p in row],
            num_classes=len(answer.labels),
        )
        for index, row in enumerate(answer.probabilities)
    ]
    return Classes(id=_identity("classify"), created=int(time.time()), model=name, data=data)


@router.post("/v1/chat/completions", responses=problems(400, 404, 408, 413, 422, 503))
async def complete(body: Chat, state: SharedState) -> Completion:
    """Give the likeliest label as the assistant's answer, as OpenAI's API does."""
    name = adapter_name(state, body.model)
    if state.engine.generations[name].thresholds:
        raise RefusedError(
            422, f"{name} may give a message several labels; ask /v1/classify, which gives them all"
        )
    text = _only_text(body.messages)
    check_texts(state, name, [text])
    answer = await wait_for_answer(state, name, [text])
    best = answer.labels[int(answer.probabilities[0].argmax())]
    logs = _logs(answer, body.top_logprobs or 0) if body.logprobs else None
    choice = Choice(message=Written(content=best), logprobs=logs)
    return Completion(
        id=_identity("chatcmpl"), created=int(time.time()), model=name, choices=[choice]
    )


@router.get("/v1/models")
async def models(state: SharedState) -> Models:
    """List the adapters, as OpenAI's API lists models."""
    return Models(data=[Model(id=name) for name in state.engine.generations])


def _only_text(messages: list[Message]) -> str:
    """Return the text of a conversation's only message."""
    if len(messages) != 1 or messages[0].role != "user":
        roles = ", ".join(message.role[:16] for message in messages[:8]) or "none"
        raise RefusedError(
            422,
            f"messages are of {roles}; send one of the user's, since the prompt around it is the "
            "adapter's own",
        )
    content = messages[0].content
    if isinstance(content, str):
        return content
    texts = [part.get("text") for part in content if part.get("type") == "text"]
    if len(texts) != len(content) or not all(isinstance(text, str) for text in texts):
        raise RefusedError(422, "content has other parts than texts; send text alone")
    return "".join(map(str, texts))


def _logs(answer: Answer, top: int) -> LogProbabilities:
    row = answer.probabilities[0]
    order = np.argsort(-row, kind="stable")

    def log(index: int) -> dict[str, Any]:
        label, p = answer.labels[index], float(row[index])
        logprob = math.log(p) if p > 0 else LEAST_LOG
        return {"token": label, "logprob": logprob, "bytes": list(label.encode())}

    others = [LogProbability(**log(int(i))) for i in order[:top]]
    return LogProbabilities(content=[BestLogProbability(**log(int(order[0])), top_logprobs=others)])


def _identity(kind: str) -> str:
    return f"{kind}-{secrets.token_hex(12)}"

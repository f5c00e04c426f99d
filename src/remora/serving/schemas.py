"""Bodies of the service's requests and answers."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from remora.formatting import quote


def _check_text(given: Any) -> Any:
    """Refuse what is no message, by the name of the field; pydantic names its own types."""
    if isinstance(given, dict):
        wrong = {name: each for name, each in given.items() if not isinstance(each, str | None)}
        for name, each in wrong.items():
            found = {"name": quote(name), "type": type(each).__name__}
            raise PydanticCustomError(
                "text", "the field {name} is of type {type}; send a string or null", found
            )
    elif not isinstance(given, str):
        found = {"type": type(given).__name__}
        raise PydanticCustomError(
            "text", "the text is of type {type}; send a string, or an object of columns", found
        )
    return given


Text = Annotated[str | dict[str, str | None], BeforeValidator(_check_text)]
"""A message, or its columns, of which null is an empty one."""


class Classify(BaseModel):
    """What to classify."""

    model_config = ConfigDict(extra="forbid", strict=True)

    texts: list[Text] = Field(
        min_length=1,
        description="The messages; where the adapter was trained on several columns, an object of "
        "their names and texts each, null for an empty one.",
        examples=[["my card"]],
    )
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
    predicted: list[str] | None = Field(
        default=None,
        description="Where a message may have several labels, or none: those that it is given, by "
        "the threshold of each. They are all among `labels`.",
    )
    levels: list[Label] | None = Field(
        default=None,
        description="Where labels form a hierarchy, the levels above the likeliest one, the first "
        "one first; each has the probability of all labels below it.",
    )


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
    text_columns: list[str] = Field(
        description="The text columns of its training table; where there are several, a message is "
        "an object of their names and texts."
    )


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

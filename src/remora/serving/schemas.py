"""Bodies of the service's requests and answers."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class Classify(BaseModel):
    """What to classify."""

    model_config = ConfigDict(extra="forbid", strict=True)

    texts: list[str | dict[str, str]] = Field(
        min_length=1,
        description="The messages; where the adapter was trained on several columns, an object of "
        "their names and texts each.",
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

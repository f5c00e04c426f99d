"""Progress of a run as it is reported: sentences, steps, evaluations."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Step:
    """One optimizer step, as it is logged."""

    step: int
    num_steps: int
    epoch: float
    loss: float  # mean cross entropy of the answer tokens of the effective batch, in nats
    grad_norm: float
    learning_rate: float
    examples_per_second: float
    supervised_tokens_per_second: float
    peak_memory_bytes: int


@dataclass(frozen=True, kw_only=True)
class Validation:
    """One evaluation on the validation rows, as it is logged."""

    step: int
    accuracy: float
    loss: float  # mean cross entropy of the answer tokens in nats, as that of a step
    rows: int  # that were scored
    best: bool
    macro_f1: float | None = None  # where it selects the weights, or rows have several labels
    micro_f1: float | None = None  # where rows have several labels

    def to_dict(self) -> dict[str, Any]:
        """Return the record as it is logged."""
        values = {k: v for k, v in asdict(self).items() if v is not None}
        return {f"validation_{k}" if k != "step" else k: v for k, v in values.items()}


class Reporter:
    """Receives a run's progress. This one is silent; a subclass may show it."""

    def say(self, line: str) -> None:
        """Receive a sentence for the user."""

    def stepped(self, step: Step) -> None:
        """Receive an optimizer step."""

    def validated(self, validation: Validation) -> None:
        """Receive an evaluation on the validation rows."""

    def scoring(self, what: str, done: int, total: int) -> None:
        """Receive the progress of an evaluation, in rows."""

    def status(self, line: str) -> None:
        """Receive the progress of work without a known end, which replaces the line before it."""


class SayOnce(Reporter):
    """Passes everything on, each sentence once: several sessions in a row repeat theirs."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter
        self._said: set[str] = set()

    def say(self, line: str) -> None:
        """Pass on a sentence that is new."""
        if line not in self._said:
            self._said.add(line)
            self._reporter.say(line)

    def stepped(self, step: Step) -> None:
        """Pass on an optimizer step."""
        self._reporter.stepped(step)

    def validated(self, validation: Validation) -> None:
        """Pass on an evaluation."""
        self._reporter.validated(validation)

    def scoring(self, what: str, done: int, total: int) -> None:
        """Pass on the progress of an evaluation."""
        self._reporter.scoring(what, done, total)

    def status(self, line: str) -> None:
        """Pass on the progress of work without a known end."""
        self._reporter.status(line)

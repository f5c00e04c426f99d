"""How far a run is: steps, best validation, speed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

WARM_UP_STEPS = 3
"""Steps that the speed leaves out: memory is allocated and kernels are chosen in them."""


@dataclass
class Speed:
    """Counts examples and supervised tokens over the time that is spent on training steps."""

    examples: int = 0
    supervised_tokens: int = 0
    seconds: float = 0.0
    own_seconds: float = 0.0  # in which this process computed gradients
    warm_up_steps: int = WARM_UP_STEPS

    def add(
        self, examples: int, supervised_tokens: int, seconds: float, own_seconds: float = 0.0
    ) -> None:
        """Count a step, unless it is one of the first."""
        if self.warm_up_steps > 0:
            self.warm_up_steps -= 1
            return
        self.examples += examples
        self.supervised_tokens += supervised_tokens
        self.seconds += seconds
        self.own_seconds += own_seconds

    @property
    def examples_per_second(self) -> float:
        """Examples a second; 0 before the warm-up is over."""
        return self.examples / self.seconds if self.seconds else 0.0

    @property
    def supervised_tokens_per_second(self) -> float:
        """Answer tokens a second; 0 before the warm-up is over."""
        return self.supervised_tokens / self.seconds if self.seconds else 0.0


@dataclass
class Progress:
    """How far a run is; with tensors and random numbers, all that it needs to resume."""

    step: int = 0
    evaluated: int = 0  # the last step after which the validation rows were scored
    best: tuple[float, float] | None = None  # validation accuracy, -loss in nats
    best_step: int = 0
    without_better: int = 0  # evaluations since the best
    skipped: int = 0  # consecutive skipped steps, for a loss or gradient that is not finite
    micro_batch_tokens: int = 0
    peak_bytes: int = 0  # most memory used
    seconds: float = 0.0  # of the loop, validation included
    validation_seconds: float = 0.0  # of the evaluations in it
    test_seconds: float = 0.0  # after it: of scoring test and validation rows
    expected: dict[str, Any] = field(default_factory=dict)  # its time as told, in the plan's names
    speed: Speed = field(default_factory=Speed)
    speed_up: float | None = None  # of several processes over one, estimated

    @property
    def name(self) -> str:
        """The checkpoint's name: such names sort in the order of the run."""
        return f"step-{self.step:08d}" + ("-evaluated" if self.evaluated == self.step else "")

    @classmethod
    def restored(cls, values: Mapping[str, Any]) -> Progress:
        """Return what a checkpoint holds; the speed leaves out a warm-up again."""
        best = values["best"] and tuple(values["best"])
        speed = Speed(**{**values["speed"], "warm_up_steps": WARM_UP_STEPS})
        return cls(**{**values, "best": best, "speed": speed})

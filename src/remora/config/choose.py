"""The settings of `remora choose`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from cyclopts import Parameter

from remora.config.checks import (
    Accuracy,
    Duration,
    Names,
    check,
    is_read_once,
    to_seconds,
)
from remora.config.help_pages import grouped
from remora.config.train import TrainConfig


@grouped(models="Choice", json="Output")
@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ChooseConfig(TrainConfig):
    """Settings of `remora choose`: those of `remora train`, several models, and what suffices."""

    model: Annotated[str, Parameter(show=False)] = ""

    models: Names
    """Base models to choose from, separated by commas, in any order."""

    bar: Accuracy
    """Accuracy on the test rows that suffices, such as 0.93; micro-F1 where rows have several
    labels."""

    budget: Duration | None = None
    """Longest time to train and measure in all, such as 2h or 45m; a model that would take longer
    is left out."""

    json: bool = False
    """Write the choice as JSON to standard output."""

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            ConfigError: Naming everything that is wrong.
        """
        super().__post_init__()
        check(
            self,
            (bool(self.model), "choose takes several models; give --models A,B"),
            (not any(self.models), "models has no name; give one or more, separated by commas"),
            (len(set(self.models)) < len(self.models), "models has a name twice; leave one out"),
            (self.learning_curve is not None, "choose trains no learning curve; leave it out"),
            (self.start_from is not None, "choose trains every model anew; leave out --from"),
            (self.devices > 1, "choose trains on one device; leave out devices"),
            *(
                (
                    is_read_once(getattr(self, name) or ""),
                    f"{name} is standard input or a pipe, and choose reads it once for every "
                    "model; save it to a file",
                )
                for name in ("data", "validation", "test")
            ),
        )

    @property
    def budget_seconds(self) -> float | None:
        """`budget` in seconds; None without one."""
        return None if self.budget is None else to_seconds(self.budget)

    def of(self, model: str, **settings: object) -> TrainConfig:
        """Return the settings of a run with one of the models."""
        return TrainConfig.taken_from(self, model=model, **settings)

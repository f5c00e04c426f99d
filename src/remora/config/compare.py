"""The settings of `remora compare`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from cyclopts import Parameter

from remora.config.checks import is_from
from remora.errors import ConfigError


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Settings of `remora compare`."""

    runs: tuple[Path, ...] = field(kw_only=False)
    """Run directories that were measured on the same rows."""

    bar: float | None = None
    """Accuracy that suffices, such as 0.93: names the smallest run that clears it."""

    volume: int | None = None
    """Number of messages to say for what the difference comes to."""

    cost_per_error: float | None = None
    """What one wrong answer costs, in any currency; with `volume` it gives the difference a
    worth."""

    report: Path | None = None
    """Write the comparison to this HTML file too, which fetches nothing."""

    json: bool = False
    """Write the figures as JSON to standard output."""

    def __post_init__(self) -> None:
        """Check every value; raises ConfigError."""
        problems = [
            f"{name} is {getattr(self, name)}; give {wanted}"
            for name, wanted, good in (
                ("bar", "a share above 0, 1 at most", self.bar is None or 0 < self.bar <= 1),
                ("volume", "a whole number from 1", is_from(1, self.volume)),
                (
                    "cost_per_error",
                    "a number from 0",
                    self.cost_per_error is None or 0 <= self.cost_per_error < float("inf"),
                ),
            )
            if not good
        ]
        if not self.runs:
            problems.append("no run is given; give one or more run directories")
        if self.cost_per_error is not None and self.volume is None:
            problems.append("cost_per_error is given without volume; give both")
        if problems:
            raise ConfigError("; ".join(problems))

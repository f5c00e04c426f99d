"""The settings of `remora compare`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from cyclopts import Parameter

from remora.config.checks import Accuracy, Count, PositiveOrZero, check


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Settings of `remora compare`."""

    runs: tuple[Path, ...] = field(kw_only=False)
    """Run directories measured on the same rows."""

    bar: Accuracy | None = None
    """Accuracy that suffices, such as 0.93: names the smallest run that reaches it; micro-F1 where
    rows have several labels."""

    volume: Count | None = None
    """Number of messages: says how many more of them the best run classifies correctly."""

    cost_per_error: PositiveOrZero | None = None
    """Cost of one wrong answer, in any currency; with `volume`, gives the value of the
    difference."""

    report: Path | None = None
    """Also write the comparison to this HTML file, which loads nothing from elsewhere."""

    json: bool = False
    """Write the figures as JSON to standard output."""

    def __post_init__(self) -> None:
        """Check every value; raises ConfigError."""
        check(
            self,
            (not self.runs, "no run is given; give one or more run directories"),
            (
                self.cost_per_error is not None and self.volume is None,
                "cost_per_error is given without volume; give both",
            ),
        )

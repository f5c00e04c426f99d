"""The settings of `remora retrain`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from cyclopts import Parameter

from remora.config.checks import PlainName, check


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class RetrainConfig:
    """Settings of `remora retrain`."""

    run: Path = field(kw_only=False)
    """Directory of a finished run whose labels were reviewed."""

    corrections: Path | None = None
    """A relabel.csv with decisions; by default the one in the run directory."""

    name: PlainName | None = None
    """Name of the new run, beside the old one; by default the old name with -cleaned."""

    model: str | None = None
    """Base model, if it has moved since training."""

    json: bool = False
    """Write the figures as JSON to standard output."""

    def __post_init__(self) -> None:
        """Check every value; raises ConfigError."""
        check(self)

"""The settings of `remora report`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from cyclopts import Parameter

from remora.config.checks import check


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Settings of `remora report`."""

    run: Path = field(kw_only=False)
    """Directory of a finished run."""

    output: Path | None = None
    """File to write; by default report.html in the run directory."""

    json: bool = False
    """Write the file's path as JSON to standard output."""

    def __post_init__(self) -> None:
        """Check every value; raises ConfigError."""
        check(self)

"""The settings of `remora review`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from cyclopts import Parameter

from remora.config.checks import Port, check


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ReviewConfig:
    """Settings of `remora review`."""

    run: Path = field(kw_only=False)
    """Directory of a run that `remora diagnose` has diagnosed."""

    port: Port = 0
    """Port of the page, on this machine only; 0 takes a free one."""

    browser: bool = True
    """Open the page in a browser; its address is printed in any case."""

    json: bool = False
    """Write what is decided as JSON to standard output."""

    def __post_init__(self) -> None:
        """Check every value; raises ConfigError."""
        check(self)

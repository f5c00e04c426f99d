"""The settings of `remora push`."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from cyclopts import Parameter

from remora.errors import ConfigError


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class PushConfig:
    """Settings of `remora push`."""

    run: Path = field(kw_only=False)
    """Directory of a finished run."""

    repo_id: str = field(kw_only=False)
    """Repository on the Hugging Face hub, as owner/name; it is made if there is none."""

    public: bool = False
    """Let everybody read it; by default it is private."""

    json: bool = False
    """Write what was published as JSON to standard output."""

    def __post_init__(self) -> None:
        """Check every value; raises ConfigError."""
        if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", self.repo_id):
            raise ConfigError(f"repo_id is {self.repo_id!r}; give it as owner/name")

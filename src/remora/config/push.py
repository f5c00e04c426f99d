"""The settings of `remora push`."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from remora.config.checks import Constraint, check

RepositoryId = Annotated[
    str, Constraint("it as owner/name", lambda x: bool(re.fullmatch(r"\w[\w.-]*/[\w.-]+", x)))
]


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class PushConfig:
    """Settings of `remora push`."""

    run: Path = field(kw_only=False)
    """Directory of a finished run."""

    repo_id: RepositoryId = field(kw_only=False)
    """Repository on the Hugging Face Hub, as owner/name; created if it does not exist."""

    public: bool = False
    """Make it public; by default it is private."""

    json: bool = False
    """Write what was published as JSON to standard output."""

    def __post_init__(self) -> None:
        """Check every value; raises ConfigError."""
        check(self)

"""The settings of `remora diagnose`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from cyclopts import Parameter

from remora.errors import ConfigError


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class DiagnoseConfig:
    """Settings of `remora diagnose`."""

    run: Path = field(kw_only=False)
    """Directory of a finished run."""

    method: Literal["fast", "frozen", "tfidf", "adapters"] = "fast"
    """Who judges rows that it was not trained on: regressions on frozen features of the base
    model and on TF-IDF (fast), on either of them, or new adapters, which takes as long as training
    once for each fold; stopped, the same command goes on."""

    folds: int | None = None
    """In how many parts the rows are cut; each is judged by what was trained on the others. By
    default 10 for regressions on up to 5,000 rows, else 5."""

    apply: Path | None = None
    """A relabel.csv with decisions: write the training table with them, and diagnose nothing."""

    output: Path | None = None
    """Where to write the table that `apply` makes; by default cleaned.csv in the run directory."""

    model: str | None = None
    """Base model, where it no longer is where the run found it."""

    json: bool = False
    """Write the figures as JSON to standard output."""

    def __post_init__(self) -> None:
        """Check every value; raises ConfigError."""
        if self.folds is not None and self.folds < 2:
            raise ConfigError(f"folds is {self.folds}; give a whole number from 2")
        if self.output is not None and self.apply is None:
            raise ConfigError("output is given without apply; give both")

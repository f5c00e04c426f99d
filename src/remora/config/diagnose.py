"""The settings of `remora diagnose`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from remora.config.checks import Constraint, check

Folds = Annotated[int, Constraint("a whole number from 2", lambda n: n >= 2)]


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class DiagnoseConfig:
    """Settings of `remora diagnose`."""

    run: Path = field(kw_only=False)
    """Directory of a finished run."""

    method: Literal["fast", "frozen", "tfidf", "adapters"] = "fast"
    """Classifiers that judge each row without having trained on it: logistic regressions on frozen
    features of the base model and on TF-IDF (fast), on one of the two (frozen, tfidf), or new
    adapters (adapters), which take as long as one training run per fold; if stopped, the same
    command resumes."""

    folds: Folds | None = None
    """Number of cross-validation folds; by default 10 for regressions on up to 5,000 rows, else
    5."""

    apply: Path | None = None
    """A relabel.csv with decisions: write the training table with them applied, and diagnose
    nothing."""

    output: Path | None = None
    """File that `apply` writes; by default cleaned.csv in the run directory."""

    model: str | None = None
    """Base model, if it has moved since training."""

    json: bool = False
    """Write the figures as JSON to standard output."""

    def __post_init__(self) -> None:
        """Check every value; raises ConfigError."""
        check(
            self,
            (
                self.output is not None and self.apply is None,
                "output is given without apply; give both",
            ),
        )

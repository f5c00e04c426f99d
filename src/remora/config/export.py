"""The settings of `remora export`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from cyclopts import Parameter

from remora.config.checks import DeviceName, parse_bytes
from remora.errors import ConfigError


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Settings of `remora export`."""

    run: Path = field(kw_only=False)
    """Directory of a finished run."""

    merge: bool = False
    """Write base model and adapter as one model folder."""

    compress: bool = False
    """Write a smaller adapter: each layer's update cut to the rank that it deserves."""

    output: Path | None = None
    """Folder to write; by default merged or compressed in the run directory."""

    dtype: Literal["float32", "bfloat16", "float16", "float8"] | None = None
    """What weights are stored in; by default what the base model is stored in when merging, float8
    when compressing."""

    budget: str | None = None
    """Most bytes that the compressed adapter's files may take together, such as 3MB."""

    ratio: float | None = None
    """Make the compressed adapter at least so many times smaller than the base model's weights."""

    distill: bool = False
    """Let an adapter that was cut learn again from the whole one and the training rows. That takes
    up to 2,000 steps for each size that cutting alone costs too much."""

    tolerance: float = 0.5
    """Where neither budget nor ratio is given: how many points of accuracy on the validation rows
    the compressed adapter may lose, up to the next whole row."""

    model: str | None = None
    """Base model, where it no longer is where the adapter was trained."""

    micro_batch_tokens: int = 2048
    """Most tokens computed at once; limits memory, changes no result."""

    device: DeviceName = "auto"
    """Where to compute."""

    json: bool = False
    """Write the figures as JSON to standard output."""

    def __post_init__(self) -> None:
        """Check every value; raises ConfigError."""
        problems = []
        if self.merge == self.compress:
            given = "both are" if self.merge else "neither is"
            problems.append(f"of merge and compress {given} given; give one of them")
        if self.merge and (self.budget is not None or self.ratio is not None):
            problems.append("budget and ratio are for compressing; give them with compress only")
        if self.merge and self.distill:
            problems.append("distill is for compressing; give it with compress only")
        if self.merge and self.dtype == "float8":
            problems.append("dtype float8 is for compressing; merge in 16 or 32 bits")
        if self.budget is not None and self.ratio is not None:
            problems.append("budget and ratio are both given; give one of them")
        problems += [
            f"{name} is {getattr(self, name)}; give {wanted}"
            for name, wanted, good in (
                ("ratio", "a number above 0", self.ratio is None or 0 < self.ratio < float("inf")),
                ("tolerance", "a number of points from 0 to 100", 0 <= self.tolerance <= 100),
                ("micro_batch_tokens", "a whole number from 1", self.micro_batch_tokens >= 1),
            )
            if not good
        ]
        if problems:
            raise ConfigError("; ".join(problems))
        self.budget_bytes()

    def budget_bytes(self) -> int | None:
        """Return the budget in bytes, None where it was not given; raises ConfigError."""
        return parse_bytes("budget", self.budget, "3MB or 500kB")

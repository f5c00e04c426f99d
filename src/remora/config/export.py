"""The settings of `remora export`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from remora.config.checks import (
    DEFAULT_MICRO_BATCH_TOKENS,
    Constraint,
    Count,
    DeviceName,
    FileSize,
    Positive,
    check,
    to_bytes,
)

Points = Annotated[float, Constraint("a number of points from 0 to 100", lambda x: 0 <= x <= 100)]


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Settings of `remora export`."""

    run: Path = field(kw_only=False)
    """Directory of a finished run."""

    merge: bool = False
    """Write base model and adapter as one model folder."""

    compress: bool = False
    """Write a smaller adapter: each layer's update truncated to the rank it needs."""

    output: Path | None = None
    """Folder to write; by default merged or compressed in the run directory."""

    dtype: Literal["float32", "bfloat16", "float16", "float8"] | None = None
    """Data type to store weights in; by default that of the base model with `merge`, float8 with
    `compress`."""

    budget: FileSize | None = None
    """Most bytes that the compressed adapter's files may take together, such as 3MB."""

    ratio: Positive | None = None
    """Make the compressed adapter at least this many times smaller than the base model's
    weights."""

    distill: bool = False
    """Where truncation costs too much accuracy, fine-tune the truncated adapter to match the full
    one on the training rows, for up to 2,000 steps per size."""

    tolerance: Points = 0.5
    """Without budget and ratio: percentage points of validation accuracy that the compressed
    adapter may lose, rounded up to a whole row."""

    model: str | None = None
    """Base model, if it has moved since training."""

    micro_batch_tokens: Count = DEFAULT_MICRO_BATCH_TOKENS
    """Most tokens computed at once; limits memory, changes no result."""

    device: DeviceName = "auto"
    """Device to compute on."""

    json: bool = False
    """Write the figures as JSON to standard output."""

    def __post_init__(self) -> None:
        """Check every value; raises ConfigError."""
        is_sized = self.budget is not None or self.ratio is not None
        check(
            self,
            (
                self.merge and self.compress,
                "merge and compress are both given; give --merge or --compress",
            ),
            (
                not self.merge and not self.compress,
                "neither merge nor compress is given; give --merge or --compress",
            ),
            (
                self.merge and is_sized,
                "budget and ratio need compress; leave them out to merge",
            ),
            (self.merge and self.distill, "distill needs compress; leave it out to merge"),
            (
                self.merge and self.dtype == "float8",
                "dtype float8 needs compress; merge in 16 or 32 bits",
            ),
            (
                self.budget is not None and self.ratio is not None,
                "budget and ratio are both given; give one of them",
            ),
        )

    def budget_bytes(self) -> int | None:
        """Return the budget in bytes, None if it was not given."""
        return None if self.budget is None else to_bytes(self.budget)

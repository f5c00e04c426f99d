"""The settings of `remora predict`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from cyclopts import Parameter

from remora.config.checks import (
    DEFAULT_MICRO_BATCH_TOKENS,
    Count,
    DeviceName,
    PrecisionName,
    Share,
    check,
)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """Settings of `remora predict`."""

    adapter: Path = field(kw_only=False)
    """A run directory, the folder of an adapter or of a fully fine-tuned model, or an adapter's id
    on the Hugging Face Hub."""

    source: str = field(kw_only=False, default="-")
    """Messages: a CSV, TSV, JSONL, Parquet or text file, or - for lines on standard input."""

    text_column: str | None = None
    """Column of the messages; by default found by its name."""

    input_format: Literal["text", "csv", "tsv", "jsonl"] | None = None
    """Format of standard input; by default one message a line."""

    top_k: Count = 1
    """Labels to return per message, most probable first."""

    model: str | None = None
    """Base model, if it has moved since training."""

    tolerance: Share = 0.01
    """Maximum total probability left on unexplored labels. With 1, only the most probable label is
    certain: faster, but probabilities are rough."""

    micro_batch_tokens: Count = DEFAULT_MICRO_BATCH_TOKENS
    """Most tokens computed at once; limits memory, changes no result."""

    precision: PrecisionName = "auto"
    """Arithmetic of the forward pass."""

    device: DeviceName = "auto"
    """Device to compute on."""

    json: bool = False
    """Write JSON lines instead of CSV."""

    def __post_init__(self) -> None:
        """Check every value; raises ConfigError."""
        check(self)

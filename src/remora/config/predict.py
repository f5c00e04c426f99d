"""The settings of `remora predict`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from cyclopts import Parameter

from remora.config.checks import DeviceName, PrecisionName
from remora.errors import ConfigError


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """Settings of `remora predict`."""

    adapter: Path = field(kw_only=False)
    """A run directory, the folder of an adapter or of a whole model, or an adapter's id on the
    Hugging Face hub."""

    source: str = field(kw_only=False, default="-")
    """Messages: a CSV, TSV, JSONL, Parquet or text file, or - for lines on standard input."""

    text_column: str | None = None
    """Column with the messages; by default found by its name."""

    input_format: Literal["text", "csv", "tsv", "jsonl"] | None = None
    """Format of standard input; by default one message a line."""

    top_k: int = 1
    """How many labels to give for each message, the likeliest first."""

    model: str | None = None
    """Base model, where it no longer is where the adapter was trained."""

    tolerance: float = 0.01
    """Most probability that the labels not looked at may hold together. 1 only makes sure of the
    likeliest label: that is faster, and the probabilities are rough."""

    micro_batch_tokens: int = 2048
    """Most tokens computed at once; limits memory, changes no result."""

    precision: PrecisionName = "auto"
    """Arithmetic of the forward pass."""

    device: DeviceName = "auto"
    """Where to compute."""

    json: bool = False
    """Write JSON lines instead of CSV."""

    def __post_init__(self) -> None:
        """Check every value; raises ConfigError."""
        if self.top_k < 1:
            raise ConfigError(f"top_k is {self.top_k}; give a whole number from 1")
        if not 0 <= self.tolerance <= 1:
            raise ConfigError(f"tolerance is {self.tolerance}; give a number from 0 to 1")
        if self.micro_batch_tokens < 1:
            raise ConfigError(
                f"micro_batch_tokens is {self.micro_batch_tokens}; give a whole number from 1"
            )

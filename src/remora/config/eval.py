"""The settings of `remora eval`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from cyclopts import Parameter

from remora.config.checks import DeviceName, PrecisionName
from remora.errors import ConfigError


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Settings of `remora eval`."""

    adapter: Path = field(kw_only=False)
    """A run directory, the folder of an adapter or of a whole model, or an adapter's id on the
    Hugging Face hub."""

    data: str = field(kw_only=False)
    """Table of texts and labels to measure on."""

    text_column: str | None = None
    """Column with the messages; by default found by its name."""

    label_column: str | None = None
    """Column with the labels; by default found by its name."""

    model: str | None = None
    """Base model, where it no longer is where the adapter was trained."""

    predictions: Path | None = None
    """Write each row's label, prediction and probability to this CSV file."""

    abstain_at_accuracy: float | None = None
    """Find the confidence from which on the answers are right this often, such as 0.98; messages
    below it are for a person. It is chosen on the run's validation rows."""

    out_of_scope: str | None = None
    """Table of messages that no label fits, to measure how well the confidence tells them."""

    micro_batch_tokens: int = 2048
    """Most tokens computed at once; limits memory, changes no result."""

    precision: PrecisionName = "auto"
    """Arithmetic of the forward pass."""

    device: DeviceName = "auto"
    """Where to compute."""

    json: bool = False
    """Write the figures as JSON to standard output."""

    def __post_init__(self) -> None:
        """Check every value; raises ConfigError."""
        wanted, problems = self.abstain_at_accuracy, []
        if wanted is not None and not 0 < wanted <= 1:
            problems.append(
                f"abstain_at_accuracy is {wanted}; give a share above 0, 1 at most, such as 0.98"
            )
        if self.micro_batch_tokens < 1:
            problems.append(
                f"micro_batch_tokens is {self.micro_batch_tokens}; give a whole number from 1"
            )
        if problems:
            raise ConfigError("; ".join(problems))

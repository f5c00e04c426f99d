"""The settings of `remora eval`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from cyclopts import Parameter

from remora.config.checks import (
    DEFAULT_MICRO_BATCH_TOKENS,
    Accuracy,
    Count,
    DeviceName,
    Names,
    OneOrMore,
    PrecisionName,
    TableFormat,
    check,
)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Settings of `remora eval`."""

    adapter: Path = field(kw_only=False)
    """A run directory, the folder of an adapter or of a fully fine-tuned model, or an adapter's id
    on the Hugging Face Hub."""

    data: str = field(kw_only=False)
    """Table of texts and labels to measure on."""

    text_column: OneOrMore | None = None
    """Column of the messages, or several; by default those of the training table, or found by its
    name."""

    label_column: str | None = None
    """Column of the labels; by default that of the training table, or found by its name."""

    input_format: TableFormat | None = None
    """Format of the table, if its name does not tell."""

    columns: Names = ()
    """Names for the columns of a table without a header, separated by commas."""

    strict: bool = False
    """Refuse rows with a blank text or label, instead of skipping them."""

    merge_labels: bool = False
    """Take labels that differ from the model's only in case, spaces or Unicode form for them."""

    model: str | None = None
    """Base model, if it has moved since training."""

    predictions: Path | None = None
    """Write each row's label, prediction and probability to this CSV file."""

    abstain_at_accuracy: Accuracy | None = None
    """Find the confidence threshold above which answers are this accurate, such as 0.98; send the
    messages below it to a person. Chosen on the run's validation rows."""

    out_of_scope: str | None = None
    """Table of messages that no label fits, to measure how well the confidence detects them."""

    micro_batch_tokens: Count = DEFAULT_MICRO_BATCH_TOKENS
    """Most tokens computed at once; limits memory, changes no result."""

    precision: PrecisionName = "auto"
    """Arithmetic of the forward pass."""

    device: DeviceName = "auto"
    """Device to compute on."""

    json: bool = False
    """Write the figures as JSON to standard output."""

    def __post_init__(self) -> None:
        """Check every value; raises ConfigError."""
        check(self)

"""The settings of `remora predict`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from cyclopts import Parameter

from remora.config.checks import (
    DEFAULT_MICRO_BATCH_TOKENS,
    Accuracy,
    Count,
    DeviceName,
    MessageFormat,
    Names,
    OneOrMore,
    PrecisionName,
    Share,
    check,
    convert,
)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """Settings of `remora predict`."""

    adapter: Path = field(kw_only=False)
    """A run directory, the folder of an adapter or of a fully fine-tuned model, or an adapter's id
    on the Hugging Face Hub."""

    source: str = field(kw_only=False, default="-")
    """Messages: a table as `train` reads it, a text file with one message a line, or - for lines on
    standard input. With engine ray: a path, a folder, a glob or a URL that fsspec knows, such as
    s3://bucket/in/*.parquet."""

    output: str | None = None
    """File to write instead of standard output: .csv, .jsonl or .parquet. With engine ray: a folder
    of such a name, or a URL, for the parts."""

    text_column: OneOrMore | None = None
    """Column of the messages, or several; by default those of the training table, or found by its
    name."""

    id_column: OneOrMore | None = None
    """Column to keep in the output, or several; by default all."""

    input_format: MessageFormat | None = None
    """Format of the messages, if their name does not tell; standard input has one message a line by
    default."""

    columns: Names = ()
    """Names for the columns of a table without a header, separated by commas."""

    top_k: Count = 1
    """Labels to return per message, most probable first."""

    threshold: Share | None = None
    """Give no label to messages whose most probable label is less probable than this."""

    abstain_at_accuracy: Accuracy | None = None
    """Choose that threshold so that the run's validation rows are answered this accurately, such as
    0.98."""

    spreadsheet_safe: bool = False
    """In CSV, put an apostrophe before cells that a spreadsheet would run as formulas."""

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

    engine: Literal["local", "ray"] = "local"
    """Where to compute: in this process, or by workers of Ray, which resume an interrupted run."""

    address: str | None = None
    """Ray cluster to join, such as 10.0.0.5:6379, or auto; by default Ray starts on this machine
    and ends with the command."""

    workers: Count | None = None
    """Workers of Ray, each with the model; by default as many as the GPUs, or the cores and the
    memory, allow."""

    worker_cores: Count = 4
    """Cores of each worker without a GPU, if a machine has as many."""

    part_rows: Count = 100_000
    """Most rows in each part of the output. A part is also ended after ten minutes."""

    def __post_init__(self) -> None:
        """Check every value; raises ConfigError."""
        convert(self)
        check(
            self,
            (
                self.threshold is not None and self.abstain_at_accuracy is not None,
                "threshold and abstain_at_accuracy are both given; give one of them",
            ),
            (
                self.json and self.output is not None,
                "json and output are both given; end the output's name with .jsonl",
            ),
            (
                self.engine == "ray" and self.output is None,
                "engine ray is given without output; name a folder for its parts with --output,"
                " such as predictions.parquet",
            ),
            (
                self.engine == "ray" and self.source == "-",
                "engine ray does not read standard input; name files",
            ),
            (
                self.engine == "local" and (self.address or self.workers) is not None,
                "address and workers are of engine ray; add --engine ray, or leave them out",
            ),
        )

"""Compressed adapters measured, and fine-tuned again, beside the full one on one base model."""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from remora.config import ExportConfig
from remora.config.schedule import default_learning_rate
from remora.data.table import Table
from remora.export import distill, truncate
from remora.export.truncate import Artifact
from remora.formatting import spoken_bytes
from remora.models.saved import open_trained
from remora.runtime import files, run_directory
from remora.runtime.reporter import Reporter
from remora.tree import scoring
from remora.tree.forward import text_config

MAX_STEPS = 2_000
MAX_PASSES = 6
"""Fine-tuning again takes the smaller of these: optimizer steps, passes over the training rows."""

LEARNING_RATE_FACTOR = 2
"""Its learning rate is that of the run times this."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """The size of a compressed adapter, and its accuracy."""

    num_bytes: int
    ratio: float  # the base model's weights are so many times larger
    mean_rank: float
    accuracy: float
    num_flips: int  # rows that get another label than from the full adapter
    cut_accuracy: float | None = None  # before it was fine-tuned again; None if it was not


class Trials:
    """Loads compressed adapters beside the full one, and compares their labels."""

    def __init__(
        self,
        config: ExportConfig,
        adapter: truncate.Adapter,
        base_bytes: int,
        reporter: Reporter,
    ) -> None:
        self._config, self._adapter = config, adapter
        self._trained = open_trained(config.run, base=config.model, device=config.device)
        self._base_bytes, self._reporter = base_bytes, reporter

    def full_labels(self, table: Table) -> list[str]:
        """Return the labels that the full adapter gives."""
        return self._labels(table, "adapter")

    def measure(self, artifact: Artifact, table: Table, full: Sequence[str]) -> Point:
        """Measure an adapter, and keep no file of it."""
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            return self.write(artifact, Path(folder), table, full)

    def write(self, artifact: Artifact, folder: Path, table: Table, full: Sequence[str]) -> Point:
        """Write an adapter into a folder, and measure it as PEFT loads it from there.

        Args:
            artifact: The compressed adapter.
            folder: An empty folder.
            table: The rows to measure on.
            full: The full adapter's labels of these rows.
        """
        with self._loaded(artifact, folder):
            labels = self._labels(table, spoken_bytes(artifact.num_bytes))
        return Point(
            num_bytes=artifact.num_bytes,
            ratio=self._base_bytes / artifact.num_bytes,
            mean_rank=artifact.mean_rank,
            accuracy=accuracy(labels, table),
            num_flips=sum(a != b for a, b in zip(labels, full, strict=True)),
        )

    def distilled(self, artifact: Artifact, table: Table) -> Artifact:
        """Return an adapter of the same ranks and bytes, fine-tuned again on a table."""
        adapted = self._trained.model
        width = text_config(adapted).hidden_size
        rate = run_directory.read_settings(self._config.run).learning_rate
        rate = LEARNING_RATE_FACTOR * (rate or default_learning_rate(width, "lora"))
        passes = MAX_PASSES * math.ceil(len(table) / distill.BATCH_ROWS)
        # From float32: float8 needs such large numbers that no learning rate would move them.
        start = truncate.pack(self._adapter, artifact.ranks, torch.float32, {})
        temporary = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        with temporary as folder, self._loaded(start, Path(folder)):
            distill.distill(
                adapted,
                self._trained.prompt,
                table,
                teacher="default",
                student="compressed",
                num_steps=min(MAX_STEPS, passes),
                learning_rate=rate,
                max_tokens=self._config.micro_batch_tokens,
                precision=self._trained.precision,
                reporter=self._reporter,
            )
            updates = {
                name.removeprefix(truncate.PREFIX): truncate.decompose(
                    layer.lora_A["compressed"].weight.detach().cpu(),
                    layer.lora_B["compressed"].weight.detach().cpu(),
                    layer.scaling["compressed"],
                )
                for name, layer in adapted.named_modules()
                if "compressed" in getattr(layer, "lora_A", ())
            }
        return truncate.repack(artifact, self._adapter, updates)

    @contextlib.contextmanager
    def _loaded(self, artifact: Artifact, folder: Path) -> Iterator[None]:
        """Write an adapter into a folder, and have it active beside the full one."""
        adapted = self._trained.model
        with files.disk_errors(folder):
            for name, content in artifact.files.items():
                (folder / name).write_bytes(content)
        keys = adapted.load_adapter(str(folder), adapter_name="compressed", local_files_only=True)
        assert not keys.missing_keys, keys
        assert not keys.unexpected_keys, keys
        adapted.eval().set_adapter("compressed")
        yield
        adapted.set_adapter("default")
        adapted.delete_adapter("compressed")

    def _labels(self, table: Table, what: str) -> list[str]:
        # A tolerance of 1 ends the search once the likeliest label is certain: no other is needed.
        scorer = self._trained.scorer(max_tokens=self._config.micro_batch_tokens, tolerance=1)
        probabilities = scoring.score_table(scorer, table.texts, what, self._reporter)
        return [scorer.prompt.labels[i] for i in probabilities.argmax(1)]


def accuracy(labels: Sequence[str], table: Table) -> float:
    """Return the share of a table's rows that get their own label."""
    return sum(a == b for a, b in zip(labels, table.labels, strict=True)) / len(table)

"""A smaller adapter: several sizes are measured, and the smallest that is as good is kept.

Each is the full adapter truncated; if truncation costs too much, it is fine-tuned again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from remora.config import ExportConfig
from remora.data.dataset import Dataset, load_again
from remora.data.table import Table
from remora.errors import ConfigError, DataError, ModelError
from remora.evaluation.results import Results
from remora.export import truncate
from remora.export.sizes import Point, Trials, accuracy
from remora.export.truncate import Artifact
from remora.models import metadata
from remora.runtime import files, run_directory
from remora.runtime.reporter import Reporter

SHARES = (1, 2, 4, 8, 10, 16, 32, 64)
"""Fractions of the full adapter's bytes that are tried, as their denominators."""

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float8": torch.float8_e4m3fn,
}
"""Storage types of an adapter; PEFT converts each to float32 when it loads."""


@dataclass(frozen=True, kw_only=True)
class Compressed:
    """The compressed adapter that was written, and the sizes it was chosen from."""

    dtype: str
    adapter_bytes: int  # of the full one
    frontier: tuple[Point, ...]  # on validation rows, the full adapter first; empty if the size
    # was given
    least_accuracy: float | None  # on these rows, that a smaller adapter had to reach
    chosen: Point  # on the rows that the run was measured on
    num_rows: int
    full_accuracy: float


@dataclass(frozen=True, kw_only=True)
class _Source:
    """The full adapter, and how smaller ones are stored."""

    adapter: truncate.Adapter
    adapter_bytes: int
    base_bytes: int
    others: Mapping[str, bytes]  # files that go with it
    dtype: torch.dtype
    power: int

    def fit(self, budget_bytes: int) -> Artifact:
        return truncate.fit(self.adapter, budget_bytes, self.dtype, self.others, power=self.power)


def compress(
    config: ExportConfig, folder: Path, results: Results, reporter: Reporter
) -> Compressed:
    """Write a smaller adapter into an empty folder, and measure it from there.

    Args:
        config: The settings.
        folder: Where to write.
        results: The run's rows.
        reporter: Shows the progress.

    Raises:
        ConfigError: If nothing fits into the budget.
        DataError: If validation or training rows are needed and missing.
        ModelError: If the adapter or base model cannot be used, or every size loses too much
            accuracy.
        ResourceError: If the disk fails.
    """
    # The full adapter, and how large a smaller one may be
    full_folder = metadata.adapter_folder(config.run)
    card = metadata.read_card(full_folder)
    base = metadata.find_base(card, config.model, config.run)
    base_bytes = files.folder_bytes(base, "*.safetensors")
    stored = config.dtype or "float8"
    source = _Source(
        adapter_bytes=files.folder_bytes(full_folder),
        adapter=truncate.read(full_folder),
        base_bytes=base_bytes,
        others={"remora.json": (full_folder / "remora.json").read_bytes()},
        dtype=DTYPES[stored],
        # Fine-tuning again does better with the ranks spread; docs/log.md has the figures.
        power=1 if config.distill else 2,
    )
    budget = config.budget_bytes()
    if config.ratio is not None:
        budget = int(base_bytes / config.ratio)

    # The size that was given, or the smallest that is good enough
    frontier: tuple[Point, ...] = ()
    least_accuracy = None
    if budget is not None:
        trials, artifact = _at_budget(config, source, budget, reporter)
    else:
        trials, artifact, frontier, least_accuracy = _chosen(config, source, results, reporter)

    # Write it, and measure it on the rows that the run was measured on
    measured = Table(results.texts, results.true)
    full = trials.full_labels(measured)
    return Compressed(
        dtype=stored,
        adapter_bytes=source.adapter_bytes,
        frontier=frontier,
        least_accuracy=least_accuracy,
        chosen=trials.write(artifact, folder, measured, full),
        num_rows=len(measured),
        full_accuracy=accuracy(full, measured),
    )


def _at_budget(
    config: ExportConfig, source: _Source, budget_bytes: int, reporter: Reporter
) -> tuple[Trials, Artifact]:
    """Return the best adapter of a given size, fine-tuned again if that is wanted and needed."""
    artifact = source.fit(budget_bytes)
    train_rows = _train_rows(config)
    trials = Trials(config, source.adapter, source.base_bytes, reporter)
    everything = truncate.allocate(source.adapter.updates, 1 << 62, source.dtype)
    if train_rows and artifact.ranks != everything:
        artifact = trials.distilled(artifact, train_rows)
    return trials, artifact


def _chosen(
    config: ExportConfig, source: _Source, results: Results, reporter: Reporter
) -> tuple[Trials, Artifact, tuple[Point, ...], float]:
    """Return the smallest adapter that is good enough on validation rows.

    Returns:
        The trials, the adapter, all points measured with the full adapter first, and the accuracy
        that was good enough.
    """
    validation = _validation(config.run, results)
    train_rows = _train_rows(config)
    trials = Trials(config, source.adapter, source.base_bytes, reporter)
    full = trials.full_labels(validation)
    full_accuracy = accuracy(full, validation)
    artifacts = _candidates(source)
    spare_rows = math.ceil(config.tolerance * len(validation) / 100 - 1e-9)  # up to a whole row
    least_right = round(full_accuracy * len(validation)) - spare_rows

    # Measure each size; fine-tune again those that lose too much
    points: list[Point] = []
    for place, candidate in enumerate(artifacts):
        point = trials.measure(candidate, validation, full)
        if train_rows and not _is_good(point, validation, least_right):
            tuned = trials.distilled(candidate, train_rows)
            again = trials.measure(tuned, validation, full)
            if not _is_good(again, validation, least_right):
                train_rows = None  # smaller ones would not recover either
            if again.accuracy >= point.accuracy:
                artifacts[place], point = tuned, replace(again, cut_accuracy=point.accuracy)
        points.append(point)

    # Keep the smallest that is good enough
    good = [
        artifact
        for artifact, point in zip(artifacts, points, strict=True)
        if _is_good(point, validation, least_right)
    ]
    if not good:
        best = max((point.accuracy for point in points), default=0.0)
        raise ModelError(
            f"every compressed adapter loses more than {config.tolerance:g} points of accuracy "
            f"(best {best:.2%}, full adapter {full_accuracy:.2%} on {len(validation):,} validation "
            "rows); give a larger --tolerance or another --dtype"
        )
    updates = source.adapter.updates
    whole = Point(
        num_bytes=source.adapter_bytes,
        ratio=source.base_bytes / source.adapter_bytes,
        mean_rank=sum(len(u.values) for u in updates.values()) / len(updates),
        accuracy=full_accuracy,
        num_flips=0,
    )
    smallest = min(good, key=lambda artifact: artifact.num_bytes)
    return trials, smallest, (whole, *points), least_right / len(validation)


def _candidates(source: _Source) -> list[Artifact]:
    """Return the adapter at fractions of its bytes, the largest first and equal ones only once."""
    artifacts: list[Artifact] = []
    for share in SHARES:
        try:
            artifact = source.fit(source.adapter_bytes // share)
        except ConfigError:  # too small for any part of it
            break
        if not artifacts or artifact.ranks != artifacts[-1].ranks:
            artifacts.append(artifact)
    return artifacts


def _is_good(point: Point, table: Table, least_right: int) -> bool:
    return round(point.accuracy * len(table)) >= least_right


def _validation(directory: Path, results: Results) -> Table:
    """Return the validation rows, which the size is chosen on.

    Raises:
        DataError: If the run has none, or its table is missing or has changed.
    """
    if results.figures["measured_on"] == "validation":
        return Table(results.texts, results.true)
    advice = "give --budget or --ratio, which need no rows"
    dataset = _dataset(directory, advice)
    if not len(dataset.validation):
        raise DataError(f"{directory} has no validation rows; {advice}")
    return dataset.validation


def _train_rows(config: ExportConfig) -> Table | None:
    """Return the rows to fine-tune on, None if that is not wanted; raises DataError."""
    if not config.distill:
        return None
    return _dataset(config.run, "restore the table, or leave out --distill").train


def _dataset(directory: Path, advice: str) -> Dataset:
    """Return the rows that a run was trained on.

    Raises:
        DataError: If its table is missing or has changed.
    """
    try:
        dataset = load_again(run_directory.read_settings(directory))
        known = json.loads((directory / "data.json").read_text(encoding="utf-8"))["sha256"]
    except (DataError, OSError, ValueError, KeyError) as error:
        raise DataError(
            f"the rows that {directory} was trained on cannot be read "
            f"({str(error).split(';')[0]}); {advice}"
        ) from error
    if known != dataset.summary.sha256:
        raise DataError(f"the rows are not those that {directory} was trained on; {advice}")
    return dataset

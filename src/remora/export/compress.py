"""A smaller adapter: measured at several sizes, the smallest that is as good is kept.

Each is cut from the full one, and where that costs too much it learns again.
"""

from __future__ import annotations

import contextlib
import json
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from remora.config import ExportConfig
from remora.data.dataset import Dataset, load_data
from remora.data.table import Table
from remora.errors import ConfigError, DataError, ModelError
from remora.evaluation.results import Results
from remora.export import distill, truncate
from remora.export.truncate import Artifact
from remora.formatting import spoken_bytes
from remora.models import adapter_card, hub, saved
from remora.runtime import files, run_directory
from remora.runtime.device import choose_device, choose_precision
from remora.runtime.reporter import Reporter
from remora.training.optimizer import default_learning_rate
from remora.tree import scoring
from remora.tree.forward import text_config
from remora.tree.scoring import Scorer

SHARES = (1, 2, 4, 8, 10, 16, 32, 64)
"""Fractions of the full adapter's bytes that are tried, as their denominators."""

MAX_STEPS = 2_000
MAX_PASSES = 6
"""An adapter that was cut learns for so many steps, or passes over the training rows if fewer."""

LEARNING_RATE_FACTOR = 2
"""Of the learning rate that the whole one was trained at."""

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float8": torch.float8_e4m3fn,
}
"""What an adapter may be stored in; PEFT makes float32 of each when it loads."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """A compressed adapter, and what it does."""

    num_bytes: int
    ratio: float  # the base model's weights are so many times larger
    mean_rank: float
    accuracy: float
    num_flips: int  # rows that get another label than from the full adapter
    cut_accuracy: float | None = None  # before it learned again; None where it did not


@dataclass(frozen=True, kw_only=True)
class Compressed:
    """A compressed adapter that was chosen and written."""

    dtype: str
    adapter_bytes: int  # of the full one
    frontier: tuple[Point, ...]  # on validation rows, the whole adapter first; empty where the
    # size was given
    least_accuracy: float | None  # that was good enough on them
    chosen: Point  # on the rows that the run was measured on
    num_rows: int
    full_accuracy: float


def compress(config: ExportConfig, folder: Path, found: Results, reporter: Reporter) -> Compressed:
    """Write a smaller adapter into an empty folder, and measure it from there.

    Raises:
        ConfigError: If nothing fits into the budget.
        DataError: If validation rows are needed and cannot be had.
        ModelError: If adapter or base model cannot be used, or every size is too bad.
        ResourceError: If the disk fails.
    """
    full_folder = adapter_card.adapter_folder(config.run)
    card = adapter_card.read_card(full_folder)
    base_bytes = files.folder_bytes(hub.find(config.model or card.base_model), "*.safetensors")
    adapter_bytes = files.folder_bytes(full_folder)
    adapter = truncate.read(full_folder)
    others = {"remora.json": (full_folder / "remora.json").read_bytes()}
    stored = config.dtype or "float8"
    dtype = DTYPES[stored]
    budget = config.budget_bytes()
    if config.ratio is not None:
        budget = int(base_bytes / config.ratio)
    # An adapter that learns again does better with its ranks spread; docs/log.md has the figures.
    power = 1 if config.distill else 2
    frontier: list[Point] = []
    least_accuracy = None
    if budget is not None:
        artifact = truncate.fit(adapter, budget, dtype, others, power=power)
        train_rows = _dataset(config.run).train if config.distill else None
        trials = _Trials(config, adapter, base_bytes, reporter)
        if train_rows and artifact.ranks != truncate.allocate(adapter.updates, 1 << 62, dtype):
            artifact = trials.distilled(artifact, train_rows)
    else:
        validation = _validation(config.run, found)
        train_rows = _dataset(config.run).train if config.distill else None
        trials = _Trials(config, adapter, base_bytes, reporter)
        full = trials.full(validation)
        artifacts = _candidates(adapter, adapter_bytes, dtype, others, power)
        least_right = _least_right(full, validation, config.tolerance)
        least_accuracy = least_right / len(validation)
        for place, candidate in enumerate(artifacts):
            point = trials.trial(candidate, validation, full)
            if train_rows and not _is_good(point, validation, least_right):
                learned = trials.distilled(candidate, train_rows)
                again = trials.trial(learned, validation, full)
                if not _is_good(again, validation, least_right):
                    train_rows = None  # and smaller ones would not come back either
                if again.accuracy >= point.accuracy:
                    artifacts[place], point = learned, replace(again, cut_accuracy=point.accuracy)
            frontier.append(point)
        artifact = _smallest(artifacts, frontier, full, validation, config.tolerance)
        whole = Point(
            num_bytes=adapter_bytes,
            ratio=base_bytes / adapter_bytes,
            mean_rank=sum(len(u.values) for u in adapter.updates.values()) / len(adapter.updates),
            accuracy=_accuracy(full, validation),
            num_flips=0,
        )
        frontier.insert(0, whole)
    measured = Table(found.texts, found.true)
    full = trials.full(measured)
    return Compressed(
        dtype=stored,
        adapter_bytes=adapter_bytes,
        frontier=tuple(frontier),
        least_accuracy=least_accuracy,
        chosen=trials.point(artifact, folder, measured, full),
        num_rows=len(measured),
        full_accuracy=_accuracy(full, measured),
    )


class _Trials:
    """Puts compressed adapters on a base model beside the full one, and compares their labels."""

    def __init__(
        self,
        config: ExportConfig,
        adapter: truncate.Adapter,
        base_bytes: int,
        reporter: Reporter,
    ) -> None:
        self._config, self._adapter = config, adapter
        device = choose_device(config.device)
        self._precision = choose_precision(device, "auto")
        self._adapted, self._prompt, _ = saved.load_adapter(
            config.run, base=config.model, dtype=self._precision.base, device=device
        )
        self._base_bytes, self._reporter = base_bytes, reporter

    def full(self, table: Table) -> list[str]:
        """Return the labels that the full adapter gives."""
        return self._labels(table, "adapter")

    def trial(self, artifact: Artifact, table: Table, full: Sequence[str]) -> Point:
        """Measure an adapter that is not kept."""
        with tempfile.TemporaryDirectory() as folder:
            return self.point(artifact, Path(folder), table, full)

    def point(self, artifact: Artifact, folder: Path, table: Table, full: Sequence[str]) -> Point:
        """Write an adapter into a folder and measure it as PEFT loads it from there."""
        with self._loaded(artifact, folder):
            labels = self._labels(table, spoken_bytes(artifact.num_bytes))
        return Point(
            num_bytes=artifact.num_bytes,
            ratio=self._base_bytes / artifact.num_bytes,
            mean_rank=artifact.mean_rank,
            accuracy=_accuracy(labels, table),
            num_flips=sum(a != b for a, b in zip(labels, full, strict=True)),
        )

    def distilled(self, artifact: Artifact, table: Table) -> Artifact:
        """Return an adapter of the same ranks and bytes that has learned again."""
        width = text_config(self._adapted).hidden_size
        rate = run_directory.read_settings(self._config.run).learning_rate
        rate = LEARNING_RATE_FACTOR * (rate or default_learning_rate(width, "lora"))
        passes = MAX_PASSES * math.ceil(len(table) / distill.BATCH_ROWS)
        # The large numbers that 8 bits want, no learning rate would move.
        start = truncate.pack(self._adapter, artifact.ranks, torch.float32, {})
        with tempfile.TemporaryDirectory() as folder, self._loaded(start, Path(folder)):
            distill.distill(
                self._adapted,
                self._prompt,
                table,
                teacher="default",
                student="compressed",
                num_steps=min(MAX_STEPS, passes),
                learning_rate=rate,
                max_tokens=self._config.micro_batch_tokens,
                precision=self._precision,
                reporter=self._reporter,
            )
            updates = {
                name.removeprefix(truncate.PREFIX): truncate.decompose(
                    layer.lora_A["compressed"].weight.detach().cpu(),
                    layer.lora_B["compressed"].weight.detach().cpu(),
                    layer.scaling["compressed"],
                )
                for name, layer in self._adapted.named_modules()
                if "compressed" in getattr(layer, "lora_A", ())
            }
        return truncate.repack(artifact, self._adapter, updates)

    @contextlib.contextmanager
    def _loaded(self, artifact: Artifact, folder: Path) -> Iterator[None]:
        """Write an adapter into a folder, and have it active beside the full one."""
        with files.disk_errors(folder):
            for name, content in artifact.files.items():
                (folder / name).write_bytes(content)
        loaded = self._adapted.load_adapter(
            str(folder), adapter_name="compressed", local_files_only=True
        )
        assert not loaded.missing_keys, loaded
        assert not loaded.unexpected_keys, loaded
        self._adapted.eval().set_adapter("compressed")
        yield
        self._adapted.set_adapter("default")
        self._adapted.delete_adapter("compressed")

    def _labels(self, table: Table, what: str) -> list[str]:
        # Only the likeliest label is asked for, so the search may end once it is certain.
        scorer = Scorer(
            self._adapted,
            self._prompt,
            max_tokens=self._config.micro_batch_tokens,
            tolerance=1,
            autocast=self._precision.autocast,
        )
        probabilities = scoring.score_table(scorer, table.texts, what, self._reporter)
        return [self._prompt.labels[i] for i in probabilities.argmax(1)]


def _candidates(
    adapter: truncate.Adapter,
    adapter_bytes: int,
    dtype: torch.dtype,
    others: Mapping[str, bytes],
    power: int,
) -> list[Artifact]:
    """Return an adapter at fractions of its bytes, the largest first; equal ones only once."""
    found: list[Artifact] = []
    for share in SHARES:
        try:
            artifact = truncate.fit(adapter, adapter_bytes // share, dtype, others, power=power)
        except ConfigError:  # too small for anything
            break
        if not found or artifact.ranks != found[-1].ranks:
            found.append(artifact)
    return found


def _least_right(full: Sequence[str], table: Table, tolerance: float) -> int:
    """Return how many rows a smaller adapter has to get right, a part of a row given to it."""
    spare_rows = math.ceil(tolerance * len(table) / 100 - 1e-9)
    return round(_accuracy(full, table) * len(table)) - spare_rows


def _smallest(
    artifacts: Sequence[Artifact],
    frontier: Sequence[Point],
    full: Sequence[str],
    table: Table,
    tolerance: float,
) -> Artifact:
    """Return the smallest adapter that loses at most `tolerance` points, up to the next whole row.

    Raises:
        ModelError: If all lose more.
    """
    least_right = _least_right(full, table, tolerance)
    good = [
        artifact
        for artifact, point in zip(artifacts, frontier, strict=True)
        if _is_good(point, table, least_right)
    ]
    if not good:
        best = max((point.accuracy for point in frontier), default=0.0)
        raise ModelError(
            f"every compressed adapter loses more than {tolerance:g} points of accuracy, the best "
            f"has {best:.2%} where the full one has {_accuracy(full, table):.2%} on "
            f"{len(table):,} validation rows; give a larger --tolerance or another --dtype"
        )
    return min(good, key=lambda artifact: artifact.num_bytes)


def _is_good(point: Point, table: Table, least_right: float) -> bool:
    return round(point.accuracy * len(table)) >= least_right


def _validation(directory: Path, found: Results) -> Table:
    """Return the rows to choose on.

    Raises:
        DataError: If the run has none, or they are no longer what they were.
    """
    if found.figures["measured_on"] == "validation":
        return Table(found.texts, found.true)
    try:
        dataset = _dataset(directory)
    except DataError as error:
        raise DataError(f"{error}; give --budget or --ratio, which need no rows") from error
    if not len(dataset.validation):
        raise DataError(
            f"{directory} has no validation rows; give --budget or --ratio, which need no rows"
        )
    return dataset.validation


def _dataset(directory: Path) -> Dataset:
    """Return the rows that a run was trained on.

    Raises:
        DataError: If they are gone or no longer what they were.
    """
    try:
        dataset = load_data(run_directory.read_settings(directory))
        known = json.loads((directory / "data.json").read_text(encoding="utf-8"))["sha256"]
    except (DataError, OSError, ValueError, KeyError) as error:
        raise DataError(
            f"the rows that {directory} was trained on cannot be read ({str(error).split(';')[0]})"
        ) from error
    if known != dataset.summary.sha256:
        raise DataError(f"the rows are not those that {directory} was trained on")
    return dataset


def _accuracy(labels: Sequence[str], table: Table) -> float:
    return sum(a == b for a, b in zip(labels, table.labels, strict=True)) / len(table)

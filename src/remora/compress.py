"""A smaller adapter: measured at several sizes, the smallest that is as good is kept."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from remora import data, low_rank, model, plan, run, score
from remora.config import ExportConfig
from remora.data import Table
from remora.errors import ConfigError, DataError, ModelError
from remora.low_rank import Artifact
from remora.progress import Reporter
from remora.results import Results
from remora.score import Scorer

SHARES = (1, 2, 4, 8, 16, 32, 64)
"""Fractions of the full adapter's bytes that are tried, as their denominators."""


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


@dataclass(frozen=True, kw_only=True)
class Compressed:
    """A compressed adapter that was chosen and written."""

    dtype: str
    adapter_bytes: int  # of the full one
    frontier: tuple[Point, ...]  # on validation rows; empty where the size was given
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
    full_folder = run.adapter_folder(config.run)
    card = run.read_card(full_folder)
    base_bytes = run.folder_bytes(model.find(config.model or card.base_model), "*.safetensors")
    adapter_bytes = run.folder_bytes(full_folder)
    adapter = low_rank.read(full_folder)
    others = {"remora.json": (full_folder / "remora.json").read_bytes()}
    stored = config.dtype or "float8"
    dtype = DTYPES[stored]
    budget = config.budget_bytes()
    if config.ratio is not None:
        budget = int(base_bytes / config.ratio)
    frontier: list[Point] = []
    if budget is not None:
        artifact = low_rank.fit(adapter, budget, dtype, others)
        trials = _Trials(config, base_bytes, reporter)
    else:
        validation = _validation(config.run, found)
        trials = _Trials(config, base_bytes, reporter)
        full = trials.full(validation)
        artifacts = _candidates(adapter, adapter_bytes, dtype, others)
        for candidate in artifacts:
            with tempfile.TemporaryDirectory() as trial:
                frontier.append(trials.point(candidate, Path(trial), validation, full))
        artifact = _smallest(
            artifacts,
            frontier,
            _accuracy(full, validation),
            len(validation),
            config.tolerance,
        )
    measured = Table(found.texts, found.true)
    full = trials.full(measured)
    return Compressed(
        dtype=stored,
        adapter_bytes=adapter_bytes,
        frontier=tuple(frontier),
        chosen=trials.point(artifact, folder, measured, full),
        num_rows=len(measured),
        full_accuracy=_accuracy(full, measured),
    )


class _Trials:
    """Puts compressed adapters on a base model beside the full one, and compares their labels."""

    def __init__(self, config: ExportConfig, base_bytes: int, reporter: Reporter) -> None:
        device = plan.choose_device(config.device)
        self._precision = plan.choose_precision(device, "auto")
        self._adapted, self._prompt, _ = run.load_adapter(
            config.run, base=config.model, dtype=self._precision.base, device=device
        )
        self._max_tokens, self._base_bytes = config.micro_batch_tokens, base_bytes
        self._reporter = reporter

    def full(self, table: Table) -> list[str]:
        """Return the labels that the full adapter gives."""
        return self._labels(table, "adapter")

    def point(self, artifact: Artifact, folder: Path, table: Table, full: Sequence[str]) -> Point:
        """Write an adapter into a folder and measure it as PEFT loads it from there."""
        with run.disk_errors(folder):
            for name, content in artifact.files.items():
                (folder / name).write_bytes(content)
        loaded = self._adapted.load_adapter(
            str(folder), adapter_name="compressed", local_files_only=True
        )
        assert not loaded.missing_keys, loaded
        assert not loaded.unexpected_keys, loaded
        self._adapted.set_adapter("compressed")
        labels = self._labels(table, plan.spoken_bytes(artifact.num_bytes))
        self._adapted.set_adapter("default")
        self._adapted.delete_adapter("compressed")
        return Point(
            num_bytes=artifact.num_bytes,
            ratio=self._base_bytes / artifact.num_bytes,
            mean_rank=artifact.mean_rank,
            accuracy=_accuracy(labels, table),
            num_flips=sum(a != b for a, b in zip(labels, full, strict=True)),
        )

    def _labels(self, table: Table, what: str) -> list[str]:
        # Only the likeliest label is asked for, so the search may end once it is certain.
        scorer = Scorer(
            self._adapted,
            self._prompt,
            max_tokens=self._max_tokens,
            tolerance=1,
            autocast=self._precision.autocast,
        )
        probabilities = score.score_table(scorer, table.texts, what, self._reporter)
        return [self._prompt.labels[i] for i in probabilities.argmax(1)]


def _candidates(
    adapter: low_rank.Adapter,
    adapter_bytes: int,
    dtype: torch.dtype,
    others: Mapping[str, bytes],
) -> list[Artifact]:
    """Return an adapter at fractions of its bytes, the largest first; equal ones only once."""
    found: list[Artifact] = []
    for share in SHARES:
        try:
            artifact = low_rank.fit(adapter, adapter_bytes // share, dtype, others)
        except ConfigError:  # too small for anything
            break
        if not found or artifact.ranks != found[-1].ranks:
            found.append(artifact)
    return found


def _smallest(
    artifacts: Sequence[Artifact],
    frontier: Sequence[Point],
    full_accuracy: float,
    num_rows: int,
    tolerance: float,
) -> Artifact:
    """Return the smallest adapter that loses at most `tolerance` points, up to the next whole row.

    Raises:
        ModelError: If all lose more.
    """
    spare_rows = math.ceil(tolerance * num_rows / 100 - 1e-9)
    good = [
        artifact
        for artifact, point in zip(artifacts, frontier, strict=True)
        if round((full_accuracy - point.accuracy) * num_rows) <= spare_rows
    ]
    if not good:
        best = max((point.accuracy for point in frontier), default=0.0)
        raise ModelError(
            f"every compressed adapter loses more than {tolerance:g} points of accuracy, the best "
            f"has {best:.2%} where the full one has {full_accuracy:.2%} on {num_rows:,} validation "
            "rows; give a larger --tolerance or another --dtype"
        )
    return min(good, key=lambda artifact: artifact.num_bytes)


def _validation(directory: Path, found: Results) -> Table:
    """Return the rows to choose on.

    Raises:
        DataError: If the run has none, or they are no longer what they were.
    """
    if found.figures["measured_on"] == "validation":
        return Table(found.texts, found.true)
    advice = "give --budget or --ratio, which need no validation rows"
    try:
        dataset = data.load(run.read_settings(directory))
        known = json.loads((directory / "data.json").read_text(encoding="utf-8"))["sha256"]
    except (DataError, OSError, ValueError, KeyError) as error:
        raise DataError(
            f"the rows that {directory} was trained on cannot be read "
            f"({str(error).split(';')[0]}); {advice}"
        ) from error
    if known != dataset.summary.sha256:
        raise DataError(f"the rows are not those that {directory} was trained on; {advice}")
    if not len(dataset.validation):
        raise DataError(f"{directory} has no validation rows; {advice}")
    return dataset.validation


def _accuracy(labels: Sequence[str], table: Table) -> float:
    return sum(a == b for a, b in zip(labels, table.labels, strict=True)) / len(table)

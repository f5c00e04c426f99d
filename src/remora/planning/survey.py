"""The effective batches of a run, looked at before it begins."""

from __future__ import annotations

from remora.config import TrainConfig
from remora.data import splits
from remora.data.dataset import Dataset
from remora.data.prompt import Prompt, TokenSequence

MAX_SURVEYED_ROWS = 100_000
"""Rows whose batches are looked at for the heaviest one; the rest are taken to be like them."""


def effective_batches(
    dataset: Dataset, prompt: Prompt, settings: TrainConfig, num_steps: int
) -> list[list[TokenSequence]]:
    """Return the effective batches of a run, or the first ones of a long run."""
    table = dataset.train
    num_batches = min(num_steps, max(1, MAX_SURVEYED_ROWS // settings.batch_size))
    chosen = list(splits.batches(len(table), settings.batch_size, num_batches, settings.seed))
    wanted = sorted({index for batch in chosen for index in batch})
    rows = prompt.rows([table.texts[i] for i in wanted], [table.labels[i] for i in wanted])
    found = dict(zip(wanted, rows, strict=True))
    return [[found[index] for index in batch] for batch in chosen]

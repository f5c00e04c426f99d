"""The effective batches of a run and their token trees, surveyed before it begins."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

from remora.config import TrainConfig
from remora.data import splits
from remora.data.dataset import Dataset
from remora.data.prompt import Prompt, TokenSequence
from remora.tree import layouts
from remora.tree.layouts import Layout
from remora.tree.packing import MicroBatch

MAX_SURVEYED_ROWS = 100_000
"""Rows whose batches are searched for the heaviest one; the rest are taken to be like them."""


def effective_batches(
    dataset: Dataset, prompt: Prompt, settings: TrainConfig, num_steps: int
) -> list[list[TokenSequence]]:
    """Return the effective batches of a run, or the first ones of a long run."""
    table = dataset.train
    num_batches = min(num_steps, max(1, MAX_SURVEYED_ROWS // settings.batch_size))
    chosen = list(splits.batches(len(table), settings.batch_size, num_batches, settings.seed))
    wanted = sorted({index for batch in chosen for index in batch})
    rows = prompt.rows([table.texts[i] for i in wanted], [table.labels[i] for i in wanted])
    row_of = dict(zip(wanted, rows, strict=True))
    return [[row_of[index] for index in batch] for batch in chosen]


@dataclass(frozen=True, kw_only=True)
class Extremes:
    """The micro-batches of one size that decide how much memory a step needs."""

    longest: MicroBatch  # the one with most tokens
    widest: MicroBatch  # the one with most predictors
    num_tokens: int  # of all micro-batches together
    are_several: bool  # whether any effective batch has more than one


class Survey:
    """The token trees that a run's effective batches are cut into, at each size asked for."""

    def __init__(self, batches: list[list[TokenSequence]], layout: Layout = "tree") -> None:
        self.batches, self._layout = batches, layout
        self.extremes = functools.cache(self._find_extremes)

    @functools.cached_property
    def rows(self) -> list[TokenSequence]:
        """The rows of all batches, one after the other."""
        return [row for batch in self.batches for row in batch]

    def trees(self, size: int) -> Iterator[tuple[list[TokenSequence], list[MicroBatch]]]:
        """Yield each batch with its trees of at most `size` tokens."""
        for batch in self.batches:
            yield batch, layouts.split(self._layout, batch, size)

    def tree_tokens(self, size: int) -> float:
        """Return the tokens computed for each row in trees of at most `size` tokens."""
        return self.extremes(size).num_tokens / len(self.rows)

    def _find_extremes(self, size: int) -> Extremes:
        """Return the extremes of trees of at most `size` tokens."""
        longest = widest = None
        num_tokens, are_several = 0, False
        for _, trees in self.trees(size):
            are_several = are_several or len(trees) > 1
            for packed in trees:
                num_tokens += packed.num_tokens
                if longest is None or packed.num_tokens > longest.num_tokens:
                    longest = packed
                if widest is None or len(packed.predictors) > len(widest.predictors):
                    widest = packed
        assert longest is not None
        assert widest is not None
        return Extremes(
            longest=longest, widest=widest, num_tokens=num_tokens, are_several=are_several
        )

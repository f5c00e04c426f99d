"""The effective batches of a run and their token trees, surveyed before it begins."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

from remora.data import splits
from remora.data.dataset import Dataset
from remora.data.prompt import Prompt, TokenSequence
from remora.tree import layouts
from remora.tree.layouts import Layout
from remora.tree.packing import MicroBatch

MAX_SURVEYED_ROWS = 100_000
"""Rows whose batches are searched for the heaviest one; the rest are taken to be like them."""

CHARACTERS_PER_TOKEN = 4
"""About as many as in English text."""


def effective_batches(
    dataset: Dataset, prompt: Prompt, num_steps: int, *, batch_size: int, seed: int
) -> list[list[TokenSequence]]:
    """Return the effective batches of a run, or the first ones of a long run."""
    table = dataset.train
    most = MAX_SURVEYED_ROWS
    if prompt.kept == "windows":
        tokens = sum(map(len, table.texts)) / len(table) / CHARACTERS_PER_TOKEN
        most = int(most / max(1.0, tokens / prompt.max_length))
    num_batches = min(num_steps, max(1, most // batch_size))
    chosen = list(splits.batches(len(table), batch_size, num_batches, seed))
    wanted = sorted({index for batch in chosen for index in batch})
    texts, labels = [table.texts[i] for i in wanted], [table.labels[i] for i in wanted]
    rows_of = dict(zip(wanted, prompt.rows_by_message(texts, labels), strict=True))
    return [[row for index in batch for row in rows_of[index]] for batch in chosen]


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
        """The sequences of all batches, one after the other."""
        return [row for batch in self.batches for row in batch]

    @functools.cached_property
    def num_rows(self) -> int:
        """The rows of the table that they are of: fewer where long ones are read in windows."""
        return round(sum(row.weight for row in self.rows))

    def trees(self, size: int) -> Iterator[tuple[list[TokenSequence], list[MicroBatch]]]:
        """Yield each batch with its trees of at most `size` tokens."""
        for batch in self.batches:
            yield batch, layouts.split(self._layout, batch, size)

    def tree_tokens(self, size: int) -> float:
        """Return the tokens computed for each row in trees of at most `size` tokens."""
        return self.extremes(size).num_tokens / self.num_rows

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

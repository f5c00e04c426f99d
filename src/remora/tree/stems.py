"""Messages packed into one row, below the prefix of the prompt that they all share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias, TypeVar

import torch

from remora.data.prompt import Prompt, common_prefix_length
from remora.tree.packed_row import PackedRow

Stem: TypeAlias = tuple[int, ...]
"""Token ids of a conversation up to its answer."""

Item = TypeVar("Item")


class PackedStems(NamedTuple):
    """Sequences laid out below a prefix that is computed already."""

    row: PackedRow  # of the prefix; to extend by the new tokens
    new: list[tuple[int, int]]  # a token and the position of its parent in the row, -1 for none
    paths: list[list[int]]  # of each sequence: the positions of its tokens in the extended row


class StemPacker:
    """Packs stems for one model; the prefix that they share is computed once and kept."""

    def __init__(
        self, model: Any, prompt: Prompt, *, max_tokens: int, autocast: torch.dtype | None
    ) -> None:
        self._model, self._autocast = model, autocast
        self._prompt, self._max_tokens = prompt, max_tokens
        self._prefix: tuple[Stem, PackedRow] | None = None

    def groups(
        self, items: Sequence[Item], size: Callable[[Item], tuple[Stem, int]], most_kept: int
    ) -> Iterator[list[Item]]:
        """Cut items into groups of at most `max_tokens` computed tokens.

        Args:
            items: Sorted by their tokens, so that those which share most are neighbours.
            size: Returns the tokens of an item, and at how many of them logits are computed.
            most_kept: Most logits in a group.
        """
        group: list[Item] = []
        num_tokens = num_kept = 0
        before: Sequence[int] = self._prompt.prefix
        for item in items:
            path, kept = size(item)
            added = len(path) - common_prefix_length(before, path)
            if group and (num_tokens + added > self._max_tokens or num_kept + kept > most_kept):
                yield group
                group, num_tokens, num_kept = [], 0, 0
                added = len(path) - common_prefix_length(self._prompt.prefix, path)
            group.append(item)
            num_tokens, num_kept, before = num_tokens + added, num_kept + kept, path
        if group:
            yield group

    def pack(self, stems: Sequence[Stem], sequences: Sequence[Stem]) -> PackedStems:
        """Lay out sorted sequences below the part of the prompt's prefix that all stems share.

        Args:
            stems: Each the beginning of its sequence, or all of it.
            sequences: The tokens to lay out.
        """
        prefix, row = self._start(stems)
        new: list[tuple[int, int]] = []
        paths = []
        path, before = list(range(len(prefix))), prefix
        for sequence in sequences:
            del path[common_prefix_length(before, sequence) :]
            for token in sequence[len(path) :]:
                new.append((token, path[-1] if path else -1))
                path.append(row.length + len(new) - 1)
            paths.append(list(path))
            before = sequence
        return PackedStems(row, new, paths)

    def _start(self, stems: Sequence[Stem]) -> tuple[Stem, PackedRow]:
        """Return the prefix that all stems share, and its packed row."""
        prefix = self._prompt.prefix
        for stem in stems:  # a message may, rarely, be tokenized together with the prefix's end
            prefix = prefix[: min(common_prefix_length(prefix, stem), len(stem) - 1)]
        if self._prefix is None or self._prefix[0] != prefix:
            row = PackedRow(self._model, self._autocast)
            if prefix:
                row.extend([(token, i - 1) for i, token in enumerate(prefix)], [len(prefix) - 1])
            self._prefix = prefix, row
        return prefix, self._prefix[1].fork()

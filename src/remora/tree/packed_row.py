"""A packed row of tokens that can be extended, with a key-value cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from remora.tree import attention
from remora.tree.forward import text_config
from remora.tree.label_search import Search


class PackedRow:
    """A packed row of tokens that can be extended, with a key-value cache.

    A token sees itself and all tokens that its parent sees.
    """

    def __init__(self, model: Any, autocast: torch.dtype | None) -> None:
        from transformers import DynamicCache

        self._model = model
        self._config = text_config(model)
        first = next(model.parameters())
        self._device = first.device
        self._dtype = autocast or first.dtype
        self._cache = DynamicCache()
        self._depths: list[int] = []
        self._visible: list[NDArray[np.bool_]] = []  # for each token, over itself and those before

    @property
    def length(self) -> int:
        """Number of tokens in the row."""
        return len(self._depths)

    def fork(self) -> PackedRow:
        """Return a copy that is extended independently."""
        other = PackedRow(self._model, None)
        other._dtype = self._dtype
        for index, layer in enumerate(self._cache.layers):
            other._cache.update(layer.keys, layer.values, index)  # type: ignore[union-attr,arg-type]
        other._depths = list(self._depths)
        other._visible = list(self._visible)
        return other

    def keep_only(self, searches: Sequence[Search]) -> PackedRow:
        """Return a copy with only the tokens that some searches still need.

        The positions in their open nodes become those of the copy.
        """
        seen = np.zeros(self.length, dtype=bool)
        frontier = [opened for search in searches for opened in search.frontier]
        for opened in frontier:
            seen[: opened.parent + 1] |= self._visible[opened.parent]
        places = np.cumsum(seen) - 1
        kept = torch.from_numpy(np.flatnonzero(seen)).to(self._device)
        other = PackedRow(self._model, None)
        other._dtype = self._dtype
        for index, layer in enumerate(self._cache.layers):
            keys, values = (x.index_select(2, kept) for x in (layer.keys, layer.values))  # type: ignore[union-attr]
            other._cache.update(keys, values, index)
        other._depths = [self._depths[i] for i in kept.tolist()]
        other._visible = [self._visible[i][seen[: i + 1]] for i in kept.tolist()]
        for opened in frontier:
            opened.parent = int(places[opened.parent])
        return other

    def extend(self, new: Sequence[tuple[int, int]], keep: Sequence[int]) -> Tensor:
        """Compute new tokens.

        Args:
            new: Pairs of a token and the position of its parent in the row, -1 for none.
            keep: Positions in the row of the new tokens to return logits for.

        Returns:
            Logits [len(keep), vocabulary].
        """
        logits: Tensor = self._compute(new, keep).logits[0]
        return logits

    def extend_states(self, new: Sequence[tuple[int, int]]) -> tuple[Tensor, ...]:
        """Compute new tokens, given as to `extend`; return their hidden states.

        Returns:
            The embeddings and the output of each layer, the last one normalized, each [new, H].
        """
        last = self.length + len(new) - 1
        states = self._compute(new, [last], output_hidden_states=True).hidden_states
        return tuple(layer[0] for layer in states)

    def _compute(self, new: Sequence[tuple[int, int]], keep: Sequence[int], **more: Any) -> Any:
        """Return the model's output for new tokens."""
        start, end = self.length, self.length + len(new)
        visible = np.zeros((len(new), end), dtype=bool)
        for index, (_, parent) in enumerate(new):
            if parent >= 0:
                visible[index, : parent + 1] = self._visible[parent]
            visible[index, start + index] = True
            self._visible.append(visible[index, : start + index + 1])
            self._depths.append(self._depths[parent] + 1 if parent >= 0 else 0)
        mask = torch.from_numpy(visible).to(self._device)
        depths = torch.tensor(self._depths, device=self._device)

        def within(window: int | None, chunk: int | None = None) -> Tensor:
            if chunk is not None:
                return mask & (depths[start:, None] // chunk == depths[None, :] // chunk)
            if window is None:
                return mask
            return mask & (depths[start:, None] - depths[None, :] < window)

        kept = torch.tensor(keep, device=self._device) - start
        only = None if more else kept  # whoever asks for hidden states wants them everywhere
        return self._model(
            input_ids=torch.tensor([[token for token, _ in new]], device=self._device),
            position_ids=depths[None, start:],
            **attention.inputs(self._config, within, self._dtype, kept=only),
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=kept,
            **more,
        )

"""What a model keeps of rows that it has computed, to continue them: its own cache."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from remora.tree import layouts
from remora.tree.rows import head_at, padded


def cache_argument(model: Any) -> str | None:
    """Return the name by which a model takes a cache that can be reordered; None if it has none."""
    known = inspect.signature(layouts.base_of(model).forward).parameters
    return next((name for name in ("past_key_values", "cache_params") if name in known), None)


class RowStates:
    """Rows of equal length with their keys and values, convolution and recurrent states.

    Padding would enter the states of what follows it, so a row is continued only from its own last
    token: rows of other lengths have states of their own.
    """

    def __init__(
        self, model: Any, cache: Any = None, length: int = 0, *, in_steps: bool = False
    ) -> None:
        """Take a model and its cache, which this object changes; none before the first token.

        With `in_steps` rows are continued token by token: some models forget their state if they
        get several at once.
        """
        self._model, self._cache, self.length = model, cache, length
        self._in_steps = in_steps

    def select(self, rows: Sequence[int]) -> RowStates:
        """Return copies of some rows, each as often as it is named; these stay as they are."""
        if self._cache is None:
            return RowStates(self._model, in_steps=self._in_steps)
        cache = copy.copy(self._cache)
        cache.layers = [_copied(layer) for layer in cache.layers]
        device = next(self._model.parameters()).device
        cache.reorder_cache(torch.tensor(rows, device=device))
        return RowStates(self._model, cache, self.length, in_steps=self._in_steps)

    def extend(self, tokens: Sequence[Sequence[int]], places: Sequence[int]) -> Tensor:
        """Compute tokens behind each row.

        Args:
            tokens: New tokens of each row. If their numbers differ they are padded on the right,
                and the rows cannot be extended again.
            places: Where to return logits: indices into the flattened new tokens.

        Returns:
            Logits [places, vocabulary].
        """
        ids = padded(tokens)
        if self._cache is None or not self._in_steps:
            return self._compute(ids, places)
        width = ids.shape[1]
        steps: list[list[int]] = [[] for _ in range(width)]  # the rows wanted at each token
        for place in places:
            steps[place % width].append(place // width)
        parts = [self._compute(ids[:, i : i + 1], rows) for i, rows in enumerate(steps)]
        found = {
            row * width + step: logits
            for step, (rows, part) in enumerate(zip(steps, parts, strict=True))
            for row, logits in zip(rows, part, strict=True)
        }
        return torch.stack([found[place] for place in places])

    def _compute(self, ids: Tensor, places: Sequence[int]) -> Tensor:
        name = str(cache_argument(self._model))
        device = next(self._model.parameters()).device
        cache = {} if self._cache is None else {name: self._cache}
        at = torch.tensor(places, dtype=torch.int64, device=device)
        with head_at(self._model, at):
            output = self._model(input_ids=ids.to(device), use_cache=True, **cache)
        self._cache = getattr(output, name)
        self.length += ids.shape[1]
        logits: Tensor = output.logits[0]
        return logits


def _copied(layer: Any) -> Any:
    """Return a copy of a cache's layer with dictionaries and lists of its own, for new tensors."""
    other = copy.copy(layer)
    for name, value in vars(layer).items():
        if isinstance(value, dict | list):
            setattr(other, name, copy.copy(value))
    return other

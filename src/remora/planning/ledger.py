"""A ledger of the storages that are alive while a model runs, and of its operations."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import flop_registry

from remora.planning.allocator import MAPPED_BYTES

PRODUCTS = {"mm": 0, "bmm": 0, "addmm": 1, "addmm_": 1, "baddbmm": 1, "baddbmm_": 1}
"""Matrix products, by which argument is their first factor."""


class Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the bytes of live storages by tag, their peak, and the operations.

    Attributes:
        tag: Given to new storages: forward, gradients, logits, saved or workspace.
        totals: Bytes that are alive now, by tag.
        peak: Most bytes alive at any moment.
        at_peak: Bytes that were alive then, by tag.
        most_heap: Most bytes in arrays of the allocator's heap, at any moment.
        most_mapped: Most bytes in larger arrays, at any moment.
        largest: Bytes of the largest array.
        operations: Floating-point operations of matrix products and attention.
    """

    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._known = {id(t.untyped_storage()) for t in known}
        self._keep = [t.untyped_storage() for t in known]  # an id holds as long as its storage
        self._live: dict[int, tuple[str, int, Any]] = {}
        self.tag = "forward"
        self.forget()

    def forget(self) -> None:
        """Leave out the storages that are alive now, and start to count."""
        self._known |= self._live.keys()
        self._keep += [storage for _, _, ref in self._live.values() if (storage := ref())]
        self._live.clear()
        tags = ("forward", "gradients", "logits", "saved", "workspace")
        self.totals = dict.fromkeys(tags, 0)
        self.at_peak, self.peak, self._total = dict(self.totals), 0, 0
        self.most_heap = self.most_mapped = self._heap = self.largest = 0
        self.operations = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._add, result)
        name = func._schema.name.removeprefix("aten::")
        if (place := PRODUCTS.get(name)) is not None:
            self.operations += 2 * args[place].numel() * args[place + 1].shape[-1]
        elif (count := flop_registry.get(func.overloadpacket)) is not None:
            self.operations += count(*args, **(kwargs or {}), out_val=result)
        return result

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._live or key in self._known:
            return
        reference = weakref.ref(storage, lambda _: self._remove(key))
        self._live[key] = (self.tag, storage.nbytes(), reference)
        self.totals[self.tag] += storage.nbytes()
        self._total += storage.nbytes()
        self._heap += storage.nbytes() if storage.nbytes() < MAPPED_BYTES else 0
        self.largest = max(self.largest, storage.nbytes())
        if self._total > self.peak:
            self.peak, self.at_peak = self._total, dict(self.totals)
        self.most_heap = max(self.most_heap, self._heap)
        self.most_mapped = max(self.most_mapped, self._total - self._heap)

    def _remove(self, key: int) -> None:
        if key in self._live:
            tag, size, _ = self._live.pop(key)
            self.totals[tag] -= size
            self._total -= size
            self._heap -= size if size < MAPPED_BYTES else 0

    def retag(self, rename: Callable[[str, int], str]) -> None:
        """Change the tags of live storages, by their tag and their bytes."""
        for key, (tag, size, reference) in self._live.items():
            self.totals[tag] -= size
            self._live[key] = (rename(tag, size), size, reference)
            self.totals[self._live[key][0]] += size

    def add_gradient(self, parameter: Tensor) -> None:
        """Tag the gradient of a parameter that has just been computed."""
        assert parameter.grad is not None
        key = id(parameter.grad.untyped_storage())
        if key in self._live:
            tag, size, reference = self._live[key]
            self.totals[tag] -= size
            self._live[key] = ("gradients", size, reference)
            self.totals["gradients"] += size

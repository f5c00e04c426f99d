"""What a training step keeps in memory, counted without weights; and how much memory is free.

The model is built with fake tensors, which have shapes and no contents, and takes the training
loop's own path over a real token tree: forward, loss and backward. A ledger writes down every
storage while it is alive, so any architecture is counted and nothing is guessed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import flop_registry

from remora.errors import ModelError
from remora.models import loading
from remora.planning.allocator import MAPPED_BYTES
from remora.tree import attention
from remora.tree.forward import model_inputs, text_config
from remora.tree.loss import loss_sum
from remora.tree.packing import TokenTree

PRODUCTS = {"mm": 0, "bmm": 0, "addmm": 1, "addmm_": 1, "baddbmm": 1, "baddbmm_": 1}
"""Matrix products, by which argument is their first factor."""


@dataclass(frozen=True, kw_only=True)
class StepMemory:
    """Memory of one micro-batch at its peak, in bytes, and its operations.

    Attributes:
        gradients: Of what trains.
        saved: Activations that the forward pass keeps for the backward pass.
        logits: [predictors, vocabulary] and its gradient.
        workspace: Everything else that is alive at the peak.
        operations: Floating-point operations of forward and backward pass, recomputation included;
            a multiplication and an addition count as two.
        heap: Most bytes in arrays that lie in the allocator's heap, at any moment.
        mapped: Most bytes in larger arrays, at any moment.
        largest: Bytes of the largest array.
    """

    gradients: int
    saved: int
    logits: int
    workspace: int
    operations: int
    heap: int
    mapped: int
    largest: int = 0

    @property
    def peak(self) -> int:
        """All of it together."""
        return self.gradients + self.saved + self.logits + self.workspace


class Skeleton:
    """A model without weights, that can be run to see what it would need."""

    def __init__(self, adapted: nn.Module, *, autocast: torch.dtype | None, device: str) -> None:
        """Take a model whose parameters are on the device `meta`, for this use only.

        Args:
            adapted: The model, with its adapter if it gets one.
            autocast: 16-bit arithmetic to compute in, or None.
            device: What type of device it would run on, which computes attention in its own way.
        """
        self._model, self._autocast, self._device = adapted, autocast, device
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        with self._mode:
            _make_fake(adapted)
        adapted.train()

    def count(
        self, packed: TokenTree, *, checkpointing: bool = False, accumulates: bool = False
    ) -> StepMemory:
        """Run a micro-batch and return what it needs.

        Args:
            packed: The micro-batch.
            checkpointing: Whether layers are computed again in the backward pass.
            accumulates: Whether gradients of an earlier micro-batch are there already.

        Raises:
            ModelError: If the model looks at values while it computes, which fake tensors lack.
        """
        loading.set_checkpointing(self._model, checkpointing)
        with _told():
            return self._count(packed, accumulates)

    def _count(self, packed: TokenTree, accumulates: bool) -> StepMemory:
        adapted = self._model
        is_whole = attention.prefers_whole(self._device, packed.num_tokens, packed.num_tokens)
        inputs = model_inputs(adapted, packed, in_blocks=False if is_whole else None)
        if blocks := inputs.get("tree_blocks"):
            inputs["tree_blocks"] = dataclasses.replace(blocks, by_kernel=self._device != "cpu")
        trained = [p for p in adapted.parameters() if p.requires_grad]
        ledger = _Ledger([*adapted.parameters(), *adapted.buffers()])
        with self._mode, ledger:
            inputs, packed = self._faked(inputs), self._faked(packed)
            ledger.forget()
            for parameter in trained:
                parameter.grad = None
                if accumulates:
                    ledger.tag = "gradients"
                    parameter.grad = torch.zeros_like(parameter)
            hooks = [
                p.register_post_accumulate_grad_hook(ledger.add_gradient)  # type: ignore[no-untyped-call]
                for p in trained
            ]
            ledger.tag = "forward"
            with torch.autocast("cpu", self._autocast, enabled=self._autocast is not None):
                logits = adapted(**inputs).logits[0]
            logits_bytes = _bytes(logits)
            ledger.retag(lambda tag, size: "logits" if size == logits_bytes else tag)
            loss = loss_sum(logits, packed)
            del logits
            ledger.retag(lambda tag, size: "logits" if size == logits_bytes else tag)
            kept = ledger.totals["forward"]
            ledger.retag(lambda tag, _: "saved" if tag == "forward" else tag)
            ledger.tag = "workspace"
            loss.backward()  # type: ignore[no-untyped-call]
            del loss
            for hook in hooks:
                hook.remove()
            for parameter in trained:
                parameter.grad = None
        at_peak = ledger.at_peak
        saved = at_peak["saved"] + min(kept, at_peak["forward"])
        return StepMemory(
            gradients=at_peak["gradients"],
            saved=saved,
            logits=at_peak["logits"],
            workspace=sum(at_peak.values()) - at_peak["gradients"] - saved - at_peak["logits"],
            operations=ledger.operations,
            heap=ledger.most_heap,
            mapped=ledger.most_mapped,
            largest=ledger.largest,
        )

    def count_scoring(self, num_tokens: int, num_kept: int) -> StepMemory:
        """Return what a pass of closed-set scoring needs at most, keys and values included.

        Args:
            num_tokens: Tokens of the packed row.
            num_kept: Positions that logits are computed for.

        Raises:
            ModelError: If the model looks at values while it computes, which fake tensors lack.
        """
        adapted = self._model.eval()
        with _told():
            found = self._count_scoring(num_tokens, num_kept)
        adapted.train()
        return found

    def _count_scoring(self, num_tokens: int, num_kept: int) -> StepMemory:
        from transformers import DynamicCache

        visible = torch.ones(num_tokens, num_tokens, dtype=torch.bool)
        config = text_config(self._model)
        dtype = self._autocast or next(self._model.parameters()).dtype
        arguments = attention.inputs(config, lambda _: visible, dtype)
        ledger = _Ledger([*self._model.parameters(), *self._model.buffers()])
        with self._mode, ledger, torch.no_grad():
            arguments = self._faked(arguments)
            positions = torch.arange(num_tokens)
            with torch.autocast("cpu", self._autocast, enabled=self._autocast is not None):
                logits = self._model(
                    input_ids=positions[None],
                    position_ids=positions[None],
                    **arguments,
                    past_key_values=DynamicCache(),
                    use_cache=True,
                    logits_to_keep=positions[:num_kept],
                ).logits
            size = _bytes(logits)
            ledger.retag(lambda tag, found: "logits" if found == size else tag)
        peak = max(ledger.peak, sum(ledger.totals.values()))
        return StepMemory(
            gradients=0,
            saved=0,
            logits=ledger.totals["logits"],
            workspace=peak - ledger.totals["logits"],
            operations=ledger.operations,
            heap=ledger.most_heap,
            mapped=ledger.most_mapped,
            largest=ledger.largest,
        )

    def _faked(self, value: Any) -> Any:
        """Return a structure with its tensors replaced by fake ones."""
        if isinstance(value, Tensor):
            return self._mode.from_tensor(value)
        if isinstance(value, dict):
            return {key: self._faked(part) for key, part in value.items()}
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return dataclasses.replace(value, **self._faked(vars(value)))
        return value


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Make a ModelError of torch's errors for what depends on data."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise ModelError(
            f"the memory of this model cannot be counted ({reason}); "
            "train it with a --micro-batch-tokens of your choice"
        ) from error


class _Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Knows the storages that are alive, by tag, and counts operations."""

    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._known = {id(t.untyped_storage()) for t in known}
        self._keep = [t.untyped_storage() for t in known]  # an id holds as long as its storage
        self._live: dict[int, tuple[str, int, Any]] = {}
        self.tag = "forward"
        self.forget()

    def forget(self) -> None:
        """Take what is alive now as known, and begin to count."""
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
        """Give what is alive another tag, by its tag and its bytes."""
        for key, (tag, size, reference) in self._live.items():
            self.totals[tag] -= size
            self._live[key] = (rename(tag, size), size, reference)
            self.totals[self._live[key][0]] += size

    def add_gradient(self, parameter: Tensor) -> None:
        """Tag a gradient that has arrived."""
        assert parameter.grad is not None
        key = id(parameter.grad.untyped_storage())
        if key in self._live:
            tag, size, reference = self._live[key]
            self.totals[tag] -= size
            self._live[key] = ("gradients", size, reference)
            self.totals["gradients"] += size


def _make_fake(module: nn.Module) -> None:
    """Replace parameters and buffers on `meta` by fake ones, tied weights once."""
    replaced: dict[int, Tensor] = {}
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in replaced:
                    empty: Tensor = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                    if isinstance(tensor, nn.Parameter):
                        empty = nn.Parameter(empty, requires_grad=tensor.requires_grad)
                    replaced[id(tensor)] = empty
                tensors[name] = replaced[id(tensor)]  # type: ignore[assignment]


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()

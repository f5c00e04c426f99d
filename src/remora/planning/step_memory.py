"""The memory of a training step, and of a scoring pass, counted without weights.

The model is built with fake tensors, which have shapes and no contents, and runs the training
loop's own steps on a real micro-batch: forward, loss and backward. A ledger records every storage
while it is alive, so that any architecture can be counted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)

from remora.errors import ModelError
from remora.formatting import first_line
from remora.models import loading
from remora.planning.ledger import Ledger
from remora.tree import attention, row_search
from remora.tree.forward import model_inputs, output, text_config
from remora.tree.loss import loss_sum
from remora.tree.packing import MicroBatch
from remora.tree.rows import head_at

_FAILURES = (
    *(RuntimeError, TypeError, ValueError, IndexError, AttributeError, AssertionError, ImportError),
)
_DATA_DEPENDENT = (DataDependentOutputException, DynamicOutputShapeException)


class NotCountableError(ModelError):
    """A model reads values while it computes, which fake tensors lack."""


@dataclass(frozen=True, kw_only=True)
class StepMemory:
    """Memory of one micro-batch at its peak, in bytes, and its operations.

    Attributes:
        gradients: Of the trainable parameters.
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
        """Memory of all of them together."""
        return self.gradients + self.saved + self.logits + self.workspace


class Skeleton:
    """A model without weights that can be run to count the memory it would need."""

    def __init__(self, adapted: nn.Module, *, autocast: torch.dtype | None, device: str) -> None:
        """Take a model whose parameters are on the device `meta`; it cannot be used elsewhere then.

        Args:
            adapted: The model, with its adapter if it has one.
            autocast: 16-bit type to compute in, or None.
            device: Type of the device it would run on, which decides how attention is computed.
        """
        self._model, self._autocast, self._device = adapted, autocast, device
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        with self._mode:
            _make_fake(adapted)
        adapted.train()

    def count(
        self, packed: MicroBatch, *, checkpointing: bool = False, accumulates: bool = False
    ) -> StepMemory:
        """Run a micro-batch and return its memory.

        Args:
            packed: The micro-batch.
            checkpointing: Whether layers are computed again in the backward pass.
            accumulates: Whether gradients of an earlier micro-batch exist already.

        Raises:
            NotCountableError: If the model reads values while it computes, which fake tensors lack.
        """
        loading.set_checkpointing(self._model, checkpointing)
        return self._in_blocks_or_whole(lambda: self._count(packed, accumulates))

    def _in_blocks_or_whole(self, count: Callable[[], StepMemory]) -> StepMemory:
        """Count; where a model cannot attend in blocks, with whole masks, as in training."""
        with _counting():
            try:
                return count()
            except _FAILURES as error:
                if isinstance(error, _DATA_DEPENDENT) or not attention.uninstall(self._model):
                    raise _not_countable(error) from error
            try:
                return count()
            except _FAILURES as error:
                raise _not_countable(error) from error

    def _count(self, packed: MicroBatch, accumulates: bool) -> StepMemory:
        adapted = self._model
        is_whole = attention.prefers_whole(self._device, packed.num_tokens, packed.num_tokens)
        inputs = model_inputs(adapted, packed, in_blocks=False if is_whole else None)
        if blocks := inputs.get("tree_blocks"):
            inputs["tree_blocks"] = dataclasses.replace(blocks, by_kernel=self._device != "cpu")
        trained = [p for p in adapted.parameters() if p.requires_grad]
        ledger = Ledger([*adapted.parameters(), *adapted.buffers()])
        with self._mode, ledger:
            inputs, packed = self._faked(inputs), self._faked(packed)
            ledger.forget()
            # Gradients of an earlier micro-batch.
            for parameter in trained:
                parameter.grad = None
                if accumulates:
                    ledger.tag = "gradients"
                    parameter.grad = torch.zeros_like(parameter)
            hooks = [
                p.register_post_accumulate_grad_hook(ledger.add_gradient)  # type: ignore[no-untyped-call]
                for p in trained
            ]
            # Forward pass and loss; what is alive after them is saved for the backward pass.
            ledger.tag = "forward"
            with torch.autocast("cpu", self._autocast, enabled=self._autocast is not None):
                logits = output(adapted, packed, inputs).logits[0]
            logits_bytes = logits.nbytes
            ledger.retag(lambda tag, size: "logits" if size == logits_bytes else tag)
            loss = loss_sum(logits, packed)
            del logits
            ledger.retag(lambda tag, size: "logits" if size == logits_bytes else tag)
            kept = ledger.totals["forward"]
            ledger.retag(lambda tag, _: "saved" if tag == "forward" else tag)
            # Backward pass.
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
        """Return the memory of a pass of closed-set scoring, keys and values included.

        Args:
            num_tokens: Tokens of the packed row.
            num_kept: Positions whose logits are computed.

        Raises:
            NotCountableError: If the model reads values while it computes, which fake tensors lack.
        """
        return self._counted_pass(lambda: self._count_scoring(num_tokens, num_kept))

    def count_scoring_rows(self, num_rows: int, length: int, num_kept: int) -> StepMemory:
        """Return the memory of a pass of scoring by rows, copies of their states included.

        Args:
            num_rows: Rows of the pass.
            length: Tokens of each.
            num_kept: Positions whose logits are computed.

        Raises:
            ModelError: If the model reads values while it computes, which fake tensors lack.
        """
        return self._counted_pass(lambda: self._count_scoring_rows(num_rows, length, num_kept))

    def _counted_pass(self, count: Callable[[], StepMemory]) -> StepMemory:
        adapted = self._model.eval()
        try:
            return self._in_blocks_or_whole(count)
        finally:
            adapted.train()

    def _count_scoring(self, num_tokens: int, num_kept: int) -> StepMemory:
        from transformers import DynamicCache

        visible = torch.ones(num_tokens, num_tokens, dtype=torch.bool)
        config = text_config(self._model)
        dtype = self._autocast or next(self._model.parameters()).dtype
        kept = torch.arange(num_kept)
        arguments = attention.inputs(config, lambda *_: visible, dtype, kept=kept)
        ledger = Ledger([*self._model.parameters(), *self._model.buffers()])
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
            logits_bytes = logits.nbytes
            ledger.retag(lambda tag, size: "logits" if size == logits_bytes else tag)
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

    def _count_scoring_rows(self, num_rows: int, length: int, num_kept: int) -> StepMemory:
        ledger = Ledger([*self._model.parameters(), *self._model.buffers()])
        with self._mode, ledger, torch.no_grad():
            ids = torch.zeros(num_rows, length, dtype=torch.int64)
            with (
                torch.autocast("cpu", self._autocast, enabled=self._autocast is not None),
                head_at(self._model, torch.arange(num_kept)),
            ):
                output = self._model(input_ids=ids, use_cache=True)
            logits_bytes = output.logits.nbytes
            ledger.retag(lambda tag, size: "logits" if size == logits_bytes else tag)
        states = sum(ledger.totals.values()) - ledger.totals["logits"]
        return StepMemory(
            gradients=0,
            saved=row_search.CACHED * states,
            logits=ledger.totals["logits"],
            workspace=ledger.peak - ledger.totals["logits"],
            operations=ledger.operations,
            heap=ledger.most_heap,
            mapped=ledger.most_mapped + row_search.CACHED * states,
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


def _not_countable(error: Exception) -> NotCountableError:
    """Return torch's error about values that fake tensors lack, in one line."""
    return NotCountableError(
        f"the memory of this model cannot be counted ({first_line(error)}); "
        "choose --micro-batch-tokens yourself"
    )


@contextlib.contextmanager
def _counting() -> Iterator[None]:
    """Let fake tensors compute experts, and keep torch from logging what it raises anyway."""
    from transformers.integrations import moe

    log, stock = logging.getLogger("torch._subclasses.fake_tensor"), moe._grouped_mm
    was_disabled, log.disabled = log.disabled, True
    moe._grouped_mm = _one_product  # type: ignore[assignment]  # of other argument names
    try:
        yield
    finally:
        log.disabled, moe._grouped_mm = was_disabled, stock


def _one_product(rows: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
    """Compute the product of each row and its expert: all rows and one expert, of the same size.

    Fake tensors know the grouped product in bfloat16 only.
    """
    with torch.autocast(rows.device.type, enabled=False):
        return rows.to(weight.dtype) @ weight[0]


def _make_fake(module: nn.Module) -> None:
    """Replace parameters and buffers on `meta` by fake ones; tied weights stay tied."""
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

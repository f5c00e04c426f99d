"""The gradients of micro-batches, recorded as CUDA graphs.

A micro-batch runs thousands of kernels of a few microseconds each, and Python takes several times
as long to launch them. A CUDA graph launches all of them at once
(https://pytorch.org/blog/accelerating-pytorch-with-cuda-graphs/). Its shapes and addresses are
fixed: trees are padded to shapes that many of them share, and copied to the graph's inputs.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from remora.runtime import memory
from remora.tree import attention, packing
from remora.tree.forward import answer_logits
from remora.tree.loss import loss_sum
from remora.tree.packing import MicroBatch, TokenTree

MAX_GRAPHS = 16
"""Shapes that are recorded, in the order of their arrival; others launch kernel by kernel."""


@dataclass
class _Shape:
    """The inputs of all micro-batches of a shape, on the device, and their graph."""

    packed: TokenTree
    num_supervised: Tensor  # [] float32
    loss: Tensor  # [] float32
    is_warm: bool = False
    graph: Any = None


class Graphs:
    """Computes gradients of micro-batches by CUDA graphs, the same that single kernels give.

    The first micro-batch of a shape is computed kernel by kernel, which sets up the libraries; the
    second one is recorded. Both need memory of their own. The very first one shows whether the
    model waits for the device, which cannot be recorded.
    """

    def __init__(self, adapted: Any, accelerator: Any, say: Callable[[str], None]) -> None:
        """Take a model whose trained parameters stay where they are.

        Args:
            adapted: The model.
            accelerator: accelerate's Accelerator for the device and the precision.
            say: Takes a sentence if the model cannot be recorded.
        """
        self._adapted, self._accelerator, self._say = adapted, accelerator, say
        self._is_tried, self._records = False, True
        self._parameters = [p for p in adapted.parameters() if p.requires_grad]
        self._gradients: list[Tensor] = []
        self._shapes: dict[tuple[int, ...], _Shape] = {}
        self._pool: Any = None

    def begin(self) -> None:
        """Set the gradients that the graphs add to to zero."""
        if not self._gradients:
            self._gradients = [torch.zeros_like(p) for p in self._parameters]
        else:
            torch._foreach_zero_(self._gradients)
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient

    def add_gradients(self, packed: MicroBatch, num_supervised: int) -> Tensor:
        """Add the gradients of a micro-batch in CPU memory; return its part of the mean loss."""
        assert isinstance(packed, TokenTree), "only trees are recorded"
        packed = packing.filled(packed)
        arrays = {name: x for name, x in vars(packed).items() if isinstance(x, Tensor)}
        sizes = tuple(map(len, arrays.values()))
        if sizes not in self._shapes:
            device = self._accelerator.device
            zero = torch.zeros((), dtype=torch.float32, device=device)
            self._shapes[sizes] = _Shape(packed.to(device), zero, zero.clone())
        shape = self._shapes[sizes]
        for name, array in arrays.items():
            getattr(shape.packed, name).copy_(array)
        shape.num_supervised.fill_(num_supervised)
        # Larger trees attend in blocks, and choosing those reads the mask.
        is_whole = attention.prefers_whole("cuda", packed.num_tokens, packed.num_tokens)
        recorded = sum(shape.graph is not None for shape in self._shapes.values())
        if shape.graph:
            shape.graph.replay()
        elif is_whole and not self._is_tried:
            self._try(shape)
        elif is_whole and shape.is_warm and self._records and recorded < MAX_GRAPHS:
            self._record(shape)
        else:
            self._compute(shape)
        shape.is_warm = True
        return shape.loss.clone()

    def clear(self) -> None:
        """Free the memory of all graphs; they are recorded again when they are needed."""
        self._shapes.clear()
        self._pool = None

    def _try(self, shape: _Shape) -> None:
        """Compute kernel by kernel, and see whether anything waits for the device."""
        before = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                self._compute(shape)
            finally:
                torch.cuda.set_sync_debug_mode(before)
        self._is_tried = True
        for warning in caught:
            if "synchronizing CUDA operation" not in str(warning.message):
                warnings.warn_explicit(
                    warning.message, warning.category, warning.filename, warning.lineno
                )
            elif self._records:
                self._give_up("it waits for the device")

    def _record(self, shape: _Shape) -> None:
        """Record and compute."""
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph, pool=self._pool):
                self._compute(shape)
        except RuntimeError as error:
            # The recording's end fails as well, and its error hides the first one.
            torch.cuda.set_stream(stream)
            if memory.is_exhausted(error.__context__ or error):
                raise torch.OutOfMemoryError("CUDA out of memory, in a recording") from error
            with contextlib.suppress(AttributeError, RuntimeError):  # left undone
                torch._C._cuda_endAllocateToPool(stream.device_index, self._pool)
                torch._C._cuda_releasePool(stream.device_index, self._pool)
            self._give_up(str(error.__context__ or error).strip().split("\n")[0])
            self._compute(shape)
        else:
            shape.graph = graph
            graph.replay()

    def _give_up(self, reason: str) -> None:
        self._records = False
        self._say(f"slower: CUDA graphs cannot record this model ({reason})")

    def _compute(self, shape: _Shape) -> None:
        with self._accelerator.autocast():
            logits = answer_logits(self._adapted, shape.packed)
        part = loss_sum(logits, shape.packed) / shape.num_supervised
        del logits
        self._accelerator.backward(part)
        shape.loss.copy_(part.detach())

"""The gradients of micro-batches, recorded as CUDA graphs.

A micro-batch is thousands of kernels of a few microseconds each, and it takes Python several times
as long to launch them. A CUDA graph launches all of them at once
(https://pytorch.org/blog/accelerating-pytorch-with-cuda-graphs/). Its shapes and addresses are
fixed: trees are filled up to shapes that many of them have, and copied to where the graph reads.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from remora import attention, memory, tree
from remora.config import Method
from remora.tree import TokenTree

MAX_GRAPHS = 32
"""Shapes whose graphs are kept, those used last."""


@dataclass
class _Shape:
    """Where the micro-batches of a shape lie on the device, and what their gradients take."""

    packed: TokenTree
    num_supervised: Tensor  # [] float32
    loss: Tensor  # [] float32
    graph: Any = None


def are_of_use(device: torch.device | str, method: Method, *, checkpointing: bool) -> bool:
    """Whether a run's micro-batches are computed by CUDA graphs.

    Not where whole models train: their gradients would lie there all the time. Nor with
    checkpointing, which looks at the state of the random numbers as it computes.
    """
    return str(device).startswith("cuda") and method != "full" and not checkpointing


class Graphs:
    """Computes gradients of micro-batches by CUDA graphs, bit for bit those of the kernels alone.

    The first micro-batch is computed kernel by kernel, which sets up the libraries, and shows if
    the model waits for the device, which cannot be recorded. After that each new shape is recorded,
    which takes about as long as it takes to launch its kernels.
    """

    def __init__(self, adapted: Any, accelerator: Any, say: Callable[[str], None]) -> None:
        """Take a model whose trained parameters stay where they are.

        Args:
            adapted: The model.
            accelerator: accelerate's Accelerator for the device and the precision.
            say: Told if the model cannot be recorded.
        """
        self._adapted, self._accelerator, self._say = adapted, accelerator, say
        self._is_tried, self._records = False, True
        self._parameters = [p for p in adapted.parameters() if p.requires_grad]
        self._gradients: list[Tensor] = []
        self._shapes: dict[tuple[int, ...], _Shape] = {}
        self._pool: Any = None

    def begin(self) -> None:
        """Let gradients be zero, where the graphs add to them."""
        if not self._gradients:
            self._gradients = [torch.zeros_like(p) for p in self._parameters]
        else:
            torch._foreach_zero_(self._gradients)
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient

    def add_gradients(self, packed: TokenTree, num_supervised: int) -> Tensor:
        """Add the gradients of a micro-batch on the processor; return its part of the mean loss."""
        packed = tree.filled(packed)
        arrays = {name: x for name, x in vars(packed).items() if isinstance(x, Tensor)}
        sizes = tuple(map(len, arrays.values()))
        shape = self._shapes.pop(sizes, None) or self._place(packed)
        self._shapes[sizes] = shape  # the one used last
        for name, array in arrays.items():
            getattr(shape.packed, name).copy_(array)
        shape.num_supervised.fill_(num_supervised)
        # What is larger attends in blocks, which are chosen by a look at the mask.
        is_whole = attention.prefers_whole("cuda", packed.num_tokens, packed.num_tokens)
        if is_whole and not self._is_tried:
            self._try(shape)
        elif is_whole and self._records:
            if shape.graph is None:
                self._record(shape)
            self._compute(shape) if shape.graph is None else shape.graph.replay()
        else:
            self._compute(shape)
        return shape.loss.clone()

    def clear(self) -> None:
        """Give the memory of all graphs back; they are recorded again when they are needed."""
        self._shapes.clear()
        self._pool = None

    def _place(self, packed: TokenTree) -> _Shape:
        """Make room for a new shape."""
        if len(self._shapes) == MAX_GRAPHS:
            del self._shapes[next(iter(self._shapes))]
        device = self._accelerator.device
        zero = torch.zeros((), dtype=torch.float32, device=device)
        return _Shape(packed.to(device), zero, zero.clone())

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
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            # A kernel is loaded when it is first launched, which the stricter modes forbid here.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="relaxed"):
                self._compute(shape)
        except RuntimeError as error:
            # The recording's end fails as well, and its error hides the first one.
            torch.cuda.set_stream(stream)
            if memory.is_exhausted(error.__context__ or error):
                raise torch.OutOfMemoryError("CUDA out of memory, in a recording") from error
            with contextlib.suppress(AttributeError, RuntimeError):  # what the end has left undone
                torch._C._cuda_endAllocateToPool(stream.device_index, self._pool)
                torch._C._cuda_releasePool(stream.device_index, self._pool)
            self._give_up(str(error.__context__ or error).strip().split("\n")[0])
        else:
            shape.graph = graph

    def _give_up(self, reason: str) -> None:
        self._records = False
        self._say(f"this model's kernels are launched one by one, which takes longer: {reason}")

    def _compute(self, shape: _Shape) -> None:
        with self._accelerator.autocast():
            logits = tree.answer_logits(self._adapted, shape.packed)
        part = tree.loss_sum(logits, shape.packed) / shape.num_supervised
        del logits
        self._accelerator.backward(part)
        shape.loss.copy_(part.detach())

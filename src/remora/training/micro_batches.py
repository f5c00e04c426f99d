"""An effective batch, computed in micro-batches that fit into memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from remora.data.prompt import TokenSequence
from remora.errors import ResourceError
from remora.planning import plan, timing
from remora.runtime import memory, sharding
from remora.runtime.process_group import ProcessGroup
from remora.runtime.reporter import Reporter
from remora.training.checkpoint import random_state, set_random_state
from remora.tree import layouts
from remora.tree.cuda_graphs import Graphs
from remora.tree.forward import answer_logits
from remora.tree.loss import loss_sum
from remora.tree.packing import MicroBatch

Result = TypeVar("Result")

LONG_SECONDS = 30.0
"""A slower micro-batch is not computed again to time it."""


class MicroBatches:
    """Computes effective batches in micro-batches, smaller ones after running out of memory.

    A step averages over the whole effective batch, whatever the micro-batches. A repeated step
    draws the same random numbers, so the run equals one that started with the smaller size.

    With sharded weights all processes compute equally many micro-batches: a process with fewer
    computes a row with weight zero. They check together whether memory suffices for the next
    micro-batch, and repeat the step together if it does not.
    """

    def __init__(
        self,
        adapted: Any,
        max_tokens: int,
        accelerator: Any,
        heaviest: plan.Heaviest | None,
        group: ProcessGroup,
        reporter: Reporter,
        *,
        graphs: bool = False,
    ) -> None:
        """Keep the model and how to compute it.

        Args:
            adapted: The model.
            max_tokens: Tokens to compute at once, at most.
            accelerator: accelerate's Accelerator for the device and the precision.
            heaviest: The batch that needs most memory, and how much; None to skip the checks.
            group: The processes that train together.
            reporter: Told when memory runs out.
            graphs: Whether to use CUDA graphs; not with sharded weights.
        """
        self.max_tokens = max_tokens
        self._adapted, self._accelerator, self._reporter = adapted, accelerator, reporter
        self._heaviest, self._group = heaviest, group
        self._bytes_per_token = heaviest.bytes_per_token if heaviest else 0.0
        self._said = False
        self._layout = layouts.of(adapted)
        self._is_sharded = sharding.has_shards(adapted)
        self._graphs = Graphs(adapted, accelerator, reporter.say) if graphs else None

    def add_gradients(self, batch: Sequence[TokenSequence]) -> tuple[float, int]:
        """Add this process's part of the gradients of an effective batch to none.

        Returns:
            The part of the mean loss of the batch's answer tokens, in nats, and how many those of
            the whole batch are. Parts add up: the mean is over all processes' rows.

        Raises:
            ResourceError: If memory does not suffice for its longest row alone.
        """
        num_supervised = sum(row.num_targets for row in batch)
        total = sum(row.weight * row.num_targets for row in batch)
        # Rows that share most are computed in one process.
        own = self._group.part(sorted(batch, key=lambda row: row.token_ids))
        if self._is_sharded:
            loss = self._repeat(batch, lambda: self._add_in_step(own, batch, total))
        elif own:
            loss = self._repeat(own, lambda: self._add_gradients(own, total))
        else:
            loss = 0.0
        return loss, num_supervised

    def try_heaviest(self) -> plan.Rates:
        """Compute the heaviest micro-batch and forget it; return the seconds for each token.

        The forward pass is timed by itself, as in scoring.

        Raises:
            ResourceError: If memory does not suffice for its longest row alone.
        """
        assert self._heaviest is not None
        rows = self._heaviest.rows
        self._adapted.train()
        before = random_state(self._accelerator.device)
        rates = self._repeat(rows, lambda: self._time_largest(rows))
        set_random_state(self._accelerator.device, before)
        self._adapted.zero_grad()
        return rates

    def _repeat(self, batch: Sequence[TokenSequence], compute: Callable[[], Result]) -> Result:
        before = random_state(self._accelerator.device)
        while True:
            try:
                return compute()
            except _NotEnoughError:
                pass
            except (RuntimeError, MemoryError) as error:
                if not memory.is_exhausted(error):
                    raise
                if self._is_sharded:  # the others wait in the middle of a layer
                    raise ResourceError(
                        "out of memory, and with sharded weights a step cannot be repeated; run "
                        "the same command again with --micro-batch-tokens "
                        f"{max(1, self.max_tokens // 2)}"
                    ) from error
            # Here the error is gone, and with it the tensors that its traceback held.
            self._adapted.zero_grad()
            if self._graphs:
                self._graphs.clear()
            memory.release(self._accelerator.device)
            self._halve(batch)
            set_random_state(self._accelerator.device, before)

    def _halve(self, batch: Sequence[TokenSequence]) -> None:
        longest = max(len(row.token_ids) for row in batch)
        largest = max(
            packed.num_tokens for packed in layouts.split(self._layout, batch, self.max_tokens)
        )
        if largest <= longest:
            raise ResourceError(
                f"out of memory: a single row of {longest} tokens does not fit; use a smaller "
                "model, --checkpointing on, or a smaller --max-length"
            )
        self.max_tokens = max(longest, largest // 2)
        if not self._said:
            self._reporter.say(
                f"out of memory: micro-batches now have at most {self.max_tokens:,} tokens, halved "
                "again if needed; the effective batch stays the same"
            )
            self._said = True

    def _add_gradients(self, rows: Sequence[TokenSequence], total: float) -> float:
        trees = layouts.split(self._layout, rows, self.max_tokens)
        if self._graphs:
            self._graphs.begin()
        return float(sum(self._backward(packed, total) for packed in trees))

    def _add_in_step(
        self, own: Sequence[TokenSequence], batch: Sequence[TokenSequence], total: float
    ) -> float:
        """Do the same in as many micro-batches as the process with the most."""
        trees = layouts.split(self._layout, own, self.max_tokens)
        num_trees = max(self._group.gather(len(trees)))
        loss = float(sum(self._backward(packed, total) for packed in trees))
        shortest = min(batch, key=lambda row: len(row.token_ids))
        for _ in range(num_trees - len(trees)):
            self._backward(layouts.build(self._layout, [shortest]), total, counts=False)
        return loss

    def _time_largest(self, batch: Sequence[TokenSequence]) -> plan.Rates:
        trees = layouts.split(self._layout, batch, self.max_tokens)
        largest = max(trees, key=lambda packed: packed.num_tokens)
        if self._graphs:
            self._graphs.begin()
        # The first pass sets up the libraries; on a GPU the second one is recorded.
        for _ in range(3 if self._accelerator.device.type == "cuda" else 2):
            began = time.perf_counter()
            float(self._backward(largest, largest.num_supervised_tokens))
            seconds = time.perf_counter() - began
            if seconds > LONG_SECONDS:  # of which setting up is a small part
                break
        began = time.perf_counter()
        self._adapted.eval()
        with torch.inference_mode(), self._accelerator.autocast():
            float(answer_logits(self._adapted, largest.to(self._accelerator.device))[0, 0])
        self._adapted.train()
        forward = time.perf_counter() - began
        scoring = timing.SEARCH_COST * forward
        return plan.Rates(seconds / largest.num_tokens, scoring / largest.num_tokens)

    def _backward(self, packed: MicroBatch, total: float, *, counts: bool = True) -> Tensor:
        """Add the gradients of a micro-batch; return its part of the mean loss, [].

        `total` is the weight of all answer tokens of the effective batch.
        """
        device = self._accelerator.device
        if self._graphs:
            return self._graphs.add_gradients(packed, total)
        if self._heaviest:
            memory.keep_within(device, self._heaviest.limit_bytes)
        self._refuse_to_exhaust(int(self._bytes_per_token * packed.num_tokens))
        packed = packed.to(device)
        with self._accelerator.autocast():
            logits = answer_logits(self._adapted, packed)
        part = loss_sum(logits, packed) / total
        if not counts:
            part = part * 0
        del logits  # the largest array; its gradient is there already
        self._accelerator.backward(part)
        return part.detach()

    def _refuse_to_exhaust(self, needed: int) -> None:
        """Fail before memory is exhausted: with sharded weights, in all processes.

        Raises:
            torch.OutOfMemoryError: If memory does not suffice.
            _NotEnoughError: The same in all processes.
        """
        device = self._accelerator.device
        if not self._is_sharded or device.type != "cpu":
            memory.refuse_to_exhaust(device, needed)
            return
        suffices = True
        try:
            memory.refuse_to_exhaust(device, needed)
        except torch.OutOfMemoryError:
            suffices = False
        if self._group.any(not suffices):
            raise _NotEnoughError


class _NotEnoughError(Exception):
    """Memory does not suffice in some process, and none has started."""

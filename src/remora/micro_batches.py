"""An effective batch, computed in parts that fit into memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from remora import memory, plan, tree
from remora.checkpoint import random_state, set_random_state
from remora.errors import ResourceError
from remora.progress import Reporter
from remora.prompt import TokenSequence
from remora.ranks import Ranks

Result = TypeVar("Result")


class MicroBatches:
    """Computes effective batches in micro-batches, smaller ones once memory has run out.

    What a step averages over stays the effective batch, and the random numbers of a step that is
    repeated are those it had, so the run is the one that would have begun with the smaller size.
    """

    def __init__(
        self,
        adapted: Any,
        max_tokens: int,
        accelerator: Any,
        heaviest: plan.Heaviest | None,
        ranks: Ranks,
        reporter: Reporter,
    ) -> None:
        self.max_tokens = max_tokens
        self._adapted, self._accelerator, self._reporter = adapted, accelerator, reporter
        self._heaviest, self._ranks = heaviest, ranks
        self._bytes_per_token = heaviest.bytes_per_token if heaviest else 0.0
        self._said = False

    def add_gradients(self, batch: Sequence[TokenSequence]) -> tuple[float, int]:
        """Add this process's part of the gradients of an effective batch to none.

        Returns:
            The part of the mean loss of the batch's answer tokens, in nats, and how many those of
            the whole batch are. Parts add up: the mean is over all processes' rows.

        Raises:
            ResourceError: If the memory does not suffice for its longest row alone.
        """
        num_supervised = sum(len(row.token_ids) - row.answer_start for row in batch)
        # Rows that share most are computed in one process.
        own = self._ranks.part(sorted(batch, key=lambda row: row.token_ids))
        if not own:
            return 0.0, num_supervised
        return self._repeat(own, lambda: self._add_gradients(own, num_supervised)), num_supervised

    def try_heaviest(self) -> float:
        """Compute the heaviest micro-batch and forget it; return the seconds for each token.

        Raises:
            ResourceError: If the memory does not suffice for its longest row alone.
        """
        assert self._heaviest is not None
        rows = self._heaviest.rows
        self._adapted.train()
        before = random_state(self._accelerator.device)
        seconds = self._repeat(rows, lambda: self._time_largest(rows))
        set_random_state(self._accelerator.device, before)
        self._adapted.zero_grad()
        return seconds

    def _repeat(self, batch: Sequence[TokenSequence], compute: Callable[[], Result]) -> Result:
        before = random_state(self._accelerator.device)
        while True:
            try:
                return compute()
            except (RuntimeError, MemoryError) as error:
                if not memory.is_exhausted(error):
                    raise
            # Here the error and the tensors that its traceback holds are gone.
            self._adapted.zero_grad()
            memory.release(self._accelerator.device)
            self._halve(batch)
            set_random_state(self._accelerator.device, before)

    def _halve(self, batch: Sequence[TokenSequence]) -> None:
        longest = max(len(row.token_ids) for row in batch)
        largest = max(packed.num_tokens for packed in tree.split(batch, self.max_tokens))
        if largest <= longest:
            raise ResourceError(
                f"the memory does not suffice for a single row of {longest} tokens; choose a "
                "smaller model, --checkpointing on, or a smaller --max-length"
            )
        self.max_tokens = max(longest, largest // 2)
        if not self._said:
            self._reporter.say(
                f"the memory ran out: from here on at most {self.max_tokens:,} tokens at once, "
                "halved again where needed; the effective batch stays the same"
            )
            self._said = True

    def _add_gradients(self, rows: Sequence[TokenSequence], num_supervised: int) -> float:
        trees = tree.split(rows, self.max_tokens)
        return sum(self._backward(packed, num_supervised) for packed in trees)

    def _time_largest(self, batch: Sequence[TokenSequence]) -> float:
        trees = tree.split(batch, self.max_tokens)
        largest = max(trees, key=lambda packed: packed.num_tokens)
        began = time.perf_counter()
        self._backward(largest, largest.num_supervised_tokens)
        return (time.perf_counter() - began) / largest.num_tokens

    def _backward(self, packed: tree.TokenTree, num_supervised: int) -> float:
        """Add the gradients of a micro-batch; return its part of the mean loss."""
        device = self._accelerator.device
        if self._heaviest:
            memory.keep_within(device, self._heaviest.limit_bytes)
        memory.refuse_to_exhaust(device, int(self._bytes_per_token * packed.num_tokens))
        packed = packed.to(device)
        with self._accelerator.autocast():
            logits = tree.answer_logits(self._adapted, packed)
        part = tree.loss_sum(logits, packed) / num_supervised
        del logits  # the largest array; its gradient is there already
        self._accelerator.backward(part)
        return float(part.detach())

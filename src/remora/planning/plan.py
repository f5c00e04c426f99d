"""The plan of a run: its memory and time, its settings and why."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, NamedTuple

from remora.config import TrainConfig
from remora.data.prompt import TokenSequence
from remora.formatting import spoken_seconds
from remora.tree.layouts import Layout

CUDA_CONTEXT_BYTES = 850_000_000
CUDA_WORKSPACE_BYTES = 80_000_000
"""A CUDA context with the kernels that a run loads, and cuBLAS's workspaces. Measured on an H100;
docs/log.md has the figures."""


@dataclass(frozen=True, kw_only=True)
class Components:
    """Peak memory by component, in bytes."""

    base: int  # the frozen model with its buffers
    adapter: int  # the trainable parameters, in float32
    best: int  # a copy of those that validated best
    gradients: int  # those in memory at the peak
    optimizer: int  # two float32 moments of each trained weight
    saved_activations: int  # kept by the forward pass for the backward pass
    logits: int  # or their gradient
    workspace: int
    graphs: int  # memory of recorded CUDA graphs; 0 if none are recorded
    fragments: int  # freed, but held by the allocator in pieces
    runtime: int  # Python, its libraries and their kernels; on CUDA the context and workspaces

    @property
    def peak(self) -> int:
        """All of it together."""
        return sum(vars(self).values())


@dataclass(frozen=True, kw_only=True)
class Heaviest:
    """The effective batch whose micro-batch needs most memory."""

    rows: list[TokenSequence]
    bytes_per_token: float
    limit_bytes: int  # of the process on CPU; above it freed memory is given back


class Rates(NamedTuple):
    """Seconds for each token."""

    training: float  # forward and backward
    scoring: float  # forward only


@dataclass(frozen=True, kw_only=True)
class Duration:
    """The time of a run, or of the rest of one, in seconds."""

    training: float  # optimizer steps
    validation: float  # evaluations on validation rows, which choose the weights
    test: float  # scoring test and validation rows with the weights that were chosen

    @property
    def total(self) -> float:
        """All of it."""
        return self.training + self.validation + self.test

    def to_dict(self) -> dict[str, float]:
        """Return the parts by the names that they have in a plan."""
        return {
            "seconds": self.training,
            "validation_seconds": self.validation,
            "test_seconds": self.test,
        }

    def __str__(self) -> str:
        """Return it in words, without the parts that take no time."""
        parts = {
            "training": self.training,
            "validation": self.validation,
            "scoring held-out rows": self.test,
        }
        told = [f"{spoken_seconds(part)} {name}" for name, part in parts.items() if part >= 0.5]
        return f"{spoken_seconds(self.total)} ({', '.join(told)})" if told else "1 s"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The plan of a run: its memory and time, its settings and why."""

    model: str
    device: str
    is_cuda: bool
    precision: str
    parameters: int
    trainable: int
    adapter_bytes_32: int
    adapter_bytes_16: int
    num_rows: int
    prefix_tokens: int  # that all rows share
    message_tokens: float  # mean over rows, like the next ones
    answer_tokens: float
    padded_tokens: float  # computed for each row if batches are padded to their longest
    tree_tokens: float  # computed for each row in micro-batches of the chosen size
    operations_per_example: float
    num_steps: int
    batch_size: int
    run_tokens: float  # computed by all steps, forward and backward
    num_evaluations: int  # while training, unless it stops early
    eval_rows: int  # validation rows in each of them
    eval_tokens: float  # computed for each of these rows, forward only
    num_scored_rows: int  # test and validation rows, scored with the weights that were chosen
    scored_tokens: float  # computed for each of these rows, forward only; estimated
    micro_batch_tokens: int
    largest_micro_batch: int  # tokens of the largest one
    checkpointing: bool
    layout: Layout = "tree"
    shard: bool  # whether the weights are sharded over several processes
    why: str
    memory: Components
    available_bytes: int | None
    disk_bytes: int  # of the run directory, at most
    free_disk_bytes: int  # where it will be
    download_bytes: int  # 0 if the base model is on this machine
    seconds: float | None  # of all steps
    validation_seconds: float | None
    test_seconds: float | None  # of scoring test and validation rows
    seconds_are: str
    alternatives: tuple[str, ...]  # that would fit, the cheapest first; empty if the run fits
    active_parameters: int | None = None  # that a token uses, in a mixture of experts

    @property
    def estimated(self) -> Duration | None:
        """The time of the run, None if it was not estimated."""
        if self.seconds is None or self.validation_seconds is None or self.test_seconds is None:
            return None
        return Duration(
            training=self.seconds, validation=self.validation_seconds, test=self.test_seconds
        )

    def duration(
        self,
        seconds_per_token: Rates,
        *,
        num_processes: int = 1,
        num_steps: int | None = None,
        num_scored: int | None = None,
    ) -> Duration:
        """Return the time of the run, or of its last steps.

        Args:
            seconds_per_token: Of training and of scoring, of one process.
            num_processes: Those that share the work.
            num_steps: Steps that are left; by default all.
            num_scored: Rows that are scored at the end; by default those of `remora train`.
        """
        steps = self.num_steps if num_steps is None else num_steps
        rows = self.num_scored_rows if num_scored is None else num_scored
        num_evaluations = -(-steps * self.num_evaluations // self.num_steps)  # rounded up
        training, scoring = (rate / num_processes for rate in seconds_per_token)
        return Duration(
            training=self.run_tokens * steps / self.num_steps * training,
            validation=num_evaluations * self.eval_rows * self.eval_tokens * scoring,
            test=rows * self.scored_tokens * scoring,
        )

    @property
    def peak_bytes(self) -> int:
        """Memory at its peak, all of the process or device."""
        return self.memory.peak

    @property
    def measurable_bytes(self) -> int:
        """The part of the peak that `memory.peak_bytes` measures: without CUDA's context."""
        return self.peak_bytes - (CUDA_CONTEXT_BYTES if self.is_cuda else 0)

    @property
    def fits_disk(self) -> bool:
        """Whether there is room for the run directory."""
        return self.disk_bytes <= self.free_disk_bytes

    @property
    def fits(self) -> bool:
        """Whether the peak is within the available memory, as far as that is known."""
        return self.available_bytes is None or self.peak_bytes <= self.available_bytes

    def applied_to(self, settings: TrainConfig) -> TrainConfig:
        """Return the settings with the plan's choices."""
        return dataclasses.replace(
            settings,
            micro_batch_tokens=self.micro_batch_tokens,
            checkpointing="on" if self.checkpointing else "off",
            shard="on" if self.shard else "off",
            layout=self.layout,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON."""
        return {**dataclasses.asdict(self), "peak_bytes": self.peak_bytes, "fits": self.fits}

"""Plans a run before it begins: the settings that fit, its memory and its time."""

from __future__ import annotations

import copy
import dataclasses
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from remora.config import PlanConfig, TrainConfig
from remora.config.several_labels import settled
from remora.data.dataset import Dataset, load_data
from remora.data.prompt import Prompt, TokenSequence, common_prefix_length
from remora.formatting import first_line
from remora.models import hub, loading
from remora.planning import timing
from remora.planning.alternatives import alternatives
from remora.planning.plan import Components, Heaviest, Plan
from remora.planning.process_memory import ProcessMemory
from remora.planning.survey import Survey, effective_batches
from remora.runtime import memory
from remora.runtime.device import (
    KNOWN_DEVICES,
    Hardware,
    Precision,
    choose_device,
    choose_precision,
    hardware_here,
)
from remora.tree import layouts
from remora.tree.packing import MicroBatch

MICRO_BATCH_TOKENS = (2048, 1024, 512, 256, 128)
"""Sizes to try, largest first, if the user gives none."""

ROWS_ON_CPU = 512
"""Largest size to try for padded rows on a CPU. They share nothing, so that more at once saves no
computing, and takes memory; docs/benchmarks.md has a measurement."""

RECOMPUTING_COST = 4 / 3
"""Checkpointing computes forward, forward and backward instead of forward and backward."""


def make_plan(settings: PlanConfig, *, say: Callable[[str], None] = lambda _: None) -> Plan:
    """Plan the run that `remora train` would make with these settings, on this or another machine.

    Args:
        settings: The run's settings, and the device to plan for.
        say: Takes a sentence for the user.

    Raises:
        RemoraError: If the settings, the data or the model cannot be used; see `remora.errors`.
    """
    dataset = load_data(settings)
    settings = settled(settings, is_multi_label=dataset.multi_label)
    elsewhere = KNOWN_DEVICES.get(settings.device)
    if elsewhere is None:
        here = choose_device(settings.device)  # type: ignore[arg-type]  # the others are known
        hardware = hardware_here(here)
    else:
        here, hardware = torch.device("cuda"), elsewhere
    precision = choose_precision(
        here, settings.precision, hardware=hardware, trains_base=settings.method == "full"
    )
    folder = hub.find(settings.model, weights=False)
    prompt = loading.load_prompt(settings, dataset.labels, folder)
    planner = Planner(
        settings, dataset, prompt, folder, precision, hardware, settings.memory_bytes()
    )
    made = planner.make()
    operations = planner.operations(made)
    if elsewhere is not None:
        time = timing.published(operations, made, hardware, precision, settings.method)
    else:
        say("measuring the speed of one layer")
        packed = planner.largest_tree(min(made.micro_batch_tokens, timing.MAX_TOKENS))
        config = loading.load_config(folder, prompt.classes)
        try:
            time = timing.measured(operations, made, config, settings, precision, packed, here)
        except (
            *(RuntimeError, ValueError, TypeError, LookupError, AttributeError, ImportError),
        ) as error:
            if memory.is_exhausted(error):
                raise
            say(f"no time is estimated: one layer cannot be computed alone ({first_line(error)})")
            time = {}
    return dataclasses.replace(made, **time)


class Planner:
    """Makes the plan of a run: chooses settings that fit, and says what they need."""

    def __init__(
        self,
        settings: TrainConfig,
        dataset: Dataset,
        prompt: Prompt,
        folder: Path,
        precision: Precision,
        hardware: Hardware,
        memory_bytes: int | None = None,
        batches: list[list[TokenSequence]] | None = None,
        num_processes: int | None = None,
    ) -> None:
        """Build the model without weights, and survey the rows.

        Args:
            settings: The run's settings.
            dataset: Its rows.
            prompt: How they are asked.
            folder: Where the base model's configuration lies.
            precision: What is computed in.
            hardware: What it is computed on.
            memory_bytes: Memory of each device to plan for; None to use what is free here.
            batches: The rows' effective batches, if they are known.
            num_processes: Those that train together, one for each device; by default as many as
                the settings say.
        """
        self.settings, self.hardware = settings, hardware
        self.num_processes = num_processes or settings.devices
        self._dataset, self._prompt, self._folder = dataset, prompt, folder
        self._precision = precision
        self._num_steps = settings.num_steps(len(dataset.train))
        if not batches:
            drawn = {"batch_size": settings.batch_size, "seed": settings.seed}
            batches = effective_batches(dataset, prompt, self._num_steps, **drawn)
        self._model_config = loading.load_config(folder, prompt.classes)
        kind = loading.model_class(self._model_config)
        self.layout = layouts.choose(settings.layout, kind, self._model_config)
        self._survey = Survey(batches, self.layout)
        self.memory = ProcessMemory(
            settings,
            dataset,
            prompt,
            self._survey,
            self._model_config,
            precision,
            hardware,
            layout=self.layout,
            memory_bytes=memory_bytes or hardware.memory_bytes,
            num_processes=self.num_processes,
        )

    def make(self) -> Plan:
        """Choose the cheapest settings that fit, or list alternatives if none does."""
        settings, several = self.settings, self.num_processes
        can_shard = several > 1 and self.memory.sizes is not None
        sharded = can_shard and (settings.shard == "on" or settings.method == "full")
        size, checkpointing, fits = self.choose(several if sharded else 1)
        if can_shard and not sharded and not fits:
            in_parts = self.choose(several)
            if in_parts[2]:
                sharded, (size, checkpointing, fits) = True, in_parts
        why = self._why(size, checkpointing, fits)
        if sharded:
            cause = "as the base does not fit on one device"
            if settings.shard == "on":
                cause = "as requested"
            elif settings.method == "full":
                cause = "as all of them train"
            why += f"; weights sharded over {several} processes, {cause}"
        if self.memory.uncountable:
            cause = self.memory.uncountable.partition(";")[0]
            why += (
                f"; estimated, since {cause}: training computes the heaviest micro-batch first to "
                "see that it fits"
            )
        return self._plan(size, checkpointing, several if sharded else 1, why)

    def heaviest(self, made: Plan) -> Heaviest:
        """Return the batch that the training loop should try first."""
        size = made.micro_batch_tokens
        rows, trees = max(
            self._survey.trees(size),
            key=lambda batch: max(packed.num_tokens for packed in batch[1]),
        )
        step = self.memory.step(size, made.checkpointing)
        largest = max(packed.num_tokens for packed in trees)
        return Heaviest(
            rows=rows,
            bytes_per_token=(step.saved + step.logits + step.workspace) / largest,
            limit_bytes=made.peak_bytes - made.memory.fragments // 3,
        )

    def operations(self, made: Plan) -> float:
        """Return the floating-point operations of the run's training steps."""
        return made.operations_per_example * self._examples

    def largest_tree(self, size: int) -> MicroBatch:
        """Return the longest of the micro-batches of at most `size` tokens."""
        return self._survey.extremes(size).longest

    def choose(self, num_parts: int) -> tuple[int, bool, bool]:
        """Return the cheapest micro-batch size and checkpointing, and whether they fit.

        Args:
            num_parts: Processes that the weights are sharded over; 1 if they are not.
        """
        sizes = self._sizes
        either = (False, True) if self.memory.can_checkpoint else (False,)
        choices = {"auto": either, "on": (True,), "off": (False,)}[self.settings.checkpointing]
        least = (sizes[-1], choices[-1])

        def fits(size: int, checkpointing: bool) -> bool:
            return self.memory.fits(self.memory.components(size, checkpointing, num_parts))

        if self.memory.are_weights_too_large(num_parts):
            return *least, False
        if fits(sizes[0], choices[0]):
            return sizes[0], choices[0], True
        if not fits(*least):
            return *least, False
        # Of each kind the largest that fits; the cheaper of both.
        best: tuple[float, int, bool] | None = None
        for checkpointing in choices:
            for size in sizes:
                if fits(size, checkpointing):
                    recomputing = RECOMPUTING_COST if checkpointing else 1
                    cost = self._survey.tree_tokens(size) * recomputing
                    best = min(best or (math.inf, *least), (cost, size, checkpointing))
                    break
        return (*least, False) if best is None else (*best[1:], True)

    @property
    def _sizes(self) -> tuple[int, ...]:
        """Sizes of micro-batches to choose from, largest first."""
        if (given := self.settings.micro_batch_tokens) is not None:
            return (given,)
        is_small = self.layout == "rows" and self.hardware.type == "cpu"
        return tuple(size for size in MICRO_BATCH_TOKENS if not is_small or size <= ROWS_ON_CPU)

    def changed(self, **change: Any) -> Planner:
        """Return a planner of the same run with some settings changed."""
        settings = dataclasses.replace(self.settings, **change)
        if change.keys() <= {"micro_batch_tokens", "checkpointing"}:  # the counts are the same
            other = copy.copy(self)
            other.settings = settings
            return other
        return Planner(
            settings,
            self._dataset,
            self._prompt,
            self._folder,
            choose_precision(
                torch.device(self.hardware.type),
                settings.precision,
                hardware=self.hardware,
                trains_base=settings.method == "full",
            ),
            self.hardware,
            self.memory.available,
            batches=self._survey.batches,
            num_processes=self.num_processes,
        )

    def _why(self, size: int, checkpointing: bool, fits: bool) -> str:
        if not fits:
            return "the smallest that the settings allow, which does not fit"
        if self.settings.micro_batch_tokens is not None:
            return "micro-batch size as requested"
        if size == self._sizes[0] and not checkpointing:
            return "memory suffices without checkpointing"
        if checkpointing and self.settings.checkpointing == "auto":
            smaller = "trees that share less" if self.layout == "tree" else "smaller micro-batches"
            return f"without checkpointing it would not fit, or only in {smaller}"
        return "larger micro-batches do not fit"

    @property
    def _examples(self) -> int:
        """Rows that the run computes, counted once for each time."""
        per_epoch = math.ceil(len(self._dataset.train) / self.settings.batch_size)
        epochs, rest = divmod(self._num_steps, per_epoch)
        return epochs * len(self._dataset.train) + rest * self.settings.batch_size

    def _plan(self, size: int, checkpointing: bool, num_parts: int, why: str) -> Plan:
        components = self.memory.components(size, checkpointing, num_parts)
        counts, tree_tokens = self.memory.counts, self._survey.tree_tokens(size)
        longest = self.largest_tree(size)
        operations = self.memory.step(size, checkpointing).operations / longest.num_tokens
        return Plan(
            model=self.settings.model,
            device=self.hardware.name,
            is_cuda=self.hardware.type == "cuda",
            precision=str(self._precision),
            parameters=counts.total,
            active_parameters=counts.active,
            trainable=counts.trainable,
            adapter_bytes_32=4 * counts.trainable,
            adapter_bytes_16=2 * counts.trainable,
            num_rows=len(self._dataset.train),
            **self._row_tokens(),
            tree_tokens=tree_tokens,
            operations_per_example=operations * tree_tokens,
            num_steps=self._num_steps,
            batch_size=self.settings.batch_size,
            run_tokens=tree_tokens * self._examples,
            **self._held_out(),
            micro_batch_tokens=size,
            largest_micro_batch=longest.num_tokens,
            checkpointing=checkpointing,
            layout=self.layout,
            shard=num_parts > 1,
            why=why,
            memory=components,
            available_bytes=self.memory.available,
            # The trained weights in float32, and checkpoints with four arrays of their size: the
            # weights, the best ones, two moments. While one is saved, the previous one still
            # exists.
            disk_bytes=2 * (1 + 4) * 4 * counts.trainable,
            free_disk_bytes=_free_bytes(self.settings.output),
            download_bytes=self._download_bytes(),
            seconds=None,
            validation_seconds=None,
            test_seconds=None,
            seconds_are="not estimated",
            alternatives=self._alternatives(components),
        )

    def _row_tokens(self) -> dict[str, Any]:
        """Return the means over rows of the tokens of their parts, by the names of `Plan`."""
        rows, num_rows = self._survey.rows, self._survey.num_rows
        num_windows = len(rows) / num_rows  # of a row
        prefix = min(common_prefix_length(rows[0].token_ids, row.token_ids) for row in rows)
        stems = sum(row.answer_start for row in rows) / num_rows
        lengths = sum(len(row.token_ids) for row in rows) / num_rows
        padded = sum(
            len(batch) * max(len(row.token_ids) for row in batch) for batch in self._survey.batches
        )
        return {
            "prefix_tokens": prefix,
            "message_tokens": stems - num_windows * prefix,
            "answer_tokens": lengths - stems,
            "padded_tokens": padded / num_rows,
        }

    def _held_out(self) -> dict[str, Any]:
        """Return how many rows are scored and the tokens of each, by the names of `Plan`."""
        settings, dataset = self.settings, self._dataset
        num_train, num_validation = len(dataset.train), len(dataset.validation)
        eval_steps = settings.steps_between_evaluations(num_train)
        num_seen = self._examples / len(dataset.labels)
        width = self._model_config.get_text_config().hidden_size
        tokens, num_windows = self._row_tokens(), len(self._survey.rows) / self._survey.num_rows
        answer_tokens = tokens["answer_tokens"] / num_windows
        evaluated, scored = (
            num_windows * nodes
            for nodes in timing.label_nodes(
                self._prompt.answers, answer_tokens, num_seen * width, settings.tolerance
            )
        )
        return {
            "num_evaluations": math.ceil(self._num_steps / eval_steps) if num_validation else 0,
            "eval_rows": settings.num_eval_rows(num_train, num_validation),
            "eval_tokens": tokens["message_tokens"] + evaluated,
            "num_scored_rows": num_validation + (len(dataset.test) if dataset.test else 0),
            "scored_tokens": tokens["message_tokens"] + scored,
        }

    def _download_bytes(self) -> int:
        """Return the bytes of the base model's weights, 0 if they are here."""
        if any(self._folder.glob("*.safetensors")):
            return 0
        dtype = getattr(self._model_config, "dtype", None)
        is_wide = not isinstance(dtype, torch.dtype) or dtype is torch.float32
        return self.memory.counts.total * (4 if is_wide else 2)

    def _alternatives(self, components: Components) -> tuple[str, ...]:
        return () if self.memory.fits(components) else tuple(alternatives(self, components))


def _free_bytes(folder: Path) -> int:
    """Return the bytes that are free where a folder is, or would be made."""
    present = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(present).free

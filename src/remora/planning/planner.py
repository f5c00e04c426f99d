"""Makes the plan of a run: whether it fits, how long it takes, and which settings it takes."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from remora.config import PlanConfig, TrainConfig
from remora.data.dataset import Dataset, load_data
from remora.data.prompt import Prompt, TokenSequence, common_prefix_length
from remora.errors import ConfigError
from remora.formatting import spoken_bytes
from remora.models import hub, loading, lora, quantize
from remora.models.loading import load_prompt
from remora.planning import allocator, step_memory, timing
from remora.planning.plan import (
    CUDA_CONTEXT_BYTES,
    CUDA_WORKSPACE_BYTES,
    Components,
    Heaviest,
    Plan,
)
from remora.planning.survey import effective_batches
from remora.runtime import memory, sharding
from remora.runtime.device import (
    KNOWN_DEVICES,
    Hardware,
    Precision,
    choose_device,
    choose_precision,
    hardware_here,
)
from remora.tree import packing, scoring
from remora.tree.packing import TokenTree

MICRO_BATCH_TOKENS = (2048, 1024, 512, 256, 128)
"""Sizes that are tried, as many as needed, where the user gives none."""

RECOMPUTING_COST = 4 / 3
"""Checkpointing computes forward, forward and backward instead of forward and backward."""


def make_plan(settings: PlanConfig, *, say: Callable[[str], None] = lambda _: None) -> Plan:
    """Plan the run that `remora train` would make with these settings, on this or another machine.

    Raises:
        RemoraError: The settings, the data or the model; see `remora.errors`.
    """
    dataset = load_data(settings)
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
    prompt = load_prompt(settings, dataset.labels, folder)
    planner = Planner(
        settings, dataset, prompt, folder, precision, hardware, settings.memory_bytes()
    )
    made = planner.make()
    operations = planner.operations(made)
    if elsewhere is not None:
        seconds = timing.published(operations, hardware, precision)
    else:
        say("measuring the speed of one layer")
        packed = planner.largest_tree(min(made.micro_batch_tokens, timing.MAX_TOKENS))
        seconds = timing.measured(
            operations, loading.load_config(folder), settings, precision, packed, here
        )
    return dataclasses.replace(made, **seconds)


class Planner:
    """Makes the plan of a run."""

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
        """Take a run's parts.

        Args:
            settings: The run's settings.
            dataset: Its rows.
            prompt: How they are asked.
            folder: Where the base model's configuration lies.
            precision: What is computed in.
            hardware: What it is computed on.
            memory_bytes: Memory of each device to plan for; None for what is here.
            batches: The rows' batches, where they are known.
            num_processes: Those that train together, one a device; by default as the settings say.
        """
        self._settings, self._precision, self._hardware = settings, precision, hardware
        self._folder, self._dataset, self._prompt = folder, dataset, prompt
        self._model_config = loading.load_config(folder)
        self._num_processes = num_processes or settings.devices
        self._num_steps = settings.num_steps(len(dataset.train))
        self._given_bytes = memory_bytes or hardware.memory_bytes
        self._batches = batches or effective_batches(dataset, prompt, settings, self._num_steps)
        adapted = self._adapted()
        self._counts = lora.count_parameters(adapted)
        self._base_bytes = sum(
            t.numel() * t.element_size()
            for t in [*adapted.parameters(), *adapted.buffers()]
            if not t.requires_grad
        )
        in_float32 = [4 * p.numel() for p in adapted.parameters() if p.requires_grad]
        self._trainable_in_heap = sum(b for b in in_float32 if b < allocator.MAPPED_BYTES)
        self._sizes = self._sizes_of(adapted)
        self._skeleton = step_memory.Skeleton(
            adapted, autocast=precision.autocast, device=hardware.type
        )
        self._count = functools.cache(self._count_step)
        self._scoring = functools.cache(self._count_scoring)

    def _sizes_of(self, adapted: Any) -> sharding.Sizes | None:
        """Return how large the weights are that can be sharded, None where there are none."""
        settings = self._settings
        if settings.method == "qlora" or settings.shard == "off":
            return None
        try:
            return sharding.sizes(adapted)
        except ConfigError:
            if settings.shard == "on":
                raise
            return None

    @functools.cached_property
    def _runtime(self) -> int:
        """What is used beside the model; first asked for when a count has imported it."""
        if self._hardware.type == "cuda":
            return CUDA_CONTEXT_BYTES + CUDA_WORKSPACE_BYTES
        memory.trim()
        kernels = 0 if self._precision.autocast is None else allocator.KERNEL_BYTES
        return memory.used_bytes() + kernels

    @functools.cached_property
    def _available(self) -> int | None:
        if self._given_bytes is not None:
            return self._given_bytes
        free = memory.free_bytes(torch.device(self._hardware.type))
        if free is None or self._hardware.type == "cuda":
            return free
        return free + memory.used_bytes()

    def _adapted(self) -> Any:
        with torch.random.fork_rng():
            base = loading.load_empty(
                self._model_config,
                self._precision.base,
                quantized=self._settings.method == "qlora",
            )
            return lora.adapt(base, self._settings)

    @functools.cached_property
    def _sequences(self) -> list[TokenSequence]:
        return [row for batch in self._batches for row in batch]

    def make(self) -> Plan:
        """Choose the settings that fit and cost least, and say what would where none fits."""
        settings, several = self._settings, self._num_processes
        can_shard = several > 1 and self._sizes is not None
        sharded = can_shard and (settings.shard == "on" or settings.method == "full")
        size, checkpointing, fits = self._choose(several if sharded else 1)
        if can_shard and not sharded and not fits:
            in_parts = self._choose(several)
            if in_parts[2]:
                sharded, (size, checkpointing, fits) = True, in_parts
        why = self._why(size, checkpointing, fits)
        if sharded:
            cause = "as the base does not fit on one device"
            if settings.shard == "on":
                cause = "as asked for"
            elif settings.method == "full":
                cause = "as all of them train"
            why += f"; weights sharded over {several} processes, {cause}"
        return self._plan(size, checkpointing, several if sharded else 1, why)

    def _choose(self, num_parts: int) -> tuple[int, bool, bool]:
        """Return tokens at once and checkpointing, and whether they fit, of weights in parts."""
        settings = self._settings
        given = settings.micro_batch_tokens
        sizes = MICRO_BATCH_TOKENS if given is None else (given,)
        choices = {"auto": (False, True), "on": (True,), "off": (False,)}[settings.checkpointing]
        least = (sizes[-1], choices[-1])
        best: tuple[float, int, bool] | None = None
        if self._are_weights_too_large(num_parts):
            return *least, False
        if self._fits(self.components(sizes[0], choices[0], num_parts)):
            best = (0, sizes[0], choices[0])
        elif self._fits(self.components(*least, num_parts)):
            for checkpointing in choices:
                for size in sizes:
                    if self._fits(self.components(size, checkpointing, num_parts)):
                        cost = self._tree_tokens(size) * (RECOMPUTING_COST if checkpointing else 1)
                        best = min(best or (math.inf, *least), (cost, size, checkpointing))
                        break
        return (*least, False) if best is None else (*best[1:], True)

    def _why(self, size: int, checkpointing: bool, fits: bool) -> str:
        if not fits:
            return "the least that the settings allow, and it does not fit"
        if self._settings.micro_batch_tokens is not None:
            return "micro-batch as asked for"
        if size == MICRO_BATCH_TOKENS[0] and not checkpointing:
            return "the largest that is of use fits without checkpointing"
        if checkpointing and self._settings.checkpointing == "auto":
            return "without checkpointing it would not fit, or only in trees that share less"
        return "larger micro-batches do not fit"

    def _fits(self, components: Components) -> bool:
        return self._available is None or components.peak <= self._available

    def _trees(self, size: int) -> Iterator[tuple[list[TokenSequence], list[TokenTree]]]:
        for batch in self._batches:
            yield batch, packing.split(batch, size)

    @functools.lru_cache  # noqa: B019 - a planner does not outlive its plan
    def _survey_of(self, size: int) -> tuple[TokenTree, TokenTree, int, bool]:
        """Return the trees with most tokens and most predictors, all tokens, any step cut?"""
        longest = widest = None
        total, several = 0, False
        for _, trees in self._trees(size):
            several = several or len(trees) > 1
            for packed in trees:
                total += packed.num_tokens
                if longest is None or packed.num_tokens > longest.num_tokens:
                    longest = packed
                if widest is None or len(packed.predictors) > len(widest.predictors):
                    widest = packed
        assert longest is not None
        assert widest is not None
        return longest, widest, total, several

    def _tree_tokens(self, size: int) -> float:
        return self._survey_of(size)[2] / len(self._sequences)

    def _count_step(self, size: int, checkpointing: bool) -> step_memory.StepMemory:
        """Count the micro-batch that needs most."""
        longest, widest, _, several = self._survey_of(size)
        if self._may_use_graphs(checkpointing):
            longest, widest, several = packing.filled(longest), packing.filled(widest), True
        found = self._skeleton.count(longest, checkpointing=checkpointing, accumulates=several)
        per_token = (found.peak - found.logits - found.gradients) / longest.num_tokens
        per_predictor = found.logits / len(longest.predictors)
        gain = len(widest.predictors) - len(longest.predictors)
        if gain * per_predictor > (longest.num_tokens - widest.num_tokens) * per_token:
            other = self._skeleton.count(widest, checkpointing=checkpointing, accumulates=several)
            found = max(found, other, key=lambda count: count.peak)
        return found

    def _weights(self, num_parts: int) -> tuple[int, int, int]:
        """Return the bytes of a process's weights: frozen, trained, and of its parts of all."""
        base, trainable, held = self._base_bytes, 4 * self._counts.trainable, 0
        if num_parts > 1 and (sizes := self._sizes):
            held = -(-sizes.total // num_parts)
            if self._settings.method == "full":
                trainable = held
            else:
                base += held - sizes.total
        return base, trainable, held

    def _are_weights_too_large(self, num_parts: int) -> bool:
        """Whether weights and optimizer alone do not fit; then there is nothing to count."""
        base, trainable, _ = self._weights(num_parts)
        # What a processor's libraries take is known once a count has loaded them.
        runtime = 0 if self._hardware.type == "cpu" else self._runtime
        return self._available is not None and base + 3 * trainable + runtime > self._available

    def components(self, size: int, checkpointing: bool, num_parts: int = 1) -> Components:
        """Return the memory at its peak, of one process; weights may be sharded in parts."""
        base, trainable, held = self._weights(num_parts)
        step, scoring = self._count(size, checkpointing), self._scoring(size)
        if num_parts > 1 and self._sizes:
            # What is in no layer is there all the time, and with a layer the next is gathered.
            rest, layer = self._sizes.rest, self._sizes.largest_layer
            gathered = in_training = rest + 2 * layer
            if self._settings.method == "full" and self._hardware.type != "cpu":
                # With gradients that wait to be sent, and their copies; measured on a processor
                # only, which needs less.
                in_training = max(2 * rest + 4 * layer, 3 * rest)
            step = dataclasses.replace(
                step,
                gradients=min(step.gradients, trainable),
                workspace=step.workspace + in_training,
            )
            scoring = dataclasses.replace(scoring, workspace=scoring.workspace + gathered)
        in_heap = min(trainable, self._trainable_in_heap)
        # While the optimizer steps, all gradients are there and its own arrays; activations are
        # not. On MPS torch's AdamW makes one array as large as the weights.
        stepping = step_memory.StepMemory(
            gradients=trainable,
            saved=0,
            logits=0,
            workspace=trainable if self._hardware.type == "mps" else 0,
            operations=0,
            heap=in_heap,
            mapped=trainable - in_heap,
        )
        moments = [step, stepping, scoring]
        if num_parts > 1 and self._sizes and self._hardware.type == "cpu":
            # The whole model is there as it is loaded, beside nothing else, and as it is saved.
            whole = self._sizes.total - (0 if self._settings.method == "full" else held)
            moments.append(dataclasses.replace(stepping, gradients=0, workspace=whole))
        most = max(moments, key=lambda moment: moment.peak)
        fragments = 0
        has_best = len(self._dataset.validation) > 0
        if self._hardware.type == "cpu" and num_parts > 1:
            fragments = allocator.MAPPED_FRAGMENT_BYTES
        elif self._hardware.type == "cpu":
            # AdamW's two moments and the best weights come during training, to stay.
            fragments = allocator.fragment_bytes(
                heap=max(moment.heap for moment in moments),
                mapped=max(moment.mapped for moment in moments),
                peak=most.peak,
                lasting=(2 + has_best) * in_heap,
            )
        elif self._hardware.type == "cuda":
            # Of what torch reserves, a piece stays free that the next large array did not fit.
            fragments = max(moment.largest for moment in moments)
        made = Components(
            base=base,
            adapter=trainable,
            best=trainable if has_best else 0,
            gradients=most.gradients,
            optimizer=2 * trainable,
            saved_activations=most.saved,
            logits=most.logits,
            workspace=most.workspace,
            graphs=0,
            fragments=fragments,
            runtime=self._runtime,
        )
        if self._may_use_graphs(checkpointing):
            # What they compute in stays theirs, and so do the gradients.
            held = step.peak - step.gradients
            both = dataclasses.replace(made, gradients=trainable, graphs=held)
            made = both if self._fits(both) else made
        return made

    def _may_use_graphs(self, checkpointing: bool) -> bool:
        """Whether micro-batches are recorded as CUDA graphs, if there is room.

        Not where whole models train: their gradients would lie there all the time. Nor with
        checkpointing, which looks at the state of the random numbers as it computes. Nor in one
        of several processes, beside NCCL's threads, where it is untried.
        """
        return (
            self._hardware.type == "cuda"
            and self._settings.method != "full"
            and not checkpointing
            and self._num_processes == 1
        )

    def _count_scoring(self, size: int) -> step_memory.StepMemory:
        """Count a pass that scores labels, in a packed row as long as it may become."""
        vocabulary = self._model_config.get_text_config().vocab_size
        tables = (self._dataset.validation, self._dataset.test)
        num_rows = max(len(table) if table else 0 for table in tables)
        lengths = [len(row.token_ids) for row in self._sequences]
        below = sum(len(answer) for answer in self._prompt.answers)  # all labels of a message
        all_tokens = num_rows * (sum(lengths) // len(lengths) + below)
        tokens = max(*lengths, min(size, all_tokens))
        return self._skeleton.count_scoring(tokens, min(tokens, scoring.most_kept(vocabulary)))

    def heaviest(self, made: Plan) -> Heaviest:
        """Return the batch that the training loop should try first."""
        size = made.micro_batch_tokens
        rows, trees = max(
            self._trees(size), key=lambda found: max(packed.num_tokens for packed in found[1])
        )
        step = self._count(size, made.checkpointing)
        largest = max(packed.num_tokens for packed in trees)
        return Heaviest(
            rows=rows,
            bytes_per_token=(step.saved + step.logits + step.workspace) / largest,
            limit_bytes=made.peak_bytes - min(allocator.FRAGMENT_BYTES, made.memory.fragments) // 2,
            run_tokens=made.tree_tokens * self._examples,
        )

    def operations(self, made: Plan) -> float:
        """Return the floating-point operations of the run's training steps."""
        return made.operations_per_example * self._examples

    def largest_tree(self, size: int) -> TokenTree:
        """Return the micro-batch with most tokens where so many are computed at once."""
        return self._survey_of(size)[0]

    @property
    def _examples(self) -> int:
        """Rows that the run computes, counted once for each time."""
        per_epoch = math.ceil(len(self._dataset.train) / self._settings.batch_size)
        epochs, rest = divmod(self._num_steps, per_epoch)
        return epochs * len(self._dataset.train) + rest * self._settings.batch_size

    def _plan(self, size: int, checkpointing: bool, num_parts: int, why: str) -> Plan:
        rows = self._sequences
        prefix = min(common_prefix_length(rows[0].token_ids, row.token_ids) for row in rows)
        stems = sum(row.answer_start for row in rows) / len(rows)
        lengths = sum(len(row.token_ids) for row in rows) / len(rows)
        padded = sum(
            len(batch) * max(len(row.token_ids) for row in batch) for batch in self._batches
        )
        components = self.components(size, checkpointing, num_parts)
        step = self._count(size, checkpointing)
        longest = self._survey_of(size)[0]
        trainable, total = self._counts.trainable, self._counts.total
        download = total * (4 if self._stored_dtype() is torch.float32 else 2)
        fits = self._fits(components)
        is_here = any(self._folder.glob("*.safetensors"))
        return Plan(
            model=self._settings.model,
            device=self._hardware.name,
            is_cuda=self._hardware.type == "cuda",
            precision=str(self._precision),
            parameters=total,
            trainable=trainable,
            adapter_bytes_32=4 * trainable,
            adapter_bytes_16=2 * trainable,
            num_rows=len(self._dataset.train),
            prefix_tokens=prefix,
            message_tokens=stems - prefix,
            answer_tokens=lengths - stems,
            padded_tokens=padded / len(rows),
            tree_tokens=self._tree_tokens(size),
            operations_per_example=step.operations / longest.num_tokens * self._tree_tokens(size),
            num_steps=self._num_steps,
            batch_size=self._settings.batch_size,
            micro_batch_tokens=size,
            largest_micro_batch=longest.num_tokens,
            checkpointing=checkpointing,
            shard=num_parts > 1,
            why=why,
            memory=components,
            available_bytes=self._available,
            # What trains in float32, and checkpoints with four arrays of its size: the weights, the
            # best ones, two moments. While either is saved, the one before is still there.
            disk_bytes=2 * (1 + 4) * 4 * trainable,
            free_disk_bytes=_free_bytes(self._settings.output),
            download_bytes=0 if is_here else download,
            seconds=None,
            seconds_are="not estimated",
            alternatives=() if fits else tuple(self._alternatives(components)),
        )

    def _stored_dtype(self) -> torch.dtype:
        dtype = getattr(self._model_config, "dtype", None)
        return dtype if isinstance(dtype, torch.dtype) else torch.float32

    def _alternatives(self, components: Components) -> Iterator[str]:
        """Yield what would fit, in the order of what it costs the user."""
        settings = self._settings
        for change, told in (
            ({"micro_batch_tokens": None}, "without --micro-batch-tokens {}: nothing but time"),
            ({"checkpointing": "auto"}, "without --checkpointing off: about a third more time"),
            ({"method": "lora"}, "with --method lora: usually within a point or two of full"),
            ({"method": "qlora"}, "with --method qlora: the base in 4 bits, slower"),
            ({"shard": "auto"}, "without --shard off: the weights in parts, gathered by layers"),
            ({"rank": 4}, "with --rank 4: a smaller adapter, which may learn less"),
        ):
            ((name, value),) = change.items()
            now = getattr(settings, name)
            if now in {value, "on"} or (name == "rank" and (now <= 4 or settings.method == "full")):
                continue
            if value == "lora" and now == "qlora":
                continue
            if value == "qlora" and self._hardware.type not in quantize.DEVICES:
                continue
            other = self._changed(**change).make()
            if other.fits:
                yield f"{told.format(now)}; {spoken_bytes(other.peak_bytes)} at the peak"
        yield from self._more_devices()
        assert self._available is not None
        room = self._available - components.runtime
        share = room / (components.peak - components.runtime)
        if share > 0:
            most = share * self._counts.total
            count = f"{most / 1e9:.2g} billion" if most >= 1e9 else f"{most / 1e6:.0f} million"
            yield f"a model of about {count} parameters or fewer"
        yield f"a device with {spoken_bytes(components.peak)} of memory"

    def _more_devices(self) -> Iterator[str]:
        """Yield on how many devices such as this one it would fit with sharded weights."""
        if self._num_processes > 1 or self._sizes is None or self._hardware.type != "cuda":
            return
        for count in (2, 4, 8):
            size, checkpointing, fits = self._choose(count)
            if fits:
                peak = self.components(size, checkpointing, count).peak
                yield (
                    f"with --devices {count}: the weights sharded over as many such devices; "
                    f"{spoken_bytes(peak)} at the peak of each"
                )
                return

    def _changed(self, **change: Any) -> Planner:
        """Return a planner of the same run but for some settings."""
        settings = dataclasses.replace(self._settings, **change)
        if change.keys() <= {"micro_batch_tokens", "checkpointing"}:  # what is counted is the same
            other = copy.copy(self)  # with what was counted
            other._settings = settings
            return other
        return Planner(
            settings,
            self._dataset,
            self._prompt,
            self._folder,
            choose_precision(
                torch.device(self._hardware.type),
                settings.precision,
                hardware=self._hardware,
                trains_base=settings.method == "full",
            ),
            self._hardware,
            self._available,
            batches=self._batches,
            num_processes=self._num_processes,
        )


def _free_bytes(folder: Path) -> int:
    """Return the bytes that are free where a folder is, or would be made."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(there).free

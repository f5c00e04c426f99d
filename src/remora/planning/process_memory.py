"""The memory of one process of a run, by component, at the moment when most of it is used."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import torch

from remora.config import TrainConfig
from remora.data.dataset import Dataset
from remora.data.prompt import Prompt
from remora.errors import ConfigError
from remora.models import loading, lora
from remora.planning import allocator
from remora.planning.plan import CUDA_CONTEXT_BYTES, CUDA_WORKSPACE_BYTES, Components
from remora.planning.step_memory import NotCountableError, Skeleton, StepMemory
from remora.planning.survey import Survey
from remora.runtime import memory, sharding
from remora.runtime.device import Hardware, Precision
from remora.tree import layouts, packing, scoring
from remora.tree.layouts import Layout
from remora.tree.packing import TokenTree


class ProcessMemory:
    """Counts the memory of one process of a run, and compares it with what is available.

    Attributes:
        counts: The parameters, and how many of them train.
        uncountable: Why this model's memory is estimated, "" if it is counted.
        can_checkpoint: Whether layers can be computed again in the backward pass.
        sizes: Sizes of the weights that can be sharded; None if they cannot or must not be.
    """

    def __init__(
        self,
        settings: TrainConfig,
        dataset: Dataset,
        prompt: Prompt,
        survey: Survey,
        model_config: Any,
        precision: Precision,
        hardware: Hardware,
        *,
        layout: Layout,
        memory_bytes: int | None,
        num_processes: int,
    ) -> None:
        """Build the model without weights.

        Args:
            settings: The run's settings.
            dataset: Its rows.
            prompt: How they are asked.
            survey: Its effective batches.
            model_config: The base model's configuration.
            precision: What is computed in.
            hardware: What it is computed on.
            layout: How batches are computed.
            memory_bytes: Memory of each device; None to measure what is free here.
            num_processes: Those that train together, one for each device.
        """
        self._settings, self._dataset, self._prompt = settings, dataset, prompt
        self._survey = survey
        self._precision, self._hardware = precision, hardware
        self._given_bytes, self._num_processes = memory_bytes, num_processes
        self._layout = layout
        with torch.random.fork_rng():
            base = loading.load_empty(
                model_config, precision.base, quantized=settings.method == "qlora", layout=layout
            )
            adapted = lora.adapt(base, settings)
        self.counts = lora.count_parameters(adapted)
        self._num_outputs = layouts.num_outputs(adapted)
        self.uncountable = ""
        self.can_checkpoint = bool(getattr(adapted, "supports_gradient_checkpointing", True))
        self._config = model_config.get_text_config()
        self._base_bytes = sum(
            t.nbytes for t in [*adapted.parameters(), *adapted.buffers()] if not t.requires_grad
        )
        in_float32 = [4 * p.numel() for p in adapted.parameters() if p.requires_grad]
        self._trainable_in_heap = sum(b for b in in_float32 if b < allocator.MAPPED_BYTES)
        self.sizes = _shardable(adapted, settings)
        self._skeleton = Skeleton(adapted, autocast=precision.autocast, device=hardware.type)
        self.step = functools.cache(self._count_step)
        self._scoring = functools.cache(self._count_scoring)

    @functools.cached_property
    def available(self) -> int | None:
        """Bytes that the process may use, None if that is unknown."""
        if self._given_bytes is not None:
            return self._given_bytes
        free = memory.free_bytes(torch.device(self._hardware.type))
        if free is None or self._hardware.type == "cuda":
            return free
        return free + memory.used_bytes()

    @functools.cached_property
    def _runtime(self) -> int:
        """Memory used beside the model; measured after the first count has imported it."""
        if self._hardware.type == "cuda":
            return CUDA_CONTEXT_BYTES + CUDA_WORKSPACE_BYTES
        memory.trim()
        kernels = 0 if self._precision.autocast is None else allocator.KERNEL_BYTES
        return memory.used_bytes() + kernels

    def fits(self, components: Components) -> bool:
        """Whether a process's memory is available, as far as that is known."""
        return self.available is None or components.peak <= self.available

    def are_weights_too_large(self, num_parts: int) -> bool:
        """Whether weights and optimizer alone do not fit; then there is nothing to count."""
        base, trainable, _ = self._weights(num_parts)
        # On CPU the libraries' memory is known once a count has loaded them.
        runtime = 0 if self._hardware.type == "cpu" else self._runtime
        return self.available is not None and base + 3 * trainable + runtime > self.available

    def components(self, size: int, checkpointing: bool, num_parts: int = 1) -> Components:
        """Return the peak memory of one process, by component.

        Args:
            size: Most tokens of a micro-batch.
            checkpointing: Whether layers are computed again in the backward pass.
            num_parts: Processes that the weights are sharded over; 1 if they are not.
        """
        base, trainable, _ = self._weights(num_parts)
        moments = self._moments(size, checkpointing, num_parts)
        most = max(moments, key=lambda moment: moment.peak)
        counted = Components(
            base=base,
            adapter=trainable,
            best=trainable if self._has_best else 0,
            gradients=most.gradients,
            optimizer=2 * trainable,
            saved_activations=most.saved,
            logits=most.logits,
            workspace=most.workspace,
            graphs=0,
            fragments=self._fragments(moments, most.peak, num_parts),
            runtime=self._runtime,
        )
        if self._may_use_graphs(checkpointing):
            # They keep the memory that they compute in, and the gradients.
            step = moments[0]
            recorded = dataclasses.replace(
                counted, gradients=trainable, graphs=step.peak - step.gradients
            )
            counted = recorded if self.fits(recorded) else counted
        return counted

    @property
    def _has_best(self) -> bool:
        """Whether a copy of the weights that validated best is kept."""
        return len(self._dataset.validation) > 0

    def _weights(self, num_parts: int) -> tuple[int, int, int]:
        """Return the bytes of a process's weights: frozen, trained, and its part of all."""
        base, trainable, held = self._base_bytes, 4 * self.counts.trainable, 0
        if num_parts > 1 and (sizes := self.sizes):
            held = -(-sizes.total // num_parts)
            if self._settings.method == "full":
                trainable = held
            else:
                base += held - sizes.total
        return base, trainable, held

    def _moments(self, size: int, checkpointing: bool, num_parts: int) -> list[StepMemory]:
        """Return what is in memory beside the weights: in a micro-batch, and at other moments."""
        _, trainable, held = self._weights(num_parts)
        step, scoring = self.step(size, checkpointing), self._scoring(size)
        if num_parts > 1 and self.sizes:
            # Weights outside of layers stay gathered, and the next layer's beside one layer's.
            rest, layer = self.sizes.rest, self.sizes.largest_layer
            gathered = in_training = rest + 2 * layer
            if self._settings.method == "full" and self._hardware.type != "cpu":
                # Plus gradients that wait to be sent, and their copies; measured on CPU only, which
                # needs less.
                in_training = max(2 * rest + 4 * layer, 3 * rest)
            step = dataclasses.replace(
                step,
                gradients=min(step.gradients, trainable),
                workspace=step.workspace + in_training,
            )
            scoring = dataclasses.replace(scoring, workspace=scoring.workspace + gathered)
        in_heap = min(trainable, self._trainable_in_heap)
        # An optimizer step needs all gradients and its own arrays, and no activations. On MPS
        # torch's AdamW makes one array as large as the weights.
        stepping = StepMemory(
            gradients=trainable,
            saved=0,
            logits=0,
            workspace=trainable if self._hardware.type == "mps" else 0,
            operations=0,
            heap=in_heap,
            mapped=trainable - in_heap,
        )
        moments = [step, stepping, scoring]
        if num_parts > 1 and self.sizes and self._hardware.type == "cpu":
            # The whole model is in memory while it is loaded, beside nothing else, and saved.
            whole = self.sizes.total - (0 if self._settings.method == "full" else held)
            moments.append(dataclasses.replace(stepping, gradients=0, workspace=whole))
        return moments

    def _fragments(self, moments: list[StepMemory], peak: int, num_parts: int) -> int:
        """Return the bytes that the allocator holds in pieces beyond the peak."""
        if self._hardware.type == "cpu" and num_parts > 1:
            return allocator.MAPPED_FRAGMENT_BYTES
        if self._hardware.type == "cpu":
            # AdamW's two moments and the best weights are allocated during training, and stay.
            _, trainable, _ = self._weights(num_parts)
            return allocator.fragment_bytes(
                heap=max(moment.heap for moment in moments),
                mapped=max(moment.mapped for moment in moments),
                peak=peak,
                lasting=(2 + self._has_best) * min(trainable, self._trainable_in_heap),
            )
        if self._hardware.type == "cuda":
            # A piece of torch's reserved memory stays free, too small for the next large array.
            return max(moment.largest for moment in moments)
        return 0

    def _may_use_graphs(self, checkpointing: bool) -> bool:
        """Whether micro-batches are recorded as CUDA graphs, if there is room.

        Not with method full, whose gradients would stay in memory all the time. Not with
        checkpointing, which reads the state of the random numbers as it computes. Not in one of
        several processes, beside NCCL's threads, where it is untried. Nor for padded rows, whose
        shapes are many.
        """
        return (
            self._hardware.type == "cuda"
            and self._settings.method != "full"
            and not checkpointing
            and self._num_processes == 1
            and self._layout == "tree"
        )

    def _count_step(self, size: int, checkpointing: bool) -> StepMemory:
        """Count the micro-batch that needs most memory."""
        extremes = self._survey.extremes(size)
        longest, widest, several = extremes.longest, extremes.widest, extremes.are_several
        if self._may_use_graphs(checkpointing):
            assert isinstance(longest, TokenTree) and isinstance(widest, TokenTree)  # noqa: PT018
            longest, widest, several = packing.filled(longest), packing.filled(widest), True
        try:
            most = self._skeleton.count(longest, checkpointing=checkpointing, accumulates=several)
        except NotCountableError as error:
            self.uncountable = str(error)
            return self._estimated(longest.num_tokens, len(widest.predictors), checkpointing)
        # The widest tree may need more, if its logits outweigh the tokens that it has fewer.
        per_token = (most.peak - most.logits - most.gradients) / longest.num_tokens
        per_predictor = most.logits / len(longest.predictors)
        gain = len(widest.predictors) - len(longest.predictors)
        if gain * per_predictor > (longest.num_tokens - widest.num_tokens) * per_token:
            other = self._skeleton.count(widest, checkpointing=checkpointing, accumulates=several)
            most = max(most, other, key=lambda count: count.peak)
        return most

    def _count_scoring(self, size: int) -> StepMemory:
        """Count a pass that scores labels, in a packed row as long as it may become."""
        tables = (self._dataset.validation, self._dataset.test)
        num_rows = max(len(table) if table else 0 for table in tables)
        lengths = [len(row.token_ids) for row in self._survey.rows]
        num_rows = math.ceil(num_rows * len(lengths) / self._survey.num_rows)  # windows
        below = sum(len(answer) for answer in self._prompt.answers)  # all labels of a message
        all_tokens = num_rows * (sum(lengths) // len(lengths) + below)
        tokens = max(*lengths, min(size, all_tokens))
        kept = min(tokens, scoring.most_kept(self._num_outputs))
        try:
            if self._layout == "rows":
                num_rows = -(-tokens // max(lengths))
                return self._skeleton.count_scoring_rows(num_rows, max(lengths), kept)
            return self._skeleton.count_scoring(tokens, kept)
        except NotCountableError as error:
            self.uncountable = str(error)
            return dataclasses.replace(
                self._estimated(tokens, kept, checkpointing=True), gradients=0, saved=0
            )

    def _estimated(self, tokens: int, predictors: int, checkpointing: bool) -> StepMemory:
        """Estimate a micro-batch of a model that cannot be counted.

        A transformer layer keeps 34 bytes for each token and width, and 5 for each head and pair of
        tokens, if it computes in 16 bits (Korthikanti et al. 2022,
        https://arxiv.org/abs/2205.05198). Experts keep as much again for each that a token uses.
        """
        computed = self._precision.autocast or self._precision.base
        config, scale = self._config, computed.itemsize / 2
        width, layers = config.hidden_size, config.num_hidden_layers
        pairs = 5 * getattr(config, "num_attention_heads", 1) * tokens * tokens
        layer = int(scale * (34 * tokens * width * max(1, lora.experts_per_token(config)) + pairs))
        saved = layers * (int(2 * scale * tokens * width) if checkpointing else layer)
        logits = int(2 * scale * predictors * self._num_outputs)
        share = 6 if self._settings.method == "full" else 4  # operations a weight and token
        return StepMemory(
            gradients=4 * self.counts.trainable,
            saved=saved,
            logits=2 * logits,
            workspace=2 * layer,
            operations=share * (self.counts.active or self.counts.total) * tokens,
            heap=0,
            mapped=4 * self.counts.trainable + saved + 2 * logits + 2 * layer,
            largest=max(layer, logits),
        )


def _shardable(adapted: Any, settings: TrainConfig) -> sharding.Sizes | None:
    """Return the sizes of the weights that can be sharded, None if there are none.

    Raises:
        ConfigError: If they have to be sharded and cannot be.
    """
    if settings.method == "qlora" or settings.shard == "off":
        return None
    try:
        return sharding.sizes(adapted)
    except ConfigError:
        if settings.shard == "on":
            raise
        return None

"""The time of a run, estimated before it begins: its steps, evaluations and scoring."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import time
from collections.abc import Sequence
from typing import Any

import torch

from remora.config import TrainConfig
from remora.models import loading, lora, quantize
from remora.planning import step_memory
from remora.planning.plan import Plan, Rates
from remora.runtime.device import Hardware, Precision
from remora.tree import last_layer
from remora.tree.forward import answer_logits
from remora.tree.loss import loss_sum
from remora.tree.packing import MicroBatch

MAX_TOKENS = 512
"""Most tokens of the tree that a layer is timed with."""

VOCABULARY = 4_096
"""Largest vocabulary of the layer that is timed."""


FORWARD_SHARE = 1 / 3
"""Share of a step's operations that the forward pass takes if all weights train. The backward pass
computes gradients of the inputs and of the weights, each about as many operations."""

FROZEN_FORWARD_SHARE = 1 / 2
"""The same if the base is frozen: gradients of its weights are left out."""


SEARCH_COST = 1.4
"""Time of a token in scoring, for that of a forward pass over a tree of messages with their labels:
passes are smaller, and most of their tokens need logits. Measured with SmolLM2-135M on CPU."""

SURE = 11_500
"""Training examples of each label, times the model's width, after which the search at a tolerance
of 0.01 explores 1/e of the label nodes. Measured with Banking77: nano, 256 wide, explores 73, 53
and 12 % after 16, 30 and 91 examples; SmolLM2-135M, 576 wide, 58 and 37 % after 10 and 21."""


def label_nodes(
    answers: Sequence[Sequence[int]], mean_length: float, training: float, tolerance: float
) -> tuple[float, float]:
    """Return the label nodes computed for a row: in an evaluation, and in scoring at the end.

    An estimate: the search explores more the less sure the model is, which training decides.

    Args:
        answers: The tokens of each label.
        mean_length: Tokens of an answer, the mean over rows.
        training: Examples of each label that the run trains on, times the model's width.
        tolerance: That of scoring.
    """
    # Nodes whose logits are needed: all beginnings of answers but the empty one.
    num_nodes = len({tuple(answer[:end]) for answer in answers for end in range(1, len(answer))})
    # Evaluations are spread over the run, so the middle of it stands for all of them.
    evaluated = mean_length * (1 + 3 * math.exp(-2 / 3 * training / SURE))
    if tolerance == 0:
        return evaluated, num_nodes
    share = math.exp(-training / SURE) * -math.log10(tolerance) / 2
    return evaluated, min(num_nodes, 1.3 * mean_length + share * num_nodes)


def published(
    operations: float, planned: Plan, hardware: Hardware, precision: Precision, method: str
) -> dict[str, Any]:
    """Return the seconds at a device's published rate, by the names of `Plan`.

    No run reaches it. Empty if no rate is known for the precision.
    """
    rate = hardware.teraflops
    if rate is None or precision.compute is not hardware.native:
        return {}
    training = operations / (rate * 1e12) / planned.run_tokens
    share = FORWARD_SHARE if method == "full" else FROZEN_FORWARD_SHARE
    return {
        **planned.duration(Rates(training, SEARCH_COST * share * training)).to_dict(),
        "seconds_are": f"lower bound, at the published {rate:g} TFLOP/s, which no run reaches",
    }


def measured(
    operations: float,
    planned: Plan,
    model_config: Any,
    settings: TrainConfig,
    precision: Precision,
    packed: MicroBatch,
    device: torch.device,
) -> dict[str, Any]:
    """Return the seconds at the measured rate of one layer, by the names of `Plan`.

    The layer has random weights and a small vocabulary. Without bitsandbytes the time to dequantize
    4-bit weights is left out.

    Args:
        operations: Floating-point operations of the run's steps.
        planned: Its plan.
        model_config: The model's configuration.
        settings: The run's settings.
        precision: What is computed in.
        packed: A micro-batch of the run.
        device: Where it is computed.
    """
    # One layer of the model, and the micro-batch in its vocabulary.
    cut = copy.deepcopy(model_config)
    text = cut.get_text_config()
    text.num_hidden_layers = 1
    with contextlib.suppress(AttributeError):  # some configurations derive it
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:1]
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(text, name, None)
    text.vocab_size = vocabulary = min(text.vocab_size, VOCABULARY)
    packed = dataclasses.replace(
        packed,
        token_ids=packed.token_ids % vocabulary,
        edge_targets=packed.edge_targets % vocabulary,
    )
    is_quantized = settings.method == "qlora"
    with torch.random.fork_rng():
        # Its operations, counted without weights.
        empty = lora.adapt(
            loading.load_empty(cut, precision.base, quantized=is_quantized), settings
        )
        last_layer.uninstall(empty)  # it stands for all layers, which are computed whole
        skeleton = step_memory.Skeleton(empty, autocast=precision.autocast, device=device.type)
        share = skeleton.count(packed).operations
        # Its time, with random weights.
        base = loading.load_empty(cut, precision.base).to_empty(device=device)
        for tensor in [*base.parameters(), *base.buffers()]:
            if tensor.is_floating_point():  # a norm of small weights would make denormals
                bound = 1 if tensor.dim() < 2 else 1 / math.sqrt(tensor.shape[-1])
                torch.nn.init.uniform_(tensor, bound if tensor.dim() < 2 else -bound, bound)
        if is_quantized and quantize.is_installed():
            quantize.quantize(base)
        layer = lora.adapt(base, settings).to(device).train()
        last_layer.uninstall(layer)
        packed = packed.to(device)
        seconds = min(_seconds(layer, packed, device, precision) for _ in range(5))
        layer.eval()
        with torch.inference_mode():
            forward = min(_seconds(layer, packed, device, precision) for _ in range(5))
    training = seconds / share * operations / planned.run_tokens
    return {
        **planned.duration(Rates(training, SEARCH_COST * forward / seconds * training)).to_dict(),
        "seconds_are": "estimated from one layer with random weights",
    }


def _seconds(layer: Any, packed: MicroBatch, device: torch.device, precision: Precision) -> float:
    """Return the seconds of a forward pass, and of the backward pass unless in inference mode."""
    dtype = precision.autocast
    began = time.perf_counter()
    with torch.autocast(device.type, dtype, enabled=dtype is not None):
        logits = answer_logits(layer, packed)
    if not torch.is_inference_mode_enabled():
        loss_sum(logits, packed).backward()  # type: ignore[no-untyped-call]
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began

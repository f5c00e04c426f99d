"""Runs a micro-batch, a token tree or padded rows, through a Hugging Face model."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from remora.tree import attention, rows
from remora.tree.packing import MicroBatch, TokenTree


def answer_logits(model: nn.Module, batch: MicroBatch) -> Tensor:
    """Return the logits at a batch's predictors, [P, vocabulary], as the model computes them."""
    logits: Tensor = output(model, batch, model_inputs(model, batch)).logits[0]
    return logits


def output(model: nn.Module, batch: MicroBatch, inputs: dict[str, Any], **more: Any) -> Any:
    """Return a Hugging Face model's output for a batch, logits at its predictors only.

    Args:
        model: The model.
        batch: The batch.
        inputs: Its inputs, see `model_inputs`.
        **more: Further arguments of the model's forward.

    Returns:
        The model's output; its logits are [1, P, vocabulary].
    """
    at: AbstractContextManager[None] = nullcontext()
    if not isinstance(batch, TokenTree):
        at = rows.head_at(model, batch.predictors)
    with at:
        return model(**inputs, **more)


def states_at_predictors(batch: MicroBatch, states: Tensor) -> Tensor:
    """Return the hidden states [P, H] at a batch's predictors, of those of all its tokens."""
    return states.flatten(0, 1)[batch.predictors]


def model_inputs(
    model: nn.Module, batch: MicroBatch, *, in_blocks: bool | None = None
) -> dict[str, Any]:
    """Return the arguments of a Hugging Face model's forward that compute a batch's logits.

    `in_blocks` says whether a tree's attention is computed in blocks; None to do so if it costs
    less.
    """
    if not isinstance(batch, TokenTree):
        return {"input_ids": batch.token_ids, "use_cache": False}
    visible = functools.partial(attention.tree_mask, batch)
    kept = batch.predictors
    return {
        "input_ids": batch.token_ids[None],
        "position_ids": batch.position_ids[None],
        **attention.inputs(
            text_config(model), visible, _dtype(model), in_blocks=in_blocks, kept=kept
        ),
        "logits_to_keep": kept,
        "use_cache": False,
    }


def text_config(model: Any) -> Any:
    """Return the configuration of a model's text part."""
    return model.config.get_text_config()


def is_narrow(model: nn.Module) -> bool:
    """Whether a model computes in 16 bits, whatever precision its head gives logits in."""
    device = next(model.parameters()).device
    if torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type).itemsize < 4
    return _dtype(model).itemsize < 4


def _dtype(model: nn.Module) -> torch.dtype:
    return next(p.dtype for p in model.parameters() if p.is_floating_point())

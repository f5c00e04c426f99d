"""Runs a token tree through a Hugging Face model."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from remora.tree import attention
from remora.tree.packing import TokenTree


def answer_logits(model: nn.Module, tree: TokenTree) -> Tensor:
    """Return the logits at the tree's predictors, [P, vocabulary], as the model computes them."""
    logits: Tensor = model(**model_inputs(model, tree)).logits[0]
    return logits


def model_inputs(
    model: nn.Module, tree: TokenTree, *, in_blocks: bool | None = None
) -> dict[str, Any]:
    """Return the arguments of a Hugging Face model's forward that compute a tree's logits.

    `in_blocks` says whether attention is computed in blocks; None to do so if it costs less.
    """
    visible = functools.partial(attention.tree_mask, tree)
    return {
        "input_ids": tree.token_ids[None],
        "position_ids": tree.position_ids[None],
        **attention.inputs(text_config(model), visible, _dtype(model), in_blocks=in_blocks),
        "logits_to_keep": tree.predictors,
        "use_cache": False,
    }


def text_config(model: Any) -> Any:
    """Return the configuration of a model's text part."""
    return model.config.get_text_config()


def _dtype(model: nn.Module) -> torch.dtype:
    return next(p.dtype for p in model.parameters() if p.is_floating_point())

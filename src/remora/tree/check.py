"""The start-up check: whether a model computes a batch in its layout as it computes each row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from remora.data.prompt import TokenSequence
from remora.errors import ModelError
from remora.formatting import first_line
from remora.runtime import memory
from remora.tree import attention, layouts, packing
from remora.tree.forward import answer_logits, model_inputs
from remora.tree.loss import loss_sum
from remora.tree.rows import build


def check_layout(model: nn.Module, rows: Sequence[TokenSequence]) -> None:
    """Make sure that a model computes rows together, in its layout, as it computes each alone.

    Raises:
        ModelError: If they differ by more than rounding.
    """
    check = check_tree if layouts.of(model) == "tree" else check_rows
    check(model, rows)


@torch.no_grad()
def check_tree(model: nn.Module, rows: Sequence[TokenSequence]) -> None:
    """Make sure that a model's attention and positions follow the tree.

    Compares the summed loss of some rows, packed, with that of each row alone in the model's own
    ordinary forward pass. A model that does not pass blocks to its attention uses whole masks from
    then on.

    Raises:
        ModelError: If they differ by more than rounding, or the model takes no such inputs.
    """
    was_training = model.training
    model.eval()
    packed = packing.build(rows).to(next(model.parameters()).device)
    try:
        logits = answer_logits(model, packed)
        in_tree = float(loss_sum(logits, packed))
    except (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError) as error:
        model.train(was_training)
        if memory.is_exhausted(error):
            raise
        raise ModelError(
            f"this model computes no token tree ({first_line(error)}); use --layout rows"
        ) from error
    tolerance = _tolerance(logits.dtype)
    # Each row alone.
    expected = 0.0
    for row in rows:
        targets = torch.tensor(row.token_ids[row.answer_start :], device=logits.device)
        alone = _alone(model, row).float()
        expected += float(functional.cross_entropy(alone, targets, reduction="sum"))
    # The tree again, in blocks.
    try:
        blocked = model(**model_inputs(model, packed, in_blocks=True)).logits[0]
        follows = abs(float(loss_sum(blocked, packed)) - expected) <= tolerance * abs(expected)
    except (RuntimeError, TypeError, ValueError):
        follows = False
    if not follows:
        attention.uninstall(model)
    model.train(was_training)
    if not abs(in_tree - expected) <= tolerance * abs(expected):
        raise ModelError(
            f"this model's loss is {in_tree:.4f} in a token tree and {expected:.4f} row by row, so "
            "its attention or positions do not follow the tree; use --layout rows"
        )


@torch.no_grad()
def check_rows(model: nn.Module, rows: Sequence[TokenSequence]) -> None:
    """Make sure that padding on the right changes no prediction, and that the head is where it is.

    Compares the logits of some rows, padded to the longest, with those of each row alone.

    Raises:
        ModelError: If they differ by more than rounding, which a causal model's do not.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    together = answer_logits(model, build(rows).to(device))
    alone = torch.cat([_alone(model, row) for row in rows])
    model.train(was_training)
    if not same_logits(together, alone):
        raise ModelError(
            "this model predicts something else if rows are padded on the right, so it is no "
            "causal language model; choose another"
        )


def same_logits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether two arrays of logits differ by no more than rounding."""
    difference = (one.float() - other.float()).abs().max()
    return bool(difference <= _tolerance(one.dtype) * other.float().abs().max())


def _tolerance(dtype: torch.dtype) -> float:
    return 1e-3 if dtype in {torch.float32, torch.float64} else 3e-2


def _alone(model: Any, row: TokenSequence) -> torch.Tensor:
    """Return a row's answer logits by the model's own ordinary forward pass, [answer, V]."""
    ids = torch.tensor([list(row.token_ids)], device=next(model.parameters()).device)
    logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits[
        0, row.answer_start - 1 : -1
    ]
    return logits

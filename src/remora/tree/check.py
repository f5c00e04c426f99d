"""The start-up check: whether a model's attention and positions follow the token tree."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional

from remora.data.prompt import TokenSequence
from remora.errors import ModelError
from remora.tree import attention
from remora.tree.forward import answer_logits, model_inputs
from remora.tree.loss import loss_sum
from remora.tree.packing import build


@torch.no_grad()
def check_tree(model: nn.Module, rows: Sequence[TokenSequence]) -> None:
    """Make sure that a model's attention and positions follow the tree.

    Compares the summed loss of some rows, packed, with that of each row alone in the model's own
    ordinary forward pass. A model that does not pass blocks to its attention uses whole masks from
    then on.

    Raises:
        ModelError: If they differ by more than rounding.
    """
    was_training = model.training
    model.eval()
    packed = build(rows).to(next(model.parameters()).device)
    logits = answer_logits(model, packed)
    in_tree = float(loss_sum(logits, packed))
    tolerance = 1e-3 if logits.dtype in {torch.float32, torch.float64} else 3e-2
    # Each row alone.
    expected = 0.0
    for row in rows:
        ids = torch.tensor([list(row.token_ids)], device=logits.device)
        alone = model(input_ids=ids, use_cache=False).logits[0, row.answer_start - 1 : -1]
        targets = ids[0, row.answer_start :]
        expected += float(functional.cross_entropy(alone.float(), targets, reduction="sum"))
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
            "its attention or positions do not follow the tree; choose another architecture"
        )

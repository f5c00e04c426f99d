"""The cross entropy of a micro-batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from remora.tree.packing import MicroBatch


def loss_sum(logits: Tensor, batch: MicroBatch) -> Tensor:
    """Return sum(weight * cross entropy) over a batch's edges, in nats, computed in float32.

    Divide by the sum of the weights over the whole effective batch to get its mean loss.

    Args:
        logits: [P, vocabulary], from `answer_logits`.
        batch: The batch of these logits.
    """
    loss: Tensor = _CrossEntropySum.apply(  # type: ignore[no-untyped-call]
        logits, batch.edge_predictors, batch.edge_targets, batch.edge_weights
    )
    return loss


class _CrossEntropySum(torch.autograd.Function):
    """Cross entropy of several weighted targets per row, without float32 copies of all logits.

    The gradient is computed beside the loss, a few rows at a time, so that the logits and their
    gradient are the only [P, vocabulary] arrays.
    """

    CHUNK_ELEMENTS = 1 << 21  # stays in a CPU's cache as float32

    @staticmethod
    def forward(ctx: Any, logits: Tensor, rows: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        wide = torch.promote_types(logits.dtype, torch.float32)
        weights = weights.to(wide)
        row_weights = torch.zeros(len(logits), dtype=wide, device=logits.device)
        row_weights.index_add_(0, rows, weights)
        log_normalizer = torch.empty_like(row_weights)
        needs_gradient = logits.requires_grad
        # float16 would lose small gradients here, before the loss scale can lift them.
        narrow = wide if logits.dtype == torch.float16 else logits.dtype
        gradient = torch.empty_like(logits, dtype=narrow) if needs_gradient else None
        step = max(1, _CrossEntropySum.CHUNK_ELEMENTS // logits.shape[-1])
        for start in range(0, len(logits), step):
            part = slice(start, start + step)
            shifted = logits[part].to(wide, copy=True)
            largest = shifted.amax(-1, keepdim=True)
            total = shifted.sub_(largest).exp_().sum(-1, keepdim=True)
            log_normalizer[part] = (largest + total.log()).squeeze(-1)
            if gradient is not None:
                gradient[part] = shifted.mul_(row_weights[part, None] / total)
        chosen = logits[rows, targets].to(wide)  # [E]
        log_probabilities = chosen - log_normalizer[rows]
        if gradient is not None:
            # In float32 at least, since probability - 1 cancels where the model is confident.
            difference = log_probabilities.exp() * row_weights[rows] - weights
            gradient[rows, targets] = difference.to(narrow)
        ctx.save_for_backward(gradient)
        ctx.dtype = logits.dtype
        return -(weights * log_probabilities).sum()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * grad_outputs[0]).to(ctx.dtype), None, None, None

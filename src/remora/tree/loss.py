"""The cross entropy of a micro-batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from remora.tree.packing import MicroBatch


def loss_sum(logits: Tensor, batch: MicroBatch) -> Tensor:
    """Return sum(weight * cross entropy) over a batch's edges, in nats, computed in float32.

    Where classes are sets, it is the sum over rows of weight * mean binary cross entropy of the
    classes, as `BCEWithLogitsLoss` in transformers' multi-label classification.

    Divide by the sum of the weights over the whole effective batch to get its mean loss.

    Args:
        logits: [P, vocabulary], from `answer_logits`.
        batch: The batch of these logits.
    """
    if batch.row_weights is not None:
        of_sets: Tensor = _BinaryCrossEntropySum.apply(  # type: ignore[no-untyped-call]
            logits, batch.edge_predictors, batch.edge_targets, batch.edge_weights, batch.row_weights
        )
        return of_sets
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


class _BinaryCrossEntropySum(torch.autograd.Function):
    """Mean binary cross entropy over classes of several weighted sets per row.

    With x the logits of a row, w its weight and w_c that of its sets with class c, the loss is the
    mean over c of w * softplus(x_c) - w_c * x_c. The gradient is computed beside it, as above.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        rows: Tensor,
        targets: Tensor,
        weights: Tensor,
        row_weights: Tensor,
    ) -> Tensor:
        wide = torch.promote_types(logits.dtype, torch.float32)
        share = 1 / logits.shape[-1]
        weights, row_weights = weights.to(wide) * share, row_weights.to(wide) * share
        needs_gradient = logits.requires_grad
        gradient = torch.empty_like(logits, dtype=wide) if needs_gradient else None
        loss = -(weights * logits[rows, targets].to(wide)).sum()
        step = max(1, _CrossEntropySum.CHUNK_ELEMENTS // logits.shape[-1])
        for start in range(0, len(logits), step):
            part = slice(start, start + step)
            x = logits[part].to(wide)
            loss += (row_weights[part, None] * functional.softplus(x)).sum()
            if gradient is not None:
                gradient[part] = row_weights[part, None] * torch.sigmoid(x)
        if gradient is not None:
            gradient[rows, targets] -= weights  # an edge occurs once, but for those that fill up
        ctx.save_for_backward(gradient)
        ctx.dtype = logits.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * grad_outputs[0]).to(ctx.dtype), None, None, None, None

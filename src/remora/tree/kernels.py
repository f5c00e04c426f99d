"""How the blocks of a token tree attend: by torch's fused kernels or by matrix products."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel


def attend_by_kernel(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    index: Tensor,
    settings: dict[str, Any],
) -> Tensor:
    """Attend by torch's fused kernels: query [G, H, B, D]; returns [G, B, H, D]."""
    from torch.utils.checkpoint import checkpoint
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        keys, values = _gather(key, index), _gather(value, index)
        with allowed_kernels(query.device):
            output, _ = sdpa_attention_forward(module, query, keys, values, mask, **settings)
        return output

    # The gathered keys are many times the keys: they are gathered again for the backward pass.
    output: Tensor = checkpoint(
        attend,
        query,
        key,
        value,
        use_reentrant=False,
        preserve_rng_state=bool(settings.get("dropout")),
    )
    return output


def allowed_kernels(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Choose among torch's kernels for a device: all but cuDNN's on CUDA.

    The backward pass of cuDNN's is not deterministic, and gives NaN under a mask at some lengths
    (https://github.com/pytorch/pytorch/issues/196678).
    """
    if device.type != "cuda":
        return contextlib.nullcontext()
    chosen: contextlib.AbstractContextManager[None] = sdpa_kernel(
        [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    )
    return chosen


def _gather(x: Tensor, index: Tensor) -> Tensor:
    """Return the keys or values of each block, [G, H', L, D]; x [1, H', K, D], index [G, L]."""
    gathered: Tensor = _Gather.apply(x, index)  # type: ignore[no-untyped-call]
    return gathered


class _Gather(torch.autograd.Function):
    """Indexing whose gradients are summed in float32: a shared key has one for each block."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.length, ctx.dtype = x.shape[2], x.dtype
        rows = x[0].transpose(0, 1)  # [K, H', D]
        chosen = rows.index_select(0, index.flatten())
        return chosen.view(*index.shape, *rows.shape[1:]).transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        gradient = grad_outputs[0].transpose(1, 2)  # [G, L, H', D]
        wide = torch.promote_types(ctx.dtype, torch.float32)
        rows = gradient.new_zeros(ctx.length, *gradient.shape[2:], dtype=wide)
        rows.index_add_(0, index.flatten(), gradient.flatten(0, 1).to(wide))
        return rows.to(ctx.dtype).transpose(0, 1)[None], None


def has_slow_kernel(device: torch.device) -> bool:
    """Whether matrix products beat torch's fused kernel on small blocks; on CPU they do."""
    return device.type == "cpu"


def attend_by_products(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, index: Tensor, scale: float
) -> Tensor:
    """Attend by matrix products: query [G, H, B, D]; returns [G, B, H, D]."""
    if torch.is_autocast_enabled(query.device.type):  # a float32 base: its rotary positions are too
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    groups, heads, size, _ = query.shape
    stacked = query.reshape(groups, key.shape[1], -1, query.shape[-1])  # [G, H', H / H' * B, D]
    additive = torch.zeros_like(mask, dtype=query.dtype)
    additive.masked_fill_(~mask, torch.finfo(query.dtype).min)
    output: Tensor = BlockAttention.apply(  # type: ignore[no-untyped-call]
        stacked, key, value, additive, index, scale
    )
    return output.view(groups, heads, size, -1).transpose(1, 2)


class BlockAttention(torch.autograd.Function):
    """softmax(scale * Q K' + mask) V for each block, computed again in the backward pass.

    Heads that share a key are stacked as queries of it, R = H / H' * B. Shapes: query
    [G, H', R, D], key [1, H', K, D], value [1, H', K, D'], mask [G, 1, B, L], index [G, L].
    """

    CHUNK_ELEMENTS = 1 << 21  # attention weights at a time, which stay in a CPU's cache

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor,
        index: Tensor,
        scale: float,
    ) -> Tensor:
        """Compute it; see the class."""
        ctx.save_for_backward(query, key, value, mask, index)
        ctx.scale = scale
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        for part in _parts(query, index):
            keys, values = _gather(key, index[part]), _gather(value, index[part])
            weights = BlockAttention.weights(query[part], keys, mask[part], scale)
            torch.matmul(weights, values, out=output[part])
        return output

    @staticmethod
    def weights(query: Tensor, keys: Tensor, mask: Tensor, scale: float) -> Tensor:
        """Return the attention weights [G, H', R, L]."""
        scores = torch.matmul(query, keys.transpose(-1, -2)).mul_(scale)
        scores.view(*scores.shape[:2], -1, *mask.shape[2:]).add_(mask[:, :, None])
        return torch.softmax(scores, -1)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the gradients; see the class."""
        query, key, value, mask, index = ctx.saved_tensors
        wide = torch.promote_types(key.dtype, torch.float32)
        grad_query = torch.empty_like(query)
        grad_key = torch.zeros_like(key[0].transpose(0, 1), dtype=wide)  # [K, H', D]
        grad_value = torch.zeros_like(value[0].transpose(0, 1), dtype=wide)
        for part in _parts(query, index):
            keys, values = _gather(key, index[part]), _gather(value, index[part])
            gradient = grad_outputs[0][part]
            weights = BlockAttention.weights(query[part], keys, mask[part], ctx.scale)
            grad_weights = torch.matmul(gradient, values.transpose(-1, -2))
            # In one operation, since its subtraction cancels in 16 bits.
            grad_scores = torch.ops.aten._softmax_backward_data(
                grad_weights, weights, -1, weights.dtype
            ).mul_(ctx.scale)
            torch.matmul(grad_scores, keys, out=grad_query[part])
            for total, grad in (
                (grad_key, torch.matmul(grad_scores.transpose(-1, -2), query[part])),
                (grad_value, torch.matmul(weights.transpose(-1, -2), gradient)),
            ):
                rows = grad.transpose(1, 2).flatten(0, 1).to(wide)  # [G * L, H', D]
                total.index_add_(0, index[part].flatten(), rows)
        grads = (x.to(key.dtype).transpose(0, 1)[None] for x in (grad_key, grad_value))
        return grad_query, *grads, None, None, None


def _parts(query: Tensor, index: Tensor) -> Iterator[slice]:
    """Yield slices of the blocks whose attention weights fit a CPU's cache."""
    elements = query.shape[1] * query.shape[2] * index.shape[1]
    step = max(1, BlockAttention.CHUNK_ELEMENTS // elements)
    for start in range(0, len(index), step):
        yield slice(start, start + step)

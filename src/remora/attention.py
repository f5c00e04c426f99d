"""Attention over a token tree, computed only near where there is something to see.

A packed row of N tokens has N * N pairs of a query and a key, and almost all of them are hidden:
a message does not see another message. So the queries are cut into blocks of neighbours, and each
block attends to the keys that one of its queries sees: in a preorder, its own tokens and the
ancestors of the first. What a block leaves out was hidden from all of its queries, so nothing
changes but the work.

transformers lets a model take its attention from a registered function; ours gathers the keys of
each block and calls transformers' own scaled-dot-product attention on the blocks as a batch.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from remora.errors import ModelError

NAME = "remora"
"""What the attention is registered as in transformers."""

BLOCK_SIZES = (32, 64, 128)
"""Queries to a block; the size that computes fewest pairs is taken."""

BLOCK_COST = 2_048
"""What a block costs beside its pairs, in pairs: its keys are copied together."""

GPU_PAIRS = 1 << 24
"""Pairs that a CUDA device computes whole. With 762 tokens that was faster than blocks, which take
many small kernels (docs/log.md); the limit itself was not measured."""


@dataclass(frozen=True)
class Blocks:
    """Which keys each block of queries attends to. G blocks of up to B queries, L keys each."""

    size: int  # B
    keys: Tensor  # [G, L] int64, positions in the row; a block that sees fewer is filled up with 0
    filled: Tensor  # [G, L] bool, False where filled up
    by_kernel: bool = True  # by torch's fused kernel, or by matrix products


def install(model: Any) -> None:
    """Let a model that uses scaled-dot-product attention compute it in blocks where it is told to.

    Without blocks its attention is what it was.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    if model.config.get_text_config()._attn_implementation != "sdpa":
        return
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)


def uninstall(model: Any) -> None:
    """Give a model its scaled-dot-product attention over whole masks back."""
    if model.config.get_text_config()._attn_implementation == NAME:
        model.set_attn_implementation("sdpa")


def inputs(
    config: Any,
    visible: Callable[[int | None], Tensor],
    dtype: torch.dtype,
    *,
    in_blocks: bool | None = None,
) -> dict[str, Any]:
    """Return the arguments of a Hugging Face model's forward that make a packed row's attention.

    Args:
        config: The model's (text) configuration; it names the attention of each layer.
        visible: Gives the boolean mask [queries, keys] for a sliding window, or None for no window.
        dtype: Of the additive mask that models without scaled-dot-product attention need.
        in_blocks: Whether to compute in blocks; None where that costs less.

    Returns:
        `attention_mask`, one or, where layers differ, one for each layer type; and the blocks.

    Raises:
        ModelError: If a layer's attention cannot follow the tree.
    """
    layer_types = set(getattr(config, "layer_types", None) or ())
    if unknown := layer_types - {"full_attention", "sliding_attention"}:
        raise ModelError(
            f"the model has layers of type {', '.join(sorted(unknown))}, which cannot branch; "
            "choose a model whose layers are all full or sliding-window attention"
        )
    window = getattr(config, "sliding_window", None)
    # Where the layers are of one unnamed type, a window holds for all of them.
    every = {"every layer": window}
    named = {"full_attention": None, "sliding_attention": window}
    windows = {kind: named[kind] for kind in layer_types} or every
    dense = visible(None)
    if in_blocks is None and prefers_whole(dense.device.type, *dense.shape):
        in_blocks = False
    blocks = None
    if config._attn_implementation == NAME and in_blocks is not False:
        blocks = _choose_blocks(dense, forced=bool(in_blocks))
    masks = {}
    for kind, width in windows.items():
        mask = dense if width is None else visible(width)
        if blocks:
            masks[kind] = _block_mask(mask, blocks)
        elif config._attn_implementation == "eager":
            lowest = torch.finfo(dtype).min
            additive = torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, lowest)
            masks[kind] = additive[None, None]
        else:
            masks[kind] = mask[None, None]
    return {
        "attention_mask": masks if "sliding_attention" in masks else next(iter(masks.values())),
        **({"tree_blocks": blocks} if blocks else {}),
    }


def prefers_whole(device: str, num_queries: int, num_keys: int) -> bool:
    """Whether a type of device computes so many pairs at once, hidden ones too."""
    return device == "cuda" and num_queries * num_keys <= GPU_PAIRS


def _choose_blocks(visible: Tensor, *, forced: bool) -> Blocks | None:
    """Cut the queries of a mask [queries, keys] into blocks, or return None where it costs more."""
    num_queries, num_keys = visible.shape
    best, cost = None, math.inf if forced else num_queries * num_keys
    for size in BLOCK_SIZES:
        rows = functional.pad(visible, (0, 0, 0, -num_queries % size))
        seen = rows.view(-1, size, num_keys).any(1)  # [G, keys]
        counts = seen.sum(1)
        longest = int(counts.max())
        now = len(seen) * (size * longest + BLOCK_COST)
        if now < cost:
            filled = torch.arange(longest, device=seen.device) < counts[:, None]
            keys = torch.zeros_like(filled, dtype=torch.int64)
            keys[filled] = seen.nonzero()[:, 1]
            best = Blocks(size, keys, filled, not _has_slow_kernel(visible.device))
            cost = now
    return best


def _block_mask(visible: Tensor, blocks: Blocks) -> Tensor:
    """Return the part [G, 1, B, L] of a mask [queries, keys] that the blocks look at."""
    rows = functional.pad(visible, (0, 0, 0, -len(visible) % blocks.size))
    rows = rows.view(len(blocks.keys), blocks.size, -1)
    index = blocks.keys[:, None, :].expand(-1, blocks.size, -1)
    return (rows.gather(2, index) & blocks.filled[:, None, :])[:, None]


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    tree_blocks: Blocks | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute a layer's attention: query [1, H, Q, D], key and value [1, H', K, D]."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if tree_blocks is None:
        with _kernels(query.device):
            return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    assert attention_mask is not None
    num_queries = query.shape[2]
    padded = functional.pad(query[0], (0, 0, 0, -num_queries % tree_blocks.size))
    heads, width = query.shape[1], query.shape[3]
    blocked = padded.view(heads, -1, tree_blocks.size, width).transpose(0, 1)  # [G, H, B, D]
    if not (tree_blocks.by_kernel or kwargs.get("dropout")):
        scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
        output = _by_products(blocked, key, value, attention_mask, tree_blocks.keys, scale)
    else:
        output = _by_kernel(module, blocked, key, value, attention_mask, tree_blocks.keys, kwargs)
    return output.flatten(0, 1)[None, :num_queries], None  # [1, Q, H, D]


def _by_kernel(
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
        with _kernels(query.device):
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


def _kernels(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Choose among torch's kernels for a device: on CUDA not cuDNN's.

    Its backward pass gives other bits each time, and under a mask NaN at some lengths
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


def _has_slow_kernel(device: torch.device) -> bool:
    """Whether matrix products beat torch's fused kernel on small blocks; on processors they do."""
    return device.type == "cpu"


def _by_products(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, index: Tensor, scale: float
) -> Tensor:
    """Attend by matrix products: query [G, H, B, D]; returns [G, B, H, D]."""
    if torch.is_autocast_enabled(query.device.type):  # a float32 base: its rotary positions are too
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    groups, heads, size, width = query.shape
    stacked = query.reshape(groups, key.shape[1], -1, width)  # [G, H', H / H' * B, D]
    additive = torch.zeros_like(mask, dtype=query.dtype)
    additive.masked_fill_(~mask, torch.finfo(query.dtype).min)
    output: Tensor = _BlockAttention.apply(  # type: ignore[no-untyped-call]
        stacked, key, value, additive, index, scale
    )
    return output.view(groups, heads, size, width).transpose(1, 2)


class _BlockAttention(torch.autograd.Function):
    """softmax(scale * Q K' + mask) V for each block, computed again in the backward pass.

    Heads that share a key are stacked as queries of it, R = H / H' * B. Shapes: query
    [G, H', R, D], key and value [1, H', K, D], mask [G, 1, B, L], index [G, L].
    """

    CHUNK_ELEMENTS = 1 << 21  # attention weights at a time, which stay in a processor's cache

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
        ctx.save_for_backward(query, key, value, mask, index)
        ctx.scale = scale
        output = torch.empty_like(query)
        for part in _parts(query, index):
            keys, values = _gather(key, index[part]), _gather(value, index[part])
            weights = _BlockAttention.weights(query[part], keys, mask[part], scale)
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
        query, key, value, mask, index = ctx.saved_tensors
        wide = torch.promote_types(key.dtype, torch.float32)
        grad_query = torch.empty_like(query)
        grad_key = torch.zeros_like(key[0].transpose(0, 1), dtype=wide)  # [K, H', D]
        grad_value = torch.zeros_like(grad_key)
        for part in _parts(query, index):
            keys, values = _gather(key, index[part]), _gather(value, index[part])
            gradient = grad_outputs[0][part]
            weights = _BlockAttention.weights(query[part], keys, mask[part], ctx.scale)
            grad_weights = torch.matmul(gradient, values.transpose(-1, -2))
            # In one operation, since what is subtracted in it cancels in 16 bits.
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
    """Yield slices of the blocks whose attention weights fit a processor's cache."""
    elements = query.shape[1] * query.shape[2] * index.shape[1]
    step = max(1, _BlockAttention.CHUNK_ELEMENTS // elements)
    for start in range(0, len(index), step):
        yield slice(start, start + step)

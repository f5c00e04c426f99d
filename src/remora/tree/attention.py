"""Attention over a token tree, computed in blocks that skip most masked pairs.

A packed row of N tokens has N * N pairs of a query and a key, and almost all of them are masked:
a message does not see another message. So the queries are cut into blocks of neighbours, and each
block attends only to keys that one of its queries sees: in a preorder, its own tokens and the
ancestors of the first. Keys that a block skips are masked for all of its queries, so the result is
the same.

transformers calls an attention function that is registered by name; ours gathers the keys of each
block and calls transformers' own scaled-dot-product attention on the blocks as a batch.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from remora.errors import ModelError
from remora.tree import last_layer
from remora.tree.kernels import (
    allowed_kernels,
    attend_by_kernel,
    attend_by_products,
    has_slow_kernel,
)
from remora.tree.packing import TokenTree

NAME = "remora"
"""Name of the attention in transformers."""

_NARROW = {"sliding_attention", "chunked_attention"}
"""Types of layers for which a model takes a mask each."""

BLOCK_SIZES = (32, 64, 128)
"""Queries in a block, each a multiple of the one before; that with the lowest cost is chosen."""

BLOCK_COST = 2_048
"""Fixed cost of a block, in pairs: its keys are gathered."""

GPU_PAIRS = 1 << 24
"""Up to this many pairs CUDA devices compute the whole mask. With 762 tokens that was faster than
blocks, which take many small kernels (docs/log.md); the limit itself was not measured."""


@dataclass(frozen=True)
class Blocks:
    """Which keys each block of queries attends to. G blocks of up to B queries, L keys each."""

    size: int  # B
    keys: Tensor  # [G, L] int64, positions in the row; a block that sees fewer is padded with 0
    filled: Tensor  # [G, L] bool, False where padded
    by_kernel: bool = True  # by torch's fused kernel, or by matrix products


def install(model: Any) -> None:
    """Let a model with scaled-dot-product attention compute it in blocks if it is given blocks.

    Without blocks its attention stays the same. Also its last layer, if it is given predictors.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    if model.config.get_text_config()._attn_implementation != "sdpa":
        return
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    _set(model, NAME)
    last_layer.install(model)


def uninstall(model: Any) -> bool:
    """Restore a model's attention over whole masks; return whether it was another."""
    if model.config.get_text_config()._attn_implementation != NAME:
        return False
    _set(model, "sdpa")
    return True


def _set(model: Any, name: str) -> None:
    """Set a model's attention, without what transformers logs of parts that are no models."""
    log = logging.getLogger("transformers.modeling_utils")
    was_disabled, log.disabled = log.disabled, True
    try:
        model.set_attn_implementation(name)
    finally:
        log.disabled = was_disabled


def tree_mask(tree: TokenTree, window: int | None = None, chunk: int | None = None) -> Tensor:
    """Return which key each query of a tree sees, a boolean mask [N, N], rows are queries.

    Query q sees key k if k is q or one of its ancestors: k <= q < subtree_end[k].

    Args:
        tree: The tree.
        window: Width of a sliding window: a key is seen from at most `window - 1` positions on.
            Measured in positions, since neighbours in the packed row may be far apart in depth.
        chunk: Length of chunks of positions: a key is seen only from its own chunk.
    """
    index = torch.arange(tree.num_tokens, device=tree.token_ids.device)
    mask = (index[None, :] <= index[:, None]) & (index[:, None] < tree.subtree_end[None, :])
    if window is not None:
        mask &= tree.position_ids[:, None] - tree.position_ids[None, :] < window
    if chunk is not None:
        chunks = tree.position_ids // chunk
        mask &= chunks[:, None] == chunks[None, :]
    return mask


def inputs(
    config: Any,
    visible: Callable[..., Tensor],
    dtype: torch.dtype,
    *,
    in_blocks: bool | None = None,
    kept: Tensor | None = None,
) -> dict[str, Any]:
    """Return the arguments of a Hugging Face model's forward for a packed row's attention.

    Args:
        config: The model's (text) configuration; it names the attention of each layer.
        visible: Returns the boolean mask [queries, keys] for a sliding window, None for no window,
            and for chunks of positions if they are given after it.
        dtype: Type of the additive mask that models without scaled-dot-product attention need.
        in_blocks: Whether to compute in blocks; None to do so if it costs less.
        kept: Places [P] of which the head is computed and nothing else of the last layer is needed;
            None if its output is needed everywhere.

    Returns:
        `attention_mask`, one, or one for each layer type if they differ; `tree_blocks`, and `kept`.

    Raises:
        ModelError: If a layer's attention cannot follow the tree.
    """
    reaches = _reaches(config)
    # The blocks, if they cost less than whole masks.
    dense = visible(None)
    if in_blocks is None and prefers_whole(dense.device.type, *dense.shape):
        in_blocks = False
    blocks = None
    takes_more = config._attn_implementation == NAME
    if takes_more and in_blocks is not False:
        blocks = _choose_blocks(dense, forced=bool(in_blocks))
    # A mask for each type of layer.
    masks = {}
    for kind, reach in reaches.items():
        mask = dense if reach == (None, None) else visible(*reach)
        if blocks:
            masks[kind] = _block_mask(mask, blocks)
        elif config._attn_implementation == "eager":
            lowest = torch.finfo(dtype).min
            additive = torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, lowest)
            masks[kind] = additive[None, None]
        else:
            masks[kind] = mask[None, None]
    return {
        "attention_mask": masks if masks.keys() & _NARROW else next(iter(masks.values())),
        **({"tree_blocks": blocks} if blocks else {}),
        **({last_layer.ARGUMENT: kept} if kept is not None and takes_more else {}),
    }


def _reaches(config: Any) -> dict[str, tuple[int | None, int | None]]:
    """Return the sliding window and the chunk of each type of layer, None where it has none.

    Raises:
        ModelError: If a layer's attention cannot follow the tree.
    """
    layer_types = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None)
    known = {
        "full_attention": (None, None),
        "sliding_attention": (window, None),
        "chunked_attention": (None, getattr(config, "attention_chunk_size", None)),
    }
    if unknown := layer_types - known.keys():
        raise ModelError(
            f"the model has {', '.join(sorted(unknown))} layers, which cannot follow a token tree; "
            "choose a model with full, sliding-window or chunked attention only"
        )
    # Layers without named types all have the same window.
    return {kind: known[kind] for kind in layer_types} or {"every layer": (window, None)}


def prefers_whole(device: str, num_queries: int, num_keys: int) -> bool:
    """Whether a type of device computes all pairs at once, masked ones too."""
    return device == "cuda" and num_queries * num_keys <= GPU_PAIRS


def _choose_blocks(visible: Tensor, *, forced: bool) -> Blocks | None:
    """Cut the queries of a mask [queries, keys] into blocks; None if that costs more."""
    num_queries, num_keys = visible.shape
    best, cost = None, math.inf if forced else num_queries * num_keys
    # The largest byte is 40 times as fast as `any` of truth values on a CPU.
    seen, before = visible.view(torch.uint8), 1  # [G, keys], of blocks of the size before
    for size in BLOCK_SIZES:
        padded = functional.pad(seen, (0, 0, 0, -len(seen) % (size // before)))
        seen, before = padded.view(-1, size // before, num_keys).amax(1), size
        counts = seen.sum(1)
        longest = int(counts.max())
        now = len(seen) * (size * longest + BLOCK_COST)
        if now < cost:
            filled = torch.arange(longest, device=seen.device) < counts[:, None]
            keys = torch.zeros_like(filled, dtype=torch.int64)
            keys[filled] = seen.nonzero()[:, 1]
            best = Blocks(size, keys, filled, not has_slow_kernel(visible.device))
            cost = now
    return best


def _block_mask(visible: Tensor, blocks: Blocks) -> Tensor:
    """Return the part [G, 1, B, L] of a mask [queries, keys] that belongs to the blocks."""
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
        with allowed_kernels(query.device):
            return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    assert attention_mask is not None
    num_queries = query.shape[2]
    padded = functional.pad(query[0], (0, 0, 0, -num_queries % tree_blocks.size))
    heads, width = query.shape[1], query.shape[3]
    blocked = padded.view(heads, -1, tree_blocks.size, width).transpose(0, 1)  # [G, H, B, D]
    if not (tree_blocks.by_kernel or kwargs.get("dropout")):
        scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
        output = attend_by_products(blocked, key, value, attention_mask, tree_blocks.keys, scale)
    else:
        output = attend_by_kernel(
            module, blocked, key, value, attention_mask, tree_blocks.keys, kwargs
        )
    return output.flatten(0, 1)[None, :num_queries], None  # [1, Q, H, D]

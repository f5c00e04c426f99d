"""The two layouts of a batch: one token tree, or padded rows.

A model carries its layout. What trains, scores, plans, serves and diagnoses asks for micro-batches
and logits here, and does not know which layout it is.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

from remora.data.prompt import TokenSequence
from remora.errors import ModelError
from remora.tree import attention, packing, rows
from remora.tree.packing import MicroBatch

Layout: TypeAlias = Literal["tree", "rows"]

_MARK = "remora_layout"

FOLLOWING = {"full_attention", "sliding_attention", "chunked_attention"}
"""Types of layers that compute only what a mask and positions say, so that a row can branch."""


def why_rows(kind: type, config: Any) -> str | None:
    """Return why a model declares that it cannot follow a token tree; None if it does not.

    Args:
        kind: The model's class in transformers.
        config: Its configuration.
    """
    types = set(getattr(config.get_text_config(), "layer_types", None) or ())
    if others := sorted(types - FOLLOWING):
        return f"it has {', '.join(others)} layers, in which a row cannot branch"
    if getattr(kind, "_is_stateful", False):
        return "its layers carry a state along the row, which cannot branch"
    if getattr(config.get_text_config(), "alibi", False):
        return "its attention measures distances by index (ALiBi), which a tree changes"
    takes_masks = ("_supports_sdpa", "_supports_attention_backend")
    is_own = not any(getattr(kind, name, False) for name in takes_masks)
    takes_positions = (
        "position_ids" in inspect.signature(getattr(kind, "forward", object)).parameters
    )
    if is_own and (not takes_positions or hasattr(config.get_text_config(), "window_size")):
        return "its attention is of its own kind, and may not follow the mask of a tree"
    return None


def choose(requested: str, kind: type, config: Any) -> Layout:
    """Return the layout of a model by what it declares; the start-up check has the last word.

    Args:
        requested: The setting: auto, tree or rows.
        kind: The model's class in transformers.
        config: Its configuration.

    Raises:
        ModelError: If a tree is requested, and the model declares that it cannot follow one.
    """
    reason = why_rows(kind, config)
    if requested == "tree" and reason:
        raise ModelError(
            f"this model cannot follow a token tree: {reason}; leave out --layout, or use "
            "--layout rows"
        )
    return "rows" if requested == "rows" or reason else "tree"


def assign(model: Any, layout: Layout) -> None:
    """Have a model computed in a layout from now on."""
    setattr(base_of(model), _MARK, layout)
    if layout == "tree":
        attention.install(model)
    else:
        attention.uninstall(model)


def base_of(model: Any) -> Any:
    """Return a model of transformers, without an adapter's wrapping."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def num_outputs(model: Any) -> int:
    """Return how many tokens or classes a model's head tells apart, the width of its logits."""
    classes = getattr(model.get_output_embeddings(), "out_features", None)
    return int(classes or model.config.get_text_config().vocab_size)


def of(model: Any) -> Layout:
    """Return a model's layout."""
    layout: Layout = getattr(model, _MARK, "tree")
    return layout


def split(layout: Layout, batch: Sequence[TokenSequence], max_tokens: int) -> list[MicroBatch]:
    """Cut rows into micro-batches of at most `max_tokens` computed tokens; a longer row is alone.

    The order within an effective batch does not change sums over it.
    """
    cut = packing.split if layout == "tree" else rows.split
    return list(cut(batch, max_tokens))


def build(layout: Layout, batch: Sequence[TokenSequence]) -> MicroBatch:
    """Return rows as one micro-batch."""
    return packing.build(batch) if layout == "tree" else rows.build(batch)

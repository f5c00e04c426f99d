"""Attention in blocks: what it looks at, what it leaves out, and what it leaves alone.

Also covers remora.tree.kernels and check.
"""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from conftest import tiny_model
from remora.data.prompt import TokenSequence
from remora.errors import ModelError
from remora.tree import attention, packing
from remora.tree.check import check_tree
from remora.tree.forward import answer_logits
from remora.tree.loss import loss_sum

PREFIX = list(range(20, 40))


def many_rows(count: int = 40, length: int = 12) -> packing.TokenTree:
    generator = torch.Generator().manual_seed(0)
    messages = torch.randint(5, 60, (count, length), generator=generator).tolist()
    return packing.build(
        [TokenSequence([*PREFIX, *m, 3, 4, 2], len(PREFIX) + length + 1) for m in messages]
    )


def given(packed: packing.TokenTree, implementation: str = attention.NAME, **config: Any) -> Any:
    settings = SimpleNamespace(_attn_implementation=implementation, **config)
    return attention.inputs(settings, partial(attention.tree_mask, packed), torch.float32)


def test_blocks_look_at_every_visible_pair_once_and_at_few_others() -> None:
    packed = many_rows()
    arguments = given(packed)
    blocks, mask = arguments["tree_blocks"], arguments["attention_mask"]
    found = torch.zeros(packed.num_tokens, packed.num_tokens, dtype=torch.int64)
    for group, keys in enumerate(blocks.keys):
        for place in range(blocks.size):
            query = group * blocks.size + place
            if query < packed.num_tokens:
                found[query].index_add_(0, keys, mask[group, 0, place].long())
    assert torch.equal(found, attention.tree_mask(packed).long())
    assert mask.numel() < packed.num_tokens**2 / 4


def test_a_row_without_branches_is_computed_whole() -> None:
    packed = packing.build([TokenSequence(list(range(64)), 60)])
    arguments = given(packed)
    assert "tree_blocks" not in arguments
    assert arguments["attention_mask"].shape == (1, 1, 64, 64)


def test_other_attention_gets_the_whole_mask() -> None:
    packed = many_rows()
    size = packed.num_tokens
    eager = given(packed, "eager")["attention_mask"]
    assert eager.shape == (1, 1, size, size)
    assert torch.equal(eager[0, 0] == 0, attention.tree_mask(packed))
    assert given(packed, "sdpa")["attention_mask"].dtype == torch.bool


def test_a_window_narrows_the_blocks_of_its_layers() -> None:
    packed = many_rows()
    kinds = ["sliding_attention", "full_attention"]
    masks = given(packed, layer_types=kinds, sliding_window=6)["attention_mask"]
    assert masks["sliding_attention"].shape == masks["full_attention"].shape
    assert masks["sliding_attention"].sum() == attention.tree_mask(packed, 6).sum()


def test_an_ordinary_forward_is_that_of_the_stock_attention() -> None:
    model = tiny_model("qwen2")
    ids = torch.arange(5, 30)[None]
    with torch.no_grad():
        ours = model(input_ids=ids).logits
        model.set_attn_implementation("sdpa")
        assert torch.equal(model(input_ids=ids).logits, ours)


def test_layers_that_carry_state_are_refused() -> None:
    with pytest.raises(
        ModelError, match="linear_attention layers, which cannot follow a token tree; choose"
    ):
        given(many_rows(), layer_types=["linear_attention", "full_attention"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_blocks_give_what_the_whole_mask_gives(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = many_rows()
    model = tiny_model("qwen2", dtype, scale=2)
    losses, gradients = [], []
    for sizes in ((), (32,)):
        monkeypatch.setattr(attention, "BLOCK_SIZES", sizes)
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_sum(answer_logits(model, packed), packed)
        loss.backward()
        losses.append(float(loss.detach()))
        gradients.append(model.model.layers[0].self_attn.q_proj.weight.grad.float())
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert (gradients[1] - gradients[0]).norm() < 0.03 * gradients[0].norm()


def test_chunks_are_counted_in_positions() -> None:
    """Against a loop over the pairs: keys of the own chunk among the ancestors."""
    packed = many_rows()
    mask = attention.tree_mask(packed, None, 5)
    depth, end = packed.position_ids.tolist(), packed.subtree_end.tolist()
    for query in range(packed.num_tokens):
        for key in range(packed.num_tokens):
            seen = key <= query < end[key] and depth[key] // 5 == depth[query] // 5
            assert bool(mask[query, key]) == seen


def test_the_check_reaches_a_window_that_only_long_trees_exceed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A model whose window counts neighbours in the packed row, and is longer than short rows."""
    from transformers.models.gpt2.modeling_gpt2 import GPT2Attention

    stock = GPT2Attention.forward

    def windowed(self: Any, states: Any, *args: Any, attention_mask: Any, **kwargs: Any) -> Any:
        if attention_mask is not None:
            index = torch.arange(attention_mask.shape[-1])
            attention_mask = attention_mask & (index[:, None] - index[None, :] < 100)
        return stock(self, states, *args, attention_mask=attention_mask, **kwargs)

    model = tiny_model("gpt2", torch.float32)
    model.set_attn_implementation("sdpa")
    ids = [*PREFIX, 50, 51, 3, 4, 2]
    rows = [TokenSequence(ids, 23), TokenSequence([*PREFIX, 52, 3, 4, 2], 22)]
    model.config.window_size = 100
    check_tree(model, rows, rows, 400)
    monkeypatch.setattr(GPT2Attention, "forward", windowed)
    check_tree(model, rows)  # the rows are too short to tell
    check_tree(model, rows, rows, 100)  # and no tree is longer
    with pytest.raises(ModelError, match="do not follow the tree"):
        check_tree(model, rows, rows, 400)


@pytest.mark.parametrize("passes_on", [True, False])
def test_a_model_that_drops_the_blocks_computes_whole_masks(
    passes_on: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention

    stock = Qwen2Attention.forward

    def forgetful(self: Any, *args: Any, tree_blocks: Any = None, **kwargs: Any) -> Any:
        return stock(self, *args, **kwargs)

    if not passes_on:
        monkeypatch.setattr(Qwen2Attention, "forward", forgetful)
    model = tiny_model("qwen2", torch.float32)
    ids = [*PREFIX, 50, 51, 3, 4, 2]
    rows = [TokenSequence(ids, 23), TokenSequence([*PREFIX, 52, 3, 4, 2], 22)]
    check_tree(model, rows)
    implementation = model.config._attn_implementation
    assert implementation == (attention.NAME if passes_on else "sdpa")
    loss = loss_sum(answer_logits(model, many_rows()), many_rows())
    assert loss.isfinite()

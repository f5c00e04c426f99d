"""Padded rows equal each row alone, in the stock model's own forward: loss and all gradients.

Also covers remora.tree.layouts, and remora.tree.check for rows.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional

from conftest import randomize_adapter, tiny_model
from hybrids import BRANCHLESS, hybrid_config, hybrid_model
from remora.data.prompt import TokenSequence
from remora.errors import ModelError
from remora.models import loading, lora
from remora.tree import check, layouts, packing, rows
from remora.tree.forward import answer_logits
from remora.tree.loss import loss_sum

VOCABULARY = 97
PREFIX = list(range(3, 20))
BATCH = [
    TokenSequence([*PREFIX, 30, 31, 32, 33, 34, 40, 41, 2], 22),
    TokenSequence([*PREFIX, 50, 40, 42, 2], 18),
    TokenSequence([*PREFIX, 51, 52, 53, 43, 2], 20),
    TokenSequence([*PREFIX, 50, 40, 42, 2], 18),
]


def adapted_model(kind: str) -> Any:
    model = hybrid_model(kind, VOCABULARY)
    adapted = lora.add_adapter(model, rank=4, alpha=8, dropout=0.0).double()
    randomize_adapter(adapted)
    return adapted.train()


def gradients(adapted: Any) -> dict[str, torch.Tensor]:
    found = {name: p.grad for name, p in adapted.named_parameters() if p.requires_grad}
    adapted.zero_grad()
    return found


def each_alone(adapted: Any) -> torch.Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for row in BATCH:
        ids = torch.tensor([row.token_ids])
        logits = adapted(input_ids=ids, use_cache=False).logits[0, row.answer_start - 1 : -1]
        targets = ids[0, row.answer_start :]
        total = total + functional.cross_entropy(logits.double(), targets, reduction="sum")
    return total


def assert_same(adapted: Any, batches: list[packing.MicroBatch]) -> None:
    """Compare a batch with its rows alone, to 1e-6 of the largest number of each array."""
    wanted = each_alone(adapted)
    wanted.backward()
    expected = gradients(adapted)
    losses = [loss_sum(answer_logits(adapted, batch), batch) for batch in batches]
    found = torch.stack(losses).sum()
    found.backward()
    assert float(found.detach()) == pytest.approx(float(wanted.detach()), rel=1e-6)
    for name, gradient in gradients(adapted).items():
        assert expected[name] is not None, f"{name} has no gradient at all"
        assert expected[name].abs().max() > 0, name
        difference = (gradient - expected[name]).abs().max() / expected[name].abs().max()
        assert difference <= 1e-6, (name, float(difference))


@pytest.mark.parametrize("kind", [*BRANCHLESS, "llama"])
def test_loss_and_every_gradient_equal_those_of_each_row_alone(kind: str) -> None:
    adapted = adapted_model(kind)
    assert layouts.of(adapted) == ("tree" if kind == "llama" else "rows")
    layouts.assign(adapted, "rows")
    batches = layouts.split("rows", BATCH, 60)
    assert [batch.num_rows for batch in batches] == [2, 2]
    assert sum(batch.num_tokens for batch in batches) == 2 * 21 + 2 * 25
    assert_same(adapted, batches)


@pytest.mark.parametrize("kind", ["qwen3_5", "mamba"])
def test_checkpointing_changes_no_gradient(kind: str) -> None:
    adapted = adapted_model(kind)
    loading.set_checkpointing(adapted, True)
    assert_same(adapted, layouts.split("rows", BATCH, 60))


def test_rows_equal_the_tree_where_both_can_be_computed() -> None:
    adapted = adapted_model("llama")
    assert_same(adapted, [packing.build(BATCH)])
    assert_same(adapted, [rows.build(BATCH)])


def padded_left(batch: list[TokenSequence]) -> rows.PaddedRows:
    """Pad rows on the left instead, without a mask."""
    width = max(len(row.token_ids) for row in batch)
    full = [[*[0] * (width - len(row.token_ids)), *row.token_ids] for row in batch]
    shifted = [
        TokenSequence(ids, row.answer_start + width - len(row.token_ids))
        for ids, row in zip(full, batch, strict=True)
    ]
    return rows.build(shifted)


@pytest.mark.parametrize("kind", BRANCHLESS)
def test_padding_that_enters_a_state_is_not_the_same(kind: str) -> None:
    adapted = adapted_model(kind)
    with pytest.raises(AssertionError):
        assert_same(adapted, [padded_left(BATCH)])


@pytest.mark.parametrize("kind", BRANCHLESS)
def test_the_check_refuses_padding_that_enters_a_state(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = hybrid_model(kind, VOCABULARY, torch.float32).train()
    check.check_rows(model, BATCH)
    assert model.training
    monkeypatch.setattr(check, "build", padded_left)
    with pytest.raises(ModelError, match="predicts something else"):
        check.check_rows(model, BATCH)


def test_the_head_is_computed_where_an_answer_is_predicted_and_nowhere_else() -> None:
    model = hybrid_model("lfm2", VOCABULARY)
    seen = []
    model.lm_head.register_forward_hook(lambda _, args, output: seen.append(output.shape))
    batch = rows.build(BATCH)
    answer_logits(model, batch)
    assert seen == [(1, 3 + 3 + 2 + 3, VOCABULARY)]
    assert model(input_ids=batch.token_ids, use_cache=False).logits.shape[:2] == (4, 25)


def test_a_model_that_names_no_head_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = hybrid_model("lfm2", VOCABULARY, torch.float32)
    monkeypatch.setattr(type(model), "get_output_embeddings", lambda self: None)
    with pytest.raises(ModelError, match="names no output layer"):
        check.check_rows(model, BATCH)


def test_a_row_longer_than_the_micro_batch_is_alone() -> None:
    batches = layouts.split("rows", BATCH, 5)
    assert [batch.num_rows for batch in batches] == [1, 1, 1, 1]
    assert [batch.num_tokens for batch in batches] == [21, 21, 22, 25]
    assert all(batch.num_tokens == batch.num_row_tokens for batch in batches)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("qwen3_5", "linear_attention layers"),
        ("lfm2", "conv layers"),
        ("mamba", "linear_attention layers"),
        ("bloom", "of its own kind"),
        ("gpt_neo", "of its own kind"),
        ("llama", None),
    ],
)
def test_a_model_declares_whether_it_follows_a_tree(kind: str, reason: str | None) -> None:
    model = hybrid_model(kind, VOCABULARY)
    why = layouts.why_rows(type(model), model.config)
    assert why is None if reason is None else reason in str(why)
    assert layouts.choose("auto", type(model), model.config) == ("rows" if reason else "tree")
    assert layouts.choose("rows", type(model), model.config) == "rows"
    if reason:
        with pytest.raises(ModelError, match=f"{reason}.*leave out --layout"):
            layouts.choose("tree", type(model), model.config)


def test_alibi_by_a_setting_of_the_configuration_is_seen() -> None:
    import transformers

    kind = transformers.FalconForCausalLM
    for alibi in (False, True):
        config = transformers.FalconConfig(alibi=alibi)
        assert (layouts.why_rows(kind, config) is None) is not alibi


def test_a_model_that_takes_no_tree_is_refused_in_one_line() -> None:
    model = hybrid_model("bloom", VOCABULARY, torch.float32)
    with pytest.raises(ModelError, match="use --layout rows"):
        check.check_tree(model, BATCH)


def test_the_tree_of_other_models_stays_as_it_was() -> None:
    from remora.tree import attention

    model = tiny_model("qwen2")
    layouts.assign(model, "rows")
    assert model.config._attn_implementation == "sdpa"
    layouts.assign(model, "tree")
    assert model.config._attn_implementation == attention.NAME
    assert hybrid_config("qwen3_5", VOCABULARY).layer_types[0] == "linear_attention"

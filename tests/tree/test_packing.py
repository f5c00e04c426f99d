"""The token tree is exact: loss and every gradient equal the padded computation's.

Also covers remora.tree.forward.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import ARCHITECTURES, randomize_adapter, tiny_model
from remora.data.prompt import TokenSequence
from remora.models.lora import add_adapter
from remora.tree import attention, packing
from remora.tree.forward import answer_logits
from remora.tree.loss import loss_sum

PREFIX = [5, 6, 7, 8, 9, 10, 11, 12]


def row(message: list[int], answer: list[int]) -> TokenSequence:
    return TokenSequence([*PREFIX, *message, 3, *answer, 2], len(PREFIX) + len(message) + 1)


BATCHES = {
    "shared prefix": [
        row([20, 21, 22], [40, 41]),
        row([20, 30], [42]),
        row([31, 32, 33, 34, 35, 36], [40, 43, 44]),
        row([50], [42]),
    ],
    "duplicate rows": [row([20, 21], [40, 41])] * 3 + [row([25], [42])],
    "same text under two labels": [row([20, 21], [40, 41]), row([20, 21], [42]), row([22], [42])],
    "one row": [row([20, 21, 22], [40, 41])],
    "one label begins another": [row([20], [40]), row([20], [40, 41]), row([21], [40, 41])],
    "a message that reads like an answer": [row([20], [40]), row([20, 3, 40, 2], [41])],
    "nothing shared": [
        TokenSequence([20, 21, 3, 40, 2], 3),
        TokenSequence([30, 31, 32, 3, 41, 2], 4),
    ],
}


def padded_loss(model: Any, rows: list[TokenSequence]) -> Tensor:
    """The stock computation: a padded batch, all logits, mean cross entropy of answer tokens.

    Not `model(labels=...).loss`, which rounds to float32.
    """
    longest = max(len(r.token_ids) for r in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    attention = torch.zeros_like(ids)
    labels = torch.full_like(ids, -100)
    for i, r in enumerate(rows):
        n = len(r.token_ids)
        ids[i, :n] = torch.tensor(r.token_ids)
        attention[i, :n] = 1
        labels[i, r.answer_start : n] = torch.tensor(r.token_ids[r.answer_start :])
    logits = model(input_ids=ids, attention_mask=attention).logits
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
    )


def tree_loss(model: Any, rows: list[TokenSequence], max_tokens: int = 10_000) -> Tensor:
    trees = packing.split(rows, max_tokens)
    weight = sum(t.num_supervised_tokens for t in trees)
    losses = [loss_sum(answer_logits(model, t), t) for t in trees]
    return torch.stack(losses).sum() / weight


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


def relative_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max(
        float((found[n] - expected[n]).norm() / expected[n].norm().clamp_min(1e-12))
        for n in expected
    )


def adapted(architecture: str) -> Any:
    model = add_adapter(tiny_model(architecture), rank=4, alpha=8, dropout=0.0)
    model.double()
    randomize_adapter(model)
    return model.train()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.usefixtures("pairs")
def test_loss_and_every_gradient_equal_the_padded_computation(architecture: str) -> None:
    model = adapted(architecture)
    for name, rows in BATCHES.items():
        expected_loss = padded_loss(model, rows)
        expected = gradients(model, expected_loss)
        for max_tokens in (10_000, 25):
            loss = tree_loss(model, rows, max_tokens)
            found = gradients(model, loss)
            assert float(loss.detach()) == pytest.approx(float(expected_loss.detach()), rel=1e-6), (
                name
            )
            assert relative_error(found, expected) < 1e-6, name


@pytest.mark.usefixtures("pairs")
def test_a_detached_prefix_has_the_same_loss_and_fails_the_gradient_test(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = adapted("qwen2")
    rows = BATCHES["shared prefix"]
    expected_loss = padded_loss(model, rows)
    expected = gradients(model, expected_loss)
    import transformers.models.qwen2.modeling_qwen2 as qwen2

    stock = qwen2.ALL_ATTENTION_FUNCTIONS[attention.NAME]

    def detached(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kw: Any):
        shared = torch.arange(key.shape[2]) < len(PREFIX)
        key, value = (torch.where(shared[:, None], x.detach(), x) for x in (key, value))
        return stock(module, query, key, value, *args, **kw)

    monkeypatch.setitem(qwen2.ALL_ATTENTION_FUNCTIONS, attention.NAME, detached)
    loss = tree_loss(model, rows)
    assert float(loss.detach()) == pytest.approx(float(expected_loss.detach()), rel=1e-6)
    assert relative_error(gradients(model, loss), expected) > 1e-3


@pytest.mark.usefixtures("pairs")
def test_fifty_steps_stay_on_the_stock_trajectory() -> None:
    generator = torch.Generator().manual_seed(3)
    batches = [
        [
            row(
                torch.randint(20, 40, (int(n),), generator=generator).tolist(),
                torch.randint(40, 60, (int(n) % 3 + 1,), generator=generator).tolist(),
            )
            for n in torch.randint(1, 8, (8,), generator=generator)
        ]
        for _ in range(50)
    ]
    trajectories = []
    for loss_of in (padded_loss, tree_loss):
        model = add_adapter(tiny_model("qwen2", torch.float32), rank=4, alpha=8, dropout=0.0)
        randomize_adapter(model)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
        losses = []
        for rows in batches:
            loss = loss_of(model, rows)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        trajectories.append(losses)
    stock, ours = trajectories
    assert ours == pytest.approx(stock, rel=2e-3)
    assert stock[-1] < stock[0] - 0.5


def test_layout_of_a_small_tree() -> None:
    packed = packing.build([TokenSequence([7, 8, 1, 5], 3), TokenSequence([7, 8, 1, 4, 5], 3)])
    assert packed.token_ids.tolist() == [7, 8, 1, 4, 5, 5]
    assert packed.position_ids.tolist() == [0, 1, 2, 3, 4, 3]
    assert packed.subtree_end.tolist() == [6, 6, 6, 5, 5, 6]
    assert packed.predictors.tolist() == [2, 3]
    assert packed.edge_predictors.tolist() == [0, 1, 0]
    assert packed.edge_targets.tolist() == [4, 5, 5]
    assert packed.edge_weights.tolist() == [1, 1, 1]
    assert packed.num_row_tokens == 9


def test_weights_count_the_rows_that_pass() -> None:
    packed = packing.build([TokenSequence([7, 1, 4], 2)] * 3 + [TokenSequence([7, 1, 5], 2)])
    assert packed.num_tokens == 4
    assert packed.edge_weights.tolist() == [3, 1]
    assert packed.num_supervised_tokens == 4


def test_split_keeps_every_row_and_the_limit() -> None:
    rows = [row([20 + i, 21 + i % 3], [40 + i % 5]) for i in range(30)]
    trees = packing.split(rows, 40)
    assert sum(t.num_rows for t in trees) == 30
    assert sum(t.num_supervised_tokens for t in trees) == 60
    assert max(t.num_tokens for t in trees) <= 40
    assert len(packing.split(rows, 1)) == 30


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.usefixtures("pairs")
def test_what_a_tree_is_filled_up_with_counts_nothing(architecture: str) -> None:
    model = adapted(architecture)
    for name, rows in BATCHES.items():
        packed = packing.build(rows)
        full = packing.filled(packed)
        assert len(full.edge_weights) == len(full.predictors) == 32
        assert full.num_tokens % 32 == 0
        assert full.num_tokens - packed.num_tokens < 32
        assert full.num_supervised_tokens == packed.num_supervised_tokens
        expected_loss = loss_sum(answer_logits(model, packed), packed)
        expected = gradients(model, expected_loss)
        loss = loss_sum(answer_logits(model, full), full)
        assert float(loss.detach()) == pytest.approx(float(expected_loss.detach()), rel=1e-6), name
        assert relative_error(gradients(model, loss), expected) < 1e-6, name


def test_large_trees_are_filled_up_by_an_eighth_at_most() -> None:
    sizes = {n: packing._full_size(n) for n in range(1, 5000)}
    assert all(n <= full <= max(32, n * 9 / 8) or full - n < 32 for n, full in sizes.items())
    assert sizes[2048] == 2048
    assert len({full for n, full in sizes.items() if n > 256}) < 40

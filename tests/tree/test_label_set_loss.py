"""Sets of classes train as transformers' multi-label classification does, in both layouts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import randomize_adapter
from remora.data.prompt import TokenSequence
from remora.models import class_head, lora
from remora.tree import layouts, packing
from remora.tree.check import check_layout
from remora.tree.cuda_graphs import packing as packed_by_graphs
from remora.tree.forward import answer_logits
from remora.tree.loss import loss_sum
from remora.tree.packing import MicroBatch
from stock import with_head

LABELS = [f"label {i}" for i in range(11)]
PREFIX = list(range(3, 20))
STEMS = [[30, 31, 32, 33, 34, 40, 41], [30, 31, 7], [30, 31, 7], [50, 40], [30, 31, 7, 8, 9]]
SETS = [(3, 4), (10,), (0, 3, 10), (), (7,)]  # the second and the third text are the same
BATCH = [
    TokenSequence([*PREFIX, *stem], len(PREFIX) + len(stem), class_set=classes)
    for stem, classes in zip(STEMS, SETS, strict=True)
]


def models(architecture: str) -> tuple[Any, Any]:
    """Return a model in float64 as it trains here, and the stock one with the same weights."""
    model, stock = with_head(architecture, LABELS)
    stock.config.problem_type = "multi_label_classification"
    stock.load_state_dict(model.double().state_dict())
    return model.train(), stock.train()


def assert_same(ours: Any, stock: Any, batches: list[MicroBatch]) -> None:
    """Compare the mean loss of the batch and all gradients, to 1e-6 of each array's largest."""
    width = max(len(row.token_ids) for row in BATCH)
    ids = torch.tensor([[*row.token_ids, *[0] * (width - len(row.token_ids))] for row in BATCH])
    wanted = torch.zeros(len(BATCH), len(LABELS), dtype=torch.float64)
    for row, classes in enumerate(SETS):
        wanted[row, list(classes)] = 1
    expected: Tensor = stock(input_ids=ids, attention_mask=(ids != 0).long(), labels=wanted).loss
    expected.backward()
    found = torch.stack([loss_sum(answer_logits(ours, each), each) for each in batches]).sum()
    found = found / sum(batch.num_supervised_tokens for batch in batches)
    found.backward()
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    for (name, own), (_, other) in zip(
        ours.named_parameters(), stock.named_parameters(), strict=True
    ):
        if other.grad is not None:
            scale = max(float(other.grad.abs().max()), 1e-9)
            assert float((own.grad - other.grad).abs().max()) / scale <= 1e-6, name
    ours.zero_grad()
    stock.zero_grad()


@pytest.mark.parametrize("layout", ["tree", "rows"])
@pytest.mark.parametrize("architecture", ["qwen2", "gpt2"])
def test_loss_and_every_gradient_equal_those_of_stock_transformers(
    architecture: str, layout: Any
) -> None:
    ours, stock = models(architecture)
    layouts.assign(ours, layout)
    assert_same(ours, stock, layouts.split(layout, BATCH, 1000))
    assert_same(ours, stock, layouts.split(layout, BATCH, 30))  # in several micro-batches
    check_layout(ours.float(), BATCH)


@pytest.mark.parametrize("layout", ["tree", "rows"])
def test_another_set_or_a_row_that_is_left_out_is_not_the_same(layout: Any) -> None:
    ours, stock = models("qwen2")
    layouts.assign(ours, layout)
    (whole,) = layouts.split(layout, BATCH, 1000)
    assert whole.row_weights is not None
    for spoilt in (
        replace(whole, edge_targets=whole.edge_targets.flip(0)),
        replace(whole, edge_weights=2 * whole.edge_weights),
        replace(whole, row_weights=whole.row_weights.flip(0) + 0.5),
    ):
        with pytest.raises(AssertionError):
            assert_same(ours, stock, [spoilt])


def test_rows_of_a_tree_count_once_however_many_labels_they_have() -> None:
    tree = packing.build(BATCH)
    assert tree.num_supervised_tokens == 5
    assert tree.row_weights is not None
    assert sorted(tree.row_weights.tolist()) == [1.0, 1.0, 1.0, 2.0]  # one text occurs twice
    assert sorted(tree.edge_targets.tolist()) == [0, 3, 3, 4, 7, 10]
    empty = packing.build([BATCH[3]])
    logits = torch.zeros(1, len(LABELS), requires_grad=True)
    loss = loss_sum(logits, empty)
    assert float(loss.detach()) == pytest.approx(0.693147, abs=1e-6)
    loss.backward()
    torch.testing.assert_close(logits.grad, torch.full((1, 11), 0.5 / 11))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_logits_have_the_loss_and_gradient_of_torch(dtype: torch.dtype) -> None:
    tree = packing.build(BATCH)
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(4, len(LABELS), generator=generator)).to(dtype).requires_grad_()
    loss = loss_sum(logits, tree)
    loss.backward()
    wide = logits.detach().float().requires_grad_()
    positive = torch.zeros(4, len(LABELS)).index_put_(
        (tree.edge_predictors, tree.edge_targets), tree.edge_weights, accumulate=True
    )
    weights = tree.row_weights[:, None] if tree.row_weights is not None else None
    assert weights is not None
    expected = (weights * torch.nn.functional.softplus(wide) - positive * wide).sum() / len(LABELS)
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits.grad.float(), wide.grad, rtol=1e-2, atol=1e-3)


def test_trees_filled_for_cuda_graphs_have_the_same_loss() -> None:
    tree = packed_by_graphs.filled(packing.build(BATCH))
    assert tree.row_weights is not None
    assert len(tree.row_weights) == len(tree.predictors)
    logits = torch.randn(len(tree.predictors), len(LABELS), dtype=torch.float64)
    plain = packing.build(BATCH)
    torch.testing.assert_close(loss_sum(logits, tree), loss_sum(logits[:4], plain))


def test_an_adapter_trains_sets_too() -> None:
    ours, _ = models("qwen2")
    adapted = lora.add_adapter(ours, rank=4, alpha=8, dropout=0.0).double()
    randomize_adapter(adapted)
    tree = packing.build(BATCH)
    loss_sum(answer_logits(adapted, tree), tree).backward()
    head = class_head.head_of(adapted).weight
    assert head.grad.abs().min() > 0

"""The cross entropy of a tree equals torch's, and its gradient is right."""

from __future__ import annotations

import pytest
import torch

from remora.data.prompt import TokenSequence
from remora.tree import packing
from remora.tree.loss import loss_sum
from tree.test_packing import BATCHES


def test_cross_entropy_equals_torch_and_its_gradient_is_right() -> None:
    torch.manual_seed(0)
    packed = packing.build(BATCHES["same text under two labels"])
    logits = torch.randn(len(packed.predictors), 60, dtype=torch.float64, requires_grad=True)
    expanded = logits[packed.edge_predictors]
    stock = torch.nn.functional.cross_entropy(expanded, packed.edge_targets, reduction="none")
    expected = (stock * packed.edge_weights).sum()
    assert float(loss_sum(logits, packed).detach()) == pytest.approx(
        float(expected.detach()), rel=1e-12
    )
    assert torch.autograd.gradcheck(lambda x: loss_sum(x, packed), (logits,))


def test_the_gradient_of_a_sure_answer_does_not_cancel_in_bfloat16() -> None:
    packed = packing.build([TokenSequence([7, 1, 4], 2)])
    wide = torch.zeros(1, 8)
    wide[0, 4] = 12.0
    narrow = wide.bfloat16().requires_grad_()
    (found,) = torch.autograd.grad(loss_sum(narrow, packed), narrow)
    exact = torch.softmax(wide.double(), -1)[0, 4] - 1
    assert float(found[0, 4]) == pytest.approx(float(exact), rel=1e-2)

"""The last layer at the predictors alone: the same loss, gradients and scores, from fewer rows."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import randomize_adapter, tiny_config, tiny_model
from remora.data.prompt import TokenSequence
from remora.models import loading, lora
from remora.planning.step_memory import Skeleton
from remora.tree import attention, last_layer, packing
from remora.tree.check import check_tree
from remora.tree.forward import answer_logits
from remora.tree.loss import loss_sum
from remora.tree.packed_row import PackedRow
from tiny_architectures import tiny_model_of

PREFIX = list(range(5, 30))
ROWS = [
    TokenSequence([*PREFIX, 30, 31, 32, 3, 40, 41, 2], 29),
    TokenSequence([*PREFIX, 30, 33, 3, 42, 2], 28),
    TokenSequence([*PREFIX, 34, 35, 36, 37, 3, 40, 43, 2], 30),
    TokenSequence([*PREFIX, 38, 3, 42, 2], 27),
]
TREE = packing.build(ROWS)


def adapted(model: Any) -> Any:
    """Return a model with adapters on all linear layers, whose values are not zero."""
    made = lora.add_adapter(model, rank=4, alpha=8, dropout=0.0).double()
    randomize_adapter(made)
    return made.train()


def loss_and_gradients(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = loss_sum(answer_logits(model, TREE), TREE)
    loss.backward()
    return loss.detach(), {
        n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad
    }


def rows_of_mlps(model: Any) -> list[int]:
    """Return how many tokens the MLP of each layer is given."""
    seen: list[int] = []
    handles = [
        module.register_forward_hook(lambda _, given, output: seen.append(given[0].shape[1]))
        for name, module in model.named_modules()
        if name.endswith(".mlp")
    ]
    with torch.no_grad():
        answer_logits(model, TREE)
    for handle in handles:
        handle.remove()
    return seen


def assert_exact(model: Any) -> None:
    num_layers = model.config.get_text_config().num_hidden_layers
    every, some = TREE.num_tokens, len(TREE.predictors)
    assert rows_of_mlps(model) == [*[every] * (num_layers - 1), some]
    loss, gradients = loss_and_gradients(model)
    assert last_layer.uninstall(model)
    assert rows_of_mlps(model) == [every] * num_layers
    expected_loss, expected = loss_and_gradients(model)
    assert float(loss) == pytest.approx(float(expected_loss), rel=1e-12)
    # Of all gradients together: that of a bias of keys is zero but for rounding.
    largest = max(float(each.abs().max()) for each in expected.values())
    for name, gradient in gradients.items():
        assert (gradient - expected[name]).abs().max() <= 1e-11 * largest, name


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma3", "mistral"])
def test_loss_and_every_gradient_are_those_of_the_whole_layer(kind: str) -> None:
    """Also computed against each row alone, for these and others, in test_packing."""
    assert_exact(adapted(tiny_model(kind)))


@pytest.mark.parametrize("kind", ["qwen3", "olmo2", "cohere2", "mixtral", "granite", "smollm3"])
def test_so_are_those_of_other_ways_to_build_a_layer(kind: str) -> None:
    """Norms of queries, norms behind the parts, parallel parts, experts, scaled residuals."""
    model = tiny_model_of(kind, 97, torch.float64)
    if model._can_set_experts_implementation():  # the others compute no float64
        model.set_experts_implementation("eager")
    model.config._attn_implementation = "sdpa"
    attention.install(model)
    assert_exact(adapted(model))


@pytest.mark.parametrize("method", ["checkpointing", "full", "blocks"])
def test_so_are_those_of_other_ways_to_train(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    if method == "blocks":
        monkeypatch.setattr(attention, "BLOCK_SIZES", (4,))
        monkeypatch.setattr(attention, "BLOCK_COST", -10_000)
    if method != "full":
        model = adapted(model)
    if method == "checkpointing":
        loading.set_checkpointing(model, True)
    assert_exact(model.train())


def test_scores_are_the_same_and_hidden_states_are_whole() -> None:
    model = tiny_model("qwen2").eval()
    new = [(token, place - 1) for place, token in enumerate([*PREFIX, 30, 31])]
    found = []
    with torch.no_grad():
        for _ in range(2):
            row = PackedRow(model, None)
            first = row.extend(new, [len(new) - 1])
            more = row.extend([(32, len(new) - 1), (33, len(new) - 1)], [len(new), len(new) + 1])
            states = PackedRow(model, None).extend_states(new)
            found.append([first, more, *states])
            last_layer.uninstall(model)
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, rtol=1e-12, atol=1e-12)


def test_an_ordinary_pass_and_a_copy_of_the_model_are_whole() -> None:
    model = tiny_model("qwen2").eval()
    ids = torch.tensor([ROWS[0].token_ids])
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        answer_logits(model, TREE)
        assert torch.equal(model(input_ids=ids).logits, expected)
        other = copy.deepcopy(model)
        assert torch.equal(answer_logits(other, TREE), answer_logits(model, TREE))
        with pytest.raises(RuntimeError):  # nothing stays behind of a pass that fails
            model(input_ids=ids, tree_kept=torch.tensor([99]))
        assert torch.equal(model(input_ids=ids).logits, expected)


class TakesTheTokens(nn.Module):
    """An MLP that looks at the tokens beside the hidden states, as some with experts do."""

    def __init__(self, mlp: nn.Module, model: nn.Module) -> None:
        super().__init__()
        self.mlp, self.ids = mlp, torch.zeros(1, 1)
        model.register_forward_pre_hook(self.see, with_kwargs=True)

    def see(self, _: nn.Module, arguments: Any, named: dict[str, Any]) -> None:
        self.ids = named["input_ids"].double()

    def forward(self, hidden: Tensor) -> Tensor:
        return self.mlp(hidden) * (1 + self.ids[..., None] / 100)


def test_a_layer_that_cannot_be_cut_is_found_and_computed_whole() -> None:
    model = tiny_model("llama")
    last_layer.uninstall(model)
    layer = model.model.layers[-1]
    layer.mlp = TakesTheTokens(layer.mlp, model)
    last_layer.install(model)
    with pytest.raises(RuntimeError):
        answer_logits(model, TREE)
    check_tree(model, ROWS)
    assert not last_layer.uninstall(model)
    assert model.config._attn_implementation == attention.NAME  # which it follows in blocks
    assert answer_logits(model, TREE).shape[0] == len(TREE.predictors)


def test_the_plan_counts_the_smaller_layer() -> None:
    counted = []
    for install in (True, False):
        empty = loading.load_empty(tiny_config("qwen2"), torch.float32)
        if not install:
            last_layer.uninstall(empty)
        made = lora.add_adapter(empty, rank=4, alpha=8, dropout=0.0)
        counted.append(Skeleton(made, autocast=None, device="cpu").count(TREE))
    # q_proj and o_proj, 32 wide, and three products of the MLP, 48 wide, in one layer of two.
    skipped = TREE.num_tokens - len(TREE.predictors)
    forward = 2 * skipped * (2 * 32 * 32 + 3 * 32 * 48)
    assert counted[1].operations - counted[0].operations >= 2 * forward  # and backward
    assert counted[0].saved < counted[1].saved


def test_where_layers_are_called_in_turns_all_are_whole() -> None:
    """HRM calls two stacks in turns, each several times; others call their layers twice."""
    hierarchical = tiny_model_of("hrm_text", 97, torch.float32)
    last_layer.install(hierarchical)
    assert not last_layer.uninstall(hierarchical)

    model = tiny_model("llama", torch.float32)
    last_layer.install(model)
    assert last_layer.uninstall(model)
    stack = model.model.layers
    model.model.layers = nn.ModuleList([*stack, *stack])
    model.config.num_hidden_layers *= 2
    last_layer.install(model)
    assert not last_layer.uninstall(model)

"""The fused LoRA layer computes what PEFT's does, and its backward pass is right."""

from __future__ import annotations

import warnings
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from conftest import ARCHITECTURES, randomize_adapter, tiny_model
from remora.models import fused_lora, lora

IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11], [12, 5, 40, 41, 42, 43, 3]])


def as_stock(model: Any) -> Any:
    """Give every module its own forward back."""
    assert any("forward" in vars(module) for module in model.modules())
    for module in model.modules():
        vars(module).pop("forward", None)
    return model


def adapted(architecture: str, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    settings = {"rank": 4, "alpha": 10, "dropout": 0.0, **settings}
    model = lora.add_adapter(tiny_model(architecture, dtype), **settings)
    randomize_adapter(model)
    return model.train()


def outputs_and_gradients(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    logits = model(input_ids=IDS).logits
    generator = torch.Generator().manual_seed(5)
    (logits.double() * torch.randn(logits.shape, generator=generator).double()).sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    return logits.detach(), gradients


def relative_error(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    distance = (found.double() - expected.double()).norm()
    return float(distance / expected.double().norm())


def count_fused(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Record each use of the fused operation."""
    calls = []
    fused = fused_lora.LoraLinear.apply

    def counted(*args: Any) -> Any:
        calls.append(1)
        return fused(*args)

    monkeypatch.setattr(fused_lora.LoraLinear, "apply", counted)
    return calls


# gpt2 has Conv1D layers with bias, opt linear layers with bias, qwen2 bias on some, llama none.
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.float64, 1e-11)])
def test_outputs_and_every_gradient_equal_stock_peft(
    architecture: str, dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted(architecture, dtype).to(dtype)
    calls = count_fused(monkeypatch)
    logits, gradients = outputs_and_gradients(model)
    assert len(calls) == len(fused_lora.lora_layers(model))
    expected_logits, expected = outputs_and_gradients(as_stock(model))
    assert len(calls) == len(fused_lora.lora_layers(model))
    assert relative_error(logits, expected_logits) < tolerance
    for name, gradient in gradients.items():
        assert expected[name].norm() > 0
        assert relative_error(gradient, expected[name]) < tolerance, name


class OneLayer(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def one_layer(kind: str, dtype: torch.dtype = torch.float32, dropout: float = 0.0) -> Any:
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(2)
    layer = Conv1D(24, 16) if kind == "conv1d" else nn.Linear(16, 24, bias=kind == "bias")
    if getattr(layer, "bias", None) is not None:
        nn.init.normal_(layer.bias)
    config = peft.LoraConfig(
        r=4,
        lora_alpha=10,
        lora_dropout=dropout,
        target_modules=["layer"],
        fan_in_fan_out=kind == "conv1d",
        init_lora_weights=False,
    )
    model = peft.get_peft_model(OneLayer(layer).to(dtype), config)
    fused_lora.make_fast(model)
    return model.train()


@pytest.mark.parametrize("kind", ["plain", "bias", "conv1d"])
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_under_bfloat16_autocast_it_is_as_close_to_the_truth_as_stock_peft(
    kind: str, base: torch.dtype
) -> None:
    model = one_layer(kind, base)
    torch.manual_seed(3)
    inputs, weights = torch.randn(2, 5, 16), torch.randn(2, 5, 24)

    def compute(model: Any, dtype: torch.dtype, autocast: bool) -> list[Tensor]:
        x = inputs.to(dtype, copy=True).requires_grad_()
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = model(x)
            assert not autocast or y.dtype is torch.bfloat16
        (y.double() * weights.double()).sum().backward()
        trained = [p.grad.clone() for p in model.parameters() if p.requires_grad]
        return [y.detach(), x.grad, *trained]

    found = compute(model, torch.float32, True)
    stock = compute(as_stock(model), torch.float32, True)
    truth = compute(model.double(), torch.float64, False)
    assert len(truth) == 4
    assert [t.dtype for t in found[1:]] == [torch.float32] * 3
    for ours, theirs, exact in zip(found, stock, truth, strict=True):
        assert relative_error(ours, exact) < 2**-7
        assert relative_error(theirs, exact) < 2**-7


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("rate", [None, 0.3])
def test_the_backward_pass_is_the_forwards(has_bias: bool, rate: float | None) -> None:
    torch.manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64)

    x, a, b = (t.requires_grad_() for t in (random(2, 3, 6), random(2, 6), random(5, 2)))
    weight, bias = random(5, 6), random(5) if has_bias else None
    mask = None if rate is None else torch.rand(x.shape) > rate

    def fused(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return fused_lora.LoraLinear.apply(None, 2.5, mask, lambda: weight, bias, a, b, x)

    dropped = x if mask is None else x * mask
    expected = functional.linear(x, weight, bias) + 2.5 * (dropped @ a.t()) @ b.t()
    torch.testing.assert_close(fused(x, a, b), expected, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(fused, (x, a, b))


def test_the_backward_pass_of_torchs_own_dropout_is_the_forwards() -> None:
    torch.manual_seed(0)
    shapes = {"x": (2, 3, 6), "a": (2, 6), "b": (5, 2)}
    given = [torch.randn(n, dtype=torch.float64, requires_grad=True) for n in shapes.values()]
    weight = torch.randn(5, 6, dtype=torch.float64)

    def fused(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        torch.manual_seed(1)
        return fused_lora.LoraLinear.apply(None, 2.5, 0.3, lambda: weight, None, a, b, x)

    x, a, b = given
    torch.manual_seed(1)
    dropped = functional.dropout(x, 0.3)
    expected = functional.linear(x, weight) + 2.5 * (dropped @ a.t()) @ b.t()
    torch.testing.assert_close(fused(*given), expected, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(fused, given)


@pytest.mark.parametrize("rate", [None, 0.3])
def test_the_backward_pass_of_a_gated_input_is_the_forwards(rate: float | None) -> None:
    torch.manual_seed(0)
    shapes = {"gate": (2, 3, 6), "up": (2, 3, 6), "a": (2, 6), "b": (5, 2)}
    given = [torch.randn(n, dtype=torch.float64, requires_grad=True) for n in shapes.values()]
    weight = torch.randn(5, 6, dtype=torch.float64)
    mask = None if rate is None else torch.rand(2, 3, 6) > rate

    def fused(gate: Tensor, up: Tensor, a: Tensor, b: Tensor) -> Tensor:
        fused = fused_lora.LoraLinear.apply
        return fused(functional.silu, 2.5, mask, lambda: weight, None, a, b, gate, up)

    gate, up, a, b = given
    x = functional.silu(gate) * up
    dropped = x if mask is None else x * mask
    expected = functional.linear(x, weight) + 2.5 * (dropped @ a.t()) @ b.t()
    torch.testing.assert_close(fused(*given), expected, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(fused, given)


def test_dropout_has_the_right_rate_scale_and_touches_the_adapter_only() -> None:
    model = one_layer("plain", dropout=0.25)
    layer = model.base_model.model.layer
    with torch.no_grad():  # the adapter passes each input on by itself
        layer.base_layer.weight.zero_()
        layer.lora_A["default"].weight.copy_(torch.eye(4, 16))
        layer.lora_B["default"].weight.copy_(torch.eye(24, 4))
    torch.manual_seed(7)
    y = model(torch.ones(50_000, 16))[:, :4] / 2.5  # alpha / r
    kept = y != 0
    # 200,000 draws: the standard deviation of the share is 0.001.
    assert float(kept.float().mean()) == pytest.approx(0.75, abs=0.005)
    torch.testing.assert_close(y[kept], torch.full_like(y[kept], 1 / 0.75))
    rows = kept.float().mean(0)
    assert (rows - 0.75).abs().max() < 0.01
    with torch.no_grad():
        layer.lora_B["default"].weight.zero_()
        layer.base_layer.weight.normal_()
    x = torch.randn(3, 16)
    assert torch.equal(model(x), functional.linear(x, layer.base_layer.weight))


def test_dropout_draws_anew_in_training_and_never_in_evaluation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = count_fused(monkeypatch)
    model = adapted("qwen2", dropout=0.5)
    first, second = model(input_ids=IDS).logits, model(input_ids=IDS).logits
    assert not torch.equal(first, second)
    assert calls
    torch.manual_seed(4)
    again = model(input_ids=IDS).logits
    torch.manual_seed(4)
    assert torch.equal(again, model(input_ids=IDS).logits)
    model.eval()
    evaluated = model(input_ids=IDS).logits
    assert torch.equal(evaluated, model(input_ids=IDS).logits)
    stock = as_stock(model)(input_ids=IDS).logits
    torch.testing.assert_close(evaluated, stock, rtol=1e-4, atol=1e-4)


def test_gradients_with_dropout_average_to_those_of_stock_peft() -> None:
    model = one_layer("bias", dropout=0.4)
    layer = model.base_model.model.layer
    torch.manual_seed(1)
    x, weights = torch.randn(8, 16), torch.randn(8, 24)
    num_draws = 3000

    def mean_gradients() -> list[Tensor]:
        model.zero_grad()
        y = model(x.repeat(num_draws, 1)).view(num_draws, 8, 24)
        (y.mean(0) * weights).sum().backward()
        return [layer.lora_A["default"].weight.grad, layer.lora_B["default"].weight.grad]

    ours = [g.clone() for g in mean_gradients()]
    as_stock(model)
    for found, expected in zip(ours, mean_gradients(), strict=True):
        assert relative_error(found, expected) < 0.05


def test_alpha_over_rank_scales_the_update() -> None:
    updates = []
    for alpha in (6, 12):
        model = one_layer("plain")
        model.base_model.model.layer.scaling["default"] = alpha / 4
        x = torch.ones(1, 16)
        with model.disable_adapter():
            base = model(x)
        updates.append(model(x) - base)
    torch.testing.assert_close(updates[1], 2 * updates[0])
    scalings = {layer.scaling["default"] for _, layer in fused_lora.lora_layers(adapted("qwen2"))}
    assert scalings == {10 / 4}


def test_a_disabled_adapter_gives_the_base_model(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = tiny_model("qwen2", torch.float32).eval()(input_ids=IDS).logits
    model = adapted("qwen2").eval()
    with_adapter = model(input_ids=IDS).logits
    calls = count_fused(monkeypatch)
    with model.disable_adapter():
        assert torch.equal(model(input_ids=IDS).logits, expected)
    assert calls == []
    assert torch.equal(model(input_ids=IDS).logits, with_adapter)
    assert calls


@pytest.mark.parametrize("architecture", ["qwen2", "gpt2"])
def test_a_merged_adapter_counts_once(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(architecture, torch.float64).double().eval()
    expected = model(input_ids=IDS).logits
    calls = count_fused(monkeypatch)
    model.merge_adapter()
    torch.testing.assert_close(model(input_ids=IDS).logits, expected, rtol=1e-8, atol=1e-8)
    assert calls == []
    model.unmerge_adapter()
    torch.testing.assert_close(model(input_ids=IDS).logits, expected, rtol=1e-8, atol=1e-8)
    assert calls
    torch.testing.assert_close(
        model.merge_and_unload()(input_ids=IDS).logits, expected, rtol=1e-8, atol=1e-8
    )


def peft_model(**settings: Any) -> Any:
    """An adapter that PEFT made without Remora."""
    settings = {"r": 4, "lora_alpha": 10, "target_modules": ["q_proj", "down_proj"], **settings}
    config = peft.LoraConfig(task_type="CAUSAL_LM", **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = peft.get_peft_model(tiny_model("qwen2", torch.float32), config)
    randomize_adapter(model)
    return model.train()


@pytest.mark.parametrize(
    "settings", [{"use_dora": True}, {"lora_bias": True, "target_modules": ["q_proj", "k_proj"]}]
)
def test_variants_of_lora_are_left_to_peft(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = peft_model(**settings)
    expected_logits, expected = outputs_and_gradients(model)
    calls = count_fused(monkeypatch)
    fused_lora.make_fast(model)
    logits, gradients = outputs_and_gradients(model)
    assert calls == []
    assert torch.equal(logits, expected_logits)
    assert len(gradients) > 8
    assert all(torch.equal(gradients[name], expected[name]) for name in expected)


def test_two_active_adapters_are_left_to_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    model = peft_model()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model.add_adapter("second", model.peft_config["default"])
    randomize_adapter(model)
    model.base_model.set_adapter(["default", "second"])
    expected, _ = outputs_and_gradients(model)
    calls = count_fused(monkeypatch)
    fused_lora.make_fast(model)
    found, _ = outputs_and_gradients(model)
    assert calls == []
    assert torch.equal(found, expected)
    model.set_adapter("second")
    assert not torch.allclose(model(input_ids=IDS).logits, expected)
    assert calls


def test_the_input_is_kept_once_and_in_its_own_precision() -> None:
    model = one_layer("plain", torch.bfloat16)
    saved: list[Tensor] = []

    def remember(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    x = torch.randn(64, 16).bfloat16()
    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        model(x)
    inputs = [t for t in saved if t.shape == x.shape]
    assert [t.dtype for t in inputs] == [torch.bfloat16]


def saved_bytes_a_token(model: Any) -> float:
    """Count what the backward pass of a layer keeps, in bytes a token; each storage once."""
    kept: dict[int, int] = {}
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def remember(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        alive.append(tensor)
        return tensor

    alive: list[Tensor] = []
    ids = torch.randint(5, 90, (1, 200), generator=torch.Generator().manual_seed(0))
    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        model(input_ids=ids).logits.sum()
    return sum(kept.values()) / 200 / 2


def test_far_less_is_kept_for_the_backward_pass_than_by_stock_peft() -> None:
    def model() -> Any:
        return adapted("qwen2", torch.bfloat16, dropout=0.0)

    assert saved_bytes_a_token(model()) < 0.4 * saved_bytes_a_token(as_stock(model()))


def test_a_gated_mlp_of_another_form_keeps_its_own_forward() -> None:
    model = tiny_model("qwen2", torch.float32)
    kind = type(model.model.layers[0].mlp)

    class Sparse(kind):  # type: ignore[misc, valid-type]
        def forward(self, x: Tensor) -> Tensor:
            return self.down_proj(self.act_fn(self.gate_proj(x)).relu() * self.up_proj(x))

    for layer in model.model.layers:
        layer.mlp.__class__ = Sparse
    model = lora.add_adapter(model, rank=4, alpha=8, dropout=0.0)
    randomize_adapter(model)
    logits = model(input_ids=IDS).logits
    torch.testing.assert_close(as_stock(model)(input_ids=IDS).logits, logits)

"""rsLoRA, DoRA, LoRA+ and other beginnings: PEFT's own, passed on."""

from __future__ import annotations

import json
import math
import types
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from conftest import tiny_model
from models.test_fused_lora import (
    IDS,
    adapted,
    as_stock,
    count_fused,
    outputs_and_gradients,
    relative_error,
)
from remora.config import ExportConfig, TrainConfig
from remora.data.table import Table
from remora.errors import ConfigError, ModelError, Stopped
from remora.export import export, truncate
from remora.models import fused_lora, lora, saved
from remora.training import checkpoint
from remora.training.optimizer import create_optimizer
from remora.training.run import train
from training.test_full import measured, measured_again

CPU = torch.device("cpu")
VARIANTS: dict[str, dict[str, Any]] = {
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "gaussian": {"init_lora_weights": "gaussian"},
    "loraplus": {"loraplus_lr_ratio": 8.0},
}


def settings(base: Path, data: Path, output: Path, **others: Any) -> TrainConfig:
    return TrainConfig(
        str(data),
        model=str(base),
        output=output,
        **{"learning_rate": 5e-3, "batch_size": 8, "max_steps": 4, "rank": 4}
        | {"precision": "float32", "device": "cpu"}
        | others,
    )


@pytest.fixture(scope="module", params=VARIANTS)
def trained(
    request: pytest.FixtureRequest,
    base: Path,
    table: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[str, Path]:
    output = tmp_path_factory.mktemp("runs")
    return request.param, train(settings(base, table, output, **VARIANTS[request.param])).directory


def test_stock_peft_loads_it_to_the_same_logits(trained: tuple[str, Path], base: Path) -> None:
    from transformers import AutoModelForCausalLM

    variant, directory = trained
    config = json.loads((directory / "adapter" / "adapter_config.json").read_text())
    for name, value in VARIANTS[variant].items():
        assert config.get(name, value) == value
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        stock = peft.PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(base), directory / "adapter"
        ).eval()
    ours, _, _ = saved.load_adapter(directory, base=None, dtype=torch.float32, device=CPU)
    with torch.no_grad():
        expected, found = stock(input_ids=IDS).logits, ours(input_ids=IDS).logits
        with stock.disable_adapter():
            before = stock(input_ids=IDS).logits
    assert relative_error(found, expected) < 1e-5
    assert relative_error(before, expected) > 1e-3
    assert measured_again(directory, "float32") == measured(directory)


@pytest.mark.parametrize(
    "trained",
    [
        *(pytest.param(each, marks=pytest.mark.durability) for each in ("rslora", "gaussian")),
        *("dora", "loraplus"),  # which have other weights, and another optimizer
    ],
    indirect=True,
)
def test_a_run_that_was_stopped_ends_with_the_same_bits(
    trained: tuple[str, Path], base: Path, table: Path, tmp_path: Path
) -> None:
    variant, undisturbed = trained
    config = settings(base, table, tmp_path, name="same", checkpoint_minutes=0, **VARIANTS[variant])
    for _ in range(2):
        with pytest.raises(Stopped):
            train(replace(config, max_time="0s"))
    assert list((tmp_path / "same" / "checkpoints").glob(f"*/{checkpoint.TENSORS}"))
    directory = train(config).directory
    name = "adapter/adapter_model.safetensors"
    assert (directory / name).read_bytes() == (undisturbed / name).read_bytes()


def test_merging_keeps_the_parity(trained: tuple[str, Path], tmp_path: Path) -> None:
    _, directory = trained
    export.export_run(ExportConfig(directory, merge=True, output=tmp_path / "whole"))
    ours, _, _ = saved.load_adapter(directory, base=None, dtype=torch.float32, device=CPU)
    whole, _, _ = saved.load_adapter(tmp_path / "whole", base=None, dtype=torch.float32, device=CPU)
    with torch.no_grad():
        expected, found = ours(input_ids=IDS).logits, whole(input_ids=IDS).logits
    assert relative_error(found, expected) < 1e-5


@pytest.mark.parametrize("variant", ["rslora", "gaussian", "dora"])
def test_outputs_and_every_gradient_equal_stock_peft(
    variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted("qwen2", **VARIANTS[variant])
    calls = count_fused(monkeypatch)
    logits, gradients = outputs_and_gradients(model)
    assert bool(calls) == (variant != "dora")  # which PEFT computes
    scales = {layer.scaling["default"] for _, layer in fused_lora.lora_layers(model)}
    assert scales == {10 / math.sqrt(4) if variant == "rslora" else 10 / 4}
    expected_logits, expected = outputs_and_gradients(as_stock(model))
    assert relative_error(logits, expected_logits) < 2e-5
    for name, gradient in gradients.items():
        assert expected[name].norm() > 0
        assert relative_error(gradient, expected[name]) < 2e-5, name


@pytest.mark.parametrize("variant", ["rslora", "gaussian", "dora"])
def test_before_the_first_step_the_outputs_are_the_bases(variant: str) -> None:
    with torch.no_grad():
        expected = tiny_model("qwen2", torch.float32).eval()(input_ids=IDS).logits
        model = lora.add_adapter(
            tiny_model("qwen2", torch.float32), rank=4, alpha=8, dropout=0.0, **VARIANTS[variant]
        )
        found = model.eval()(input_ids=IDS).logits
    if variant == "dora":
        assert relative_error(found, expected) < 1e-5
    else:
        assert torch.equal(found, expected)
    count = lora.count_parameters(model)
    assert sum(count.modules.values()) == count.trainable
    lengths = sum(layer.out_features for _, layer in fused_lora.lora_layers(model))
    plain = lora.count_parameters(adapted("qwen2")).trainable
    assert count.trainable == plain + (lengths if variant == "dora" else 0)


def test_the_rates_of_loraplus_are_those_of_peft() -> None:
    from peft.optimizers import create_loraplus_optimizer

    ours, theirs = adapted("qwen2", use_dora=True), adapted("qwen2", use_dora=True)
    theirs.load_state_dict(ours.state_dict())
    for model in (ours, theirs):
        outputs_and_gradients(model)
    config = TrainConfig(
        "", model="", learning_rate=1e-2, loraplus_lr_ratio=16, schedule="constant", max_steps=5
    )
    dataset: Any = types.SimpleNamespace(train=Table(["a"] * 8, ["b"] * 8))
    accelerator = types.SimpleNamespace(prepare_optimizer=lambda optimizer: optimizer)
    named = {name: p for name, p in ours.named_parameters() if p.requires_grad}
    optimizer, _, _ = create_optimizer(named, ours, dataset, config, accelerator)
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"]  # as after the warm-up
    stock = create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=1e-2, loraplus_lr_ratio=16, weight_decay=0.0
    )
    before = {name: p.detach().clone() for name, p in named.items()}
    optimizer.step()
    stock.step()
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            assert not torch.equal(before[name], named[name])
            torch.testing.assert_close(named[name], parameter, rtol=1e-5, atol=1e-7)


def test_a_dora_of_a_stranger_has_the_shapes_of_its_base(
    base: Path, table: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    directory = train(settings(base, table, tmp_path, use_dora=True, max_steps=1)).directory
    path = directory / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("magnitude_vector"))
    save_file({**tensors, name: torch.ones(100_000)}, path)
    with pytest.raises(ModelError, match="magnitude_vector with the shape \\(100000,\\), not"):
        saved.load_adapter(directory, base=None, dtype=torch.float32, device=CPU)
    with pytest.raises(ModelError, match="is not plain LoRA, and nothing else can be compressed"):
        truncate.read(directory / "adapter")
    config = directory / "adapter" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "use_rslora": "yes"}))
    with pytest.raises(ModelError, match="use_dora or use_rslora that is not a boolean"):
        saved.load_adapter(directory, base=None, dtype=torch.float32, device=CPU)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"use_dora": True, "method": "qlora"}, "use_dora does not work on a 4-bit base"),
        ({"use_rslora": True, "method": "full"}, "use_rslora needs an adapter and method is full"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'; give default or gaussian"),
        ({"loraplus_lr_ratio": 0.0}, "loraplus_lr_ratio is 0.0; give a number above 0"),
    ],
)
def test_what_does_not_go_together_is_refused(given: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        TrainConfig("data.csv", model="base", **given)

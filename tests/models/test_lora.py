"""Which layers get an adapter, what trains, and how many parameters that makes."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from conftest import ARCHITECTURES, randomize_adapter, tiny_model
from models.test_fused_lora import IDS
from remora.errors import ConfigError, ModelError
from remora.models import fused_lora, lora, untrusted
from tiny_architectures import tiny_model_of


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_before_the_first_step_the_outputs_are_the_bases_bit_for_bit(
    architecture: str, dtype: torch.dtype
) -> None:
    with torch.no_grad():
        expected = tiny_model(architecture, dtype).eval()(input_ids=IDS).logits
        model = lora.add_adapter(tiny_model(architecture, dtype), rank=4, alpha=8, dropout=0.05)
        assert torch.equal(model.eval()(input_ids=IDS).logits, expected)
        randomize_adapter(model)
        assert not torch.equal(model(input_ids=IDS).logits, expected)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_trains_is_float32_and_the_base_is_frozen(architecture: str) -> None:
    model = lora.add_adapter(
        tiny_model(architecture, torch.bfloat16), rank=4, alpha=8, dropout=0.05
    )
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("lora_" in name), name
        assert parameter.dtype is (torch.float32 if "lora_" in name else torch.bfloat16), name
    base = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()(input_ids=IDS).logits.float().square().mean().backward()
    optimizer.step()
    assert all(torch.equal(base[n], p) for n, p in model.named_parameters() if n in base)


def test_qwen_1_5b_has_the_published_number_of_parameters(shared: Any) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(shared / "models/qwen2.5-1.5b-instruct-config")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        adapted = lora.add_adapter(model, rank=16, alpha=32, dropout=0.05)
    count = lora.count_parameters(adapted)
    assert count.trainable == 18_464_768
    assert count.total == 18_464_768 + 1_543_714_304  # the base as published, the head tied
    assert count.share == pytest.approx(0.0118, abs=5e-5)
    # 28 layers, hidden 1536, intermediate 8960, 2 key-value heads of 128: r * (in + out)
    assert count.modules == {
        "q_proj": 28 * 16 * (1536 + 1536),
        "k_proj": 28 * 16 * (1536 + 256),
        "v_proj": 28 * 16 * (1536 + 256),
        "o_proj": 28 * 16 * (1536 + 1536),
        "gate_proj": 28 * 16 * (1536 + 8960),
        "up_proj": 28 * 16 * (1536 + 8960),
        "down_proj": 28 * 16 * (8960 + 1536),
    }


# Two layers, hidden 32, intermediate 48 (gpt2: 128), key-value width 16; r = 4.
SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
DEFAULTS = {
    "qwen2": (SEVEN, 2 * 4 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 48))),
    "opt": (
        ["fc1", "fc2", "k_proj", "out_proj", "q_proj", "v_proj"],
        2 * 4 * (4 * (32 + 32) + 2 * (32 + 48)),
    ),
    "gpt2": (
        ["c_attn", "c_fc", "c_proj"],
        2 * 4 * ((32 + 96) + (32 + 32) + (32 + 128) + (128 + 32)),
    ),
}


@pytest.mark.parametrize("architecture", DEFAULTS)
def test_the_default_is_every_linear_layer_but_the_head(architecture: str) -> None:
    names, size = DEFAULTS[architecture]
    model = tiny_model(architecture, torch.float32)
    assert lora.target_modules(model) == names
    count = lora.count_parameters(lora.add_adapter(model, rank=4, alpha=8, dropout=0.0))
    assert (count.trainable, set(count.modules)) == (size, set(names))


def test_only_the_requested_modules_get_an_adapter() -> None:
    model = lora.add_adapter(
        tiny_model("qwen2"), rank=4, alpha=8, dropout=0.0, modules=["v_proj", "q_proj"]
    )
    assert lora.count_parameters(model).modules == {"q_proj": 2 * 4 * 64, "v_proj": 2 * 4 * 48}


@pytest.mark.parametrize("wrong", ["q_porj", "lm_head", "embed_tokens", ""])
def test_a_module_that_is_not_there_is_refused(wrong: str) -> None:
    choices = ", ".join(sorted(SEVEN))
    with pytest.raises(ConfigError) as caught:
        lora.add_adapter(
            tiny_model("qwen2"), rank=4, alpha=8, dropout=0.0, modules=["q_proj", wrong]
        )
    assert str(caught.value) == (
        f"the model has no linear layer named {wrong!r}; choose from {choices}"
    )


def mixture(dtype: torch.dtype = torch.float32) -> Any:
    """A random mixture of experts, stacked as [experts, out, in], with a shared one."""
    from transformers import AutoModelForCausalLM, Qwen2MoeConfig

    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        moe_intermediate_size=8,
        shared_expert_intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
        decoder_sparse_step=1,
    )
    return AutoModelForCausalLM.from_config(config, dtype=dtype)


def test_experts_and_routers_stay_frozen_by_default() -> None:
    model = mixture()
    held = 1 * 4 * (2 * 8 * 16 + 16 * 8)  # layers, experts, gate and up, down
    assert sum(lora.expert_parameters(model).values()) == held
    total = sum(p.numel() for p in model.parameters())
    model = lora.add_adapter(model, rank=2, alpha=4, dropout=0.1)
    trained = {name.split(".lora_")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert not any(".experts" in name or name.endswith("gate") for name in trained)
    counts = lora.count_parameters(model)
    assert counts.experts == held
    assert counts.active == counts.total - held // 2  # two of four
    assert counts.total == total + counts.trainable


def test_experts_are_adapted_on_request_and_come_back(tmp_path: Path) -> None:
    names = ["q_proj", "experts.gate_up_proj", "experts.down_proj"]
    model = lora.add_adapter(mixture(), rank=2, alpha=4, dropout=0.1, modules=names)
    # [r * experts, in] and [out, r * experts] for each stack, as PEFT has them
    shapes = {
        tuple(p.shape) for n, p in model.named_parameters() if ".experts" in n and "lora" in n
    }
    assert shapes == {(8, 16), (16, 8), (8, 8)}
    counts = lora.count_parameters(model)
    assert counts.modules == {
        "q_proj": 2 * (16 + 16),
        "gate_up_proj": 8 * (16 + 16),
        "down_proj": 8 * (8 + 16),
    }
    assert counts.trainable == sum(counts.modules.values())
    assert counts.experts == 0
    randomize_adapter(model)
    expected = model.eval()(input_ids=IDS).logits
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    (tmp_path / "remora.json").write_text("{}")
    untrusted.adapter(tmp_path, mixture())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        stock = peft.PeftModel.from_pretrained(mixture(), tmp_path).eval()
    assert torch.equal(stock(input_ids=IDS).logits, expected)
    merged = model.merge_and_unload()(input_ids=IDS).logits
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-5)


def test_experts_of_other_shapes_are_refused_before_anything_is_allocated(tmp_path: Path) -> None:
    model = lora.add_adapter(mixture(), rank=2, alpha=4, dropout=0.0, modules=["experts.down_proj"])
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    (tmp_path / "remora.json").write_text("{}")
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "r": 10**6}))
    with pytest.raises(ModelError, match="experts"):
        untrusted.adapter(tmp_path, mixture())


def test_dora_on_experts_is_refused() -> None:
    with pytest.raises(ConfigError, match="use_dora"):
        lora.add_adapter(
            mixture(), rank=2, alpha=4, dropout=0.0, use_dora=True, modules=["experts.down_proj"]
        )


def test_only_the_text_part_of_a_multimodal_model_is_adapted() -> None:
    from tiny_architectures import tiny_model_of

    model = tiny_model_of("gemma3", 50)
    others = [n for n, m in model.named_modules() if n.endswith("q_proj") and "vision" in n]
    assert others
    adapted = lora.add_adapter(model, rank=2, alpha=4, dropout=0.0)
    paths = [path for path, _ in fused_lora.lora_layers(adapted)]
    assert len(paths) == 4 * 7  # layers, and q, k, v, o, gate, up, down
    assert all("language_model" in path for path in paths)
    adapted(input_ids=IDS).logits.sum().backward()
    gradients = [p.grad for p in adapted.parameters() if p.requires_grad]
    assert all(gradient is not None for gradient in gradients)


@pytest.mark.parametrize("architecture", ["longcat_flash", "zaya"])
def test_no_layer_inside_a_router_gets_an_adapter(architecture: str) -> None:
    """One writes more numbers than there are experts; the other is a small network."""
    model = tiny_model_of(architecture, 97)
    routers = [
        path
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and ("router." in path or ".gate." in path)
    ]
    assert routers
    names = lora.target_modules(model)
    assert not [path for path in routers if path in names or path.rsplit(".", 1)[-1] in names]

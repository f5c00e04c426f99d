"""Base weights in 4 bits: what they come back as, how adapters compute on them, and plans."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import ARCHITECTURES, build_tokenizer, randomize_adapter, tiny_model
from models.test_fused_lora import IDS, as_stock, count_fused, outputs_and_gradients, relative_error
from remora.config import PlanConfig
from remora.models import fused_lora, loading, lora, quantize
from remora.planning import plan, planner
from remora.tree import attention

pytest.importorskip("bitsandbytes")

CPU = torch.device("cpu")

# The 16 values of NF4 as the paper prints them (Dettmers et al. 2023, appendix E).
NF4 = torch.tensor(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ]
)


def quantized(architecture: str, dtype: torch.dtype = torch.float32) -> Any:
    made = tiny_model(architecture, dtype)
    quantize.quantize(made)
    return made


def adapted_of(base: Any, **others: Any) -> Any:
    settings = {"rank": 4, "alpha": 10, "dropout": 0.0, **others}
    torch.manual_seed(3)
    found = lora.add_adapter(base, **settings)
    randomize_adapter(found)
    return found.train()


def wide_model(architecture: str) -> Any:
    import transformers

    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    common = {"vocab_size": len(build_tokenizer()), **special}
    torch.manual_seed(0)
    if architecture == "gpt2":
        config = transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=256, **common)
        for name in ("attn_pdrop", "embd_pdrop", "resid_pdrop"):
            setattr(config, name, 0.0)
    else:
        config = transformers.Qwen2Config(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            **common,
        )
    config._attn_implementation = "sdpa"
    made = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    attention.install(made)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() > 1:
                parameter.mul_(2)
    return made


@pytest.mark.parametrize("shape", [(64, 128), (48, 32), (10, 6), (5, 65)])
def test_weights_come_back_as_the_paper_says(shape: tuple[int, int]) -> None:
    """bitsandbytes' own kernel for processors fails where a row is no multiple of 64."""
    torch.manual_seed(0)
    given = torch.randn(shape)
    small = torch.nn.Module()
    small.layer = torch.nn.Linear(shape[1], shape[0], bias=False)
    small.layer.weight.data.copy_(given)
    small.get_output_embeddings = lambda: None
    quantize.quantize(small)
    found = quantize.weight(small.layer, torch.float32)
    flat = given.flatten()
    blocks = torch.cat([flat, torch.zeros(-len(flat) % 64)]).view(-1, 64)
    scales = blocks.abs().amax(1, keepdim=True)
    nearest = (blocks[..., None] / scales[..., None] - NF4).abs().argmin(-1)
    expected = NF4[nearest] * scales
    error = torch.cat([found.flatten(), torch.zeros(-len(flat) % 64)]).view(-1, 64) - expected
    assert (error.abs() <= 0.01 * scales).all()  # of the scales, which are in 8 bits
    assert small.layer.weight.numel() == -(-given.numel() // 2)


# Wide enough for bitsandbytes' own kernel for processors.
@pytest.mark.parametrize("architecture", ["qwen2", "gpt2"])
def test_loss_and_every_gradient_equal_stock_peft(
    architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = wide_model(architecture)
    quantize.quantize(base)
    found = adapted_of(base)
    calls = count_fused(monkeypatch)
    logits, gradients = outputs_and_gradients(found)
    assert len(calls) == len(fused_lora.lora_layers(found)) > 0
    assert {type(layer).__module__ for _, layer in fused_lora.lora_layers(found)} == {
        "peft.tuners.lora.bnb"
    }
    expected_logits, expected = outputs_and_gradients(as_stock(found))
    assert relative_error(logits, expected_logits) < 1e-5
    for name, gradient in gradients.items():
        assert expected[name].norm() > 0
        assert relative_error(gradient, expected[name]) < 2e-5, name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("modules", [(), (0,)])
def test_gradients_are_those_of_stock_peft_on_the_dequantized_base(
    architecture: str, modules: tuple[int, ...]
) -> None:
    """Through quantized layers without an adapter too."""
    base = quantized(architecture)
    base.hf_quantizer = Quantizer()
    names = [lora.target_modules(base)[i] for i in modules]
    plain = copy.deepcopy(base)
    quantize.dequantize(plain)
    assert not quantize.layers(plain)
    logits, gradients = outputs_and_gradients(adapted_of(base, modules=names))
    stock = as_stock(adapted_of(plain, modules=names))
    expected_logits, expected = outputs_and_gradients(stock)
    assert relative_error(logits, expected_logits) < 1e-5
    for name, gradient in gradients.items():
        assert relative_error(gradient, expected[name]) < 2e-5, name


class Quantizer:
    def remove_quantization_config(self, _: Any) -> None:
        """As transformers' has it."""


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_before_the_first_step_the_outputs_are_the_quantized_bases_bit_for_bit(
    architecture: str, dtype: torch.dtype
) -> None:
    with torch.no_grad():
        expected = quantized(architecture, dtype).eval()(input_ids=IDS).logits
        found = lora.add_adapter(quantized(architecture, dtype), rank=4, alpha=8, dropout=0.05)
        assert torch.equal(found.eval()(input_ids=IDS).logits, expected)
        assert not torch.equal(tiny_model(architecture, dtype)(input_ids=IDS).logits, expected)
        randomize_adapter(found)
        assert not torch.equal(found(input_ids=IDS).logits, expected)
    trained = [p for p in found.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}
    count = lora.count_parameters(found)
    plain = lora.add_adapter(tiny_model(architecture, dtype), rank=4, alpha=8, dropout=0.05)
    assert (count.trainable, count.total) == (
        lora.count_parameters(plain).trainable,
        lora.count_parameters(plain).total,
    )


def test_what_comes_back_from_4_bits_is_not_kept_for_the_backward_pass() -> None:
    found = adapted_of(quantized("qwen2"))
    sizes = {layer.in_features * layer.out_features for _, layer in fused_lora.lora_layers(found)}
    kept: list[Tensor] = []

    def pack(saved: Tensor) -> Tensor:
        kept.append(saved)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        found(input_ids=IDS).logits.sum()
    head = found.get_output_embeddings().weight
    assert kept
    assert not [t for t in kept if t.dim() == 2 and t.numel() in sizes and t.shape != head.shape]


@pytest.mark.parametrize("shape", [(5, 65), (200, 130)])
def test_a_planned_layer_has_the_bytes_of_a_quantized_one(shape: tuple[int, int]) -> None:
    """Where blocks are not full, of weights and of scales."""
    small = torch.nn.Module()
    small.layer = torch.nn.Linear(shape[1], shape[0])
    small.get_output_embeddings = lambda: None
    planned = quantize.Planned(shape[1], shape[0], small.layer.bias)
    quantize.quantize(small)
    state = small.layer.weight.quant_state
    real = [small.layer.weight, small.layer.bias, state.absmax, state.offset, state.code]
    real += [state.state2.absmax, state.state2.code]
    tensors = [*planned.parameters(), *planned.buffers()]
    assert sum(t.nbytes for t in tensors) == sum(t.nbytes for t in real)


@pytest.mark.parametrize("architecture", ["qwen2", "gpt2", "gemma3", "opt"])
def test_the_plan_has_the_bytes_of_the_quantized_base(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tiny_model(architecture, torch.float32, vocabulary=len(build_tokenizer()))
    made.save_pretrained(tmp_path)
    loaded = loading.load(tmp_path, torch.float32, quantize_on=CPU)
    found = sum(t.numel() * t.element_size() for t in [*loaded.parameters(), *loaded.buffers()])
    for _, layer in quantize.layers(loaded):
        state = layer.weight.quant_state
        parts = [state.absmax, state.offset, state.code, state.state2.absmax, state.state2.code]
        found += sum(t.numel() * t.element_size() for t in parts)
    monkeypatch.setattr(quantize, "is_installed", lambda: False)  # it plans without bitsandbytes
    empty = loading.load_empty(made.config, torch.float32, quantized=True)
    planned = sum(t.numel() * t.element_size() for t in [*empty.parameters(), *empty.buffers()])
    assert planned == found
    ours = [name for name, _ in quantize.layers(empty)]
    assert ours == [name for name, _ in quantize.layers(loaded)]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux lists what is mapped")
@pytest.mark.parametrize("architecture", ["gemma3", "gpt2"])
def test_the_files_of_a_quantized_base_do_not_stay_in_memory(
    architecture: str, tmp_path: Path
) -> None:
    """Its embeddings and norms are views of them, so they stayed as a whole, 16 bits a weight."""
    tiny_model(architecture, torch.float32).save_pretrained(tmp_path)
    loaded = loading.load_base(tmp_path, "qlora", torch.float32, CPU)
    mapped = Path("/proc/self/maps").read_text("utf-8")
    assert str(tmp_path) not in mapped
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight


def test_a_plan_of_qlora_differs_in_its_base(
    base: Path,
    table: Path,
) -> None:
    methods = ("lora", "qlora")
    lora_plan, qlora_plan = (
        planner.make_plan(PlanConfig(str(table), model=str(base), device="t4", method=method))
        for method in methods
    )
    assert qlora_plan.memory.base < lora_plan.memory.base
    assert qlora_plan.trainable == lora_plan.trainable
    assert qlora_plan.parameters == lora_plan.parameters
    assert qlora_plan.memory.saved_activations == lora_plan.memory.saved_activations
    here = planner.make_plan(PlanConfig(str(table), model=str(base), device="cpu", method="qlora"))
    assert here.seconds is not None
    assert here.seconds > 0


def test_qwen_7b_is_planned_for_a_16_gb_t4(shared: Path, table: Path, tmp_path: Path) -> None:
    """The configuration of Qwen2.5-7B-Instruct: its small sister's with the published sizes."""
    for source in ("qwen2.5-1.5b-instruct-config", "qwen2.5-tokenizer"):
        for path in (shared / "models" / source).iterdir():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"hidden_size": 3584, "intermediate_size": 18944, "vocab_size": 152_064}
    config |= {"num_attention_heads": 28, "num_key_value_heads": 4, "tie_word_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps(config))

    def planned(method: Any, memory: str = "16GB") -> plan.Plan:
        return planner.make_plan(
            PlanConfig(
                str(table), model=str(tmp_path), method=method, device="t4", device_memory=memory
            )
        )

    qlora = planned("qlora")
    assert qlora.parameters - qlora.trainable == 7_615_616_512  # as published
    assert qlora.fits
    assert not qlora.checkpointing
    # 6,525,288,448 weights in 4 bits with 8.127 bits of scale to 64, the rest in 16 bits.
    in_4_bits = 6_525_288_448 * (0.5 + 8.127 / 8 / 64)
    rest = 2 * (7_615_616_512 - 6_525_288_448)
    assert qlora.memory.base == pytest.approx(in_4_bits + rest, rel=1e-3)
    config["num_hidden_layers"] = 2  # which are planned faster
    config["layer_types"] = config["layer_types"][:2]
    (tmp_path / "config.json").write_text(json.dumps(config))
    qlora = planned("qlora")
    without_graphs = qlora.peak_bytes - qlora.memory.graphs
    plain = planned("lora", f"{without_graphs / 1e6 + 1:.0f}MB")
    assert not plain.fits
    assert any("with --method qlora" in line for line in plain.alternatives)
    assert not any("with --method lora" in line for line in plain.alternatives)


PROGRAM = """
import sys, torch
from torch import nn
from remora.models import quantize
quantize.import_peft()
import peft
def adapted():
    config = peft.LoraConfig(target_modules=["0"])
    return peft.get_peft_model(nn.Sequential(nn.Linear(4, 4)), config)
adapted()
assert "bitsandbytes" not in sys.modules
quantize.import_quietly()
import bitsandbytes
linear = bitsandbytes.nn.Linear4bit(64, 64, bias=False).to("cpu")
base = nn.Sequential(linear)
base.is_loaded_in_4bit = True
found = peft.get_peft_model(base, peft.LoraConfig(target_modules=["0"]))
assert type(found.base_model.model[0]).__module__ == "peft.tuners.lora.bnb"
import kernels; kernels.get_kernel
"""


def test_bitsandbytes_is_imported_where_it_is_needed_and_fetches_nothing(tmp_path: Path) -> None:
    """Its import takes seconds, and asks `kernels` for code of the hub where that is installed."""
    (tmp_path / "kernels.py").write_text("def get_kernel(*_, **__):\n    raise SystemExit('asked')")
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{PROGRAM}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")

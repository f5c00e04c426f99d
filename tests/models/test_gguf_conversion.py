"""A converted GGUF file is the model that it was written from."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from safetensors.torch import load_file

import gguf_files
from conftest import tiny_config
from remora.errors import ModelError, ResourceError
from remora.models import gguf_conversion, gguf_header, loading

IDS = torch.arange(200)[None] * 7 % 400
TEXTS = ["Where is my card?", "7 days  ago", "Ünknown fee", "<|im_start|>user\n"]


def tiny(architecture: str, tokenizer: Any, **changes: Any) -> Any:
    from transformers import AutoModelForCausalLM, Qwen3Config

    torch.manual_seed(0)
    if architecture == "qwen3":
        sizes = tiny_config("qwen2", len(tokenizer)).to_dict()
        config = Qwen3Config(**{**sizes, "model_type": "qwen3", "head_dim": 16})
    else:
        config = tiny_config(architecture, len(tokenizer))
    for key, value in changes.items():
        setattr(config, key, value)
    config._attn_implementation = loading._attention(config)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # none at its initial value, and attention not flat
            parameter.normal_(std=0.3)
    return model


def convert(path: Path) -> Path:
    folder = path.with_suffix("")
    folder.mkdir()
    gguf_conversion.convert(path, folder)
    return folder


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "gpt2")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_it_is_the_model_that_was_written(
    architecture: str, tokenizer: Any, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {}
    if architecture == "mistral":  # llama.cpp has no sliding window for it
        changes["sliding_window"] = None
    if architecture.startswith("gemma"):  # as llama.cpp scales the scores of all but its 27B
        changes["query_pre_attn_scalar"] = 8
    if architecture == "gpt2":  # transformers takes this number for granted
        changes["n_positions"] = 1024
    if architecture == "gemma3":  # in llama.cpp every sixth layer is full
        changes |= {
            "num_hidden_layers": 6,
            "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
        }
    model = tiny(architecture, tokenizer, **changes)
    folder = convert(gguf_files.write(tmp_path / "m.gguf", model, tokenizer))
    loaded = loading.load(folder, torch.float32).eval()
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-4)


def test_its_tokenizer_is_that_of_the_file(tokenizer: Any, tmp_path: Path) -> None:
    model = tiny("llama", tokenizer)
    folder = convert(gguf_files.write(tmp_path / "m.gguf", model, tokenizer))
    loaded = loading.load_tokenizer(folder)
    assert loaded(TEXTS)["input_ids"] == tokenizer(TEXTS)["input_ids"]
    assert loaded.chat_template == tokenizer.chat_template
    assert (loaded.eos_token, loaded.pad_token) == (tokenizer.eos_token, tokenizer.pad_token)
    written = "".join(path.read_text() for path in folder.glob("*.json"))
    assert str(tmp_path) not in written  # no paths of this machine
    assert "quantization_config" not in written


@pytest.mark.parametrize(
    ("stored", "dtype"),
    [
        (Type.F32, torch.float32),
        (Type.F16, torch.float16),
        (Type.BF16, torch.bfloat16),
        (Type.Q8_0, torch.bfloat16),
        (Type.Q4_1, torch.bfloat16),
    ],
)
def test_weights_are_stored_in_the_type_that_holds_them(
    stored: Type, dtype: torch.dtype, tokenizer: Any, tmp_path: Path
) -> None:
    model = tiny("qwen2", tokenizer, intermediate_size=64)
    weights = load_file(
        convert(gguf_files.write(tmp_path / "m.gguf", model, tokenizer, stored))
        / "model.safetensors"
    )
    assert {tensor.dtype for tensor in weights.values()} == {dtype}
    for name, parameter in model.named_parameters():
        written = parameter.detach().numpy()
        if written.ndim > 1:
            written = gguf.quants.dequantize(gguf.quants.quantize(written, stored), stored)
        assert torch.equal(weights[name], torch.from_numpy(written.copy()).to(dtype)), name


def test_tied_weights_are_stored_once(tokenizer: Any, tmp_path: Path) -> None:
    model = tiny("gemma3", tokenizer)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    folder = convert(gguf_files.write(tmp_path / "m.gguf", model, tokenizer))
    assert set(load_file(folder / "model.safetensors")) == set(dict(model.named_parameters()))


def llama3_factors(factor: float, width: int = 8, theta: float = 500_000.0) -> np.ndarray:
    """As llama.cpp's converter computes them from the configuration of Llama 3.1."""
    factors = []
    for i in range(0, width, 2):
        wavelength = 2 * np.pi * theta ** (i / width)
        if wavelength < 8192 / 4:
            factors.append(1.0)
        elif wavelength > 8192 / 1:
            factors.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, dtype=np.float32)


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def test_scaled_positions_are_those_of_the_file(tokenizer: Any, tmp_path: Path) -> None:
    for name, rope, more in (
        ("llama3", LLAMA3, {"tensors": {"rope_freqs.weight": llama3_factors(32.0)}}),
        (
            "linear",
            {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0},
            {"metadata": {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}},
        ),
    ):
        model = tiny("llama", tokenizer, rope_parameters=rope)
        theta = {"rope_type": "default", "rope_theta": rope["rope_theta"]}
        plain = tiny("llama", tokenizer, rope_parameters=theta)
        plain.load_state_dict(model.state_dict())
        assert (logits(plain) - logits(model)).abs().max() > 1e-3  # it matters
        path = gguf_files.write(tmp_path / f"{name}.gguf", model, tokenizer, **more)
        loaded = loading.load(convert(path), torch.float32).eval()
        torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-4)


def test_only_full_layers_of_gemma_3_are_scaled(tokenizer: Any, tmp_path: Path) -> None:
    model = tiny("gemma3", tokenizer)
    scaled = {"gemma3.rope.scaling.type": "linear", "gemma3.rope.scaling.factor": 8.0}
    folder = convert(gguf_files.write(tmp_path / "m.gguf", model, tokenizer, metadata=scaled))
    rope = loading.load_config(folder).rope_parameters
    assert rope["full_attention"]["rope_type"] == "linear"
    assert rope["full_attention"]["factor"] == 8.0
    assert rope["sliding_attention"]["rope_type"] == "default"


@pytest.mark.parametrize(("num_layers", "width"), [(46, 32 // 4), (2, 16)])
def test_gemmas_27b_scales_attention_by_another_width(
    num_layers: int, width: int, tokenizer: Any, tmp_path: Path
) -> None:
    changes = {"head_dim": 16, "layer_types": ["full_attention"] * num_layers}
    model = tiny("gemma2", tokenizer, num_hidden_layers=num_layers, **changes)
    path = gguf_files.write(tmp_path / "m.gguf", model, tokenizer)
    config = gguf_conversion._load_config((tmp_path, path.name), gguf_header.read(path))
    assert config.query_pre_attn_scalar == width


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"metadata": {"general.architecture": "rwkv9"}}, "has the architecture rwkv9"),
        ({"metadata": {"llama.rope.scaling.type": "yarn"}}, r"rope scaling 'yarn'\) in a way"),
        ({"metadata": {"llama.rope.scale_linear": 4.0}}, "scales its positions"),
        ({"tensors": {"rope_freqs.weight": np.full(4, 7, np.float32)}}, "scales its positions"),
        ({"tensors": {"rope_freqs.weight": np.full(99, 7, np.float32)}}, "scales its positions"),
        (
            {"tensors": {"rope_factors_long.weight": np.ones(4, np.float32)}},
            "scales its positions",
        ),
        ({"tensors": {"blk.0.attn_q.bias": np.ones(32, np.float32)}}, "would be another model"),
        ({"without": ("blk.0.attn_q.weight",)}, "would be another model"),
        ({"metadata": {"llama.block_count": 1}}, "would be another model"),
        ({"metadata": {"llama.attention.head_count": 0}}, r"m\.gguf cannot be converted"),
        ({"metadata": {"tokenizer.ggml.model": "bert"}}, "cannot be converted"),
        (
            {"metadata": {"tokenizer.ggml.eos_token_id": 10**6}},
            r"eos_token_id is 1000000 and the vocabulary has [\d,]+ tokens",
        ),
        ({"without": ("tokenizer.ggml.merges",)}, "cannot be converted"),
    ],
)
def test_what_would_be_another_model_is_refused(
    more: dict[str, Any], told: str, tokenizer: Any, tmp_path: Path
) -> None:
    path = gguf_files.write(tmp_path / "m.gguf", tiny("llama", tokenizer), tokenizer, **more)
    with pytest.raises(ModelError, match=told) as caught:
        convert(path)
    assert "\n" not in str(caught.value)
    assert "; " in str(caught.value)
    assert not list((tmp_path / "m").glob("*.safetensors"))


def test_weights_that_are_not_finite_are_refused(tokenizer: Any, tmp_path: Path) -> None:
    model = tiny("llama", tokenizer)
    model.model.norm.weight.data[3] = float("nan")
    with pytest.raises(ModelError, match=r"not finite, model\.norm\.weight among them"):
        convert(gguf_files.write(tmp_path / "m.gguf", model, tokenizer))


def test_files_beside_it_are_not_read(tokenizer: Any, tmp_path: Path) -> None:
    model = tiny("llama", tokenizer)
    path = gguf_files.write(tmp_path / "m.gguf", model, tokenizer)
    for name in ("config.json", "tokenizer_config.json", "adapter_config.json", "tokenizer.json"):
        (tmp_path / name).write_text('{"auto_map": {"AutoTokenizer": ["evil.Evil", null]}}')
    (tmp_path / "chat_template.jinja").write_text("evil")
    assert loading.load_tokenizer(convert(path)).chat_template == tokenizer.chat_template


def test_a_file_of_ollamas_has_no_ending(tokenizer: Any, tmp_path: Path) -> None:
    model = tiny("llama", tokenizer)
    path = gguf_files.write(tmp_path / "m.gguf", model, tokenizer).rename(tmp_path / "sha256-ab")
    folder = tmp_path / "folder"
    folder.mkdir()
    gguf_conversion.convert(path, folder)
    loaded = loading.load(folder, torch.float32).eval()
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-4)


def test_a_full_disk_and_want_of_memory_are_errors_of_resources(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = gguf_files.write(tmp_path / "m.gguf", tiny("llama", tokenizer), tokenizer)
    for error, told in (
        (OSError(28, "No space left on device"), "No space left on device"),
        (MemoryError(), "ran out of memory"),
    ):

        def fail(*_: Any, error: BaseException = error) -> None:
            raise error

        monkeypatch.setattr(gguf_conversion, "_weights", fail)
        with pytest.raises(ResourceError, match=told):
            convert(path)
        shutil.rmtree(tmp_path / "m")

"""Tiny GGUF files, written as llama.cpp's converter writes them from a Hugging Face model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type

ARCHITECTURES = {"mistral": "llama", "gemma3_text": "gemma3"}
"""llama.cpp's names where they are others."""


def write(
    path: Path,
    model: Any,
    tokenizer: Any,
    stored: Type = Type.F32,
    *,
    metadata: dict[str, Any] | None = None,
    tensors: dict[str, np.ndarray] | None = None,
    without: tuple[str, ...] = (),
) -> Path:
    """Write a model and its tokenizer.

    Args:
        path: Where to.
        model: A transformers model.
        tokenizer: A byte-level BPE tokenizer.
        stored: Type of the matrices; vectors are float32.
        metadata: More keys of text, numbers or booleans, or other values of those that are written.
        tensors: More float32 tensors.
        without: Keys and tensors to leave out.
    """
    config = model.config
    name = ARCHITECTURES.get(config.model_type, config.model_type)
    values = {**_sizes(config, name), **_tokenizer(tokenizer), **(metadata or {})}
    writer = gguf.GGUFWriter(path, values.pop("general.architecture", name))
    for key, value in values.items():
        if key not in without:
            _add(writer, key, value)
    for key, tensor in _tensors(model, config, name).items():
        if key not in without:
            kind = stored if tensor.ndim > 1 else Type.F32
            writer.add_tensor(key, gguf.quants.quantize(tensor, kind), raw_dtype=kind)
    for key, tensor in (tensors or {}).items():
        writer.add_tensor(key, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case list():
            writer.add_array(key, value)


def _sizes(config: Any, name: str) -> dict[str, Any]:
    """Return the sizes of a model by llama.cpp's keys."""
    sizes = {
        "context_length": config.max_position_embeddings,
        "block_count": config.num_hidden_layers,
        "embedding_length": config.hidden_size,
        "attention.head_count": config.num_attention_heads,
    }
    if name == "gpt2":
        sizes |= {
            "feed_forward_length": 4 * config.hidden_size,
            "attention.layer_norm_epsilon": config.layer_norm_epsilon,
        }
    else:
        rope = config.rope_parameters
        width = (
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        )
        sizes |= {
            "feed_forward_length": config.intermediate_size,
            "attention.head_count_kv": config.num_key_value_heads,
            "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
            "attention.key_length": width,
            "attention.value_length": width,
            "rope.freq_base": float(rope.get("full_attention", rope)["rope_theta"]),
        }
    if name == "llama":
        sizes |= {"vocab_size": config.vocab_size, "rope.dimension_count": width}
    if name.startswith("gemma"):
        sizes["attention.sliding_window"] = config.sliding_window
    if name == "gemma2":
        sizes["attn_logit_softcapping"] = config.attn_logit_softcapping
        sizes["final_logit_softcapping"] = config.final_logit_softcapping
    return {f"{name}.{key}": value for key, value in sizes.items()}


def _tokenizer(tokenizer: Any) -> dict[str, Any]:
    """Return a byte-level tokenizer by llama.cpp's keys."""
    import json

    vocabulary = tokenizer.get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    special = set(tokenizer.all_special_tokens) | set(tokenizer.get_added_vocab())
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    values = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in special else 1 for token in tokens],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in merges],
        "tokenizer.ggml.eos_token_id": tokenizer.eos_token_id,
        "tokenizer.ggml.padding_token_id": tokenizer.pad_token_id,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": tokenizer.chat_template,
    }
    return {key: value for key, value in values.items() if value is not None}


def _tensors(model: Any, config: Any, name: str) -> dict[str, np.ndarray]:
    """Return the weights by llama.cpp's names, changed as it changes them."""
    (architecture,) = (key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == name)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    found = {}
    for key, parameter in model.named_parameters():  # tied ones once
        tensor = parameter.detach().to(torch.float32).numpy()
        if name == "llama" and key.endswith(("q_proj.weight", "k_proj.weight")):
            is_query = key.endswith("q_proj.weight")
            heads = config.num_attention_heads if is_query else config.num_key_value_heads
            halves = tensor.reshape(heads, 2, len(tensor) // heads // 2, -1)
            tensor = halves.swapaxes(1, 2).reshape(tensor.shape)
        if name.startswith("gemma") and key.endswith("norm.weight"):
            tensor = tensor + 1
        if name == "gpt2" and key.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            tensor = tensor.T
        renamed = names.get_name(key, try_suffixes=(".weight", ".bias"))
        assert renamed is not None, key
        found[renamed] = np.ascontiguousarray(tensor)
    return found

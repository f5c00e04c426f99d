"""Tiny random models whose rows cannot branch: states along the row, ALiBi, attention of their own.

And two that can: one to be computed by rows as well, and a mixture of experts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from conftest import build_tokenizer
from remora.models import loading
from remora.tree import layouts

BRANCHLESS = ("qwen3_5", "lfm2", "mamba", "bloom", "gpt_neo")
CONTINUED = {"mamba": "in steps"}


def hybrid_config(kind: str, vocabulary: int) -> Any:
    """Return the configuration of a model of two layers, of one kind each where there are two."""
    import transformers

    shape: dict[str, Any] = {"vocab_size": vocabulary, "hidden_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    gated = {**shape, **heads, "intermediate_size": 48}
    match kind:
        case "qwen3_5":  # a gated delta rule behind a short convolution
            return transformers.Qwen3_5TextConfig(
                **gated,
                head_dim=8,
                layer_types=["linear_attention", "full_attention"],
                linear_num_value_heads=4,
                linear_num_key_heads=2,
                linear_key_head_dim=8,
                linear_value_head_dim=8,
            )
        case "lfm2":  # gated short convolutions
            return transformers.Lfm2Config(**gated, layer_types=["conv", "full_attention"])
        case "mamba":  # a selective state space
            return transformers.MambaConfig(**shape, state_size=4, time_step_rank=4)
        case "bloom":  # ALiBi
            return transformers.BloomConfig(
                vocab_size=vocabulary,
                hidden_size=32,
                n_layer=2,
                n_head=4,
                hidden_dropout=0.0,
                attention_dropout=0.0,
            )
        case "gpt_neo":  # a window by index, in attention of its own
            return transformers.GPTNeoConfig(
                **{**shape, "num_layers": 2, "num_heads": 4, "intermediate_size": 48},
                attention_types=[[["global", "local"], 1]],
                window_size=12,
                max_position_embeddings=256,
                embed_dropout=0.0,
                resid_dropout=0.0,
                attention_dropout=0.0,
            )
        case "qwen3_moe":
            return transformers.Qwen3MoeConfig(
                **gated,
                head_dim=8,
                num_experts=4,
                num_experts_per_tok=2,
                moe_intermediate_size=16,
            )
        case "llama":
            return transformers.LlamaConfig(**gated)
    raise ValueError(kind)


def hybrid_model(
    kind: str, vocabulary: int, dtype: torch.dtype = torch.float64, scale: float = 4
) -> Any:
    """Return a random model in the layout that it declares."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = hybrid_config(kind, vocabulary)
    config._attn_implementation = loading._attention(config)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "A_log" not in name:
                parameter.mul_(scale)
    layouts.assign(model, layouts.choose("auto", type(model), config))
    return model


def save_base(kind: str, folder: Path) -> Path:
    """Write a random model with its tokenizer."""
    tokenizer = build_tokenizer()
    hybrid_model(kind, len(tokenizer), torch.float32, scale=8).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder

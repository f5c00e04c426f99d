"""Tiny random models of every causal architecture that transformers knows, made on the fly."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from remora.errors import ModelError
from remora.models import fused_lora

LABELS = ["card arrival", "refund", "top up failed"]
MESSAGES = [
    *("Where is my card?", "the refund again", "Still no top up!"),
    *("card please, day 3", "why refund why", "the top up failed, and the card is late too"),
]

SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "embedding_size"), 32),
    **dict.fromkeys(("word_embed_proj_dim", "dim_model", "attention_hidden_size"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 4),
    **dict.fromkeys(("decoder_layers", "num_blocks"), 4),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("swa_num_attention_heads", "global_num_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "swa_num_key_value_heads"), 2),
    **dict.fromkeys(("head_dim", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "index_head_dim", "dim_head"), 16),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size"), 48),
    **dict.fromkeys(("d_ff", "dim_ff", "decoder_ffn_dim", "encoder_ffn_dim"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_top_k", "top_k"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group"), 1),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 512),
    **dict.fromkeys(("context_length", "max_sequence_length"), 512),
    **dict.fromkeys(("vocab_size_per_layer_input", "vocab_size_per_layer_embed"), "vocab_size"),
    **dict.fromkeys(("hidden_size_per_layer_input", "laurel_rank"), 8),
    **dict.fromkeys(("rotary_dim", "mamba_d_state", "state_size", "linear_head_dim"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "attention_head_dim"), 8),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "linear_num_heads"), 4),
    **dict.fromkeys(("num_kv_shared_layers", "first_k_dense_replace", "num_dense_layers"), 1),
    "is_decoder": True,
    "sliding_window": 24,
    "attention_chunk_size": 24,
    "window_size": 24,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
"""Sizes by the names that configurations give them; a configuration takes those that it has."""

_FULL_HEADS = {"num_key_value_heads": 4}
_MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_chunk_size": 16}
_SHARED_CACHE = {
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
}
_INDEXED = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 8,
    "indexer_compress_ratio": 4,
    "ngram_vocab_size_base": 100,
    "ple_embed_dim": 8,
    "output_gate_type": "sigmoid",
}
OVERRIDES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32"), _FULL_HEADS),
    **dict.fromkeys(("glm4_moe_lite", "glm_moe_dsa", "longcat_flash", "minicpm3"), _FULL_HEADS),
    "youtu": _FULL_HEADS,
    "bamba": {**_MAMBA2, "attn_layer_indices": [1, 3]},
    "granitemoehybrid": {**_MAMBA2, "layer_types": ["mamba", "attention"] * 2},
    "falcon_h1": {**_MAMBA2, "mamba_d_ssm": 64},
    "nemotron_h": {"mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 8},
    "mamba2": {"num_heads": 8, "n_groups": 1, "chunk_size": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4},
    "zamba": {
        **_FULL_HEADS,
        "attn_layer_period": 2,
        "attn_layer_offset": 0,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
    },
    "zamba2": {
        "layers_block_type": ["mamba", "mamba", "hybrid", "mamba"],
        "n_mamba_heads": 8,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
    },
    "bailing_hybrid": {**_FULL_HEADS, "layer_group_size": 2, "num_local_experts": 4},
    "kimi_linear": {
        **_FULL_HEADS,
        "num_experts_per_token": 2,
        "layer_types": ["linear_attention", "full_attention"] * 2,
    },
    "codegen": {"rotary_dim": 8},
    "gptj": {"rotary_dim": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "dots1": {**_FULL_HEADS, "n_routed_experts": 4, "n_shared_experts": 1},
    "dots3_note": {"text_config": _FULL_HEADS},
    "dots3_note_text": _FULL_HEADS,
    "cohere_compass_text": {"layer_types": ["sliding_attention", "full_attention"] * 2},
    **{name: {"layer_types": ["conv", "full_attention"] * 2} for name in ("lfm2", "lfm2_moe")},
    **dict.fromkeys(("gemma3n_text", "gemma4_text", "gemma4_unified_text"), _SHARED_CACHE),
    **{name: {"text_config": _SHARED_CACHE} for name in ("gemma4", "gemma4_unified")},
    "qwen4_exp_text": _INDEXED,
    "qwen4_exp": {"text_config": _INDEXED},
    "blenderbot": {"encoder_layers": 2},
    "xlm": {"emb_dim": 32, "causal": True},
    "phi4_multimodal": {"vision_config": {"hidden_size": 32}, "audio_config": {"hidden_size": 32}},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
    "xlstm": {"chunk_size": 16, "qk_dim_factor": 1.0},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {},
    },
}
"""What an architecture needs beyond `SIZES`."""


def causal_types() -> list[str]:
    """Return the model types that transformers has a causal language model for."""
    from transformers.models.auto import modeling_auto

    return list(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_config_of(model_type: str, vocabulary: int) -> Any:
    """Return the configuration of a tiny model of this type."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = CONFIG_MAPPING[model_type]
    sizes = {k: vocabulary if v == "vocab_size" else v for k, v in SIZES.items()}
    sizes["vocab_size"] = vocabulary
    return kind(**_fitted(kind, sizes, OVERRIDES.get(model_type, {})))


def _fitted(kind: Any, sizes: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    default = kind()
    names = {v: k for k, v in (getattr(kind, "attribute_map", None) or {}).items()}
    present = set(vars(default)) | set(names)
    values = {k: v for k, v in sizes.items() if k in present}
    for part in getattr(kind, "sub_configs", None) or {}:
        inner = getattr(default, part, None)
        if inner is not None:
            values[part] = _fitted(type(inner), sizes, more.get(part, {}))
    given = {k: v for k, v in more.items() if not (isinstance(v, dict) and k in values)}
    return {**values, **given}


def tiny_model_of(model_type: str, vocabulary: int, dtype: torch.dtype = torch.float32) -> Any:
    """Return a random model; its weights are larger than usual, so that attention is not flat."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config_of(model_type, vocabulary), dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return model


@dataclass
class Trial:
    """What came of a tiny model: how it was computed, or why it was refused."""

    architecture: str
    layout: Any = ""  # tree or rows; "" if it was refused
    attention: str = ""  # of transformers
    modules: list[str] = field(default_factory=list)  # that get an adapter by default
    difference: float = float("nan")  # largest relative one of the loss and the gradients
    counted: bool = True  # whether its memory is counted, or estimated
    refusal: str = ""


def try_out(model_type: str, tokenizer: Any, folder: Path, steps: int = 5) -> Trial:
    """Save a tiny model, and train, check, count and score it as a run does.

    Raises:
        Exception: Whatever is not a refusal in one line.
    """
    from remora.data.prompt import Prompt
    from remora.models import loading, lora
    from remora.planning.step_memory import NotCountableError, Skeleton
    from remora.tree import layouts
    from remora.tree.check import check_rows, check_tree
    from remora.tree.forward import answer_logits
    from remora.tree.loss import loss_sum
    from remora.tree.scoring import Scorer

    trial = Trial(model_type)
    model = tiny_model_of(model_type, len(tokenizer))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    prompt = Prompt(tokenizer, list(LABELS), instruction="Classify the message.", max_length=200)
    rows = prompt.rows(MESSAGES, LABELS * 2)
    torch.manual_seed(0)
    try:
        config = loading.load_config(folder)
        empty = lora.add_adapter(
            loading.load_empty(config, torch.float32), rank=4, alpha=8, dropout=0.05
        )
        try:
            counted = layouts.build(layouts.of(empty), rows)
            Skeleton(empty, autocast=None, device="cpu").count(counted)
        except NotCountableError:
            trial.counted = False
        base = loading.load(folder, torch.float32)
        adapted = lora.add_adapter(base, rank=4, alpha=8, dropout=0.05)
        if layouts.of(adapted) == "tree":
            try:
                check_tree(adapted, rows, rows * 2, 512)
            except ModelError:
                layouts.assign(adapted, "rows")
        if layouts.of(adapted) == "rows":
            check_rows(adapted, rows)
    except ModelError as error:
        trial.refusal = str(error)
        return trial
    trial.attention = adapted.config.get_text_config()._attn_implementation
    trial.layout = layouts.of(adapted)
    trial.modules = sorted({path.rsplit(".", 1)[-1] for path, _ in fused_lora.lora_layers(adapted)})
    optimizer = torch.optim.AdamW((p for p in adapted.parameters() if p.requires_grad), lr=1e-3)
    for _ in range(steps):
        tree = layouts.build(trial.layout, rows)
        loss = loss_sum(answer_logits(adapted.train(), tree), tree) / tree.num_supervised_tokens
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    adapted.eval()
    probabilities = Scorer(adapted, prompt).probabilities(MESSAGES)
    assert np.allclose(probabilities.sum(1), 1)
    try:
        trial.difference = exactness(adapted.double(), rows)
    except RuntimeError:  # it computes no float64
        trial.difference = exactness(adapted.float(), rows)
    return trial


def exactness(adapted: Any, rows: Any) -> float:
    """Return the largest relative difference of loss and gradients, in a layout and row by row.

    Of all gradients together, since that of a parameter may be zero but for rounding.
    """
    from remora.tree import layouts
    from remora.tree.forward import answer_logits
    from remora.tree.loss import loss_sum

    inner = adapted.get_base_model()
    if inner._can_set_experts_implementation():  # the others compute no float64
        inner.set_experts_implementation("eager")
    trained = [p for p in adapted.parameters() if p.requires_grad]
    batch = layouts.build(layouts.of(adapted), rows)
    loss = loss_sum(answer_logits(adapted, batch), batch)
    loss.backward()
    found = [p.grad for p in trained]
    for p in trained:
        p.grad = None
    alone = 0.0
    for row in rows:
        ids = torch.tensor([row.token_ids])
        logits = adapted(input_ids=ids, use_cache=False).logits[0, row.answer_start - 1 : -1]
        own = torch.nn.functional.cross_entropy(
            logits.double(), ids[0, row.answer_start :], reduction="sum"
        )
        own.backward()
        alone += float(own.detach())
    pairs = [
        (torch.zeros_like(p) if a is None else a, torch.zeros_like(p) if p.grad is None else p.grad)
        for a, p in zip(found, trained, strict=True)
    ]
    largest = max(float(b.abs().max()) for _, b in pairs)
    gradients = max(float((a - b).abs().max()) for a, b in pairs) / largest
    return max(gradients, abs(float(loss.detach()) - alone) / alone)

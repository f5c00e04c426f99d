"""What `remora plan` says of the recipes on a device with 16 GB, from configurations alone.

The configurations are those that the models' pages show; the tokenizer is the one that Qwen2.5's
models share, and the rows are Banking77's.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import workload

QWEN: dict[str, Any] = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "dtype": "bfloat16",
    "hidden_act": "silu",
    "max_position_embeddings": 32_768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "bos_token_id": 151_643,
    "eos_token_id": 151_645,
}
MODELS: dict[str, dict[str, Any]] = {
    "Qwen2.5-1.5B-Instruct": {
        "hidden_size": 1_536,
        "intermediate_size": 8_960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "vocab_size": 151_936,
    },
    "Qwen2.5-7B-Instruct": {
        "hidden_size": 3_584,
        "intermediate_size": 18_944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
        "vocab_size": 152_064,
    },
}
PLANS = (
    ("Qwen2.5-1.5B-Instruct", "lora", "off"),
    ("Qwen2.5-7B-Instruct", "qlora", "auto"),
)


def main() -> None:
    from remora.config import PlanConfig
    from remora.plan import plan

    made = {}
    with tempfile.TemporaryDirectory() as name:
        for model, method, checkpointing in PLANS:
            folder = Path(name) / model
            shutil.copytree(workload.SHARED / "models" / "qwen2.5-tokenizer", folder)
            config = {**QWEN, **MODELS[model]}
            (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
            settings = PlanConfig(
                str(workload.SHARED / "data" / "banking77"),
                model=str(folder),
                method=method,  # type: ignore[arg-type]
                checkpointing=checkpointing,  # type: ignore[arg-type]
                batch_size=32,
                device="t4",
                device_memory="16GB",
            )
            made[f"{model}, {method}"] = plan(settings)
    components = list(vars(next(iter(made.values())).memory))
    workload.print_table(
        ["", *made],
        [
            ["parameters", *(f"{each.parameters:,}" for each in made.values())],
            ["trainable", *(f"{each.trainable:,}" for each in made.values())],
            ["arithmetic", *(each.precision.split(" (")[0] for each in made.values())],
            ["checkpointing", *("on" if each.checkpointing else "off" for each in made.values())],
            ["most tokens at once", *(f"{each.largest_micro_batch:,}" for each in made.values())],
            *(
                [part.replace("_", " "), *(_spoken(vars(m.memory)[part]) for m in made.values())]
                for part in components
            ),
            ["together", *(_spoken(each.peak_bytes) for each in made.values())],
            ["fits into 16 GB", *("yes" if each.fits else "no" for each in made.values())],
        ],
    )


def _spoken(count: int) -> str:
    from remora.progress import spoken_bytes

    return spoken_bytes(count) if count else "0"


if __name__ == "__main__":
    main()

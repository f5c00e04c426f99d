"""What the benchmarks work on: rows, models, and how a result is written down."""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SHARED = Path(os.environ.get("REMORA_SHARED", ROOT.parent / "shared"))
RESULTS = ROOT / "benchmarks" / "results"
LORA_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def parser(description: str | None, runs: str) -> argparse.ArgumentParser:
    """Return the command line of a benchmark that trains: its model, and the folder of its runs."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--model", default="nano")
    made.add_argument("--runs", type=Path, default=Path("runs") / runs)
    return made


def banking77(split: str) -> tuple[list[str], list[str]]:
    """Return texts and labels of Banking77's `train` or `test` rows."""
    return intents("banking77", split)


def intents(name: str, split: str) -> tuple[list[str], list[str]]:
    """Return texts and labels of the rows of `banking77` or `clinc150`."""
    path = SHARED / "data" / name / f"{split}.csv"
    if not path.is_file():
        raise SystemExit(f"error: this benchmark needs {path}; set REMORA_SHARED to its folder")
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return [row["text"] for row in rows], [row["category"] for row in rows]


def messages(size: str) -> tuple[list[str], list[str]]:
    """Return texts and labels of Banking77; of the sample in the package for the tiny shape."""
    if size != "tiny":
        return banking77("train")
    from remora.data.dataset import load_dataset

    train = load_dataset("sample:support").train
    return list(train.texts), list(train.labels)


def qwen_tokenizer(size: str = "0.5B") -> Any:
    """Return the tokenizer of Qwen2.5; that of nano for the tiny shape."""
    from transformers import AutoTokenizer

    if size == "tiny":
        return AutoTokenizer.from_pretrained(ROOT / "src" / "remora" / "bases" / "nano")
    return AutoTokenizer.from_pretrained(SHARED / "models" / "qwen2.5-tokenizer")


QWEN = {
    "0.5B": {
        "hidden_size": 896,
        "intermediate_size": 4_864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
    },
    "1.5B": {
        "hidden_size": 1_536,
        "intermediate_size": 8_960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 8_192,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
}
"""The shapes of Qwen2.5; and one to try a script with, on what the package has."""

HYBRID = {
    "Qwen3.5-0.8B": {
        "hidden_size": 1_024,
        "intermediate_size": 3_584,
        "num_hidden_layers": 24,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 16,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "vocab_size": 248_320,
        "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10_000_000.0,
            "partial_rotary_factor": 0.25,
        },
    }
}
"""The text part of Qwen3.5-0.8B: three layers of four are gated delta rules."""


def hybrid(size: str, dtype: Any, layers: int | None = None) -> Any:
    """Return a model of a hybrid shape; its random weights are the same in any dtype."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen3_5TextConfig

    shape = {**HYBRID[size], **({"num_hidden_layers": layers} if layers else {})}
    config = Qwen3_5TextConfig(**shape)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).to(dtype)


def qwen(size: str, dtype: Any, layers: int | None = None, device: str = "cpu") -> Any:
    """Return a model of a Qwen2.5's shape; its random weights are the same in any dtype."""
    if size in HYBRID:
        return hybrid(size, dtype, layers).to(device)
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config

    words = {"vocab_size": 151_936, "bos_token_id": 151_643, "eos_token_id": 151_645}
    config = Qwen2Config(
        **{**words, **QWEN[size]},
        max_position_embeddings=32_768,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        tie_word_embeddings=True,
    )
    if layers:
        config.num_hidden_layers = layers
        config.layer_types = config.layer_types[:layers]
    torch.manual_seed(0)
    config._attn_implementation = "sdpa"
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model.to(dtype)


def peak_memory_bytes(device: str = "cpu") -> int:
    """Return the most memory that this process has used, of the device."""
    import resource

    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def machine() -> str:
    """Name the processor and what runs on it."""
    import torch
    import transformers

    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.split(": ")[1] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    if torch.cuda.is_available():
        name = f"{torch.cuda.get_device_name()}, {name}"
    return (
        f"{name}, {torch.get_num_threads()} threads, Python {platform.python_version()}, "
        f"torch {torch.__version__}, transformers {transformers.__version__}"
    )


def write(name: str, value: dict[str, Any]) -> None:
    """Write a result to benchmarks/results/NAME.json and say so."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(), **value}, indent=2) + "\n", encoding="utf-8")
    print(f"\n{machine()}\nwritten to {path.relative_to(ROOT)}")


def print_table(header: list[str], rows: list[list[str]]) -> None:
    """Print a table in Markdown."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, ["-" * width for width in widths], *rows):
        print("| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |")

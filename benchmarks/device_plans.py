"""What `remora plan` says of known models, from configurations alone.

The configurations are those that the models' pages show, and the rows are Banking77's. The recipes
are planned for a device with 16 GB, with the tokenizer that Qwen2.5's models share. Models of other
kinds are planned for one with 80 GB, all with the tokenizer of `nano`, since that of Qwen2.5 has
more tokens than some of them. With `--train` models of the recipes' sizes with random weights take
a few real steps on the CUDA device that is here, and the plan for it stands beside what was
measured.

    python benchmarks/device_plans.py
    python benchmarks/device_plans.py --kinds
    python benchmarks/device_plans.py --train
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import memory
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
KINDS: dict[str, dict[str, Any]] = {
    "Qwen3.5-0.8B": {"model_type": "qwen3_5_text", **workload.HYBRID["Qwen3.5-0.8B"]},
    "LFM2-1.2B": {
        "model_type": "lfm2",
        "vocab_size": 65_536,
        "hidden_size": 2_048,
        "intermediate_size": 12_288,  # which the model narrows to 8,192
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "layer_types": [
            "full_attention" if layer in {2, 5, 8, 10, 12, 14} else "conv" for layer in range(16)
        ],
    },
    "Gemma 4 E2B": {
        "model_type": "gemma4_text",
        "vocab_size": 262_144,
        "hidden_size": 1_536,
        "intermediate_size": 6_144,
        "num_hidden_layers": 35,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "global_head_dim": 512,
        "sliding_window": 512,
        "layer_types": (["sliding_attention"] * 4 + ["full_attention"]) * 7,
        "num_kv_shared_layers": 20,
        "use_double_wide_mlp": True,
        "hidden_size_per_layer_input": 256,
        "vocab_size_per_layer_input": 262_144,
        "final_logit_softcapping": 30.0,
    },
    "gpt-oss-20b": {
        "model_type": "gpt_oss",
        "vocab_size": 201_088,
        "hidden_size": 2_880,
        "intermediate_size": 2_880,
        "num_hidden_layers": 24,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "num_local_experts": 32,
        "num_experts_per_tok": 4,
        "sliding_window": 128,
    },
    "Qwen3-30B-A3B": {
        "model_type": "qwen3_moe",
        "vocab_size": 151_936,
        "hidden_size": 2_048,
        "intermediate_size": 6_144,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "tie_word_embeddings": False,
    },
}
"""The text parts of models of other kinds: hybrids, and mixtures of experts, in 16 bits."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train", action="store_true", help="on a CUDA device")
    parser.add_argument("--kinds", nargs="*", choices=KINDS, help="models of other kinds")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    options = parser.parse_args()
    if options.train:
        train(options.models, options.steps)
    elif options.kinds is not None:
        show_kinds(options.kinds or list(KINDS))
    else:
        show()


def show() -> None:
    """Print the plans for a T4."""
    from remora.config import PlanConfig
    from remora.planning.planner import make_plan

    made = {}
    with tempfile.TemporaryDirectory() as name:
        for model, method, checkpointing in PLANS:
            folder = write_base(Path(name) / model)
            settings = PlanConfig(
                str(workload.SHARED / "data" / "banking77"),
                model=str(folder),
                method=method,  # type: ignore[arg-type]
                checkpointing=checkpointing,  # type: ignore[arg-type]
                batch_size=32,
                device="t4",
                device_memory="16GB",
            )
            made[f"{model}, {method}"] = make_plan(settings)
    print_plans(made, "16 GB")


def show_kinds(models: list[str]) -> None:
    """Print the plans of models of other kinds for an H100."""
    from remora.config import PlanConfig
    from remora.planning.planner import make_plan

    made = {}
    with tempfile.TemporaryDirectory() as name:
        for model in models:
            folder = Path(name) / model.replace(" ", "-")
            folder.mkdir()
            for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
                shutil.copy(memory.NANO / file, folder)
            special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
            config = {"dtype": "bfloat16", "max_position_embeddings": 32_768, **special}
            text = json.dumps({**config, **KINDS[model]})
            (folder / "config.json").write_text(text, encoding="utf-8")
            rows = str(workload.SHARED / "data" / "banking77")
            began = time.perf_counter()
            made[model] = make_plan(PlanConfig(rows, model=str(folder), device="h100"))
            print(f"{model}: planned in {time.perf_counter() - began:.0f} s", file=sys.stderr)
    print_plans(made, "80 GB")


def print_plans(made: dict[str, Any], memory_size: str) -> None:
    """Print plans beside each other."""
    components = list(vars(next(iter(made.values())).memory))
    workload.print_table(
        ["", *made],
        [
            ["parameters", *(f"{each.parameters:,}" for each in made.values())],
            [
                "active",
                *(f"{each.active_parameters or each.parameters:,}" for each in made.values()),
            ],
            ["trainable", *(f"{each.trainable:,}" for each in made.values())],
            ["layout", *(each.layout for each in made.values())],
            ["arithmetic", *(each.precision.split(" (")[0] for each in made.values())],
            ["checkpointing", *("on" if each.checkpointing else "off" for each in made.values())],
            ["most tokens at once", *(f"{each.largest_micro_batch:,}" for each in made.values())],
            *(
                [part.replace("_", " "), *(_spoken(vars(m.memory)[part]) for m in made.values())]
                for part in components
            ),
            ["together", *(_spoken(each.peak_bytes) for each in made.values())],
            [f"fits into {memory_size}", *("yes" if each.fits else "no" for each in made.values())],
        ],
    )


def write_base(folder: Path, *, weights: bool = False) -> Path:
    """Write the tokenizer and the configuration of a model; random weights where asked for."""
    shutil.copytree(workload.SHARED / "models" / "qwen2.5-tokenizer", folder)
    config = {**QWEN, **MODELS[folder.name]}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    if weights:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        torch.manual_seed(0)
        with torch.device("cuda"):
            made = AutoModelForCausalLM.from_config(
                AutoConfig.from_pretrained(folder), dtype=torch.bfloat16
            )
        made.save_pretrained(folder)
        del made
        torch.cuda.empty_cache()
    return folder


def train(models: list[str], num_steps: int) -> None:
    """Train models of these sizes; print the plans beside what was measured."""
    header = ["", "method", "planned", "measured", "ratio", "reserved", "context", "base", "step"]
    rows, results = [], []
    with tempfile.TemporaryDirectory() as name:
        table = Path(name) / "rows"
        table.mkdir()
        for split, count in {"train": 10_003, "test": 64}.items():
            source = workload.SHARED / "data" / "banking77" / f"{split}.csv"
            with source.open(encoding="utf-8", newline="") as file:
                lines = list(itertools.islice(csv.reader(file), count + 1))
            with (table / source.name).open("w", encoding="utf-8", newline="") as file:
                csv.writer(file).writerows(lines)
        for model, method, _ in (one for one in PLANS if one[0] in models):
            folder = write_base(Path(name) / model, weights=True)
            flags = ["--model", str(folder), "--method", method, "--device", "cuda"]
            flags += ["--max-steps", str(num_steps), "--validation-fraction", "0"]
            flags += ["--output", name, "--name", f"run-{method}"]
            told = memory.start(["--train", "train", str(table), *flags], show=True)
            shutil.rmtree(folder)
            measured, directory = json.loads(told), Path(name) / f"run-{method}"
            plan = json.loads((directory / "plan.json").read_text(encoding="utf-8"))
            lines = (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
            last = [json.loads(line) for line in lines if "loss" in line][-1]
            context = measured["peak_bytes"] - measured["reserved_bytes"]
            found = {"model": model, "method": method, "plan": plan, "last": last, **measured}
            results.append(found)
            rows.append(
                [
                    model,
                    method,
                    _spoken(plan["peak_bytes"]),
                    _spoken(measured["peak_bytes"]),
                    f"{plan['peak_bytes'] / measured['peak_bytes']:.2f}",
                    _spoken(measured["reserved_bytes"]),
                    _spoken(context),
                    _spoken(plan["memory"]["base"]),
                    f"{last['examples_per_second']:.0f} examples/s",
                ]
            )
    workload.print_table(header, rows)
    workload.write("trained-plans", {"runs": results})


def _spoken(count: int) -> str:
    from remora.formatting import spoken_bytes

    return spoken_bytes(count) if count else "0"


if __name__ == "__main__":
    main()

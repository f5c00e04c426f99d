"""What `remora plan` says of the recipes on a device with 16 GB, from configurations alone.

The configurations are those that the models' pages show; the tokenizer is the one that Qwen2.5's
models share, and the rows are Banking77's. With `--train` models of these sizes with random weights
take a few real steps on the CUDA device that is here, and the plan for it stands beside what was
measured.

    python benchmarks/device_plans.py
    python benchmarks/device_plans.py --train
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import shutil
import tempfile
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train", action="store_true", help="on a CUDA device")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    options = parser.parse_args()
    if options.train:
        train(options.models, options.steps)
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

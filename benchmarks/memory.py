"""The planned peak of memory against the measured one, on a CPU or a CUDA device.

Each row of the table is a whole `remora train` in a fresh process: plan, training, evaluation,
baseline and report. Measured is, on a CPU, the most memory that the process ever had (VmHWM),
on a CUDA device the most that torch had reserved, and the context beside it. The models have the
shapes of Qwen2, Llama and Gemma 3 with fewer layers, and random weights; the rows are those of the
sample in the package.

    python benchmarks/memory.py
    python benchmarks/memory.py --device cuda --at-once 4
    python benchmarks/memory.py --shapes "Qwen3 MoE" Qwen3.5 LFM2 --methods lora
"""

from __future__ import annotations

import argparse
import csv
import functools
import itertools
import json
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import workload

NANO = workload.ROOT / "src" / "remora" / "bases" / "nano"
SAMPLE = workload.ROOT / "src" / "remora" / "samples" / "support"
NUM_ROWS = {"cpu": {"train": 112, "test": 8}, "cuda": {"train": 440, "test": 8}}
BATCH = {"cpu": 32, "cuda": 128}

SMALL: dict[str, dict[str, Any]] = {
    "Qwen2": {
        "model_type": "qwen2",
        "vocab_size": 40_960,
        "hidden_size": 896,
        "intermediate_size": 4_864,
        "num_hidden_layers": 2,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "Llama": {
        "model_type": "llama",
        "vocab_size": 24_576,
        "hidden_size": 1_024,
        "intermediate_size": 2_816,
        "num_hidden_layers": 3,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
    },
    "Gemma 3": {
        "model_type": "gemma3_text",
        "vocab_size": 49_152,
        "hidden_size": 640,
        "intermediate_size": 2_048,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "sliding_window": 32,
        "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
        "tie_word_embeddings": True,
    },
}
"""Sizes of Qwen2.5-0.5B, of a small Llama and of Gemma 3 270M, with fewer layers and words."""

LARGE: dict[str, dict[str, Any]] = {
    "Qwen2": {
        **SMALL["Qwen2"],
        "vocab_size": 151_936,
        "hidden_size": 1_536,
        "intermediate_size": 8_960,
        "num_hidden_layers": 4,
        "num_attention_heads": 12,
    },
    "Llama": {
        **SMALL["Llama"],
        "vocab_size": 32_000,
        "hidden_size": 2_048,
        "intermediate_size": 8_192,
        "num_hidden_layers": 4,
        "num_attention_heads": 32,
    },
    "Gemma 3": {
        **SMALL["Gemma 3"],
        "vocab_size": 262_144,
        "num_hidden_layers": 18,
        "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 3,
    },
}
"""Sizes of Qwen2.5-1.5B and Llama 3.2 1B with fewer layers, and those of Gemma 3 270M."""

KINDS: dict[str, dict[str, Any]] = {
    "Qwen3 MoE": {
        "model_type": "qwen3_moe",
        "vocab_size": 32_768,
        "hidden_size": 1_024,
        "moe_intermediate_size": 384,
        "num_hidden_layers": 2,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "num_experts": 32,
        "num_experts_per_tok": 8,
        "tie_word_embeddings": True,
    },
    "Qwen3.5": {
        **workload.HYBRID["Qwen3.5-0.8B"],
        "model_type": "qwen3_5_text",
        "vocab_size": 32_768,
        "num_hidden_layers": 4,
    },
    "LFM2": {
        "model_type": "lfm2",
        "vocab_size": 32_768,
        "hidden_size": 1_024,
        "intermediate_size": 6_656,
        "num_hidden_layers": 4,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "layer_types": ["conv", "conv", "full_attention", "conv"],
        "tie_word_embeddings": True,
    },
}
"""Other kinds: a mixture of experts, and the hybrids Qwen3.5-0.8B and LFM2-350M, with fewer layers
and words."""

SHAPES = {"cpu": {**SMALL, **KINDS}, "cuda": LARGE}

SETTINGS = {
    "cpu": (
        ("lora", "off", 2048),
        ("lora", "off", 256),
        ("lora", "on", 2048),
        ("full", "off", 2048),
        ("full", "on", 256),
    ),
    "cuda": (
        ("lora", "off", 2048),
        ("lora", "off", 512),
        ("lora", "on", 2048),
        ("full", "off", 2048),
        ("full", "on", 512),
        ("qlora", "off", 2048),
    ),
}
"""Method, checkpointing and tokens of a micro-batch; each with every shape."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", default=list(SMALL), choices=SHAPES["cpu"])
    parser.add_argument("--methods", nargs="+", default=["lora", "full", "qlora"])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--device", default="cpu", choices=SHAPES)
    parser.add_argument("--at-once", type=int, default=1, help="runs; on a CUDA device only")
    parser.add_argument("--show", action="store_true", help="show what the runs say")
    parser.add_argument("--make", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--train", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.make:
        make_model(*options.make)
    elif options.train:
        train(options.train)
    else:
        compare(options)


def compare(options: argparse.Namespace) -> None:
    header = ["shape", "method", "checkpointing", "micro-batch", "planned", "measured", "ratio"]
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(options.at_once) as pool:
        folder = Path(name)
        write_rows(folder / "rows", NUM_ROWS[options.device])
        models = {shape: folder / re.sub(r"\W", "", shape).lower() for shape in options.shapes}
        making = [["--make", options.device, shape, str(path)] for shape, path in models.items()]
        list(pool.map(functools.partial(start, show=False), making))
        settings = [one for one in SETTINGS[options.device] if one[0] in options.methods]
        chosen = [(shape, *one) for one in settings for shape in models]
        runs = list(pool.map(lambda one: run(folder, models[one[0]], *one, options), chosen))
    rows = [
        [
            *(str(run[key]) for key in ("shape", "method", "checkpointing", "micro_batch_tokens")),
            f"{run['planned_bytes'] / 1e6:.0f} MB",
            f"{run['peak_bytes'] / 1e6:.0f} MB",
            f"{run['planned_bytes'] / run['peak_bytes']:.2f}",
        ]
        for run in runs
    ]
    workload.print_table(header, rows)
    is_usual = not set(options.shapes) & set(KINDS)
    name = "memory-cuda" if options.device == "cuda" else "memory" if is_usual else "memory-kinds"
    workload.write(name, {"steps": options.steps, "rows": NUM_ROWS[options.device], "runs": runs})


def write_rows(folder: Path, num_rows: dict[str, int]) -> None:
    """Write the first rows of the sample as a folder with train.csv and test.csv."""
    folder.mkdir()
    for split, count in num_rows.items():
        with (SAMPLE / f"{split}.csv").open(encoding="utf-8", newline="") as file:
            rows = list(itertools.islice(csv.reader(file), count + 1))
        with (folder / f"{split}.csv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows(rows)


def start(arguments: list[str], *, show: bool) -> str:
    """Run this script again in a fresh process; return the last line of what it prints."""
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if show:
        print(done.stderr, file=sys.stderr)
    if done.returncode != 0:
        raise SystemExit(f"{done.stderr}\nerror: {' '.join(command)} ended with {done.returncode}")
    return (done.stdout.splitlines() or [""])[-1]


def make_model(device: str, shape: str, folder: str) -> None:
    """Write a model of this shape with random weights in 16 bits, and nano's tokenizer."""
    import shutil

    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    sizes = SHAPES[device][shape]
    config = AutoConfig.for_model(**sizes, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    with torch.device(device):
        made = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    made.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(NANO / name, folder)


def run(
    folder: Path,
    model: Path,
    shape: str,
    method: str,
    checkpointing: str,
    size: int,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Train once; return the plan's peak by component and the process's own."""
    name = f"{model.name}-{method}-{checkpointing}-{size}"
    settings = {
        "--model": str(model),
        "--output": str(folder / "runs"),
        "--name": name,
        "--method": method,
        "--checkpointing": checkpointing,
        "--micro-batch-tokens": str(size),
        "--max-steps": str(options.steps),
        "--eval-steps": str(max(1, options.steps // 3)),  # the best copy is beside most steps
        "--validation-fraction": "0.1",
        "--learning-rate": "1e-5",
        "--device": options.device,
        "--batch-size": str(BATCH[options.device]),
    }
    flags = [part for pair in settings.items() for part in pair]
    told = start(["--train", "train", str(folder / "rows"), *flags], show=options.show)
    plan = json.loads((folder / "runs" / name / "plan.json").read_text(encoding="utf-8"))
    found = {
        "shape": shape,
        "method": method,
        "checkpointing": checkpointing,
        "micro_batch_tokens": size,
        "planned_bytes": plan["peak_bytes"],
        **json.loads(told),
        "training_bytes": plan["measured_peak_bytes"],
        "largest_micro_batch": plan["largest_micro_batch"],
        "planned": plan["memory"],
    }
    print(json.dumps(found), file=sys.stderr)
    return found


def train(arguments: list[str]) -> None:
    """Run `remora` in this process and print the most memory that it had."""
    from remora.cli import main as remora

    try:
        code = remora(arguments)
    except SystemExit as end:
        code = int(end.code or 0)
    if code:
        raise SystemExit(code)
    print(json.dumps(peak("cuda" if "cuda" in arguments else "cpu")))


def peak(device: str) -> dict[str, int]:
    """Return the most memory that this process had, of the device."""
    if device == "cpu":
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        found = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
        assert found is not None
        return {"peak_bytes": int(found[1]) * 1024}
    import torch

    reserved = torch.cuda.max_memory_reserved()
    return {
        "peak_bytes": reserved + context_bytes(),
        "reserved_bytes": reserved,
        "allocated_bytes": torch.cuda.max_memory_allocated(),
    }


def context_bytes() -> int:
    """Return what this process has of the device beside what torch reserves, as the driver says.

    Where it does not tell the processes apart, all that is used counts as this one's.
    """
    import os

    import torch

    asked = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
    told = subprocess.run(asked, capture_output=True, text=True, check=True).stdout
    megabytes = dict(line.split(", ") for line in told.splitlines()).get(str(os.getpid()), "")
    free, total = torch.cuda.mem_get_info()
    used = int(megabytes) << 20 if megabytes.isdigit() else total - free
    return used - torch.cuda.memory_reserved()


if __name__ == "__main__":
    main()

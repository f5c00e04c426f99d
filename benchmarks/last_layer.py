"""What it saves to compute the last decoder layer at the predictors only: time and memory.

Both ways take the same steps in turn in one process, so that other work on the machine falls on
both; the ratio is the median over the pairs. Peak memory is that of a process for each way.

    python benchmarks/last_layer.py
    python benchmarks/last_layer.py --shapes nano SmolLM2-135M --pairs 5
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any

import workload

BATCH = 32
SHAPES: dict[str, dict[str, int]] = {
    "nano": {},
    "SmolLM2-135M": {
        "vocab_size": 49_152,
        "hidden_size": 576,
        "intermediate_size": 1_536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
    "Qwen2.5-0.5B": {},
}
"""nano is trained; the others have random weights, and Qwen2.5's tokens as far as they exist."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--steps", type=int, default=1, help="of each way in a pair")
    parser.add_argument("--precision", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--way", choices=["both", "whole", "cut"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        print(json.dumps(measure(options.shapes[0], options)))
        return
    table, found = [], {}
    for shape in options.shapes:
        runs = {way: start(shape, way, options) for way in ("both", "whole", "cut")}
        found[shape] = runs
        both = runs["both"]
        table.append(
            [
                shape,
                str(both["layers"]),
                f"{both['tokens']:,}, {both['predictors']:,}",
                *(f"{both[way]:.1f}" for way in ("whole", "cut")),
                f"{both['ratio']:.3f}",
                " to ".join(f"{each:.2f}" for each in both["quartiles"]),
                *(f"{runs[way]['peak_bytes'] / 1e6:,.0f} MB" for way in ("whole", "cut")),
            ]
        )
    header = ["base", "layers", "tokens, predictors", "whole: examples/s", "cut", "ratio"]
    workload.print_table([*header, "quartiles", "whole: peak", "cut"], table)
    workload.write("last_layer", found)


def start(shape: str, way: str, options: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, __file__, "--shapes", shape, "--way", way]
    command += ["--pairs", str(options.pairs), "--steps", str(options.steps)]
    command += ["--precision", options.precision]
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode != 0:
        raise SystemExit(f"{done.stderr}\nerror: {shape} ended with {done.returncode}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(shape: str, options: argparse.Namespace) -> dict[str, Any]:
    """Train in turns, or one way only; seconds are CPU time, since the machine may be shared."""
    import torch
    from peft import LoraConfig, get_peft_model

    from remora.config.checks import DEFAULT_MICRO_BATCH_TOKENS
    from remora.data.dataset import load_dataset
    from remora.data.prompt import Prompt
    from remora.models import fused_lora, hub, loading
    from remora.runtime.device import choose_precision
    from remora.runtime.process_group import ProcessGroup
    from remora.runtime.reporter import Reporter
    from remora.training.micro_batches import MicroBatches
    from remora.training.trainable import accelerator_for
    from remora.tree import last_layer, layouts

    dtype = getattr(torch, options.precision)
    if shape == "nano":
        folder = hub.find("nano")
        tokenizer = loading.load_tokenizer(folder)
        base = loading.load(folder, dtype)
    else:
        tokenizer = workload.qwen_tokenizer()
        base = base_of(shape).to(dtype)
    train = load_dataset("sample:support").train
    prompt = Prompt(tokenizer, sorted(set(train.labels)), instruction="Classify.", max_length=512)
    torch.manual_seed(1)
    lora = LoraConfig(
        r=16, lora_alpha=32, target_modules=workload.LORA_MODULES, task_type="CAUSAL_LM"
    )
    model = get_peft_model(base, lora).train()
    fused_lora.make_fast(model)
    layouts.assign(model, "tree")
    batches = []
    for begin in range(0, BATCH * (options.pairs + 1) * options.steps, BATCH):
        batch = [begin % len(train) + i for i in range(BATCH)]
        rows = prompt.rows([train.texts[i] for i in batch], [train.labels[i] for i in batch])
        if shape != "nano":  # a smaller vocabulary than the tokenizer's
            size = base.config.vocab_size
            rows = [row._replace(token_ids=[t % size for t in row.token_ids]) for row in rows]
        batches.append(rows)
    trees = [tree for rows in batches for tree in layouts.split("tree", rows, 4096)]
    ways = ["cut", "whole"] if options.way == "both" else [options.way]
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    device = torch.device("cpu")
    with accelerator_for(choose_precision(device, options.precision), device) as accelerator:
        micro_batches = MicroBatches(
            model, DEFAULT_MICRO_BATCH_TOKENS, accelerator, None, ProcessGroup(), Reporter()
        )
        for pair in range(options.pairs + 1):
            for way in ways if pair % 2 else ways[::-1]:
                (last_layer.install if way == "cut" else last_layer.uninstall)(model)
                began = time.process_time()
                for rows in batches[pair * options.steps : (pair + 1) * options.steps]:
                    micro_batches.add_gradients(rows)
                    model.zero_grad()
                seconds[way].append((time.process_time() - began) / options.steps)
    # The first of each sets up the libraries.
    medians = {way: BATCH / statistics.median(each[1:]) for way, each in seconds.items()}
    found: dict[str, Any] = {"peak_bytes": workload.peak_memory_bytes(), "seconds": seconds}
    if options.way == "both":
        ratios = [a / b for a, b in zip(seconds["whole"][1:], seconds["cut"][1:], strict=True)]
        first, _, third = statistics.quantiles(ratios, n=4)
        found |= {"ratio": statistics.median(ratios), "quartiles": [first, third]}
    return {
        **found,
        **medians,
        "layers": base.config.num_hidden_layers,
        "tokens": round(sum(tree.num_tokens for tree in trees) / len(batches)),
        "predictors": round(sum(len(tree.predictors) for tree in trees) / len(batches)),
    }


def base_of(shape: str) -> Any:
    """Return a base of a shape with random weights."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    if shape == "Qwen2.5-0.5B":
        return workload.qwen("0.5B", torch.bfloat16)
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPES[shape], tie_word_embeddings=True)
    config._attn_implementation = "sdpa"
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


if __name__ == "__main__":
    main()

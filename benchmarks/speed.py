"""Examples per second and peak memory of one training step, against the stock trainers.

The shape of Qwen2.5-0.5B with random weights, its tokenizer, rows of Banking77, effective batch 32,
bfloat16 arithmetic in every arm, dropout 0 so that the losses must agree. Every arm is a process of
its own and sees the same rows in the same batches; the arms run one after the other in one call.

    python benchmarks/speed.py                  both prompts, all arms
    python benchmarks/speed.py --list-labels    only the prompt that lists the 77 labels
    python benchmarks/speed.py --size Qwen3.5-0.8B --no-list-labels --arms padded remora
    python benchmarks/speed.py --device cuda --size 1.5B --steps 20 --slow-steps 20
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any, TypeAlias

import workload

BATCH = 32
LEARNING_RATE = 2e-4
ARMS = {
    "recipe": "Trainer: padded, full logits, float32 base under autocast, checkpointing",
    "padded": "Trainer: padded, full logits, 16-bit base, no checkpointing",
    "flattened": "Trainer: padding-free, full logits, 16-bit base, no checkpointing",
    "liger": "Trainer: padded, Liger's kernels and loss, 16-bit base, no checkpointing",
    "trl-padded": "TRL SFTTrainer: padded, chunked loss, 16-bit base, no checkpointing",
    "trl-padding-free": "TRL SFTTrainer: padding-free, chunked loss, 16-bit base, no checkpointing",
    "trl-packed": "TRL SFTTrainer: rows packed to 2,048 tokens, in other batches, 16-bit base",
    "remora": "Remora: token tree or padded rows, 16-bit base",
}

Watch: TypeAlias = Callable[[int], AbstractContextManager[Any]]
"""Takes the index of a step, and is around it."""


@dataclass
class Steps:
    """What the optimizer steps of an arm gave and took, each of them."""

    losses: list[float] = field(default_factory=list)
    gradient_norms: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)  # of the process, all its threads
    num_rows: list[int] = field(default_factory=list)

    def clock(self) -> tuple[float, float]:
        return time.perf_counter(), time.process_time()

    def took(self, began: tuple[float, float]) -> None:
        """Note the time of a step since `began`."""
        ended = self.clock()
        self.seconds.append(ended[0] - began[0])
        self.cpu_seconds.append(ended[1] - began[1])

    def rate(self, seconds: list[float], warm_up: int) -> float:
        """Return the median of rows by seconds, without the first steps."""
        pairs = zip(self.num_rows, seconds, strict=True)
        return statistics.median([rows / each for rows, each in pairs][warm_up:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--list-labels", action="store_true")
    parser.add_argument("--no-list-labels", action="store_true")
    parser.add_argument("--steps", type=int, default=5, help="measured steps, after one warm-up")
    parser.add_argument("--slow-steps", type=int, default=2, help="the same for the recipe")
    parser.add_argument("--warm-up", type=int, default=1, help="steps before those measured")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--size", default="0.5B", choices=[*workload.QWEN, *workload.HYBRID])
    parser.add_argument("--layers", type=int, help="fewer than the shape has")
    default = [arm for arm in ARMS if arm not in ("liger", "trl-packed")]
    parser.add_argument("--arms", nargs="+", default=default, choices=ARMS)
    parser.add_argument("--micro-batch", type=int, nargs="+", help="rows; the best one is shown")
    parser.add_argument("--micro-batch-tokens", type=int, help="of Remora; its default")
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.arm:
        print(json.dumps(run_arm(options)))
        return
    chosen = [True] if options.list_labels else [False] if options.no_list_labels else [False, True]
    results = {}
    for list_labels in chosen:
        key = "labels listed" if list_labels else "template only"
        results[key] = compare(options, list_labels)
    workload.write("speed" if options.device == "cpu" else "speed-cuda", results)


def compare(options: argparse.Namespace, list_labels: bool) -> dict[str, Any]:
    print(f"\n## {'77 labels listed in the prompt' if list_labels else 'template only'}\n")
    found: dict[str, Any] = {}
    for arm in options.arms:
        # The recipe takes its 32 rows as they come. With the labels listed they do not fit, and it
        # accumulates like the others; each arm is shown at its fastest.
        small = list_labels and options.device == "cpu"
        sizes = options.micro_batch or ([4, 8] if small else [8, 32])
        tries = {"remora": [BATCH], "recipe": sizes if small else [BATCH]}.get(arm, sizes)
        runs = [start(arm, size, options, list_labels) for size in tries]
        best = max(runs, key=lambda run: run["examples_per_second"])
        found[arm] = {**best, "tried": runs}
    ours = found.get("remora")
    rows = []
    for arm, run in found.items():
        speedup = ours["examples_per_second"] / run["examples_per_second"] if ours else float("nan")
        memory = run["peak_bytes"] / ours["peak_bytes"] if ours else float("nan")
        rows.append(
            [
                ARMS[arm],
                str(run["micro_batch"]),
                f"{run['examples_per_second']:.2f}",
                f"{speedup:.1f}x",
                f"{run['peak_bytes'] / 1e9:.1f} GB",
                f"{memory:.1f}x",
                f"{run['examples_per_cpu_second']:.2f}",
                " ".join(f"{loss:.4f}" for loss in run["losses"][:3]),
                " ".join(f"{norm:.4f}" for norm in run["gradient_norms"][:3]),
            ]
        )
    header = [
        "arm",
        "micro-batch",
        "examples/s",
        "Remora is",
        "peak",
        "of Remora's",
        "examples/CPU s",
        "first losses",
        "gradient norms",
    ]
    workload.print_table(header, rows)
    return found


def start(arm: str, size: int, options: argparse.Namespace, list_labels: bool) -> dict[str, Any]:
    steps = options.slow_steps if arm == "recipe" else options.steps
    command = [sys.executable, __file__, "--arm", arm, "--micro-batch", str(size)]
    command += ["--steps", str(steps), "--warm-up", str(options.warm_up)]
    command += ["--device", options.device, "--size", options.size]
    command += ["--layers", str(options.layers)] if options.layers else []
    if options.micro_batch_tokens:
        command += ["--micro-batch-tokens", str(options.micro_batch_tokens)]
    if list_labels:
        command.append("--list-labels")
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode != 0:
        raise SystemExit(f"{done.stderr}\nerror: arm {arm} ended with {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def run_arm(options: argparse.Namespace, watch: Watch | None = None) -> dict[str, Any]:
    """Train with an arm and return its figures; `watch` is around each step of Remora's."""
    from remora.data.prompt import Prompt

    texts, labels = workload.messages(options.size)
    prompt = Prompt(
        workload.qwen_tokenizer(options.size),
        sorted(set(labels)),
        instruction="Classify the message.",
        list_labels=options.list_labels,
        max_length=2048,
    )
    random.seed(0)
    picked = random.sample(range(len(texts)), BATCH * (options.warm_up + options.steps))
    rows = prompt.rows([texts[i] for i in picked], [labels[i] for i in picked])
    batches = [rows[i : i + BATCH] for i in range(0, len(rows), BATCH)]
    if options.arm == "remora":
        steps = remora_arm(options, batches, watch or (lambda _: nullcontext()))
    else:
        steps = stock_arm(options, batches)
    return {
        "arm": options.arm,
        "micro_batch": options.micro_batch[0],
        "examples_per_second": steps.rate(steps.seconds, options.warm_up),
        "examples_per_cpu_second": steps.rate(steps.cpu_seconds, options.warm_up),
        **asdict(steps),
        "peak_bytes": workload.peak_memory_bytes(options.device),
    }


def adapter(model: Any) -> Any:
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    config = LoraConfig(
        r=16, lora_alpha=32, target_modules=workload.LORA_MODULES, task_type="CAUSAL_LM"
    )
    return get_peft_model(model, config)


def remora_arm(options: argparse.Namespace, batches: list[Any], watch: Watch) -> Steps:
    """Time the step that `remora.training.fit` takes, with its own functions."""
    import torch

    from remora.config.checks import DEFAULT_MICRO_BATCH_TOKENS
    from remora.models import fused_lora
    from remora.planning.planner import ROWS_ON_CPU
    from remora.runtime.device import choose_precision
    from remora.runtime.process_group import ProcessGroup
    from remora.runtime.reporter import Reporter
    from remora.training.micro_batches import MicroBatches
    from remora.training.trainable import accelerator_for
    from remora.tree import layouts

    device = torch.device(options.device)
    base = workload.qwen(options.size, torch.bfloat16, options.layers, options.device)
    model = adapter(base).to(device).train()
    fused_lora.make_fast(model)
    layouts.assign(model, layouts.choose("auto", type(base), base.config))
    parameters = [p for p in model.parameters() if p.requires_grad]
    fused = True if device.type == "cuda" else None
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0, fused=fused)
    steps = Steps()
    with accelerator_for(choose_precision(device, "bfloat16"), device) as accelerator:
        is_small = layouts.of(model) == "rows" and device.type == "cpu"
        usual = ROWS_ON_CPU if is_small else DEFAULT_MICRO_BATCH_TOKENS
        most = options.micro_batch_tokens or usual
        graphs = device.type == "cuda"
        micro_batches = MicroBatches(
            model, most, accelerator, None, ProcessGroup(), Reporter(), graphs=graphs
        )
        for index, batch in enumerate(batches):
            began = steps.clock()
            with watch(index):
                loss, _ = micro_batches.add_gradients(batch)
                norm = accelerator.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                optimizer.zero_grad()
                synchronize(options)
            steps.losses.append(loss)
            steps.gradient_norms.append(float(norm))
            steps.num_rows.append(len(batch))
            steps.took(began)
    return steps


def synchronize(options: argparse.Namespace) -> None:
    """Wait until the device has done what it was given."""
    import torch

    if options.device == "cuda":
        torch.cuda.synchronize()


def stock_arm(options: argparse.Namespace, batches: list[Any]) -> Steps:
    """Time the optimizer steps of a stock trainer, from one step's begin to the next one's."""
    import tempfile

    import torch
    from datasets import Dataset
    from transformers import TrainerCallback

    size = options.micro_batch[0]
    recipe = options.arm == "recipe"
    dtype = torch.float32 if recipe else torch.bfloat16
    base = workload.qwen(options.size, dtype, options.layers, options.device)
    if not recipe:
        # Sorted by length inside an effective batch, which changes no sum and pads least.
        batches = [sorted(batch, key=lambda row: len(row.token_ids)) for batch in batches]
    ordered = [row for batch in batches for row in batch]
    table = Dataset.from_list(
        [
            {
                "input_ids": list(row.token_ids),
                "labels": [-100] * row.answer_start + list(row.token_ids[row.answer_start :]),
            }
            for row in ordered
        ]
    )
    steps = Steps()
    times: list[tuple[float, float]] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            synchronize(options)
            if times:
                steps.took(times[-1])
            times.append(steps.clock())

        def on_train_end(self, *_: Any, **__: Any) -> None:
            synchronize(options)
            steps.took(times[-1])

    with tempfile.TemporaryDirectory() as folder:
        settings: dict[str, Any] = {
            "output_dir": folder,
            "per_device_train_batch_size": size,
            "gradient_accumulation_steps": BATCH // size,
            "max_steps": len(batches),
            "learning_rate": LEARNING_RATE,
            "lr_scheduler_type": "constant",
            "weight_decay": 0.0,
            "max_grad_norm": 1.0,
            "bf16": True,
            "use_cpu": options.device == "cpu",
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            "train_sampling_strategy": "sequential",
            "gradient_checkpointing": recipe,
            "use_liger_kernel": options.arm == "liger",
        }
        steps.num_rows = [BATCH] * len(batches)
        if options.arm == "trl-packed":  # a step is a packed row, of as many rows as fit
            settings |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}
            settings |= {"max_steps": -1, "num_train_epochs": 1}
        make = _sft if options.arm.startswith("trl") else _trainer
        trainer = make(base, table, settings, options)
        if options.arm == "trl-packed":
            steps.num_rows = [len(lengths) for lengths in trainer.train_dataset["seq_lengths"]]
        trainer.add_callback(Clock())
        trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    steps.losses = [entry["loss"] for entry in logged]
    steps.gradient_norms = [float(entry["grad_norm"]) for entry in logged]
    return steps


def _trainer(base: Any, table: Any, settings: dict[str, Any], options: argparse.Namespace) -> Any:
    from transformers import (
        DataCollatorForSeq2Seq,
        DataCollatorWithFlattening,
        Trainer,
        TrainingArguments,
    )

    tokenizer, arm = workload.qwen_tokenizer(options.size), options.arm
    if arm == "recipe":
        base.enable_input_require_grads()
    padded = DataCollatorForSeq2Seq(tokenizer)
    return Trainer(
        model=adapter(base),
        args=TrainingArguments(**settings),
        train_dataset=table,
        data_collator=DataCollatorWithFlattening() if arm == "flattened" else padded,
        processing_class=tokenizer,
    )


def _sft(base: Any, table: Any, settings: dict[str, Any], options: argparse.Namespace) -> Any:
    from trl import SFTConfig, SFTTrainer

    packs = options.arm == "trl-packed"
    config = SFTConfig(
        **settings,
        max_length=2048 if packs else None,
        packing=packs,
        padding_free=options.arm != "trl-padded",
        dataset_kwargs={"skip_prepare_dataset": not packs},
    )
    return SFTTrainer(
        model=adapter(base),
        args=config,
        train_dataset=table,
        processing_class=workload.qwen_tokenizer(options.size),
    )


if __name__ == "__main__":
    main()

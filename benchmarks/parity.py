"""Accuracy on Banking77: the stock PEFT + Trainer recipe against Remora, same hyperparameters.

craftgpt-5m, a small real pretrained model, on all training rows; or a model of real_models.py on a
few of each class. All test rows, three seeds. Both arms begin with the same weights, compute in the
same precision and are measured by the same closed-set scoring. Processes of one thread each run
side by side, two where there are cores for them. What is finished is read, not repeated, so the
long ones can be made one by one.

    python benchmarks/parity.py
    python benchmarks/parity.py --model smollm2 --rows-per-class 10 --epochs 10 --seeds 0
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import real_models
import workload

ARMS = ("stock", "remora")
CRAFTGPT = workload.SHARED / "models" / "craftgpt-5m"
RATES = {"craftgpt-5m": 2e-3, "smollm2": 1e-3}
BATCH = 32


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=RATES, default="craftgpt-5m")
    parser.add_argument("--rows-per-class", type=int, help="by default all rows")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--learning-rate", type=float, help=f"by default {RATES}")
    parser.add_argument("--runs", type=Path, default=Path("runs/parity"))
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.learning_rate = options.learning_rate or RATES[options.model]
    if options.arm:
        print(json.dumps(run_arm(options)))
        return
    jobs = [(arm, seed) for seed in options.seeds for arm in ARMS]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with ThreadPoolExecutor(min(2, cores or 1)) as pool:
        runs = list(pool.map(lambda job: finished(*job, options), jobs))
    rows = []
    for run in runs:
        low, high = run["interval"]
        rows.append(
            [
                run["arm"],
                str(run["seed"]),
                f"{run['accuracy']:.2%}",
                f"{low:.1%} to {high:.1%}",
                f"{run['last_loss']:.3f}",
                f"{run['examples_per_second']:.1f}",
                f"{run['peak_bytes'] / 1e9:.2f} GB",
            ]
        )
    header = [
        "arm",
        "seed",
        "test accuracy",
        "95% interval",
        "mean loss, last 50 steps",
        "examples/s",
        "peak memory",
    ]
    workload.print_table(header, rows)
    means = {
        arm: statistics.mean(run["accuracy"] for run in runs if run["arm"] == arm) for arm in ARMS
    }
    difference = 100 * (means["remora"] - means["stock"])
    print(
        f"\nmean accuracy: stock {means['stock']:.2%}, Remora {means['remora']:.2%}, "
        f"difference {difference:+.2f} points"
    )
    settings = {name: vars(options)[name] for name in SETTINGS}
    name = "parity" if options.model == "craftgpt-5m" else f"parity-{options.model}"
    workload.write(name, {"settings": settings, "runs": runs, "means": means})


SETTINGS = ("model", "rows_per_class", "epochs", "learning_rate")


def finished(arm: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Return an arm's figures with a seed; train unless that is done with these settings."""
    settings = {name: vars(options)[name] for name in SETTINGS}
    name = "-".join(str(value) for value in settings.values())
    path = options.runs / f"{name}-{arm}-{seed}.json"
    if not path.is_file():
        options.runs.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(start(arm, seed, options)), encoding="utf-8")
    run = json.loads(path.read_text(encoding="utf-8"))
    print(f"{arm}, seed {seed}: {run['accuracy']:.2%}", file=sys.stderr, flush=True)
    return run


def start(arm: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, __file__, "--arm", arm, "--seeds", str(seed)]
    command += ["--model", options.model, "--epochs", str(options.epochs)]
    command += ["--learning-rate", str(options.learning_rate)]
    if options.rows_per_class:
        command += ["--rows-per-class", str(options.rows_per_class)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode != 0:
        raise SystemExit(f"{done.stderr}\nerror: {arm} with seed {seed} ended in {done.returncode}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def run_arm(options: argparse.Namespace) -> dict[str, Any]:
    import torch

    from remora.config import TrainConfig
    from remora.data.dataset import limit_rows, load_dataset
    from remora.evaluation.metrics import measure
    from remora.training.loop import fit
    from remora.training.session import open_session
    from remora.tree.scoring import Scorer

    torch.set_num_threads(1)
    (seed,) = options.seeds
    small = options.model == "craftgpt-5m"
    config = TrainConfig(
        str(workload.SHARED / "data" / "banking77"),
        model=str(CRAFTGPT if small else real_models.fetch(options.model)),
        validation_fraction=0.0,
        epochs=options.epochs,
        batch_size=BATCH,
        learning_rate=options.learning_rate,
        schedule="linear",
        warmup_fraction=0.05,
        micro_batch_tokens=256 if small else None,
        precision="float32" if small else "auto",
        device="cpu",
        seed=seed,
    )
    dataset = load_dataset(config.data, validation_fraction=0.0, seed=seed)
    dataset = limit_rows(dataset, options.rows_per_class, seed)
    losses: list[float] = []
    with open_session(config, dataset) as session:
        began = time.monotonic()
        if options.arm != "stock":
            fit(session, log=lambda record: losses.append(record["loss"]))
    if options.arm == "stock":  # outside, as Trainer has an Accelerator of its own
        losses = _fit_stock(session)
    seconds, peak_bytes = time.monotonic() - began, workload.peak_memory_bytes()
    scorer = Scorer(session.model, session.prompt, tolerance=1, max_tokens=512)
    probabilities = scorer.probabilities(dataset.test.texts)
    predicted = [dataset.labels[i] for i in probabilities.argmax(1)]
    metrics = measure(dataset.labels, dataset.test.labels, predicted)
    return {
        "arm": options.arm,
        "seed": seed,
        "accuracy": metrics.accuracy,
        "interval": metrics.accuracy_interval,
        "last_loss": statistics.mean(losses[-50:]),
        "examples_per_second": options.epochs * len(dataset.train) / seconds,
        "peak_bytes": peak_bytes,
    }


def _fit_stock(session: Any) -> list[float]:
    """The ordinary recipe: PEFT's own layers, padded rows, Trainer's loop and shuffling."""
    adapted, prompt, dataset = session.model, session.prompt, session.dataset
    config, folder = session.config, session.base_folder
    import tempfile

    from datasets import Dataset
    from transformers import (
        AutoTokenizer,
        DataCollatorForSeq2Seq,
        Trainer,
        TrainingArguments,
    )

    for module in adapted.modules():
        vars(module).pop("forward", None)  # PEFT's own forward
    rows = prompt.rows(dataset.train.texts, dataset.train.labels)
    table = Dataset.from_list(
        [
            {
                "input_ids": row.token_ids,
                "attention_mask": [1] * len(row.token_ids),
                "labels": [-100] * row.answer_start + row.token_ids[row.answer_start :],
            }
            for row in rows
        ]
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with tempfile.TemporaryDirectory() as output:
        trainer = Trainer(
            model=adapted,
            args=TrainingArguments(
                output_dir=output,
                per_device_train_batch_size=BATCH,
                num_train_epochs=config.epochs,
                learning_rate=config.learning_rate,
                lr_scheduler_type="linear",
                warmup_steps=config.warmup_fraction,
                weight_decay=0.0,
                max_grad_norm=config.max_grad_norm,
                use_cpu=True,
                bf16=session.precision.mixed_precision == "bf16",
                logging_steps=1,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                seed=config.seed,
            ),
            train_dataset=table,
            data_collator=DataCollatorForSeq2Seq(tokenizer),
            processing_class=tokenizer,
        )
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    main()

"""Accuracy on Banking77: the stock PEFT + Trainer recipe against Remora, same hyperparameters.

craftgpt-5m, a small real pretrained model; all training rows, all test rows, three seeds. Both arms
train in float32 and are measured by the same closed-set scoring. Two processes of one thread each
run side by side.

    python benchmarks/parity.py
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import workload

ARMS = ("stock", "remora")
MODEL = workload.SHARED / "models" / "craftgpt-5m"
BATCH = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.arm:
        print(json.dumps(run_arm(options)))
        return
    jobs = [(arm, seed) for seed in options.seeds for arm in ARMS]
    with ThreadPoolExecutor(2) as pool:
        runs = list(pool.map(lambda job: start(*job, options), jobs))
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
            ]
        )
    header = [
        "arm",
        "seed",
        "test accuracy",
        "95% interval",
        "mean loss, last 50 steps",
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
    settings = {"epochs": options.epochs, "learning_rate": options.learning_rate}
    workload.write("parity", {"settings": settings, "runs": runs, "means": means})


def start(arm: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, __file__, "--arm", arm, "--seeds", str(seed)]
    command += ["--epochs", str(options.epochs), "--learning-rate", str(options.learning_rate)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode != 0:
        raise SystemExit(f"{done.stderr}\nerror: {arm} with seed {seed} ended in {done.returncode}")
    run = json.loads(done.stdout.splitlines()[-1])
    print(f"{arm}, seed {seed}: {run['accuracy']:.2%}", file=sys.stderr, flush=True)
    return run


def run_arm(options: argparse.Namespace) -> dict[str, Any]:
    import torch

    from remora.config import TrainConfig
    from remora.data.dataset import load_dataset
    from remora.evaluation.metrics import measure
    from remora.training.loop import fit
    from remora.training.session import open_session
    from remora.tree.scoring import Scorer

    torch.set_num_threads(1)
    (seed,) = options.seeds
    config = TrainConfig(
        str(workload.SHARED / "data" / "banking77"),
        model=str(MODEL),
        validation_fraction=0.0,
        epochs=options.epochs,
        batch_size=BATCH,
        learning_rate=options.learning_rate,
        schedule="linear",
        warmup_fraction=0.05,
        micro_batch_tokens=256,
        precision="float32",
        device="cpu",
        seed=seed,
    )
    dataset = load_dataset(config.data, validation_fraction=0.0, seed=seed)
    losses: list[float] = []
    with open_session(config, dataset) as session:
        if options.arm != "stock":
            fit(session, log=lambda record: losses.append(record["loss"]))
    if options.arm == "stock":  # outside, as Trainer has an Accelerator of its own
        losses = _fit_stock(session)
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

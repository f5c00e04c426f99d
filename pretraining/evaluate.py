"""Measure the model on Banking77, which it was not pretrained on.

LoRA with Remora's defaults and full fine-tuning of the same base, the same architecture with random
weights, and TF-IDF with a linear SVM; on all rows and on a few rows per class. Each method's
learning rate is the one that does best on validation rows with the first seed.

    python pretraining/evaluate.py
    python pretraining/evaluate.py --rows all --methods lora --seeds 0 --one-rate
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from remora.config import TrainConfig
from remora.data.dataset import Dataset, load_dataset
from remora.evaluation.baselines import train_baseline
from remora.evaluation.metrics import measure
from remora.models import hub, loading
from remora.training.loop import fit
from remora.training.session import open_session
from remora.tree.scoring import Scorer

ROOT = Path(__file__).parents[1]
SHARED = Path(os.environ.get("REMORA_SHARED", ROOT.parent / "shared"))
RATES = {"lora": (2e-3, 4e-3, 8e-3), "full": (5e-4, 1e-3, 2e-3), "random": (2e-3, 4e-3, 8e-3)}
EPOCHS = {"all": 3.0, "10": 20.0}


@dataclass(frozen=True)
class Measured:
    """One run: accuracies as fractions."""

    validation: float
    test: float
    seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", required=True, help="folder of the base model")
    parser.add_argument("--rows", nargs="+", default=["all", "10"], choices=["all", "10"])
    parser.add_argument("--methods", nargs="+", default=list(RATES), choices=RATES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--one-rate", action="store_true", help="only the middle learning rate")
    parser.add_argument(
        "--epochs", type=float, help="instead of 3 (all rows) and 20 (10 per class)"
    )
    parser.add_argument("--output", type=Path, default=Path("nano-banking77.json"))
    options = parser.parse_args()
    folder = hub.find(options.base)
    results: dict[str, Any] = {}
    for rows in options.rows:
        epochs = options.epochs or EPOCHS[rows]
        for method in options.methods:
            rates = RATES[method][1:2] if options.one_rate else RATES[method]
            first, *others = options.seeds
            tried = {r: run(folder, method, rows, r, epochs, first) for r in rates}
            rate = max(tried, key=lambda r: tried[r].validation)
            runs = [tried[rate], *(run(folder, method, rows, rate, epochs, s) for s in others)]
            results[f"{rows} {method}"] = {
                "learning_rate": rate,
                "test": [r.test for r in runs],
                "validation_by_rate": {str(r): m.validation for r, m in tried.items()},
            }
        results[f"{rows} baseline"] = {"test": [baseline(rows, s) for s in options.seeds]}
    print(
        "\n| rows | method | learning rate | test accuracy by seed | mean |\n|---|---|---|---|---|"
    )
    for name, found in results.items():
        rows, method = name.split()
        tests = found["test"]
        print(
            f"| {rows} | {method} | {found.get('learning_rate', '')} | "
            f"{', '.join(f'{t:.2%}' for t in tests)} | {np.mean(tests):.2%} |"
        )
    options.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def dataset_of(rows: str, seed: int) -> Dataset:
    """Return Banking77 with all training rows, or with a few of each class."""
    found = load_dataset(str(SHARED / "data" / "banking77"), seed=seed)
    if rows == "all":
        return found
    order = np.random.default_rng(seed).permutation(len(found.train))
    seen: Counter[str] = Counter()
    chosen = []
    for i in order.tolist():
        label = found.train.labels[i]
        if seen[label] < int(rows):
            seen[label] += 1
            chosen.append(i)
    table = replace(
        found.train,
        texts=[found.train.texts[i] for i in chosen],
        labels=[found.train.labels[i] for i in chosen],
    )
    return replace(found, train=table)


def with_random_weights(folder: Path, seed: int) -> Path:
    """Return a folder beside a model's with the same architecture and tokenizer."""
    made = folder.with_name(f"{folder.name}-random-{seed}")
    shutil.copytree(
        folder, made, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors")
    )
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(loading.load_config(folder)).save_pretrained(made)
    return made


def run(folder: Path, method: str, rows: str, rate: float, epochs: float, seed: int) -> Measured:
    """Train one model and measure it."""
    dataset = dataset_of(rows, seed)
    if method == "random":
        folder = with_random_weights(folder, seed)
    config = TrainConfig(
        "banking77",
        model=str(folder),
        method="full" if method == "full" else "lora",
        max_length=2_048,
        device="cpu",
        learning_rate=rate,
        epochs=epochs,
        eval_steps=None if rows == "all" else 100,  # about four epochs
        seed=seed,
    )

    validations: list[float] = []

    def log(record: dict[str, Any]) -> None:
        if "validation_accuracy" in record:
            validations.append(record["validation_accuracy"])

    began = time.perf_counter()
    with open_session(config, dataset) as session:
        fit(session, log=log)
    seconds = time.perf_counter() - began
    scorer = Scorer(
        session.model, session.prompt, tolerance=1.0, autocast=session.precision.autocast
    )
    assert dataset.test is not None
    chosen = scorer.probabilities(dataset.test.texts).argmax(1)
    predicted = [dataset.labels[i] for i in chosen]
    accuracy = measure(dataset.labels, dataset.test.labels, predicted).accuracy
    found = Measured(max(validations), accuracy, seconds)
    print(f"{rows} {method} rate {rate} seed {seed}: {found}", flush=True)
    return found


def baseline(rows: str, seed: int) -> float:
    """Return the accuracy of TF-IDF with a linear SVM."""
    dataset = dataset_of(rows, seed)
    assert dataset.test is not None
    return train_baseline(
        dataset.train.texts,
        dataset.train.labels,
        dataset.test.texts,
        dataset.test.labels,
        dataset.labels,
        seed=seed,
    ).metrics.accuracy


if __name__ == "__main__":
    main()

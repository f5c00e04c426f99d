"""Finished runs, made up: the files that training leaves, without the training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from remora.config import TrainConfig
from remora.diagnosis.curve_answer import LearningCurve, Size, answer
from remora.diagnosis.extrapolation import Extrapolation
from remora.diagnosis.learning_curve import FILE
from remora.evaluation import calibration, neighbours
from remora.evaluation.baselines import Baseline
from remora.evaluation.metrics import measure
from remora.evaluation.neighbours import Neighbours, TrainingText
from remora.evaluation.predictions import (
    PROBABILITIES,
    Scored,
    write_predictions,
    write_probabilities,
)
from remora.evaluation.significance import mcnemar
from remora.models import metadata
from remora.models.lora import ParameterCount
from remora.runtime import files, run_directory
from remora.runtime.reporter import Step, Validation
from remora.training.finish import TrainResult

PLAN = {
    "device": "this CPU",
    "precision": "float32 arithmetic, float32 adapter",
    "parameters": 1000,
    "trainable": 5,
    "num_rows": 90,
    "padded_tokens": 30.0,
    "tree_tokens": 10.0,
    "operations_per_example": 2e9,
    "num_steps": 6,
    "batch_size": 32,
    "micro_batch_tokens": 2048,
    "checkpointing": False,
    "why": "it fits",
    "memory": {"base": 4000, "saved_activations": 3_000_000},
    "peak_bytes": 3_004_000,
    "measured_peak_bytes": 5_000_000,
}


def write(
    path: Path,
    *,
    labels: Sequence[str],
    texts: Sequence[str],
    true: Sequence[int],
    predicted: Sequence[int],
    note: str = "a note",
    model: str = "some/base",
    data: str = "data.csv",
    method: str = "lora",
) -> Path:
    """Write a run directory; `note` stands wherever a user's word can stand in a setting."""
    path.mkdir(parents=True)
    generator = np.random.default_rng(0)
    probabilities = generator.dirichlet(np.ones(len(labels)), len(texts))
    for row, place in zip(probabilities, predicted, strict=True):  # the prediction is the largest
        best = int(row.argmax())
        row[[best, place]] = row[[place, best]]
    truth, answers = [labels[i] for i in true], [labels[i] for i in predicted]
    theirs = [labels[(i + (row % 3 == 0)) % len(labels)] for row, i in enumerate(true)]
    scored = Scored(probabilities=probabilities, true=np.array(true))
    result = TrainResult(
        directory=path,
        method=method,
        measured_on="test",
        metrics=measure(labels, truth, answers, probabilities),
        reliability=calibration.assess(scored, scored),
        baseline=Baseline(
            metrics=measure(labels, truth, theirs),
            predictions=theirs,
            num_train_rows=90,
            num_all_train_rows=90,
            seconds=0.5,
        ),
        p_value=mcnemar(truth, answers, theirs),
        parameters=ParameterCount(trainable=5, total=1000, modules={"q_proj": 5}),
        adapter_bytes=1_700_000,
        base_bytes=20_000_000,
        num_steps=6,
        best_step=6,
        examples_per_second=12.5,
        supervised_tokens_per_second=125.0,
        train_seconds=60.0,
        validation_seconds=6.0,
        tolerance=0.01,
        test_seconds=20.0,
        peak_memory_bytes=3_000_000,
    )
    config = TrainConfig(data, model=model, instruction=note, label_texts={labels[0]: note})
    files.write_text(path / "config.toml", config.to_toml())
    files.write_json(path / "environment.json", run_directory.environment(torch.device("cpu")))
    files.write_json(path / "data.json", {"source": data, "text_column": note, "labels": [*labels]})
    files.write_json(path / "plan.json", PLAN | {"why": note})
    files.write_text(path / "metrics.jsonl", "".join(json.dumps(r) + "\n" for r in records()))
    write_predictions(
        path / "predictions.csv", texts, truth, answers, probabilities.max(1).tolist(), theirs
    )
    write_probabilities(path / PROBABILITIES, labels, {"test": scored})
    files.write_json(path / "evaluation.json", result.to_dict())
    wrong = [row for row, (t, p) in enumerate(zip(true, predicted, strict=True)) if t != p]
    near = Neighbours(
        num_rows=90,
        num_all_rows=100,
        texts=tuple(TrainingText(row=i + 7, text=texts[i], label=labels[true[i]]) for i in wrong),
        nearest={i + 1: tuple(range(n, min(n + 3, len(wrong)))) for n, i in enumerate(wrong)},
    )
    neighbours.write(path, near)
    trained = path / metadata.FOLDERS[method]
    trained.mkdir()
    files.write_json(trained / "remora.json", {"base_model": model, "method": method})
    return path


def diagnose(path: Path, labels: Sequence[str], reason: str) -> None:
    """Add a diagnosis."""
    pair = {
        "first": labels[0],
        "second": labels[1],
        "verdict": "labels overlap",
        "reason": reason,
        "accuracy_if_merged": 0.9125,
        "accuracy_if_redefined": 0.9075,
    }
    figures = {"num_rows": 90, "suspects": 7, "out_of_sample_accuracy": 0.8}
    near = {"num_test_exact": 1, "num_test_near": 2, "num_conflicting": 3}
    ceiling = {"accuracy": 0.93, "interval": [0.9, 0.95], "wrong": 0.04, "overlapping": 0.03}
    ceiling |= {"alike": 0.02}
    tied = [{"token": reason, "label": labels[1], "num_rows": 5, "share": 0.1}]
    found = {"method": "fast mode", "pairs": [pair], **figures, **near}
    found |= {"ceiling": ceiling, "tied_tokens": tied}
    files.write_json(path / "diagnosis.json", found)
    files.write_csv(
        path / "relabel.csv",
        ("row", "text", "label", "suggested", "decision"),
        [(str(i), text, labels[0], labels[1], "") for i, text in enumerate(("=a", reason), 1)],
    )


def learn(path: Path) -> None:
    """Add a learning curve of three sizes."""
    sizes = [
        Size(
            per_class=per_class,
            num_rows=num_rows,
            num_short=0 if per_class else 2,
            run=".",
            accuracy=accuracy,
            accuracy_interval=(accuracy - 0.02, accuracy + 0.02),
            macro_f1=accuracy,
            baseline_accuracy=accuracy - 0.05,
            baseline_interval=(accuracy - 0.07, accuracy - 0.03),
            p_value=0.01,
            num_steps=6,
            train_seconds=60.0,
        )
        for per_class, num_rows, accuracy in ((5, 100, 0.6), (10, 200, 0.7), (None, 400, 0.8))
    ]
    further = Extrapolation(
        floor=0.1,
        scale=0.1,
        exponent=0.4,
        num_rows=800,
        accuracy=0.825,
        accuracy_interval=(0.8, 0.85),
        foretold=0.79,
    )
    found = LearningCurve(
        measured_on="test",
        num_measured=100,
        sizes=tuple(sizes),
        gain=0.1,
        gain_interval=(0.08, 0.12),
        extrapolation=further,
        caution="few sizes",
        answer=answer(sizes, 0.1, (0.08, 0.12), further, 0.5),
    )
    files.write_json(path / FILE, found.to_dict())


def records() -> list[dict[str, float]]:
    """The records of six steps and two evaluations."""
    common = {"num_steps": 6, "grad_norm": 1.0, "learning_rate": 1e-3, "peak_memory_bytes": 5}
    speeds = {"examples_per_second": 12.5, "supervised_tokens_per_second": 125.0}
    steps = [
        asdict(Step(step=i, epoch=i / 3, loss=3.0 / i, **common, **speeds)) for i in range(1, 7)
    ]
    for step, accuracy in ((3, 0.5), (6, 0.75)):
        found = asdict(Validation(step=step, accuracy=accuracy, loss=1.0, rows=40, best=True))
        steps.append({k if k == "step" else f"validation_{k}": v for k, v in found.items()})
    return steps

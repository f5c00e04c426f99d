"""Runs whose figures are given: what training would have left, and a diagnosis of it."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import finished
from remora.config import TrainConfig
from remora.evaluation import calibration
from remora.evaluation.metrics import measure
from remora.evaluation.predictions import (
    PROBABILITIES,
    Scored,
    write_predictions,
    write_probabilities,
)
from remora.evaluation.rivals import Answers, rate
from remora.runtime import files

LABELS = [f"label {i}" for i in range(10)]
NUM_TEST = 1000


LEVEL = ((125, 0.80, 0.60), (188, 0.85, 0.52), (250, 0.85, 0.51))
"""Steps, validation accuracy and loss of a run that has levelled off."""


def construct(
    path: Path,
    *,
    wrong: int,  # of 1,000 test rows
    wrong_by_rival: int,
    alike: int = 0,  # of both, with the same label
    rival: str = "svm",
    rival_seconds: float = 5.0,
    num_train: int = 2000,
    history: Sequence[tuple[int, float, float]] = LEVEL,
    num_steps: int | None = None,
    planned: int | None = None,
    train_loss: float = 0.4,
    num_base: int = 100_000_000,
    confidences: tuple[float, float] = (0.93, 0.55),  # mean, of right and of wrong answers
    rows_per_label: dict[str, int] | None = None,
    settings: dict[str, Any] | None = None,
) -> Path:
    """Write a run whose figures are those that training would have left."""
    finished.write(path, labels=LABELS, texts=["a"], true=[0], predicted=[0])
    true = [i % 10 for i in range(NUM_TEST)]
    shift = lambda rows, by: [(t + by) % 10 if i in rows else t for i, t in enumerate(true)]  # noqa: E731
    spread = np.random.default_rng(1).permutation(NUM_TEST).tolist()
    ours = {*spread[:wrong]}
    theirs = {*spread[:alike], *spread[wrong : wrong + wrong_by_rival - alike]}
    predicted, by_rival = shift(ours, 1), shift(theirs, 1)
    scored = {
        "test": score(true, predicted, confidences, 2),
        "validation": score(
            true[:400],
            shift({*range(0, 400, max(1, NUM_TEST // max(wrong, 1)))}, 1)[:400],
            confidences,
            3,
        ),
    }
    truth, answers, others = ([LABELS[i] for i in each] for each in (true, predicted, by_rival))
    given = Answers(
        name=rival,
        description={"svm": "TF-IDF + linear SVM"}.get(rival, "sentence embeddings"),
        rows=range(NUM_TEST),
        predicted=others,
        seconds=rival_seconds,
        num_train_rows=num_train,
        num_all_train_rows=num_train,
    )
    figures = json.loads((path / "evaluation.json").read_text(encoding="utf-8"))
    steps = num_steps or history[-1][0]
    figures |= {
        "metrics": measure(LABELS, truth, answers, scored["test"].probabilities).to_dict(),
        "reliability": calibration.assess(scored["test"], scored["validation"]).to_dict(),
        "rivals": [rate(given, LABELS, truth, answers).to_dict()],
        "baseline": None,
        "parameters": {"trainable": 1_000_000, "total": 1_000_000 + num_base},
        "num_steps": steps,
        "best_step": steps,
    }
    files.write_json(path / "evaluation.json", figures)
    write_predictions(
        path / "predictions.csv",
        [f"message {i}" for i in range(NUM_TEST)],
        truth,
        answers,
        scored["test"].confidence.tolist(),
        others if rival == "svm" else None,
        {} if rival == "svm" else {rival: dict(enumerate(others))},
    )
    write_probabilities(path / PROBABILITIES, LABELS, scored)
    config = TrainConfig("data.csv", model="some/base", **settings or {})
    files.write_text(path / "config.toml", config.to_toml())
    counts = rows_per_label or dict.fromkeys(LABELS, num_train // 10)
    files.write_json(
        path / "data.json",
        {"source": "data.csv", "num_train": num_train, "rows_per_label": counts},
    )
    records = [
        {"step": i, "num_steps": planned or steps, "loss": train_loss, "learning_rate": 3e-4}
        for i in range(1, steps + 1)
    ]
    best = 0.0
    for step, accuracy, loss in history:
        named = {"accuracy": accuracy, "loss": loss, "rows": 400, "best": accuracy > best}
        best = max(best, accuracy)
        records.append({"step": step} | {f"validation_{k}": v for k, v in named.items()})
    lines = "".join(json.dumps(each) + "\n" for each in records)
    files.write_text(path / "metrics.jsonl", lines)
    return path


def score(
    true: Sequence[int], predicted: Sequence[int], confidences: tuple[float, float], seed: int
) -> Scored:
    """Probabilities with these predictions; wrong answers are less confident, on average."""
    generator = np.random.default_rng(seed)
    probabilities = np.empty((len(true), 10))
    for row, (t, p) in enumerate(zip(true, predicted, strict=True)):
        mean = confidences[t != p]
        top = 0.11 + 0.89 * generator.beta(8 * mean, 8 * (1 - mean))
        probabilities[row] = (1 - top) / 9
        probabilities[row, p] = top
    return Scored(probabilities=probabilities, true=np.array(true))


def diagnose(
    run: Path,
    *,
    wrong: tuple[float, float, float] = (0.002, 0.0, 0.006),
    held_out_wrong: float = 0.0,
    num_likely: int = 0,
    overlapping: float = 0.0,
    pairs: Sequence[dict[str, Any]] = (),
    decided: str = "",
) -> None:
    """Add a diagnosis: estimated share of wrong labels with its interval, and pairs of labels."""
    rate_, low, high = wrong
    ceiling = 1 - held_out_wrong - overlapping
    found = {
        "num_rows": 2000,
        "suspects": num_likely + 20,
        "wrong": rate_,
        "wrong_interval": [low, high],
        "ceiling": {
            "accuracy": ceiling,
            "interval": [ceiling - 0.02, min(1.0, ceiling + 0.02)],
            "wrong": held_out_wrong,
            "overlapping": overlapping,
        },
        "pairs": [*pairs],
    }
    files.write_json(run / "diagnosis.json", found)
    rows = [("0.8", decided)] * num_likely + [("0.3", "")] * 20
    with (run / "relabel.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("row", "text", "label", "suggested", "p_wrong", "decision"))
        for row, (p_wrong, decision) in enumerate(rows, 1):
            writer.writerow((row, "a", LABELS[0], LABELS[1], p_wrong, decision))


def pair(first: int, second: int, verdict: str, accuracy_if_merged: float) -> dict[str, Any]:
    return {
        "first": LABELS[first],
        "second": LABELS[second],
        "verdict": verdict,
        "reason": "judges confuse the same rows (p = 0.001)",
        "accuracy_if_merged": accuracy_if_merged,
    }

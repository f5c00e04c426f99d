"""The end of a run: measured beside its baselines, and everything written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from remora.data.dataset import Dataset
from remora.data.table import Table
from remora.errors import DataError
from remora.evaluation import calibration, neighbours
from remora.evaluation.baselines import Baseline, train_baseline, train_set_baseline
from remora.evaluation.calibration import Reliability
from remora.evaluation.level_metrics import with_levels
from remora.evaluation.metrics import Metrics
from remora.evaluation.multi_label import labels_given, measured
from remora.evaluation.predictions import (
    PREDICTIONS,
    PROBABILITIES,
    Scored,
    ScoredSets,
    write_predictions,
    write_probabilities,
)
from remora.evaluation.rivals import Answers, Rival, of_baseline, rate, verdict
from remora.evaluation.significance import mcnemar
from remora.formatting import spoken_bytes
from remora.models import lora, metadata, model_card
from remora.planning.plan import Plan
from remora.report import pages
from remora.runtime import files, memory
from remora.runtime.reporter import Reporter
from remora.training.progress import Progress
from remora.training.rivals import attempt
from remora.training.session import Session


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """The results of a run."""

    directory: Path
    method: str  # "lora", "qlora" or "full"
    measured_on: str  # "test" or "validation"
    metrics: Metrics
    reliability: Reliability
    baseline: Baseline | None  # the linear SVM
    p_value: float | None  # exact McNemar test of the model against it
    parameters: lora.ParameterCount
    adapter_bytes: int  # the trained weights: the adapter's, or the whole model's
    base_bytes: int
    num_steps: int
    best_step: int
    examples_per_second: float
    supervised_tokens_per_second: float
    train_seconds: float  # of the training loop, its evaluations included
    validation_seconds: float  # of these evaluations
    tolerance: float  # of the probabilities
    test_seconds: float  # of scoring test and validation rows with the weights that were chosen
    peak_memory_bytes: int
    speed_up: float | None = None  # of several processes over one, estimated
    num_processes: int = 1
    rivals: tuple[Rival, ...] = ()  # all baselines, the SVM among them

    @property
    def verdict(self) -> str | None:
        """The sentence on the best baseline; None without one."""
        trained = "model" if self.method == "full" else "adapter"
        seconds = self.train_seconds + self.test_seconds
        return verdict(self.rivals, trained, seconds) if self.rivals else None

    def tracked(self) -> dict[str, float | None]:
        """Return the figures that an experiment tracker compares runs by."""
        names = ("accuracy", "micro_f1", "macro_f1", "log_loss")
        found = {f"{self.measured_on}_{name}": getattr(self.metrics, name, None) for name in names}
        if self.baseline:
            found["svm_accuracy"] = self.baseline.metrics.accuracy
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as JSON holds them."""
        return {
            **{k: v for k, v in vars(self).items() if isinstance(v, int | float | str)},
            "directory": str(self.directory),
            "metrics": self.metrics.to_dict(),
            "reliability": self.reliability.to_dict(),
            "baseline": self.baseline
            and {
                "description": self.baseline.description,
                "num_train_rows": self.baseline.num_train_rows,
                "seconds": self.baseline.seconds,
                "metrics": self.baseline.metrics.to_dict(),
            },
            "rivals": [each.to_dict() for each in self.rivals],
            "verdict": self.verdict,
            "parameters": asdict(self.parameters),
        }


def tables_to_measure_on(dataset: Dataset) -> dict[str, Table]:
    """Return the held-out tables by split, the one that counts first.

    Raises:
        DataError: If there is none.
    """
    tables = {"test": dataset.test, "validation": dataset.validation}
    found = {name: table for name, table in tables.items() if table is not None and len(table)}
    if not found and 1 < len(set(dataset.train.labels)) == len(dataset.train):
        raise DataError(
            f"every row of {dataset.summary.source} has a label of its own, so none can be held out"
            " to measure on; name the column of labels with --label-column"
        )
    if not found:
        raise DataError(
            "there are no rows to measure on; give --test, or a --test-fraction above 0"
        )
    return found


def held_out_rows(dataset: Dataset) -> tuple[str, Table]:
    """Return the split that counts, and its rows; raises as `tables_to_measure_on` does."""
    return next(iter(tables_to_measure_on(dataset).items()))


def train_svm(dataset: Dataset, held_out: Table, seed: int) -> Baseline:
    """Train the SVM on the training rows, within half of the free memory, and measure it.

    Where rows have several labels, its thresholds are fitted on the validation rows.
    """
    free = memory.free_bytes(torch.device("cpu"))
    if dataset.multi_label:
        return train_set_baseline(
            dataset.train,
            dataset.validation,
            held_out,
            dataset.labels,
            seed=seed,
            max_bytes=None if free is None else free // 2,
        )
    return train_baseline(
        dataset.train.texts,
        dataset.train.labels,
        held_out.texts,
        held_out.labels,
        dataset.labels,
        seed=seed,
        max_bytes=None if free is None else free // 2,
    )


def conclude(
    session: Session, directory: Path, progress: Progress, scores: Mapping[str, Scored], svm: bool
) -> TrainResult:
    """Measure, write the figures into the run directory, then add the SVM unless it fails.

    Where rows have several labels, the thresholds by which they are given are in the scores, and go
    into the model's card.

    Args:
        session: The session that has trained.
        directory: The run directory.
        progress: How training went.
        scores: The probabilities of the held-out rows by split.
        svm: Whether to train the SVM.
    """
    config, dataset = session.config, session.dataset
    measured_on, held_out = held_out_rows(dataset)
    predicted = labels_given(scores[measured_on], dataset.labels)
    true, hierarchy = held_out.labels, session.card.hierarchy
    metrics = measured(scores[measured_on], held_out, dataset.labels)
    metrics = with_levels(metrics, hierarchy, true, predicted)
    weights = metadata.trained_folder(directory)
    if isinstance(scored := scores[measured_on], ScoredSets):
        metadata.set_thresholds(weights, scored.thresholds.tolist())
    result = TrainResult(
        directory=directory,
        method=config.method,
        measured_on=measured_on,
        metrics=metrics,
        reliability=calibration.assess(
            scores[measured_on], scores.get("validation") if measured_on == "test" else None
        ),
        baseline=None,
        p_value=None,
        parameters=session.parameters,
        adapter_bytes=files.folder_bytes(weights, "*.safetensors"),
        base_bytes=files.folder_bytes(session.base_folder, "*.safetensors"),
        num_steps=progress.step,
        best_step=progress.best_step,
        examples_per_second=progress.speed.examples_per_second,
        supervised_tokens_per_second=progress.speed.supervised_tokens_per_second,
        train_seconds=progress.seconds,
        validation_seconds=progress.validation_seconds,
        tolerance=config.tolerance,
        test_seconds=progress.test_seconds,
        peak_memory_bytes=max(progress.peak_bytes, memory.peak_bytes(session.device)),
        speed_up=progress.speed_up,
        num_processes=session.group.size,
    )
    write_probabilities(directory / PROBABILITIES, dataset.labels, scores)
    result = add_rivals(session, result, scores, [])
    _write_neighbours(session, directory, held_out, scores[measured_on])
    # The SVM, once the figures are written
    baseline = None
    if svm:
        with attempt(session, "svm"):
            baseline = train_svm(dataset, held_out, config.seed)
    if baseline is None:
        return result
    theirs = with_levels(baseline.metrics, hierarchy, true, baseline.predictions)
    result = replace(
        result,
        baseline=replace(baseline, metrics=theirs),
        p_value=mcnemar(true, predicted, baseline.predictions),
    )
    return add_rivals(session, result, scores, [])


def _write_neighbours(session: Session, directory: Path, held_out: Table, scored: Scored) -> None:
    """Keep the training texts nearest to what is predicted wrongly, the surest mistakes first."""
    confidence, correct = scored.confidence, scored.correct
    wrong = [row for row in range(len(held_out)) if not correct[row]]
    wrong.sort(key=lambda row: -confidence[row])
    texts = [held_out.texts[row] for row in wrong]
    rows = [row + 1 for row in wrong]
    found = neighbours.find(session.dataset.train, texts, rows, session.config.seed)
    neighbours.write(directory, found)


def add_rivals(
    session: Session, result: TrainResult, scores: Mapping[str, Scored], answers: Sequence[Answers]
) -> TrainResult:
    """Return the result with further rivals beside the SVM, and write it.

    Args:
        session: The session that has trained.
        result: As `conclude` returns it.
        scores: The probabilities of the held-out rows by split.
        answers: The rivals' answers.
    """
    labels, (measured_on, held_out) = session.dataset.labels, held_out_rows(session.dataset)
    predicted = labels_given(scores[measured_on], labels)
    svm = [of_baseline(result.baseline)] if result.baseline else []
    rivals = [
        rate(each, labels, held_out.labels, predicted, multi_label=session.dataset.multi_label)
        for each in (*svm, *answers)
    ]
    result = replace(result, rivals=tuple(rivals))
    write_predictions(
        result.directory / PREDICTIONS,
        held_out.texts,
        held_out.labels,
        predicted,
        scores[measured_on].confidence.tolist(),
        result.baseline.predictions if result.baseline else None,
        {each.name: dict(zip(each.rows, each.predicted, strict=True)) for each in answers},
    )
    files.write_json(result.directory / "evaluation.json", result.to_dict())
    return result


def write_pages(directory: Path, say: Callable[[str], None]) -> None:
    """Write README.md and report.html of a run that has just ended; say why one cannot be."""
    with files.optional("README.md", say):
        model_card.write(directory)
    pages.refresh(directory, say)


def report_peak(directory: Path, planned: Plan, measured: int, reporter: Reporter) -> None:
    """Report planned and measured peak memory, in bytes, and keep them in plan.json."""
    reporter.say(
        f"peak memory of training: {spoken_bytes(measured)} measured, "
        f"{spoken_bytes(planned.measurable_bytes)} planned"
    )
    files.write_json(directory / "plan.json", planned.to_dict() | {"measured_peak_bytes": measured})

"""The contents of report.html, section by section, as its template reads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import remora
from remora.evaluation import charts, results
from remora.evaluation.confusion_matrix import Cell, cells, confusion_counts, matrix_labels
from remora.evaluation.results import Results
from remora.evaluation.rivals import Rival, of_figures, seconds_of, verdict
from remora.evaluation.run_files import (
    MAX_MESSAGE_CHARS,
    NUM_STATIC_MESSAGES,
    cut,
    environment_rows,
    memory_rows,
    plan_rows,
    read_records,
    read_suspects,
    setting_rows,
)

MAX_MESSAGES = 25_000
MAX_CHARS = 1_500_000  # of all messages together

NUM_CONFUSIONS = 10

Figures = dict[str, Any]  # of a JSON file
Rows = list[tuple[str, str]]  # of a table of names and values


@dataclass(frozen=True, kw_only=True)
class Message:
    """A message that was measured on; labels are indices into the label set."""

    row: int  # in predictions.csv, from 1
    text: str
    label: int
    predicted: int
    probability: float
    baseline: int | None


@dataclass(frozen=True, kw_only=True)
class ScriptData:
    """The data that report.js reads, by these names."""

    labels: list[str]
    shown: list[int]  # labels of the confusion matrix, in its order
    rows: list[int]  # of each label
    mistakes: list[int]  # rows of each label that are wrong, plus rows wrongly predicted as it
    messages: list[Message]


@dataclass(frozen=True, kw_only=True)
class ResultSection:
    """The verdict, None without baselines, and accuracies with their intervals."""

    verdict: str | None
    rivals: list[Rival]
    intervals: charts.Intervals


@dataclass(frozen=True, kw_only=True)
class TrainingSection:
    """Curves over the steps, and the evaluations during training."""

    charts: list[charts.Chart]
    validations: list[Figures]


@dataclass(frozen=True, kw_only=True)
class LearningCurveSection:
    """learning_curve.json, and its chart."""

    figures: Figures
    chart: charts.Chart


@dataclass(frozen=True, kw_only=True)
class ConfusionSection:
    """The largest confusions, and the confusion matrix."""

    largest: list[Figures]
    num_confusions: int
    largest_by_label: dict[str, Figures]
    shown: list[int]
    cells: dict[tuple[int, int], Cell]


@dataclass(frozen=True, kw_only=True)
class MessagesSection:
    """The mistakes shown without a script, and how many messages the page holds."""

    surest_mistakes: list[Message]
    num_kept: int
    max_chars: int = MAX_MESSAGE_CHARS  # of one message


@dataclass(frozen=True, kw_only=True)
class CalibrationSection:
    """The reliability in evaluation.json, and its charts."""

    figures: Figures
    charts: list[charts.Chart]


@dataclass(frozen=True, kw_only=True)
class DiagnosisSection:
    """diagnosis.json, None if there is none, and the first rows of relabel.csv."""

    figures: Figures | None
    suspects: list[dict[str, str]]


@dataclass(frozen=True, kw_only=True)
class PlanSection:
    """plan.json, and tables of it."""

    figures: Figures
    memory_rows: Rows
    work_rows: Rows


@dataclass(frozen=True, kw_only=True)
class SettingsSection:
    """Tables that say how to repeat the run."""

    settings: Rows
    data: Rows
    environment: Rows


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything that report.html shows; a section is None if its file is missing."""

    name: str
    version: str
    trained: str  # "adapter" or "model"
    figures: Figures  # evaluation.json
    labels: list[str]
    places: dict[str, int]  # the index of each label
    result: ResultSection
    training: TrainingSection | None
    learning_curve: LearningCurveSection | None
    confusion: ConfusionSection
    messages: MessagesSection
    calibration: CalibrationSection | None
    diagnosis: DiagnosisSection
    plan: PlanSection | None
    settings: SettingsSection
    data: ScriptData


def collect(run: Results) -> Report:
    """Collect what the report of a finished run shows.

    Raises:
        DataError: If one of the run's files is broken.
    """
    figures = run.figures
    trained = "model" if figures.get("method") == "full" else "adapter"
    counts = confusion_counts(run)
    shown = matrix_labels(counts)
    kept = _kept(_messages(run))
    return Report(
        name=run.directory.resolve().name,
        version=remora.__version__,
        trained=trained,
        figures=figures,
        labels=run.labels,
        places={label: place for place, label in enumerate(run.labels)},
        result=_result(figures, trained),
        training=_training(run.directory),
        learning_curve=_learning_curve(run.directory),
        confusion=_confusion(run, counts, shown),
        messages=MessagesSection(
            surest_mistakes=[m for m in kept if m.label != m.predicted][:NUM_STATIC_MESSAGES],
            num_kept=len(kept),
        ),
        calibration=_calibration(figures.get("reliability")),
        diagnosis=DiagnosisSection(
            figures=results.read_json(run.directory / "diagnosis.json"),
            suspects=read_suspects(run.directory / "relabel.csv"),
        ),
        plan=_plan(run.directory),
        settings=_settings(run.directory),
        data=ScriptData(
            labels=run.labels,
            shown=shown,
            rows=counts.sum(1).tolist(),
            mistakes=(counts.sum(0) + counts.sum(1) - 2 * counts.diagonal()).tolist(),
            messages=kept,
        ),
    )


def _result(figures: Mapping[str, Any], trained: str) -> ResultSection:
    rivals = of_figures(figures)
    said = verdict(rivals, trained, seconds_of(figures)) if rivals else None
    if said and said.startswith("the "):  # other sentences begin with a name
        said = said[0].upper() + said[1:]
    return ResultSection(
        verdict=said,
        rivals=rivals,
        intervals=charts.intervals(
            [
                ("ours", trained, figures["metrics"]),
                *(("baseline", each.description, vars(each)) for each in rivals),
            ]
        ),
    )


def _training(directory: Path) -> TrainingSection | None:
    records = read_records(directory)
    drawn = charts.training(records)
    if not drawn:
        return None
    validations = [_evaluation(record) for record in records if "validation_accuracy" in record]
    return TrainingSection(charts=drawn, validations=validations)


def _evaluation(record: Figures) -> Figures:
    """Return an evaluation as it is shown; earlier versions logged the log-loss over the labels."""
    loss = record.get("validation_loss", record.get("validation_log_loss"))
    return {
        "step": record["step"],
        "accuracy": record["validation_accuracy"],
        "loss": "" if loss is None else f"{loss:.4f}",
        "best": record["validation_best"],
    }


def _learning_curve(directory: Path) -> LearningCurveSection | None:
    figures = results.read_json(directory / "learning_curve.json")
    if not figures:
        return None
    return LearningCurveSection(figures=figures, chart=charts.learning_curve(figures))


def _confusion(run: Results, counts: NDArray[np.int64], shown: list[int]) -> ConfusionSection:
    confusions = run.figures["metrics"]["confusions"]
    return ConfusionSection(
        largest=confusions[:NUM_CONFUSIONS],
        num_confusions=len(confusions),
        largest_by_label={each["true"]: each for each in reversed(confusions)},
        shown=shown,
        cells=cells(counts, run.labels, shown),
    )


def _calibration(reliability: Figures | None) -> CalibrationSection | None:
    if not reliability:
        return None
    return CalibrationSection(figures=reliability, charts=charts.calibration(reliability))


def _plan(directory: Path) -> PlanSection | None:
    figures = results.read_json(directory / "plan.json")
    if not figures:
        return None
    return PlanSection(
        figures=figures, memory_rows=memory_rows(figures), work_rows=plan_rows(figures)
    )


def _settings(directory: Path) -> SettingsSection:
    summary = results.read_json(directory / "data.json") or {}
    return SettingsSection(
        settings=setting_rows(results.read_settings(directory)),
        data=[row for row in setting_rows(summary) if row[0] != "labels"],
        environment=environment_rows(directory),
    )


def _messages(run: Results) -> list[Message]:
    """Return all messages: mistakes first, the surest first; then the rest, the surest last."""
    place = {label: index for index, label in enumerate(run.labels)}
    answers = zip(run.texts, run.true, run.predicted, run.probability, strict=True)
    messages = [
        Message(
            row=row + 1,
            text=cut(text),
            label=place[true],
            predicted=place[predicted],
            probability=round(probability, 4),
            baseline=None if run.baseline is None else place[run.baseline[row]],
        )
        for row, (text, true, predicted, probability) in enumerate(answers)
    ]
    wrong = sorted((m for m in messages if m.label != m.predicted), key=lambda m: -m.probability)
    right = sorted((m for m in messages if m.label == m.predicted), key=lambda m: m.probability)
    return wrong + right


def _kept(messages: Sequence[Message]) -> list[Message]:
    """Return as many of the first messages as a page can hold."""
    ends = np.cumsum([len(message.text) for message in messages])
    num_fitting = int(np.searchsorted(ends, MAX_CHARS, side="right"))
    return list(messages[: min(num_fitting, MAX_MESSAGES)])

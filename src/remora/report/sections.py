"""The contents of report.html, section by section, as its template reads them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

import remora
from remora.errors import ModelError
from remora.evaluation import neighbours
from remora.evaluation.findings import NextStep
from remora.evaluation.neighbours import Neighbours, TrainingText
from remora.evaluation.next_steps import after_run, told_next_steps
from remora.evaluation.results import Results
from remora.evaluation.rivals import Rival, of_figures, seconds_of, verdict
from remora.evaluation.run_facts import RunFacts
from remora.formatting import MAX_MESSAGE_CHARS, cut
from remora.report import charts, contradictions
from remora.report.confusion_matrix import Cell, cells, confusion_counts, matrix_labels
from remora.report.rendering import isolated, percent
from remora.report.run_tables import (
    NUM_STATIC_MESSAGES,
    environment_rows,
    fitting,
    memory_rows,
    plan_rows,
    resolved,
    setting_rows,
    suspect_rows,
)

NUM_CONFUSIONS = 10
NUM_TOP = 3  # labels beside a message

LISTS = ("labels", "rows_per_label")
"""Entries of data.json that the report shows elsewhere."""

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
    others: list[tuple[int, float]]  # the next most probable labels, with their probabilities
    nearest: tuple[int, ...]  # places in the training texts that the page holds


@dataclass(frozen=True, kw_only=True)
class ScriptData:
    """The data that report.js reads, by these names."""

    labels: list[str]
    shown: list[int]  # labels of the confusion matrix, in its order
    rows: list[int]  # of each label
    mistakes: list[int]  # rows of each label that are wrong, plus rows wrongly predicted as it
    messages: list[Message]
    training: tuple[TrainingText, ...]  # nearest to the mistakes
    thresholds: list[tuple[int, int]]  # rows answered and answered correctly, from 0% to 100%


@dataclass(frozen=True, kw_only=True)
class ResultSection:
    """The verdict, None without baselines, and accuracies with their intervals."""

    verdict: str | None
    rivals: list[Rival]
    intervals: charts.Intervals
    levels: list[tuple[Figures, Figures | None]]  # of the hierarchy; those of the SVM beside


@dataclass(frozen=True, kw_only=True)
class TrainingSection:
    """Curves over the steps, and the evaluations during training."""

    charts: list[charts.Chart]
    validations: list[Figures]
    note: str | None  # on validation beside test accuracy


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
    num_predicted: list[int]  # rows predicted as each label
    correct: list[int]  # rows of each label that are predicted as it


@dataclass(frozen=True, kw_only=True)
class MessagesSection:
    """The mistakes shown without a script, and how many messages the page holds."""

    surest_mistakes: list[Message]
    num_kept: int
    neighbours: Neighbours
    max_chars: int = MAX_MESSAGE_CHARS  # of one message


@dataclass(frozen=True, kw_only=True)
class CalibrationSection:
    """The reliability in evaluation.json, what it says, and its charts."""

    figures: Figures
    summary: str
    notes: list[str]
    charts: list[charts.Chart]


@dataclass(frozen=True, kw_only=True)
class DiagnosisSection:
    """diagnosis.json, None if there is none, what it says, and the first rows of relabel.csv."""

    figures: Figures | None
    summary: str
    notes: list[str]
    decided: list[Figures]  # pairs of labels with a verdict
    undecided: list[Figures]
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
    next_steps: tuple[NextStep, ...]
    labels: list[str]
    places: dict[str, int]  # the index of each label
    worst_first: list[Figures]  # figures of each label
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

    def spoken_others(self, message: Message) -> str:
        """Return the labels after a message's predicted one as words, "" if they are not kept."""
        named = (f"{isolated(self.labels[i])} {percent(share)}" for i, share in message.others)
        return f", then {' and '.join(named)}" if message.others else ""

    def training_texts(self, message: Message) -> list[TrainingText]:
        """Return the training texts nearest to a message, the nearest first."""
        return [self.data.training[place] for place in message.nearest]

    def spoken_nearest(self, message: Message) -> str:
        """Return the labels of the training texts nearest to a message, with their numbers."""
        labels = Counter(each.label for each in self.training_texts(message))
        return ", ".join(f"{count} {isolated(label)}" for label, count in labels.most_common())


def collect(facts: RunFacts) -> Report:
    """Collect what the report of a finished run shows.

    Raises:
        DataError: If one of the run's files is broken.
    """
    run, figures = facts.run, facts.run.figures
    counts = confusion_counts(run)
    shown = matrix_labels(counts)
    near = neighbours.read(run.directory)
    kept = fitting(_messages(facts, near))
    return Report(
        name=run.directory.resolve().name,
        version=remora.__version__,
        trained=facts.trained,
        figures=figures,
        next_steps=told_next_steps(lambda: after_run(facts), lambda line: None),
        labels=run.labels,
        places={label: place for place, label in enumerate(run.labels)},
        worst_first=sorted(figures["metrics"]["per_class"], key=lambda each: each["f1"]),
        result=result_section(figures, facts.trained),
        training=training_section(facts),
        learning_curve=learning_curve_section(facts),
        confusion=_confusion(run, counts, shown),
        messages=MessagesSection(
            surest_mistakes=[m for m in kept if m.label != m.predicted][:NUM_STATIC_MESSAGES],
            num_kept=len(kept),
            neighbours=near,
        ),
        calibration=calibration_section(figures),
        diagnosis=_diagnosis(facts),
        plan=plan_section(facts),
        settings=settings_section(facts),
        data=ScriptData(
            labels=run.labels,
            shown=shown,
            rows=counts.sum(1).tolist(),
            mistakes=(counts.sum(0) + counts.sum(1) - 2 * counts.diagonal()).tolist(),
            messages=kept,
            training=near.texts,
            thresholds=_thresholds(run),
        ),
    )


def result_section(figures: Mapping[str, Any], trained: str) -> ResultSection:
    """Return the verdict, and accuracies with their intervals."""
    rivals = of_figures(figures)
    said = verdict(rivals, trained, seconds_of(figures)) if rivals else None
    if said and said.startswith("the "):  # other sentences begin with a name
        said = said[0].upper() + said[1:]
    metrics = figures["metrics"]
    levels = metrics.get("levels", [])
    beside = (figures.get("baseline") or {}).get("metrics", {}).get("levels", [])
    return ResultSection(
        verdict=said,
        rivals=rivals,
        levels=list(zip(levels, beside or [None] * len(levels), strict=True)),
        intervals=charts.intervals(
            [
                ("ours", trained, metrics["accuracy"], metrics["accuracy_interval"]),
                *(
                    ("baseline", each.description, each.accuracy, each.accuracy_interval)
                    for each in rivals
                ),
            ]
        ),
    )


def training_section(facts: RunFacts) -> TrainingSection | None:
    """Return the curves of training, None if they are missing."""
    records = facts.records
    drawn = charts.training(records)
    if not drawn:
        return None
    validations = [_evaluation(record) for record in records if "validation_accuracy" in record]
    note = contradictions.of_validation(records, facts.run.figures)
    return TrainingSection(charts=drawn, validations=validations, note=note)


def _evaluation(record: Figures) -> Figures:
    """Return an evaluation as it is shown; earlier versions logged the log-loss over the labels."""
    loss = record.get("validation_loss", record.get("validation_log_loss"))
    return {
        "step": record["step"],
        "accuracy": record["validation_accuracy"],
        "micro_f1": record.get("validation_micro_f1"),  # of several labels a row
        "loss": "" if loss is None else f"{loss:.4f}",
        "best": record["validation_best"],
    }


def learning_curve_section(facts: RunFacts) -> LearningCurveSection | None:
    """Return the learning curve, None if there is none."""
    if not facts.curve:
        return None
    return LearningCurveSection(figures=facts.curve, chart=charts.learning_curve(facts.curve))


def _confusion(run: Results, counts: NDArray[np.int64], shown: list[int]) -> ConfusionSection:
    confusions = run.figures["metrics"]["confusions"]
    return ConfusionSection(
        largest=confusions[:NUM_CONFUSIONS],
        num_confusions=len(confusions),
        largest_by_label={each["true"]: each for each in reversed(confusions)},
        shown=shown,
        cells=cells(counts, run.labels, shown),
        num_predicted=counts.sum(0).tolist(),
        correct=counts.diagonal().tolist(),
    )


def calibration_section(figures: Figures) -> CalibrationSection | None:
    """Return what the reliability says, None in runs without it."""
    reliability = figures.get("reliability")
    if not reliability:
        return None
    summary, notes = contradictions.of_confidence(figures)
    return CalibrationSection(
        figures=reliability, summary=summary, notes=notes, charts=charts.calibration(reliability)
    )


def _diagnosis(facts: RunFacts) -> DiagnosisSection:
    figures = facts.diagnosis
    pairs = figures["pairs"] if figures else []
    return DiagnosisSection(
        figures=figures,
        summary=contradictions.diagnosis_summary(figures) if figures else "",
        notes=contradictions.of_diagnosis(figures, facts.run.figures) if figures else [],
        decided=[each for each in pairs if each["verdict"] != "undecided"],
        undecided=[each for each in pairs if each["verdict"] == "undecided"],
        suspects=suspect_rows(facts),
    )


def _thresholds(run: Results) -> list[tuple[int, int]]:
    """Return the rows answered, and answered correctly, at each whole percentage."""
    confidence = np.array(run.probability)
    right = np.array(run.true) == np.array(run.predicted)
    answered = [confidence >= percent / 100 for percent in range(101)]
    return [(int(rows.sum()), int((rows & right).sum())) for rows in answered]


def plan_section(facts: RunFacts) -> PlanSection | None:
    """Return the plan, None if it is missing."""
    planned = facts.plan
    if not planned:
        return None
    return PlanSection(
        figures=planned, memory_rows=memory_rows(planned), work_rows=plan_rows(planned)
    )


def settings_section(facts: RunFacts) -> SettingsSection:
    """Return what it takes to repeat the run."""
    return SettingsSection(
        settings=setting_rows(resolved(facts)),
        data=setting_rows({k: v for k, v in facts.summary.items() if k not in LISTS}),
        environment=environment_rows(facts),
    )


def _messages(facts: RunFacts, near: Neighbours) -> list[Message]:
    """Return all messages: mistakes first, the surest first; then the rest, the surest last."""
    run = facts.run
    place = {label: index for index, label in enumerate(run.labels)}
    others = _others(facts)
    answers = zip(run.texts, run.true, run.predicted, run.probability, strict=True)
    messages = [
        Message(
            row=row + 1,
            text=cut(text),
            label=place[true],
            predicted=place[predicted],
            probability=round(probability, 4),
            baseline=None if run.baseline is None else place[run.baseline[row]],
            others=others[row] if others else [],
            nearest=near.nearest.get(row + 1, ()) if predicted != true else (),
        )
        for row, (text, true, predicted, probability) in enumerate(answers)
    ]
    wrong = sorted((m for m in messages if m.label != m.predicted), key=lambda m: -m.probability)
    right = sorted((m for m in messages if m.label == m.predicted), key=lambda m: m.probability)
    return wrong + right


def _others(facts: RunFacts) -> list[list[tuple[int, float]]]:
    """Return the second and third label of each row with their probabilities; [] if not kept."""
    try:
        scored = facts.measured
    except ModelError:  # someone has broken the file
        return []
    if scored is None or len(scored.true) != len(facts.run.texts):
        return []
    best = np.argsort(-scored.probabilities, axis=1, kind="stable")[:, 1:NUM_TOP]
    shares = np.take_along_axis(scored.probabilities, best, 1)
    return [
        [(int(label), round(float(share), 4)) for label, share in zip(*row, strict=True)]
        for row in zip(best, shares, strict=True)
    ]

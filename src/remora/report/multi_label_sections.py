"""The contents of report.html where rows have several labels, as its own template reads them.

A row has no single label to confuse with another, so a table by label stands in place of the
confusion matrix. The page has no script.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import remora
from remora.data.label_sets import labels_in
from remora.evaluation.findings import NextStep
from remora.evaluation.next_steps import after_run, told_next_steps
from remora.evaluation.results import Results
from remora.evaluation.run_facts import RunFacts
from remora.formatting import cut
from remora.report import charts, sections
from remora.report.run_tables import NUM_STATIC_MESSAGES, suspect_rows
from remora.report.sections import (
    CalibrationSection,
    Figures,
    LearningCurveSection,
    PlanSection,
    ResultSection,
    SettingsSection,
    TrainingSection,
)


@dataclass(frozen=True, kw_only=True)
class LabelRow:
    """The figures of a label."""

    label: str
    figures: Figures  # precision, recall, f1, support
    missed: int  # rows that have it and are not given it
    wrongly: int  # rows that are given it and do not have it
    threshold: float | None


@dataclass(frozen=True, kw_only=True)
class Mistake:
    """A message whose labels are not all right."""

    row: int  # in predictions.csv, from 1
    text: str
    right: list[str]
    missed: list[str]
    wrongly: list[str]
    probability: float  # of the predicted set


@dataclass(frozen=True, kw_only=True)
class DiagnosisSection:
    """diagnosis.json, None if there is none, and the first rows of relabel.csv."""

    figures: Figures | None
    suspects: list[dict[str, str]]


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything that the page shows; a section is None if its file is missing."""

    name: str
    version: str
    trained: str  # "adapter" or "model"
    figures: Figures  # evaluation.json
    next_steps: tuple[NextStep, ...]
    labels: list[LabelRow]  # the worst F1 first
    result: ResultSection
    training: TrainingSection | None
    learning_curve: LearningCurveSection | None
    mistakes: list[Mistake]  # the surest first
    calibration: CalibrationSection | None
    diagnosis: DiagnosisSection
    plan: PlanSection | None
    settings: SettingsSection


def collect(facts: RunFacts) -> Report:
    """Collect what the report of a finished run shows.

    Raises:
        DataError: If one of the run's files is broken.
    """
    run, figures = facts.run, facts.run.figures
    return Report(
        name=run.directory.resolve().name,
        version=remora.__version__,
        trained=facts.trained,
        figures=figures,
        next_steps=told_next_steps(lambda: after_run(facts), lambda line: None),
        labels=_labels(run),
        result=_result(figures, facts.trained),
        training=sections.training_section(facts),
        learning_curve=sections.learning_curve_section(facts),
        mistakes=_mistakes(run)[:NUM_STATIC_MESSAGES],
        calibration=sections.calibration_section(figures),
        diagnosis=DiagnosisSection(figures=facts.diagnosis, suspects=suspect_rows(facts)),
        plan=sections.plan_section(facts),
        settings=sections.settings_section(facts),
    )


def _result(figures: Figures, trained: str) -> ResultSection:
    """Return the verdict, and micro-F1 with its intervals in place of accuracy."""
    section = sections.result_section(figures, trained)
    rows = [("ours", trained, figures["metrics"])]
    rows += [("baseline", each.description, vars(each)) for each in section.rivals]
    drawn = [(*named, each["micro_f1"], each["micro_f1_interval"]) for *named, each in rows]
    return replace(section, intervals=charts.intervals(drawn))


def _labels(run: Results) -> list[LabelRow]:
    metrics = run.figures["metrics"]
    pairs = [
        ({*labels_in(true)}, {*labels_in(given)})
        for true, given in zip(run.true, run.predicted, strict=True)
    ]
    thresholds = metrics["thresholds"] or [None] * len(run.labels)
    rows = [
        LabelRow(
            label=each["label"],
            figures=each,
            missed=sum(each["label"] in true - given for true, given in pairs),
            wrongly=sum(each["label"] in given - true for true, given in pairs),
            threshold=threshold,
        )
        for each, threshold in zip(metrics["per_class"], thresholds, strict=True)
    ]
    return sorted(rows, key=lambda row: (row.figures["f1"], row.label))


def _mistakes(run: Results) -> list[Mistake]:
    rows = zip(run.texts, run.true, run.predicted, run.probability, strict=True)
    found = []
    for row, (text, true, predicted, probability) in enumerate(rows, 1):
        wanted, given = {*labels_in(true)}, {*labels_in(predicted)}
        if wanted != given:
            found.append(
                Mistake(
                    row=row,
                    text=cut(text),
                    right=sorted(wanted & given),
                    missed=sorted(wanted - given),
                    wrongly=sorted(given - wanted),
                    probability=probability,
                )
            )
    return sorted(found, key=lambda each: -each.probability)

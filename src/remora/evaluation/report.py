"""report.html and the page of a comparison: one file that fetches nothing."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import remora
from remora.config import ReportConfig
from remora.errors import ConfigError, ResourceError
from remora.evaluation import charts, results
from remora.evaluation.compare import Comparison
from remora.evaluation.confusion_matrix import cells, confusion_counts, matrix_labels
from remora.evaluation.rendering import (
    csp_hash,
    json_for_html,
    of_this_version,
    rendered,
    template_text,
)
from remora.evaluation.results import Results
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
from remora.evaluation.significance import accuracy_verdict
from remora.runtime import files

MAX_CHARS = 1_500_000  # of all messages together

NUM_CONFUSIONS = 10


@dataclass(frozen=True, kw_only=True)
class Message:
    """A message that was measured on."""

    row: int  # in predictions.csv, from 1
    text: str
    true: int  # places in the label set
    predicted: int
    probability: float
    baseline: int | None


def write_report(config: ReportConfig) -> Path:
    """Write the report of a finished run; return where it is.

    Raises:
        ConfigError: If the output is a folder.
        DataError: If the run is not finished, or its files are broken.
        ResourceError: If the report cannot be written.
    """
    return write(config.run, config.output)


def refresh(directory: Path, say: Callable[[str], None]) -> None:
    """Write report.html again, since files that it shows have changed; tell why, if it cannot."""
    with files.optional("report.html", say):
        write(directory)


def write(directory: Path, output: Path | None = None) -> Path:
    """Write the report of a finished run, whole or not at all; return where it is.

    Raises:
        ConfigError: If the output is a folder.
        DataError: If the run is not finished, or its files are broken.
        ResourceError: If the report cannot be written.
    """
    path = output or directory / "report.html"
    check_output(path, "output")
    files.write_text(path, page(directory))
    return path


def write_comparison(path: Path, found: Comparison, directories: Sequence[Path]) -> None:
    """Write the page of a comparison, whole or not at all.

    Raises:
        DataError: If the files of a run are broken.
        ResourceError: If the page cannot be written.
    """
    files.write_text(path, comparison_page(found, directories))


def write_chart(path: Path, chart: charts.Chart) -> None:
    """Write a chart as a picture by itself, whole or not at all.

    Raises:
        ResourceError: If it cannot be written.
    """
    files.write_text(path, rendered("chart.svg", {"chart": chart}))


def check_output(path: Path, flag: str) -> None:
    """Refuse a file that cannot be written to.

    Raises:
        ConfigError: If it is a folder.
        ResourceError: If it is write-protected.
    """
    if path.is_dir():
        raise ConfigError(f"{path} is a folder; give a file with --{flag}")
    if path.exists() and not os.access(path, os.W_OK):
        raise ResourceError(f"{path} is write-protected; give another file with --{flag}")


def page(directory: Path) -> str:
    """Return the report of a finished run as HTML.

    Texts of the user come into the page in two ways only: escaped by Jinja, or as JSON, from which
    the script sets text contents. The style and the script are known to the browser by their
    hashes, and everything else is forbidden to it.

    Raises:
        DataError: If the run is not finished, or its files are broken.
    """
    from markupsafe import Markup

    found = results.read(directory)
    script = template_text("report.js")
    with of_this_version(directory):
        context = _context(found)
        return rendered(
            "report.html",
            context | {"data": Markup(json_for_html(context["data"]))},
            script=Markup(script),
            script_hash=csp_hash(script),
        )


def comparison_page(found: Comparison, directories: Sequence[Path]) -> str:
    """Return the page of a comparison as HTML; there is no script in it, and texts are escaped.

    Raises:
        DataError: If the files of a run are broken.
    """
    runs = [results.read(directory) for directory in directories]
    alike = [
        {"row": row + 1, "text": cut(runs[0].texts[row]), "true": true, "predicted": given[0]}
        for row, (true, *given) in enumerate(
            zip(runs[0].true, *(each.predicted for each in runs), strict=True)
        )
        if len(set(given)) == 1 and given[0] != true
    ]
    settings = [dict(setting_rows(results.read_settings(directory))) for directory in directories]
    names = list(dict.fromkeys(name for each in settings for name in each))
    values = [(name, [each.get(name, "none") for each in settings]) for name in names]
    with of_this_version(directories[0]):
        return rendered(
            "comparison.html",
            {
                "version": remora.__version__,
                "found": found,
                "names": [each.name for each in found.contenders if not each.is_baseline],
                "intervals": charts.intervals(
                    [
                        ("baseline" if each.is_baseline else "ours", each.name, vars(each))
                        for each in found.contenders
                    ]
                ),
                "alike": alike[:NUM_STATIC_MESSAGES],
                "num_alike": len(alike),
                "differences": [each for each in values if len(set(each[1])) > 1],
            },
        )


def _context(found: Results) -> dict[str, Any]:
    directory, figures, labels = found.directory, found.figures, found.labels
    trained = "model" if figures.get("method") == "full" else "adapter"
    counts = confusion_counts(found)
    shown = matrix_labels(counts)
    kept = _kept(_messages(found))
    records = read_records(directory)
    learned = results.read_json(directory / "learning_curve.json")
    planned = results.read_json(directory / "plan.json")
    summary = results.read_json(directory / "data.json")
    theirs = figures["baseline"]["metrics"]["accuracy"]
    verdict = accuracy_verdict(figures["metrics"]["accuracy"], theirs, figures["p_value"])
    return {
        "name": directory.resolve().name,
        "version": remora.__version__,
        "trained": trained,
        "figures": figures,
        "metrics": figures["metrics"],
        "baseline": figures["baseline"],
        "verdict": verdict[0].upper() + verdict[1:],
        "intervals": charts.intervals(
            [
                ("ours", trained, figures["metrics"]),
                ("baseline", figures["baseline"]["description"], figures["baseline"]["metrics"]),
            ]
        ),
        "reliability": figures.get("reliability"),
        "labels": labels,
        "places": {label: place for place, label in enumerate(labels)},
        "curves": charts.training(records),
        "learned": learned,
        "learning_curve": charts.learning_curve(learned),
        "validations": [r for r in records if "validation_accuracy" in r],
        "calibration": charts.calibration(figures.get("reliability")),
        "shown": shown,
        "cells": cells(counts, labels, shown),
        "worst": figures["metrics"]["confusions"][:NUM_CONFUSIONS],
        "taken_for": {c["true"]: c for c in reversed(figures["metrics"]["confusions"])},
        "num_confusions": len(figures["metrics"]["confusions"]),
        "surest": [m for m in kept if m.true != m.predicted][:NUM_STATIC_MESSAGES],
        "num_kept": len(kept),
        "max_message_chars": MAX_MESSAGE_CHARS,
        "data": {
            "labels": labels,
            "shown": shown,
            "rows": counts.sum(1).tolist(),
            "mistakes": (counts.sum(0) + counts.sum(1) - 2 * counts.diagonal()).tolist(),
            "messages": [list(vars(message).values()) for message in kept],
        },
        "plan": planned,
        "diagnosis": results.read_json(directory / "diagnosis.json"),
        "suspects": read_suspects(directory / "relabel.csv"),
        "memory_rows": memory_rows(planned),
        "plan_rows": plan_rows(planned),
        "setting_rows": setting_rows(results.read_settings(directory)),
        "data_rows": [r for r in setting_rows(summary or {}) if r[0] != "labels"],
        "environment_rows": environment_rows(directory),
    }


def _messages(found: Results) -> list[Message]:
    """Return all messages: mistakes first, the surest first, then the right ones, surest last."""
    place = {label: index for index, label in enumerate(found.labels)}
    answers = zip(found.texts, found.true, found.predicted, found.probability, strict=True)
    messages = [
        Message(
            row=row + 1,
            text=cut(text),
            true=place[true],
            predicted=place[predicted],
            probability=round(probability, 4),
            baseline=None if found.baseline is None else place[found.baseline[row]],
        )
        for row, (text, true, predicted, probability) in enumerate(answers)
    ]
    wrong = sorted((m for m in messages if m.true != m.predicted), key=lambda m: -m.probability)
    return wrong + sorted(
        (m for m in messages if m.true == m.predicted), key=lambda m: m.probability
    )


def _kept(messages: Sequence[Message]) -> list[Message]:
    """Return as many of the first messages as a page shall hold."""
    ends = np.cumsum([len(message.text) for message in messages])
    return list(messages[: int(np.searchsorted(ends, MAX_CHARS, side="right"))])

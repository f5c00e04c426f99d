"""A finished run, read back: its figures, predictions and settings."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from remora.errors import DataError
from remora.evaluation.predictions import PREDICTIONS, Predictions, read_predictions
from remora.formatting import one_line

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@dataclass(frozen=True, kw_only=True)
class Results(Predictions):
    """The figures of a run, and its prediction for each row that it was measured on."""

    directory: Path
    figures: dict[str, Any]  # evaluation.json

    @property
    def labels(self) -> list[str]:
        """The closed label set."""
        return [row["label"] for row in self.figures["metrics"]["per_class"]]

    @property
    def multi_label(self) -> bool:
        """Whether a row may have several labels."""
        return "micro_f1" in self.figures["metrics"]


def read(directory: Path) -> Results:
    """Read the results of a finished run.

    Raises:
        DataError: If the run is not finished, or its files are broken.
    """
    if not directory.is_dir():
        raise DataError(f"there is no folder {directory}; give the directory of a finished run")
    for name in ("evaluation.json", PREDICTIONS):
        if not (directory / name).is_file():
            raise DataError(f"{directory} has no {name}; give the directory of a finished run")
    try:
        figures = json.loads((directory / "evaluation.json").read_text(encoding="utf-8"))
        labels = [row["label"] for row in figures["metrics"]["per_class"]]
        num_rows = figures["metrics"]["num_rows"] if "measured_on" in figures else None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"the figures in {directory} are broken ({one_line(error)}); train it again"
        ) from error
    multi_label = "micro_f1" in figures["metrics"]
    predictions = read_predictions(directory / PREDICTIONS, labels, multi_label=multi_label)
    if num_rows != len(predictions.texts):
        raise DataError(
            f"evaluation.json and predictions.csv in {directory} differ; train it again"
        )
    return Results(directory=directory, figures=figures, **vars(predictions))


def read_settings(directory: Path) -> dict[str, Any]:
    """Return the settings in config.toml, also those of other versions of Remora.

    `runtime.run_directory.read_settings` takes this version's only.

    Raises:
        DataError: If the file is missing or broken.
    """
    path = directory / "config.toml"
    try:
        settings: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} cannot be read ({one_line(error)}); give the directory of a finished run"
        ) from error
    return settings


def read_json(path: Path) -> dict[str, Any] | None:
    """Return the object in a JSON file of a run, None if there is no such file.

    Raises:
        DataError: If the file is broken.
    """
    if not path.is_file():
        return None
    try:
        value: Any = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError("it holds no object")
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is broken ({one_line(error)}); restore or delete it") from error
    return dict(value)


def read_records(directory: Path) -> list[dict[str, Any]]:
    """Return the records of metrics.jsonl, the last of each step; incomplete lines are skipped.

    A loss or gradient norm that is null there was not finite, for which JSON has no number. It is
    NaN here.
    """
    path = directory / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    records = [record for record in map(_record, lines) if record]
    last = {(record["step"], "loss" in record): record for record in records}
    return sorted(last.values(), key=lambda record: record["step"])


def _record(line: str) -> dict[str, Any] | None:
    try:
        record: dict[str, Any] = json.loads(line)
    except ValueError:
        return None
    for name in ("loss", "grad_norm", "validation_loss"):
        if name in record and record[name] is None:
            record[name] = math.nan
    return record


@contextlib.contextmanager
def of_this_version(directory: Path) -> Iterator[None]:
    """Raise DataError if the files of a run lack what a template needs."""
    import jinja2

    try:
        yield
    except DataError:  # it names the file already
        raise
    except (jinja2.TemplateError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"the files in {directory} do not fit this version of Remora ({one_line(error)}); "
            "train it again, or use the version that wrote them"
        ) from error

"""What a finished run has left: figures, predictions and settings, read back."""

from __future__ import annotations

import csv
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from remora.errors import DataError
from remora.formatting import one_line
from remora.runtime import files

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib
from remora.runtime.files import as_it_was


@dataclass(frozen=True, kw_only=True)
class Results:
    """The figures of a run, and each row it was measured on with what was predicted."""

    directory: Path
    figures: dict[str, Any]  # evaluation.json
    texts: list[str]
    true: list[str]
    predicted: list[str]
    probability: list[float]  # of the predicted label
    baseline: list[str] | None

    @property
    def labels(self) -> list[str]:
        """The closed label set."""
        return [row["label"] for row in self.figures["metrics"]["per_class"]]


def read(directory: Path) -> Results:
    """Read what a run has shown.

    Raises:
        DataError: If the run is not finished, or its files are broken.
    """
    if not directory.is_dir():
        raise DataError(f"there is no folder {directory}; give the directory of a finished run")
    for name in ("evaluation.json", "predictions.csv"):
        if not (directory / name).is_file():
            raise DataError(f"{directory} has no {name}; give the directory of a finished run")
    try:
        figures = json.loads((directory / "evaluation.json").read_text(encoding="utf-8"))
        with (directory / "predictions.csv").open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        labels = {
            files.defused(row["label"]): row["label"] for row in figures["metrics"]["per_class"]
        }
        found = Results(
            directory=directory,
            figures=figures,
            texts=[as_it_was(row["text"]) for row in rows],
            true=[labels[row["label"]] for row in rows],
            predicted=[labels[row["predicted"]] for row in rows],
            probability=[float(row["probability"]) for row in rows],
            baseline=([labels[row["baseline"]] for row in rows] if "baseline" in rows[0] else None),
        )
        complete = figures["metrics"]["num_rows"] == len(rows) and "measured_on" in figures
    except (OSError, ValueError, KeyError, TypeError, IndexError, csv.Error) as error:
        raise DataError(
            f"the figures in {directory} are broken ({one_line(error)}); train it again"
        ) from error
    if not complete:
        raise DataError(
            f"evaluation.json and predictions.csv in {directory} differ; train it again"
        )
    return found


def read_settings(directory: Path) -> dict[str, Any]:
    """Return what config.toml says; unlike `run.read_settings` also that of other versions.

    Raises:
        DataError: If it is missing or broken.
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
    """Return what a JSON file of a run says, None if there is no such file.

    Raises:
        DataError: If it is broken.
    """
    if not path.is_file():
        return None
    try:
        value: Any = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError("it holds no object")
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} is broken ({one_line(error)}); restore it, or delete it to go without"
        ) from error
    return dict(value)

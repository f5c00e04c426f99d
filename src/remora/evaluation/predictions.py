"""Predicted labels and probabilities of rows, in memory and on disk."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from remora.config.train import BASELINES
from remora.data.label_sets import labels_in, set_text
from remora.errors import DataError, ModelError
from remora.formatting import escape_formula, one_line, unescape_formula
from remora.runtime import files

PREDICTIONS = "predictions.csv"
PROBABILITIES = "probabilities.safetensors"
DEFAULT_THRESHOLD = 0.5

_TINY = np.finfo(np.float64).tiny


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """The rows of predictions.csv: texts and labels as they are, not as a spreadsheet sees them."""

    texts: list[str]
    true: list[str]
    predicted: list[str]
    probability: list[float]  # of the predicted label
    baseline: list[str] | None
    rivals: dict[str, list[str | None]] = field(default_factory=dict)  # None where not measured


@dataclass(frozen=True, kw_only=True)
class Scored:
    """Probabilities of some rows, with their true labels."""

    probabilities: NDArray[np.float64]  # [rows, labels]
    true: NDArray[np.int64]  # [rows], indices into the label set

    @property
    def confidence(self) -> NDArray[np.float64]:
        """Probability of the predicted label, [rows]."""
        result: NDArray[np.float64] = self.probabilities.max(1)
        return result

    @property
    def correct(self) -> NDArray[np.bool_]:
        """Whether the prediction is the true label, [rows]."""
        result: NDArray[np.bool_] = self.probabilities.argmax(1) == self.true
        return result

    @property
    def log_loss(self) -> float:
        """Mean negative log-probability of the true label, in nats."""
        chosen = self.probabilities[np.arange(len(self.true)), self.true]
        return float(-np.log(np.maximum(chosen, np.finfo(np.float64).tiny)).mean())

    def at(self, temperature: float) -> Scored:
        """Return the rows with their probabilities p scaled to softmax(log p / temperature)."""
        logs = np.log(np.maximum(self.probabilities, np.finfo(np.float64).tiny)) / temperature
        scaled = np.exp(logs - logs.max(1, keepdims=True))
        return Scored(probabilities=scaled / scaled.sum(1, keepdims=True), true=self.true)


@dataclass(frozen=True, kw_only=True)
class ScoredSets(Scored):
    """Probabilities of some rows, each label by itself, with their true sets.

    `true` is [rows, labels], 0 or 1. The confidence of a row is the probability of the set that it
    is given, if labels are independent: the product over labels of p where given, else 1 - p.
    """

    thresholds: NDArray[np.float64]  # [labels]

    @property
    def given(self) -> NDArray[np.bool_]:
        """Which labels each row is given, [rows, labels]."""
        result: NDArray[np.bool_] = self.probabilities >= self.thresholds
        return result

    @property
    def confidence(self) -> NDArray[np.float64]:
        """Probability of the predicted set, [rows]."""
        chosen = np.where(self.given, self.probabilities, 1 - self.probabilities)
        result: NDArray[np.float64] = np.exp(np.log(np.maximum(chosen, _TINY)).sum(1))
        return result

    @property
    def correct(self) -> NDArray[np.bool_]:
        """Whether the predicted set is the true one, [rows]."""
        result: NDArray[np.bool_] = (self.given == self.true.astype(bool)).all(1)
        return result

    @property
    def log_loss(self) -> float:
        """Binary cross entropy, the mean over rows and labels, in nats."""
        chosen = np.where(self.true.astype(bool), self.probabilities, 1 - self.probabilities)
        return float(-np.log(np.maximum(chosen, _TINY)).mean())

    def at(self, temperature: float) -> ScoredSets:
        """Return the rows with their logits divided by a temperature, thresholds alike."""
        return ScoredSets(
            probabilities=_scaled(self.probabilities, temperature),
            true=self.true,
            thresholds=_scaled(self.thresholds, temperature),
        )


def _scaled(probabilities: NDArray[np.float64], temperature: float) -> NDArray[np.float64]:
    from scipy.special import expit, logit

    result: NDArray[np.float64] = expit(logit(probabilities) / temperature)
    return result


def write_predictions(
    path: Path,
    texts: Sequence[str],
    true: Sequence[str],
    predicted: Sequence[str],
    probability: Sequence[float],
    baseline: Sequence[str] | None = None,
    rivals: Mapping[str, Mapping[int, str]] | None = None,
    advice: str = files.ELSEWHERE,
) -> None:
    """Write predictions.csv: one row per message, with the baselines' predictions last.

    `baseline` has those of the SVM. Each of `rivals` is a further column, by its name: predictions
    by row, of some or all rows; other cells are empty. Cells that a spreadsheet would run as
    formulas are escaped. `advice` says what else to do if the disk fails.
    """
    header = ["text", "label", "predicted", "probability"]
    columns = [texts, true, predicted, [f"{p:.6f}" for p in probability]]
    if baseline is not None:
        header, columns = [*header, "baseline"], [*columns, baseline]
    for name, given in (rivals or {}).items():
        header.append(name)
        columns.append([given.get(row, "") for row in range(len(texts))])
    files.write_csv(path, header, zip(*columns, strict=True), advice)


def read_predictions(
    path: Path, labels: Sequence[str], *, multi_label: bool = False
) -> Predictions:
    """Read predictions.csv and undo its escaping.

    A label is looked up among `labels`, so it comes back exactly. Where rows have several labels,
    those of a row are a JSON list, which no spreadsheet takes for a formula. A text that itself
    begins with an apostrophe before a formula loses the apostrophe: the file does not tell the two
    apart.

    Raises:
        DataError: If the file is broken, or has other labels.
    """
    originals: Mapping[str, str] = {escape_formula(label): label for label in labels}
    if multi_label:
        originals = _Sets()
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        if not rows:
            raise ValueError("it has no rows")
        return Predictions(
            texts=[unescape_formula(row["text"]) for row in rows],
            true=[originals[row["label"]] for row in rows],
            predicted=[originals[row["predicted"]] for row in rows],
            probability=[float(row["probability"]) for row in rows],
            baseline=(
                [originals[row["baseline"]] for row in rows] if "baseline" in rows[0] else None
            ),
            rivals={
                name: [originals[row[name]] if row[name] else None for row in rows]
                for name in BASELINES
                if name in rows[0]
            },
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, csv.Error) as error:
        raise DataError(f"{path} is broken ({one_line(error)}); train the run again") from error


class _Sets(dict[str, str]):
    """Sets of labels by their text, as `data.label_sets` writes them."""

    def __missing__(self, text: str) -> str:
        return set_text(labels_in(text))


def write_probabilities(path: Path, labels: Sequence[str], splits: Mapping[str, Scored]) -> None:
    """Write the probabilities of splits as safetensors, whole or not at all.

    Each split has `<split>.probabilities`, float32 [rows, labels], and `<split>.true`, int64
    [rows], indices into the list of labels in the file's metadata; where rows have several labels,
    [rows, labels], 0 or 1.
    """
    arrays: dict[str, NDArray[Any]] = {}
    about = {"labels": json.dumps(list(labels))}
    for split, scored in splits.items():
        if isinstance(scored, ScoredSets):
            about["thresholds"] = json.dumps(scored.thresholds.tolist())
        arrays[f"{split}.probabilities"] = scored.probabilities.astype(np.float32)
        arrays[f"{split}.true"] = scored.true
    files.write_arrays(path, arrays, about)


def read_probabilities(path: Path, labels: Sequence[str], split: str) -> Scored | None:
    """Read one split of what `write_probabilities` wrote; None if the file or the split is missing.

    Raises:
        ModelError: If the file is broken or has other labels.
    """
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="numpy") as file:
            if json.loads(file.metadata()["labels"]) != list(labels):
                raise ModelError(f"{path} has other labels than the model; restore the run")
            if f"{split}.true" not in file.keys():  # noqa: SIM118 - it is no mapping
                return None
            probabilities = file.get_tensor(f"{split}.probabilities").astype(np.float64)
            true = file.get_tensor(f"{split}.true")
            if "thresholds" not in file.metadata():
                return Scored(probabilities=probabilities, true=true)
            return ScoredSets(
                probabilities=probabilities,
                true=true,
                thresholds=np.array(json.loads(file.metadata()["thresholds"]), dtype=np.float64),
            )
    except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
        raise ModelError(f"{path} is broken ({one_line(error)}); restore or delete it") from error

"""Predicted labels and probabilities of rows, in memory and on disk."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from remora.errors import ModelError
from remora.formatting import one_line
from remora.runtime.files import disk_errors, write_csv

PROBABILITIES = "probabilities.safetensors"


def write_predictions(
    path: Path,
    texts: Sequence[str],
    true: Sequence[str],
    predicted: Sequence[str],
    probability: Sequence[float],
    baseline: Sequence[str] | None = None,
) -> None:
    """Write one row per message, with the baseline's prediction last where there is one."""
    header = ["text", "label", "predicted", "probability"]
    columns = [texts, true, predicted, [f"{p:.6f}" for p in probability]]
    if baseline is not None:
        header, columns = [*header, "baseline"], [*columns, baseline]
    write_csv(path, header, zip(*columns, strict=True))


def write_probabilities(path: Path, labels: Sequence[str], splits: Mapping[str, Scored]) -> None:
    """Write the probabilities of splits as safetensors, whole or not at all.

    For each split there are `<split>.probabilities`, float32 [rows, labels], and `<split>.true`,
    int64 [rows], places in the list of labels that is in the file's metadata.
    """
    from safetensors.numpy import save_file

    arrays: dict[str, NDArray[Any]] = {}
    for split, scored in splits.items():
        arrays[f"{split}.probabilities"] = scored.probabilities.astype(np.float32)
        arrays[f"{split}.true"] = scored.true
    temporary = path.with_name(path.name + ".tmp")
    with disk_errors(path):
        save_file(arrays, temporary, metadata={"labels": json.dumps(list(labels))})
        os.replace(temporary, path)


def read_probabilities(path: Path, labels: Sequence[str], split: str) -> Scored | None:
    """Read what `write_probabilities` wrote of a split; None if there is no file or split.

    Raises:
        ModelError: If the file is broken or of other labels.
    """
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="numpy") as file:
            if json.loads(file.metadata()["labels"]) != list(labels):
                raise ModelError(f"{path} is of other labels than the adapter; restore the run")
            if f"{split}.true" not in file.keys():  # noqa: SIM118 - it is no mapping
                return None
            return Scored(
                probabilities=file.get_tensor(f"{split}.probabilities").astype(np.float64),
                true=file.get_tensor(f"{split}.true"),
            )
    except (SafetensorError, KeyError, TypeError, OSError) as error:
        raise ModelError(
            f"{path} is broken ({one_line(error)}); restore it, or delete it to go without"
        ) from error


@dataclass(frozen=True, kw_only=True)
class Scored:
    """Probabilities of some rows beside their true labels."""

    probabilities: NDArray[np.float64]  # [rows, labels]
    true: NDArray[np.int64]  # [rows], places in the label set

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
        """Return the rows with softmax(log p / temperature) for their probabilities p."""
        logs = np.log(np.maximum(self.probabilities, np.finfo(np.float64).tiny)) / temperature
        scaled = np.exp(logs - logs.max(1, keepdims=True))
        return Scored(probabilities=scaled / scaled.sum(1, keepdims=True), true=self.true)

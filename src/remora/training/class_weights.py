"""The weight of each class in the loss, for tables in which classes are of very different size."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

from remora.data.dataset import Dataset
from remora.data.table import read_table
from remora.errors import DataError
from remora.formatting import close_match, quote

BALANCED = "balanced"


def class_weights(given: str | None, dataset: Dataset) -> dict[str, float] | None:
    """Return the weight of each label, None where all rows count the same.

    The loss of a step is the weighted mean over its answer tokens, as in torch's `CrossEntropyLoss`
    and scikit-learn's `class_weight`: "balanced" gives each class the same total over the training
    rows, rows / (classes * rows of the class).

    Args:
        given: "balanced", the path of a table of weights, or None.
        dataset: The rows, and their labels.

    Raises:
        DataError: If the table of weights is broken, or names a label that the data lacks.
    """
    if given is None:
        return None
    if given == BALANCED:
        counts = Counter(dataset.train.labels)
        return {
            label: len(dataset.train) / (len(counts) * counts[label]) if label in counts else 1.0
            for label in dataset.labels
        }
    return _read(Path(given), dataset.labels)


def _read(path: Path, labels: tuple[str, ...]) -> dict[str, float]:
    """Return the weights in a table with the columns `label` and `weight`; others are 1."""
    table = read_table(path, text_column="label", label_column="weight", strict=True)
    weights = dict.fromkeys(labels, 1.0)
    for label, written in zip(table.texts, table.labels, strict=True):
        if label.strip() not in weights:
            close = close_match(label, labels)
            hint = f"did you mean {quote(close)}?" if close else "remove it"
            raise DataError(f"{path} has the label {quote(label)}, which no row has; {hint}")
        try:
            weight = float(written)
        except ValueError:
            weight = math.nan
        if not 0 < weight < math.inf:
            raise DataError(
                f"{path} gives {quote(label)} the weight {quote(written)}; give a number above 0"
            )
        weights[label.strip()] = weight
    return weights

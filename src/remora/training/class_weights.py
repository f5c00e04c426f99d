"""The weight of each class in the loss, for tables in which classes are of very different size."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from remora.data.dataset import Dataset
from remora.data.parts import Part, Peek, Pick, Remarks, Row
from remora.data.readers import file_part
from remora.data.table import read_parts
from remora.errors import DataError
from remora.formatting import close_match, listed, quote

BALANCED = "balanced"
COLUMNS = ("label", "weight")
"""Of a table of weights, in any case."""


def class_weights(
    given: str | Mapping[object, float] | None, dataset: Dataset
) -> dict[str, float] | None:
    """Return the weight of each label, None where all rows count the same.

    The loss of a step is the weighted mean over its answer tokens, as in torch's `CrossEntropyLoss`
    and scikit-learn's `class_weight`: "balanced" gives each class the same total over the training
    rows, rows / (classes * rows of the class).

    Args:
        given: "balanced", the path of a table of weights, the weights by their labels, or None.
        dataset: The rows, and their labels.

    Raises:
        DataError: If the weights are broken, or one is of a label that the data lacks.
    """
    if given is None:
        return None
    if isinstance(given, Mapping):
        pairs = [(str(label), weight) for label, weight in given.items()]
        return _checked("class_weights", pairs, dataset.labels)
    if given == BALANCED:
        counts = Counter(dataset.train.labels)
        return {
            label: len(dataset.train) / (len(counts) * counts[label]) if label in counts else 1.0
            for label in dataset.labels
        }
    return _checked(given, _read(Path(given)), dataset.labels)


def _read(path: Path) -> Iterable[tuple[str, object]]:
    """Return the rows of a table with the columns `label` and `weight`."""
    if not path.exists() and close_match(str(path).casefold(), [BALANCED]):
        raise DataError(f"there is no table of class weights {path}; did you mean {BALANCED}?")
    part = file_part(path)
    part = Part(part.name, partial(_rows, part))
    table = read_parts([part], COLUMNS[0], COLUMNS[1], strict=True)[0]
    return zip(map(str.strip, table.texts), table.labels, strict=True)


def _rows(part: Part, pick: Pick, remarks: Remarks) -> Iterator[Row]:
    """Yield the rows of a table as if its columns were called `label` and `weight`."""

    def choose(columns: Sequence[str], _: Peek) -> list[int]:
        names = [column.strip().casefold() for column in columns]
        if any(names.count(name) != 1 for name in COLUMNS):
            raise DataError(
                f"{part.name} is a table of class weights with the columns {listed(columns)}; name"
                f" one {COLUMNS[0]} and one {COLUMNS[1]} in its first line"
            )
        return [names.index(name) for name in COLUMNS]

    pick(COLUMNS, list)
    return part.read(choose, remarks)


def _checked(
    name: str, pairs: Iterable[tuple[str, object]], labels: tuple[str, ...]
) -> dict[str, float]:
    """Return the weight of each label; those that are not given are 1."""
    weights = dict.fromkeys(labels, 1.0)
    given = set[str]()
    for label, written in pairs:
        if label not in weights:
            close = close_match(label, labels)
            hint = f"did you mean {quote(close)}?" if close else "remove it"
            raise DataError(f"{name} has the label {quote(label)}, which no row has; {hint}")
        if label in given:
            raise DataError(f"{name} has the label {quote(label)} twice; leave one of them")
        given.add(label)
        try:
            weight = float(str(written))
        except ValueError:
            weight = math.nan
        if not 0 < weight < math.inf:
            raise DataError(
                f"{name} gives {quote(label)} the weight {quote(str(written))}; give a number above"
                " 0"
            )
        weights[label] = weight
    return weights

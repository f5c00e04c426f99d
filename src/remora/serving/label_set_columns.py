"""Several labels a row as columns of an output, in the form that the training table has them in."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from remora.config import PredictConfig
from remora.data.label_sets import LabelForm, labels_in, written
from remora.models.metadata import AdapterCard
from remora.serving.prediction_files import Levels, Ranked, Writer, free_names, open_writer


class LabelSetColumns:
    """The columns of the labels that rows are given, and of their probabilities.

    Labels are a list, a text with the table's separator (a list as JSON where a label holds it), or
    a column of 0 and 1 for each label; probabilities are a list of objects, the most probable label
    first.
    """

    def __init__(self, labels: Sequence[str], form: LabelForm, columns: Sequence[str]) -> None:
        """Name the columns.

        Args:
            labels: The closed label set.
            form: How the training table wrote the labels of a row.
            columns: Those of the input, beside which others are named.
        """
        self._labels, self._form = list(labels), form
        wanted = self._labels if form.columns else ["labels"]
        self.names = free_names([*wanted, "probabilities"], columns)

    def cells(self, ranked: Ranked, answer: str | None) -> list[object]:
        """Return the cells of a row; they are empty for a blank text."""
        if answer is None:
            return [None] * len(self.names)
        given = labels_in(answer)
        probabilities = [{"label": label, "probability": round(p, 6)} for label, p in ranked]
        if self._form.columns:
            return [*(int(label in given) for label in self._labels), probabilities]
        if self._form.separator is None:
            return [list(given), probabilities]
        return [written(answer, self._form) if given else "", probabilities]

    def schema(self) -> Any:
        """Return the schema of Arrow of these columns."""
        import pyarrow

        ranked = pyarrow.struct([("label", pyarrow.string()), ("probability", pyarrow.float64())])
        kind = pyarrow.list_(pyarrow.string())
        if self._form.separator is not None:
            kind = pyarrow.string()
        if self._form.columns:
            kind = pyarrow.int64()
        *labels, probabilities = self.names
        fields = [(name, kind) for name in labels]
        return pyarrow.schema([*fields, (probabilities, pyarrow.list_(ranked))])


class LabelSetWriter:
    """Writes rows with several labels by a writer that takes all of their columns."""

    def __init__(self, columns: LabelSetColumns, writer: Writer) -> None:
        self._columns, self._writer = columns, writer

    def write(
        self, values: Sequence[object], ranked: Ranked, answer: str | None, levels: Levels = ()
    ) -> None:
        """Write a row."""
        self._writer.write([*values, *self._columns.cells(ranked, answer)], [], None)

    def flush(self) -> None:
        """Hand on what was written."""
        self._writer.flush()

    def close(self) -> None:
        """Write the end."""
        self._writer.close()


@contextlib.contextmanager
def open_predictions(
    config: PredictConfig,
    card: AdapterCard,
    columns: Sequence[str],
    schema: Any,
    output: str | Path | TextIO,
) -> Iterator[Writer]:
    """Open what writes a model's predictions, of one label a row or several.

    Args:
        config: The settings.
        card: What the model's adapter says of it.
        columns: The input's columns that are kept.
        schema: Their schema of Arrow, None where the format has none.
        output: A file's name, or where to write CSV or JSON lines.

    Raises:
        DataError: If the format cannot hold the input's values.
        ResourceError: If the disk fails.
    """
    if not card.multi_label:
        with open_writer(config, columns, schema, output, card.num_upper_levels) as writer:
            yield writer
        return
    of_sets = LabelSetColumns(card.labels, card.label_form, columns)
    whole = of_sets.schema()
    for field in schema or ():
        if field.name in columns:
            whole = whole.append(field)
    names = [*columns, *of_sets.names]
    with open_writer(config, names, whole, output, are_whole=True) as writer:
        yield LabelSetWriter(of_sets, writer)

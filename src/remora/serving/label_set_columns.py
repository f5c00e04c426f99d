"""Several labels a row as columns of an output, in the form that the training table has them in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from remora.data.label_sets import LabelForm, labels_in
from remora.serving.prediction_files import Levels, Ranked, Writer, free_names


class LabelSetColumns:
    """The columns of the labels that rows are given, and of their probabilities.

    Labels are a list, a text with the table's separator, or a column of 0 and 1 for each label;
    probabilities are a list of objects, the most probable label first.
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
        separator = self._form.separator
        return [list(given) if separator is None else separator.join(given), probabilities]

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

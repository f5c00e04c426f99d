"""The training table of a run with corrected labels: all its columns and rows, as CSV."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from remora.config import TrainConfig
from remora.data import label_sets
from remora.data.columns import LABEL_NAMES, TEXT_NAMES
from remora.data.corrections import Decisions
from remora.data.dataset import label_form
from remora.data.parts import Part, Peek, Pick, ReadOptions, Remarks, Row
from remora.data.sources import source_parts
from remora.data.table import SKIPPED, Table, read_parts
from remora.data.values import csv_cell, is_blank, text_of
from remora.runtime import files


def write_corrected(
    path: Path,
    settings: TrainConfig,
    text_columns: Sequence[str],
    decisions: Decisions,
    say: Callable[[str], None],
) -> None:
    """Write the training table of a run with other labels, and without the rows that are deleted.

    All else is as it was, so that what reads the source reads the result: columns and their order,
    the values of other columns, rows that training skips, and names of labels that the run renames.
    Shards become one table, lists and objects JSON. A chat becomes its text, under a usual name,
    since a column of CSV is no longer known by its chats; where labels came from chats too, a
    column of them is added.

    Args:
        path: The file, CSV.
        settings: Those of the run.
        text_columns: The names of the columns that the run read as its text.
        decisions: By the places of rows: another label, as the run reads it, or None to delete.
        say: Told of what cannot be written, such as fields of JSON that the first rows lack.

    Raises:
        DataError: The source cannot be read.
        ResourceError: The file cannot be written.
    """
    options = ReadOptions(settings.input_format, settings.columns)
    form, skipped = label_form(settings), _Skipped()
    num_labels = len(form.columns) or 1
    shards = [
        _Shard(part, num_labels) for part in source_parts(settings.data, options).parts["train"]
    ]
    table, _ = read_parts(
        [Part(shard.name, shard.read) for shard in shards],
        settings.text_column,
        settings.label_column,
        strict=settings.strict,
        remarks=skipped,
        form=form,
        begun_on=text_columns,
    )
    header = [*dict.fromkeys(name for shard in shards for name in shard.columns)]
    if all(shard.columns == shards[0].columns for shard in shards):
        header = shards[0].columns  # in which a name may occur twice
    added, names = [], {}
    if any({*shard.texts} & {*shard.labels} for shard in shards):
        added = [next(name for name in LABEL_NAMES if name not in header)]
    if settings.text_column is None and any(shard.has_chats for shard in shards):
        usual = next(name for name in TEXT_NAMES if name not in header)
        names = {shard.columns[shard.texts[0]]: usual for shard in shards}
    label_cells = _label_cells(table, settings.rename_labels or {})

    remarks = Remarks()

    def rows() -> Iterator[list[str]]:
        place = -1
        for shard in shards:
            for row, cells in shard.rows(header, remarks):
                label = [""]
                if (shard.name, row) not in skipped.rows:
                    place += 1
                    if place in decisions and decisions[place] is None:
                        continue
                    label = label_cells(decisions.get(place) or table.labels[place])
                    if place in decisions and not added:
                        for name, cell in zip(shard.label_columns, label, strict=True):
                            cells[header.index(name)] = cell
                yield cells + label * bool(added)

    with (
        files.replacing(path) as temporary,
        temporary.open("w", encoding="utf-8", newline="") as file,
    ):
        writer = csv.writer(file)
        writer.writerow([*(names.get(name, name) for name in header), *added])
        writer.writerows(rows())
    for line in remarks.lines():
        say(line)


class _Skipped(Remarks):
    """The rows that are read and not trained on, each with the name of its part."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: set[tuple[str, int]] = set()

    def add(self, name: str, what: str, row: int, line: int) -> None:
        if what in SKIPPED.values():
            self.rows.add((name, row))


class _Shard:
    """A part of the table, and what it was seen to have while it was read."""

    def __init__(self, part: Part, num_labels: int) -> None:
        self._part, self._num_labels = part, num_labels
        self.name = part.name
        self.columns: list[str] = []
        self.texts: list[int] = []  # places of the columns
        self.labels: list[int] = []
        self.has_chats = False

    def read(self, pick: Pick, remarks: Remarks) -> Iterator[Row]:
        """Read it as its part does, and note its columns and those that are picked."""

        def watch(columns: Sequence[str], peek: Peek) -> list[int]:
            picked = pick(columns, peek)
            self.columns = list(columns)
            self.texts, self.labels = picked[: -self._num_labels], picked[-self._num_labels :]
            self.has_chats = any(isinstance(values[self.texts[0]], list) for values in peek())
            return picked

        return self._part.read(watch, remarks)

    @property
    def label_columns(self) -> list[str]:
        """The names of the columns of labels, which occur once."""
        return [self.columns[place] for place in self.labels]

    def rows(self, header: Sequence[str], remarks: Remarks) -> Iterator[tuple[int, list[str]]]:
        """Yield each row's number, and its cells in the order of a header."""
        for row, _, values in self._part.read(lambda columns, _: [*range(len(columns))], remarks):
            cells = [
                text_of(value) if place in self.texts and not is_blank(value) else csv_cell(value)
                for place, value in enumerate(values)
            ]
            if header != self.columns:
                found = dict(zip(self.columns, cells, strict=True))
                cells = [found.get(name, "") for name in header]
            yield row, cells


def _label_cells(table: Table, names: Mapping[str, str]) -> Callable[[str], list[str]]:
    """Return what writes a label, or a set, in the cells of a row: by the names in the source.

    Args:
        table: The rows, with labels as the source names them.
        names: The names that a run gives to labels.
    """
    known, old = {*table.each_label}, {new: old for old, new in names.items()}

    def cells(label: str) -> list[str]:
        given = label_sets.labels_in(label) if table.multi_label else (label,)
        own = [name if name in known else old.get(name, name) for name in given]
        if table.form.columns:
            return [str(int(column.strip() in own)) for column in table.form.columns]
        return [table.written(label_sets.set_text(own)) if table.multi_label else own[0]]

    return cells

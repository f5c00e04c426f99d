"""Files read into checked rows.

A file is CSV, TSV, JSON, Parquet, Excel or, for texts alone, one text a line. Every fault is a
`DataError` that names the file and the row.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

from remora.data import label_sets
from remora.data.columns import UnlabelledError, choose, choose_text, has_names, joined
from remora.data.label_sets import LabelForm, LabelReader
from remora.data.parts import Part, Peek, ReadOptions, Remarks, row_place
from remora.data.readers import STANDARD_INPUT, file_part
from remora.data.values import is_blank, is_hidden, text_of
from remora.errors import DataError
from remora.formatting import listed, quote

ONE = "one label a row (--multi-label on trains them as several)"
SKIPPED = {"text": "with a blank text, skipped", "label": "without a label, skipped"}


@dataclass(frozen=True)
class Table:
    """Texts and their labels, as parallel lists."""

    texts: list[str]
    labels: list[str]
    rows: Sequence[int] = field(default=(), compare=False)
    """Their places in the table that they were read from, if they are a part of it."""
    multi_label: bool = False
    """Whether a label is a set of labels, as `label_sets` writes it."""
    form: LabelForm = field(default=LabelForm(), compare=False)
    """How the table that the rows were read from writes such sets."""

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def places(self) -> Sequence[int]:
        """The place of each row in the table that it was read from, from 0."""
        return self.rows or range(len(self))

    def take(self, places: Sequence[int]) -> Table:
        """Return the rows at some places of this table."""
        rows = self.places
        return Table(
            [self.texts[i] for i in places],
            [self.labels[i] for i in places],
            [rows[i] for i in places],
            self.multi_label,
            self.form,
        )

    def written(self, label: str) -> str:
        """Return a row's label in one cell, a set of them as the table writes it."""
        return label_sets.written(label, self.form) if self.multi_label else label

    @property
    def each_label(self) -> list[str]:
        """Every label of every row, as often as it occurs."""
        return label_sets.flattened(self.labels) if self.multi_label else self.labels

    @property
    def strata(self) -> list[str]:
        """What rows are stratified by: their label, and of several the rarest one."""
        return label_sets.rarest(self.labels) if self.multi_label else self.labels

    def relabelled(self, change: Callable[[Sequence[str]], Sequence[str]]) -> Table:
        """Return the rows with labels replaced, one for one."""
        if self.multi_label:
            return replace(self, labels=label_sets.changed(self.labels, change))
        return replace(self, labels=list(change(self.labels)))


def named(columns: str | Sequence[str] | None) -> tuple[str, ...]:
    """Return the names of text columns that were given as one name, several, or none."""
    return () if columns is None else (columns,) if isinstance(columns, str) else tuple(columns)


def read_table(
    path: str | Path,
    *,
    text_column: str | Sequence[str] | None = None,
    label_column: str | None = None,
    known: Collection[str] | None = None,
    options: ReadOptions | None = None,
    strict: bool = False,
    remarks: Remarks | None = None,
    trained: Sequence[str] = (),
    forms: Mapping[str, str] | None = None,
    form: LabelForm | None = None,
) -> Table:
    """Read one file into memory.

    Texts stay as they are; labels are stripped of surrounding white space and interned.

    Args:
        path: A file, or `-` for standard input.
        text_column: The column of the messages, or several; by default found by its usual names.
        label_column: The column of the labels; by default found by its usual names.
        known: The labels that may occur; any, by default.
        options: How to read the file, where its name does not tell.
        strict: Whether to refuse rows with a blank text or label, instead of skipping them.
        remarks: Told of rows that are skipped, and of what else is worth a line.
        trained: Columns of the training table, the label last, which come before the usual ones.
        forms: The known labels by their keys, by which labels of another form become one of them.
        form: How several labels a row are written; by default a row has one.

    Raises:
        DataError: The file is missing or broken, lacks a column, or has a broken or unknown value.
    """
    return read_parts(
        [file_part(Path(path), options)],
        text_column,
        label_column,
        known=known,
        strict=strict,
        remarks=remarks,
        trained=trained,
        forms=forms,
        form=form,
    )[0]


def read_parts(
    parts: Sequence[Part],
    text_column: str | Sequence[str] | None = None,
    label_column: str | None = None,
    *,
    known: Collection[str] | None = None,
    strict: bool = False,
    remarks: Remarks | None = None,
    trained: Sequence[str] = (),
    forms: Mapping[str, str] | None = None,
    form: LabelForm | None = None,
    begun_on: Sequence[str] = (),
) -> tuple[Table, list[str]]:
    """Read and check the parts of one split; return it with the names of its columns, label last.

    The other arguments are those of `read_table`, and `begun_on`: the text columns of the run that
    training begins with, which are taken where none are given.

    Raises:
        UnlabelledError: No row has a label, though there are texts.
    """
    known = None if known is None else frozenset(known)
    remarks = Remarks() if remarks is None else remarks
    form = LabelForm("off") if form is None else form
    reader, texts, chosen = LabelReader(form, known, forms), list[str](), list[str]()
    num_labels = len(form.columns) or 1
    first_blank, num_blank, has_hidden = "", 0, False
    for part in parts:

        def pick(columns: Sequence[str], peek: Peek, name: str = part.name) -> list[int]:
            wanted = in_trained_order(name, named(text_column), trained[:-1])
            if len(trained) > 2 and not wanted:
                choose_text(name, (), columns, peek, trained[:-1])  # refuses a table without them
            wanted = wanted or _begun_on(name, begun_on, columns)
            places = choose(
                name, wanted, form.columns or label_column, columns, peek, trained, known
            )
            chosen[:] = [columns[place] for place in places]
            if _has_refused(columns, places, peek):
                remarks.tell(
                    f"{name}: rows whose 'answer' is 'reject' or 'ignore' are read as the accepted"
                    " ones are; leave them out of the table"
                )
            return places

        for row, line, values in part.read(pick, remarks):
            cells, labels = values[:-num_labels], values[-num_labels:]
            no_text = is_blank(cells[0]) and all(map(is_blank, cells))
            if no_text or reader.is_unlabelled(labels) or is_hidden(labels[0], known):
                kind = "text" if no_text else "label"
                has_hidden |= not no_text
                place = f"{part.name}: {row_place(row, line)}"
                first_blank = first_blank or f"{place} has a blank {kind}"
                num_blank += 1
                remarks.add(part.name, SKIPPED[kind], row, line)
                continue
            try:
                texts.append(message(chosen[:-num_labels], cells, trained[:-1]))
                reader.read(labels)
            except DataError as error:
                raise DataError(f"{part.name}: {row_place(row, line)} has {error}") from None
    if not texts and has_hidden and known is not None:
        raise UnlabelledError(f"{parts[0].name} has no labels; add them")
    if num_blank and (strict or not texts):
        others = f", and it is one of {num_blank:,} rows with a blank value"
        raise DataError(
            f"{first_blank}{others if num_blank > 1 else ''}; fill it in or delete the row"
        )
    if not texts:
        raise DataError(f"{parts[0].name} has no rows; add some")
    if form.columns:
        chosen[-num_labels:] = [", ".join(form.columns)]
    labels, several, num_lists = reader.finish()
    if num_lists:
        remarks.tell(f"{parts[0].name}: the labels are lists of one label each, read as {ONE}")
    return Table(texts, labels, multi_label=several, form=form), chosen


def _begun_on(name: str, before: Sequence[str], columns: Sequence[str]) -> tuple[str, ...]:
    """Return the text columns of the run that training begins with, if a table has them.

    Raises:
        DataError: It lacks one of several, by whose names the run reads them.
    """
    if {*before} <= {*columns}:
        return tuple(before)
    if len(before) < 2:
        return ()
    lacking = next(each for each in before if each not in columns)
    raise DataError(
        f"{name} has no column {quote(lacking)}, and the run that it begins with reads"
        f" {listed(before)}; give its columns those names, or name others with --text-column"
    )


def _has_refused(columns: Sequence[str], places: Sequence[int], peek: Peek) -> bool:
    """Return whether a table is one of Prodigy with rows that its annotators did not accept."""
    place = columns.index("answer") if "answer" in columns else -1
    if place < 0 or place in places:
        return False
    found = {str(values[place]) for values in peek()}
    return found <= {"accept", "reject", "ignore"} and not found <= {"accept"}


def in_trained_order(name: str, given: Sequence[str], trained: Sequence[str]) -> tuple[str, ...]:
    """Return the text columns that were given, each in the place of the trained one it stands for.

    A column stands for the one of its own name, and the others for the rest in turn. One column
    alone may hold whole texts, which `message` checks.

    Args:
        name: Of the table, for messages.
        given: Names that were given, or none.
        trained: The names in the training table; none if they are not known.

    Raises:
        DataError: There are more or fewer of them.
    """
    if not trained or len(given) < 2:
        return tuple(given)
    others = iter([each for each in given if each not in trained])
    places = tuple(each if each in given else next(others, "") for each in trained)
    if sorted(places) != sorted(given):
        raise DataError(
            f"{name}: --text-column names {listed(given)}, and the model was trained on"
            f" {listed(trained)}; name one column for each of those"
        )
    return places


def message(columns: Sequence[str], cells: Sequence[object], trained: Sequence[str] = ()) -> str:
    """Return the text of a row as the model reads it.

    Args:
        columns: The names of the text columns.
        cells: Their values in the row, not all of them blank.
        trained: The names in the training table, by which the model reads several columns.

    Raises:
        DataError: Without the row: a cell holds no text, or one alone not those of all columns.
    """
    if len(cells) > 1:
        texts = ["" if is_blank(cell) else text_of(cell) for cell in cells]
        return joined(trained or columns, texts)
    text = text_of(cells[0])
    if not has_names(text, trained):
        raise DataError(
            f"one text, {quote(text)}, and the model was trained on {listed(trained)};"
            " name a column for each with --text-column"
        )
    return text


@dataclass(frozen=True, kw_only=True)
class Stream:
    """Rows that are read as they are asked for.

    Iterating gives pairs: the text, None if it is blank, and the values of `columns`.
    """

    columns: tuple[str, ...]  # that are kept beside the text
    is_text: bool  # whether the source has one text a line, and no columns
    schema: Any  # of Arrow, None where the format has none
    rows: Iterator[tuple[str | None, list[object]]]


def open_stream(
    source: str,
    *,
    text_column: str | Sequence[str] | None = None,
    options: ReadOptions | None = None,
    keep: Sequence[str] | None = None,
    trained: Sequence[str] = (),
    remarks: Remarks | None = None,
) -> Stream:
    """Open a file or standard input (`-`), whose rows are read one by one.

    Args:
        source: A path, or `-`.
        text_column: The column of the messages, or several; by default found by its usual names.
        options: How to read the source, where its name does not tell; standard input has one text
            a line by default.
        keep: The columns to keep beside the text, all by default.
        trained: Text columns of the training table, which come before the usual ones.
        remarks: Told what is worth a line.

    Raises:
        ConfigError: There is no such format, or standard input cannot have it.
        DataError: As in `read_table`: at once for the first row, else when the row is reached.
    """
    part = file_part(Path(source), options, allow_text=True)
    return open_part(part, text_column=text_column, keep=keep, trained=trained, remarks=remarks)


def open_part(
    part: Part,
    *,
    text_column: str | Sequence[str] | None = None,
    keep: Sequence[str] | None = None,
    trained: Sequence[str] = (),
    remarks: Remarks | None = None,
) -> Stream:
    """Open a table whose rows are read one by one; the arguments are those of `open_stream`."""
    remarks = Remarks() if remarks is None else remarks
    names, kept = list[str](), list[str]()

    def pick(columns: Sequence[str], peek: Peek) -> list[int]:
        given = in_trained_order(part.name, named(text_column), trained)
        texts = choose_text(part.name, given, columns, peek, trained)
        wanted = dict.fromkeys(keep or ())
        for name in wanted:
            if name not in columns:
                raise DataError(
                    f"{part.name} has no column {quote(name)} to keep; correct --id-column"
                )
            if (count := columns.count(name)) > 1:
                raise DataError(
                    f"{part.name} has {count} columns called {quote(name)}; rename all but one"
                )
        others = range(len(columns)) if keep is None else [columns.index(each) for each in wanted]
        names[:] = [columns[place] for place in texts]
        kept[:] = [columns[place] for place in others]
        return [*texts, *others]

    def rows() -> Iterator[tuple[str | None, list[object]]]:
        for row, line, values in part.read(pick, remarks):
            cells, others = values[: len(names)], list(values[len(names) :])
            if all(map(is_blank, cells)):
                yield None, others
                remarks.add(part.name, "with a blank text, without a label", row, line)
                continue
            try:
                yield message(names, cells, trained), others
            except DataError as error:
                raise DataError(f"{part.name}: {row_place(row, line)} has {error}") from None

    # The first row now, the others as they are asked for
    stream = rows()
    first = next(stream, None)  # a fault of the whole file shows before any work
    if first is None:
        raise DataError(f"{part.name} has no rows; add some")
    return Stream(
        columns=tuple(kept),
        is_text=part.is_text,
        schema=part.schema() if part.schema else None,
        rows=chain([first], stream),
    )


def stream_texts(
    source: str,
    *,
    text_column: str | Sequence[str] | None = None,
    format: str | None = None,  # noqa: A002
    trained: Sequence[str] = (),
) -> Iterator[str]:
    """Yield the texts of a file or of standard input (`-`) one by one, holding none in memory.

    Args:
        source: A path, or `-`.
        text_column: The column of the messages, or several; by default found by its usual names.
        format: The format, such as `csv`. By default taken from the file's name, and `text` (one
            message a line) for standard input.
        trained: Text columns of the training table, which come before the usual ones.

    Raises:
        ConfigError: There is no such format, or standard input cannot have it.
        DataError: As in `open_stream`, and for a blank text.
    """
    stream = open_stream(
        source,
        text_column=text_column,
        options=ReadOptions(format=format),
        keep=(),
        trained=trained,
    )
    name = "standard input" if source == STANDARD_INPUT else source

    def texts() -> Iterator[str]:
        for row, (text, _) in enumerate(stream.rows, 1):
            if text is None:
                raise DataError(f"{name}: row {row} has a blank text; write or delete it")
            yield text

    return texts()

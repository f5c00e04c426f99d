"""Predictions beside the columns of the input: CSV, JSON lines, Parquet."""

from __future__ import annotations

import contextlib
import csv
from collections.abc import Iterator, Sequence
from datetime import date, datetime, time
from itertools import chain
from pathlib import Path, PurePath
from typing import Any, Protocol, TextIO

from remora.config import PredictConfig
from remora.data.values import csv_cell, json_line
from remora.errors import ConfigError, DataError
from remora.formatting import cut, escape_formula, one_line, quote
from remora.runtime import files

SUFFIXES = (".csv", ".jsonl", ".parquet")
ROW_GROUP_ROWS = 10_000

Ranked = list[tuple[str, float]]
"""The likeliest labels of a text with their probabilities; none for a blank text."""


Levels = Sequence[tuple[str | None, float]]
"""The levels above the likeliest label with their probabilities, None where one is withheld."""


class Writer(Protocol):
    """Writes predictions one by one."""

    def write(
        self, values: Sequence[object], ranked: Ranked, answer: str | None, levels: Levels = ()
    ) -> None:
        """Write a row.

        Args:
            values: The input's columns.
            ranked: The likeliest labels.
            answer: The label that is given, None where it is withheld.
            levels: The levels above the likeliest label; none of a blank text.
        """

    def flush(self) -> None:
        """Hand on what was written."""

    def close(self) -> None:
        """Write the end."""


def check_output(name: str, source: str) -> None:
    """Refuse a file whose name tells no format or that cannot be written, and the table itself.

    Raises:
        ConfigError: If its name tells no format, or it is the table or a folder.
        ResourceError: If there is no folder for it, or it is write-protected.
    """
    check_format(name)
    files.check_output(name, "--output", source=source)


def check_format(name: str) -> str:
    """Return the suffix that tells the format of an output; raises ConfigError."""
    suffix = PurePath(name).suffix.lower()
    if suffix not in SUFFIXES:
        raise ConfigError(
            f"{name} has no format by its name; end it with one of {', '.join(SUFFIXES)}"
        )
    return suffix


def check_names(config: PredictConfig, columns: Sequence[str]) -> None:
    """Refuse columns of one name for an output that holds one of each; raises DataError."""
    suffix = ".jsonl" if config.json else ".csv"
    if config.output is not None:
        suffix = check_format(str(config.output))
    twice = next((name for name in columns if columns.count(name) > 1), None)
    if suffix != ".csv" and twice is not None:
        raise DataError(
            f"{config.source} has {columns.count(twice)} columns called {quote(twice)}, and"
            f" {suffix[1:]} holds one of a name; rename all but one, or name other columns"
            " with --id-column"
        )


@contextlib.contextmanager
def open_writer(
    config: PredictConfig,
    columns: Sequence[str],
    schema: Any,
    output: str | Path | TextIO,
    num_levels: int = 0,
    *,
    are_whole: bool = False,
) -> Iterator[Writer]:
    """Open what writes predictions; a file is there whole or not at all.

    Args:
        config: The settings.
        columns: The input's columns that are kept.
        schema: Their schema of Arrow, None where the format has none.
        output: A file's name, or where to write CSV or JSON lines.
        num_levels: Levels above the labels.
        are_whole: Whether the predictions are among the columns already.

    Raises:
        DataError: If the format cannot hold the input's values.
        ResourceError: If the disk fails.
    """
    abstains = config.threshold is not None or config.abstain_at_accuracy is not None
    names = [] if are_whole else predicted_names(config.top_k, num_levels)
    suffix = ".jsonl" if config.json else ".csv"
    with contextlib.ExitStack() as stack:
        writer: Writer
        if isinstance(output, str | Path):
            suffix = check_format(str(output))
            temporary = stack.enter_context(files.replacing(Path(output)))
            if suffix != ".parquet":
                output = stack.enter_context(
                    temporary.open("w", encoding="utf-8", errors="backslashreplace", newline="")
                )
        if isinstance(output, str | Path):
            writer = ParquetWriter(temporary, columns, names, schema)
        elif suffix == ".jsonl":
            writer = JsonWriter(output, columns, abstains=abstains, are_whole=are_whole)
        else:
            writer = CsvWriter(output, columns, names, safe=config.spreadsheet_safe)
        yield writer
        writer.close()


def free_names(wanted: Sequence[str], columns: Sequence[str]) -> list[str]:
    """Return names for the predictions' columns that no column of the input has."""
    prefix = ""
    while any(f"{prefix}{name}" in columns for name in wanted):
        prefix += "predicted_"
    return [f"{prefix}{name}" for name in wanted]


def predicted_names(top_k: int, num_levels: int = 0) -> list[str]:
    """Return the names of the columns of labels and levels, each before its probability."""
    more = [f"{name}_{k}" for k in range(2, top_k + 1) for name in ("label", "probability")]
    levels = [f"level_{k}{end}" for k in range(1, num_levels + 1) for end in ("", "_probability")]
    return ["label", "probability", *more, *levels]


def predicted_cells(ranked: Ranked, answer: str | None, levels: Levels) -> list[object]:
    """Return the cells of these columns, None for what is withheld; none of a blank text."""
    given = [(label if place else answer, p) for place, (label, p) in enumerate(ranked)]
    return [cell for pair in (*given, *levels) for cell in pair]


class CsvWriter:
    """Writes CSV: the input's columns, then the labels with their probabilities."""

    def __init__(
        self, output: TextIO, columns: Sequence[str], names: Sequence[str], *, safe: bool = False
    ) -> None:
        """Write the header.

        Args:
            output: Where to write.
            columns: Those of the input.
            names: Those of the predictions.
            safe: Whether to escape cells that a spreadsheet would run as formulas.
        """
        self._output, self._num_names, self._safe = output, len(names), safe
        self._writer = csv.writer(_LineFeeds(output), lineterminator="\r\n")
        self._put([*columns, *free_names(names, columns)])

    def write(
        self, values: Sequence[object], ranked: Ranked, answer: str | None, levels: Levels = ()
    ) -> None:
        """Write a row; a withheld label is an empty cell."""
        cells = [csv_cell(value) for value in values]
        found = predicted_cells(ranked, answer, levels)
        cells += [f"{each:.6f}" if isinstance(each, float) else csv_cell(each) for each in found]
        self._put(cells + [""] * (self._num_names - len(found)))

    def _put(self, cells: list[str]) -> None:
        self._writer.writerow(map(escape_formula, cells) if self._safe else cells)

    def flush(self) -> None:
        """Hand on what was written."""
        self._output.flush()

    def close(self) -> None:
        """Do nothing: each row is whole."""


class _LineFeeds:
    """Ends rows with a line feed alone; csv quotes a carriage return only if it ends rows."""

    def __init__(self, output: TextIO) -> None:
        self._output = output

    def write(self, row: str) -> None:
        self._output.write(row.removesuffix("\r\n") + "\n")


class JsonWriter:
    """Writes JSON lines: the input's fields, and a list of labels with their probabilities."""

    def __init__(
        self, output: TextIO, columns: Sequence[str], *, abstains: bool, are_whole: bool = False
    ) -> None:
        """Name the fields.

        Args:
            output: Where to write.
            columns: Those of the input.
            abstains: Whether to tell of each row if its label is withheld.
            are_whole: Whether the predictions are among the columns already.
        """
        self._output, self._columns, self._abstains = output, list(columns), abstains
        self._are_whole = are_whole
        names = ["labels", "abstained", "levels"]
        self._labels, self._abstained, self._levels = free_names(names, columns)

    def write(
        self, values: Sequence[object], ranked: Ranked, answer: str | None, levels: Levels = ()
    ) -> None:
        """Write a row."""
        record: dict[str, object] = dict(zip(self._columns, values, strict=True))
        if self._are_whole:
            self._put(record)
            return
        record[self._labels] = _probable(ranked)
        if levels:
            record[self._levels] = _probable(levels)
        if self._abstains:
            record[self._abstained] = answer is None
        self._put(record)

    def _put(self, record: dict[str, object]) -> None:
        self._output.write(json_line(record) + "\n")

    def flush(self) -> None:
        """Hand on what was written."""
        self._output.flush()

    def close(self) -> None:
        """Do nothing: each row is whole."""


class ParquetWriter:
    """Writes Parquet: the input's columns with their types, then labels and probabilities."""

    def __init__(
        self, path: Path, columns: Sequence[str], names: Sequence[str], schema: Any = None
    ) -> None:
        """Name the columns.

        Args:
            path: The file.
            columns: Those of the input.
            names: Those of the predictions: labels, each before its probability.
            schema: The input's schema of Arrow; by default types are those of the first rows.
        """
        self._path, self._columns, self._schema = path, list(columns), schema
        self._names = [*columns, *free_names(names, columns)]
        self._rows: list[list[object]] = []
        self._file: Any = None

    def write(
        self, values: Sequence[object], ranked: Ranked, answer: str | None, levels: Levels = ()
    ) -> None:
        """Keep a row, and write a group of them when there are enough; a withheld label is null."""
        cells = [*values, *predicted_cells(ranked, answer, levels)]
        self._rows.append(cells + [None] * (len(self._names) - len(cells)))
        if len(self._rows) == ROW_GROUP_ROWS:
            self._write_group()

    def flush(self) -> None:
        """Do nothing: rows are written in groups."""

    def close(self) -> None:
        """Write the last rows and the end of the file."""
        if self._rows or self._file is None:
            self._write_group()
        self._file.close()

    def _write_group(self) -> None:
        import pyarrow
        import pyarrow.parquet

        columns = list(zip(*self._rows, strict=True)) or [()] * len(self._names)
        if self._file is None:
            schema = self._full_schema(pyarrow, columns)
            self._file = pyarrow.parquet.ParquetWriter(self._path, schema)
        schema = self._file.schema
        arrays = [
            _column(field.name, values, field.type)
            for values, field in zip(columns, schema, strict=True)
        ]
        self._file.write_table(pyarrow.table(arrays, schema=schema))
        self._rows = []

    def _full_schema(self, pyarrow: Any, columns: Sequence[Sequence[object]]) -> Any:
        """Return the schema of the file."""
        schema = input_schema(self._columns, columns, self._schema)
        for place, name in enumerate(self._names[len(self._columns) :]):
            kind = pyarrow.float64() if place % 2 else pyarrow.string()
            schema = schema.append(pyarrow.field(name, kind))
        return schema


def input_schema(names: Sequence[str], columns: Sequence[Sequence[object]], given: Any) -> Any:
    """Return the schema of Arrow of the input's columns.

    Args:
        names: Their names.
        columns: Their first values, by which types are found that the input does not give.
        given: The input's own schema as far as it has one, None if it has none.

    Raises:
        DataError: If the first values of a column are of no one type.
    """
    import pyarrow

    fields = []
    for place, name in enumerate(names):
        if given is None or name not in given.names:
            kind = _found_type(name, columns[place])
        else:
            kind = given.field(name).type
            kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
            kind = pyarrow.string() if pyarrow.types.is_null(kind) else kind
        fields.append((name, kind))
    return pyarrow.schema(fields)


def _found_type(name: str, values: Sequence[object]) -> Any:
    """Return the type of Arrow that a column's first values have; raises DataError."""
    import pyarrow

    if {date, datetime} <= set(map(type, values)):
        values = _at_midnight(values)
    try:
        return _without_nulls(pyarrow.infer_type(values))
    except (pyarrow.ArrowException, TypeError, ValueError) as error:
        raise _unfit(name, one_line(error)) from None


def _without_nulls(kind: Any) -> Any:
    """Return a type with texts for what is null or empty so far; raises TypeError."""
    import pyarrow

    if pyarrow.types.is_null(kind):
        return pyarrow.string()
    if pyarrow.types.is_list(kind):
        return pyarrow.list_(_without_nulls(kind.value_type))
    if pyarrow.types.is_struct(kind):
        if not kind.num_fields:
            raise TypeError("objects without fields")
        return pyarrow.struct([(each.name, _without_nulls(each.type)) for each in kind])
    return kind


def _at_midnight(values: Sequence[object]) -> list[object]:
    """Return dates as the times that they begin: a workbook has both in one column."""
    return [datetime.combine(v, time()) if type(v) is date else v for v in values]


def _column(name: str, values: Sequence[object], kind: Any) -> Any:
    """Return an array of Arrow that holds values as they are; raises DataError if none does."""
    import pyarrow

    if pyarrow.types.is_timestamp(kind):
        values = _at_midnight(values)
    try:
        reason = _altered(values, kind)
        if reason is None:
            return pyarrow.array(values, kind)
    except (pyarrow.ArrowException, TypeError, ValueError, OverflowError) as error:
        reason = one_line(error)
    raise _unfit(name, reason)


def _altered(values: Sequence[object], kind: Any) -> str | None:
    """Return what a type would change in values without an error of Arrow's, None if nothing.

    The types in Python mostly tell it, at a fraction of the cost of a comparison. A field that an
    object lacks is null.
    """
    import pyarrow

    is_a = pyarrow.types
    if None in values:
        values = [value for value in values if value is not None]
    found = set(map(type, values))
    if is_a.is_struct(kind) and found <= {dict}:
        objects: Any = values
        if more := set[str]().union(*objects).difference(field.name for field in kind):
            return f"its first rows lack the field {quote(min(more))}"
        parts = (_altered([each.get(f.name) for each in objects], f.type) for f in kind)
        return next((part for part in parts if part), None)
    is_list = is_a.is_list(kind) or is_a.is_large_list(kind) or is_a.is_fixed_size_list(kind)
    if is_list and found <= {list}:
        lists: Any = values
        return _altered(list(chain.from_iterable(lists)), kind.value_type)
    for is_such, exact in (
        (is_a.is_string, {str}),
        (is_a.is_boolean, {bool}),
        (is_a.is_integer, {int}),
        (is_a.is_float64, {int, float}),  # Arrow refuses integers that it cannot hold as such
        (is_a.is_date32, {date}),
    ):
        if is_such(kind):
            odd = [] if found <= exact else [each for each in values if type(each) not in exact]
            odd = [each for each in odd if int not in exact or not _is_whole(each)]
            break
    else:
        held = pyarrow.array(values, kind).to_pylist()
        pairs = [] if held == list(values) else zip(values, held, strict=True)
        odd = [a for a, b in pairs if a != b and repr(a) != repr(b)]  # NaN never equals NaN
    if not odd:
        return None
    shown = quote(odd[0]) if isinstance(odd[0], str) else cut(str(odd[0]), 60)
    return f"{shown} is no {kind}, the type of its first rows"


def _is_whole(value: object) -> bool:
    return isinstance(value, float) and value.is_integer()


def _unfit(name: str, reason: str) -> DataError:
    return DataError(
        f"Parquet cannot hold the column {quote(name)} as it is ({reason}); end the name of"
        " --output with .csv or .jsonl"
    )


def _probable(ranked: Levels) -> list[dict[str, object]]:
    """Return labels and their probabilities as JSON holds them."""
    return [{"label": label, "probability": round(p, 6)} for label, p in ranked]

"""Rows of Arrow tables: Parquet files, data sets on the hub, and folders of `save_to_disk`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from remora.data.parts import PEEKED_ROWS, Part, Pick, Remarks, Row
from remora.errors import DataError
from remora.formatting import one_line, quote

if TYPE_CHECKING:
    import datasets

SAVED = ("dataset_dict.json", "state.json")
"""Files that tell a folder of `save_to_disk`: of several splits, and of one."""


def parquet_rows(stream: Any, name: str, pick: Pick) -> Iterator[Row]:
    """Yield the rows of a Parquet file.

    Raises:
        DataError: The file is broken.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        # With pre_buffer pyarrow keeps what it has read of the file until the end.
        with pyarrow.parquet.ParquetFile(stream, pre_buffer=False) as file:
            columns = file.schema_arrow.names
            features = _features(file.schema_arrow)

            def peek() -> list[Any]:
                batch = next(file.iter_batches(batch_size=PEEKED_ROWS), None)
                return [] if batch is None else list(zip(*_values(batch), strict=True))

            wanted = [columns[place] for place in pick(columns, peek)]
            _refuse_twins(name, columns, wanted)
            described = [features.get(column) for column in wanted]
            names = [_names_in(each) for each in described]
            batches = file.iter_batches(columns=list(dict.fromkeys(wanted)), batch_size=10_000)
            yield from _arrow_rows(batches, wanted, names)
    except DataError:  # of the columns
        raise
    except (pyarrow.ArrowException, ValueError, KeyError, AttributeError) as error:
        raise DataError(
            f"{name} is not a readable Parquet file ({one_line(error)});"
            " write it again, or save the table as CSV"
        ) from None


def _refuse_twins(name: str, columns: list[str], wanted: list[str]) -> None:
    """Refuse columns that Arrow cannot tell by their name."""
    for column in wanted:
        if (count := columns.count(column)) > 1:
            raise DataError(
                f"{name} has {count} columns called {quote(column)}; rename all but one"
            )


def file_schema(source: Path | IO[bytes]) -> Any:
    """Return the schema of a Parquet file, with class numbers as the names that rows have."""
    import pyarrow
    import pyarrow.parquet

    schema = pyarrow.parquet.read_schema(source)
    for name, described in _features(schema).items():
        if _names_in(described) and name in schema.names:
            place, text = schema.names.index(name), pyarrow.string()
            is_list = pyarrow.types.is_nested(schema.types[place])
            kind = pyarrow.list_(text) if is_list else text
            schema = schema.set(place, pyarrow.field(name, kind))
    return schema


def _features(schema: Any) -> dict[str, Any]:
    """Return what `datasets` has written of the columns of a Parquet file; {} if it has not."""
    try:
        metadata = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        return dict(metadata["info"]["features"])
    except (ValueError, KeyError, TypeError):
        return {}


def _names_in(described: Any) -> list[str] | None:
    """Return the names of class numbers, or of lists of them, as a Parquet file describes them."""
    if isinstance(described, list) and len(described) == 1:  # older versions' way to write a list
        return _names_in(described[0])
    if not isinstance(described, dict):
        return None
    return described.get("names") or _names_in(described.get("feature"))


def _values(batch: Any) -> list[list[Any]]:
    return [column.to_pylist() for column in batch.columns]


def _arrow_rows(
    batches: Iterable[Any], columns: list[str], names: list[list[str] | None]
) -> Iterator[Row]:
    """Yield the rows of Arrow batches, class numbers replaced by their names if there are any.

    Lists of numbers are several labels a row.
    """
    row = 0
    for batch in batches:
        values = [batch.column(column).to_pylist() for column in columns]
        for place, classes in enumerate(names):
            if classes:  # a hidden label is -1
                by_number = dict(enumerate(classes))
                values[place] = [
                    [by_number.get(each) for each in number]
                    if isinstance(number, list)
                    else by_number.get(number)
                    for number in values[place]
                ]
        for record in zip(*values, strict=True):
            row += 1
            yield row, row, record


def hub_splits(source: str) -> dict[str, Part]:
    """Load `hf:owner/name[:config]` and return its splits by their names on the hub."""
    import datasets

    name, _, config = source.removeprefix("hf:").partition(":")
    if not name:
        raise DataError(f"{source} names no dataset; write it as hf:owner/name")
    try:
        splits = datasets.load_dataset(name, config or None)
    except Exception as error:  # the hub, the network and the files raise anything
        raise DataError(
            f"{source} cannot be loaded ({one_line(error)});"
            " check the name, the network and HF_ENDPOINT, or name a file"
        ) from error
    return {split: _hub_part(f"{source} ({split})", rows) for split, rows in splits.items()}


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` wrote a folder."""
    return any((folder / name).is_file() for name in SAVED)


def saved_splits(folder: Path) -> dict[str, Part]:
    """Return the splits of a folder of `save_to_disk`; a single data set is the split `train`.

    Raises:
        DataError: The folder is broken.
    """
    import datasets

    try:
        loaded = datasets.load_from_disk(str(folder))
    except Exception as error:  # broken files raise anything
        raise DataError(
            f"the folder {folder} cannot be loaded ({one_line(error)}); save the data set again"
        ) from error
    splits = loaded if isinstance(loaded, dict) else {"train": loaded}
    return {split: _hub_part(f"{folder} ({split})", rows) for split, rows in splits.items()}


def _hub_part(name: str, rows: datasets.Dataset) -> Part:
    return Part(name, partial(_hub_rows, rows))


def _hub_rows(rows: datasets.Dataset, pick: Pick, _remarks: Remarks) -> Iterator[Row]:
    def peek() -> list[Any]:
        return [list(row.values()) for row in rows.select(range(min(PEEKED_ROWS, len(rows))))]

    wanted = [rows.column_names[place] for place in pick(rows.column_names, peek)]
    features = [rows.features[column] for column in wanted]
    names = [getattr(getattr(each, "feature", each), "names", None) for each in features]
    columns = list(dict.fromkeys(wanted))
    batches = rows.select_columns(columns).with_format("arrow").iter(batch_size=10_000)
    yield from _arrow_rows(batches, wanted, names)

"""Tables in, checked rows out.

A table is CSV, TSV, JSON lines or Parquet: a file, a folder of splits, or a dataset of the Hugging
Face Hub. Whatever is wrong with one is a `DataError` that names the file and the row. Rows are
counted from 1 without the header; the line is what an editor shows, and is told where it differs.
"""

import csv
import difflib
import gzip
import hashlib
import json
import re
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from remora.errors import ConfigError, DataError

MAX_VALIDATION_ROWS = 2_000
MAX_TEST_ROWS = 10_000

# The usual names of the columns, in the order in which they are preferred.
TEXT_NAMES = (
    *("text", "message", "sentence", "utterance", "content", "query", "review", "question"),
    *("document", "body", "comment", "tweet", "sms", "request", "description", "input", "prompt"),
)
LABEL_NAMES = (
    *("label_text", "label_name", "label", "labels", "category", "intent", "class", "target"),
    *("sentiment", "topic", "tag", "output", "completion"),
)

_SUFFIXES = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".txt": "text",
}
_SPLITS = {
    **{"train": "train", "training": "train", "test": "test"},
    **{"validation": "validation", "val": "validation", "valid": "validation", "dev": "validation"},
}
_SHARD = re.compile(r"(?P<split>[a-z]+)(-\d+-of-(?P<num_shards>\d+))?")

_Row = tuple[int, int, Sequence[Any]]  # row, line, the values of the columns picked
_Pick = Callable[[Sequence[str]], list[int]]  # a table's columns -> the places of those wanted
_Part = tuple[str, Callable[[_Pick], Iterator[_Row]]]  # a name for messages, a reader


@dataclass(frozen=True)
class Table:
    """Texts and their labels, as parallel lists; `labels` is empty when none were asked for."""

    texts: list[str]
    labels: list[str]

    def __len__(self) -> int:
        return len(self.texts)


@dataclass(frozen=True, kw_only=True)
class DataSummary:
    """What a run says about its data, and keeps in `data.json`.

    The counts of classes, duplicates and conflicts are of the training rows, after the split.
    `sha256` is over split, text and label of every row in order, whatever the file format.
    """

    source: str
    text_column: str
    label_column: str
    num_train: int
    num_validation: int
    num_test: int | None
    num_labels: int
    labels: tuple[str, ...]
    smallest_label: str
    smallest_label_rows: int
    largest_label: str
    largest_label_rows: int
    num_duplicates: int  # rows that repeat an earlier text with its label
    num_conflicting: int  # rows whose text occurs with another label too
    num_train_validation_shared: int  # validation rows whose text is also a training text
    num_train_test_shared: int
    longest_text_chars: int
    sha256: str

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON knows them."""
        return asdict(self) | {"labels": list(self.labels)}

    def lines(self) -> list[str]:
        """Return what is worth telling a person, a sentence a line."""
        test = "no" if self.num_test is None else f"{self.num_test:,}"
        lines = [
            f"{self.num_train:,} training, {self.num_validation:,} validation and {test} test rows"
            f" from {self.source} (text: {_quote(self.text_column)},"
            f" label: {_quote(self.label_column)})",
            f"{self.num_labels:,} labels, from {_rows(self.smallest_label_rows)}"
            f" ({_quote(self.smallest_label)}) to {_rows(self.largest_label_rows)}"
            f" ({_quote(self.largest_label)})",
        ]
        remarks = (
            (self.num_duplicates, "in training repeat an earlier text and label"),
            (self.num_conflicting, "in training have a text that also occurs with another label"),
            (self.num_train_validation_shared, "in validation have a text that is in training too"),
            (
                self.num_train_test_shared,
                "in test have a text that is in training too: the test score may flatter",
            ),
        )
        return lines + [f"{_rows(count)} {remark}" for count, remark in remarks if count]


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """The splits of a source, its labels in sorted order, and what there is to say about it."""

    train: Table
    validation: Table  # empty when there is no file and `validation_fraction` is 0
    test: Table | None
    labels: tuple[str, ...]
    summary: DataSummary


def load_dataset(
    source: str,
    *,
    test: str | None = None,
    validation: str | None = None,
    text_column: str | None = None,
    label_column: str | None = None,
    validation_fraction: float = 0.1,
    test_fraction: float = 0.1,
    seed: int = 0,
) -> Dataset:
    """Read a source, check every row, and split off what it does not bring.

    Args:
        source: A table, a folder with a `train` file (and `validation`, `test`), or
            `hf:owner/name[:config]`, the only form that may touch the network.
        test: A table of test rows, instead of the source's own.
        validation: A table of validation rows, instead of the source's own.
        text_column: The column of the messages; by default found by its usual names.
        label_column: The column of the labels; by default found by its usual names.
        validation_fraction: The share of the source's training rows to hold out, stratified by
            label, where there is no validation table. At most 2,000 rows.
        test_fraction: The same for the test table. At most 10,000 rows.
        seed: Decides which rows are held out.

    Raises:
        ConfigError: A fraction is outside [0, 1), or the two leave nothing to train on.
        DataError: A table is missing, broken, or cannot be learned from.
    """
    for option, value in (("validation", validation_fraction), ("test", test_fraction)):
        if not 0 <= value < 1:
            raise ConfigError(
                f"the {option} fraction is {value}; choose at least 0 and less than 1"
            )
    if validation_fraction + test_fraction >= 1:
        raise ConfigError(
            f"the validation and test fractions sum to {validation_fraction + test_fraction:g};"
            " choose less than 1, so that rows are left to train on"
        )
    parts = _source_parts(source)
    for split, path in (("validation", validation), ("test", test)):
        if path is not None:
            parts[split] = [_file_part(Path(path))]

    train, columns = _read(parts["train"], text_column, label_column)
    labels = tuple(sorted(set(train.labels)))
    if len(labels) < 2:
        raise DataError(
            f"{source}: every training row has the label {_quote(labels[0])};"
            " add rows of at least one other label"
        )
    given = {
        split: _read(parts[split], text_column, label_column, known=labels)[0]
        for split in ("validation", "test")
        if split in parts
    }
    train, held_out = _hold_out(
        train,
        {
            split: min(max(1, round(fraction * len(train))), limit)
            for split, fraction, limit in (
                ("test", test_fraction, MAX_TEST_ROWS),
                ("validation", validation_fraction, MAX_VALIDATION_ROWS),
            )
            if split not in given and fraction > 0
        },
        seed,
    )
    tables = {"train": train, "validation": Table([], []), **given, **held_out}
    return Dataset(
        train=train,
        validation=tables["validation"],
        test=tables.get("test"),
        labels=labels,
        summary=_summarize(source, columns, tables, labels),
    )


def read_table(
    path: str | Path,
    *,
    text_column: str | None = None,
    label_column: str | None = None,
    with_labels: bool = True,
) -> Table:
    """Read one file into memory.

    Texts stay as they are; labels lose the white space around them and are interned.

    Raises:
        DataError: The file is missing or broken, lacks a column, or has a blank text or label.
    """
    part = _file_part(Path(path))
    return _read([part], text_column, label_column, with_labels=with_labels)[0]


def stream_texts(
    source: str,
    *,
    text_column: str | None = None,
    format: str | None = None,  # noqa: A002
) -> Iterator[str]:
    """Yield the texts of a file or of standard input (`-`) one by one, never holding the rest.

    Args:
        source: A path, or `-`.
        text_column: The column of the messages; by default found by its usual names.
        format: `text` (one message a line), `csv`, `tsv`, `jsonl` or `parquet`. By default what the
            file's name says, and `text` for standard input.

    Raises:
        ConfigError: There is no such format, or standard input cannot have it.
        DataError: As in `read_table`: at once if the first row shows it, else when it is reached.
    """
    formats = sorted(set(_SUFFIXES.values()) - ({"parquet"} if source == "-" else set()))
    if format is not None and format not in formats:
        place = "standard input" if source == "-" else "a file"
        raise ConfigError(
            f"{_quote(format)} is not a format of {place}; choose one of {', '.join(formats)}"
        )
    if source == "-":
        name = "standard input"
        read = partial(_parse, sys.stdin.buffer, name, format or "text")
    else:
        name, read = _file_part(Path(source), format, allow_text=True)

    def texts() -> Iterator[str]:
        pick = partial(_choose, name, text_column, None, False)
        for row, line, (text,) in read(pick):
            if _is_blank(text):
                raise DataError(f"{name}: {_where(row, line)} has a blank text; write or delete it")
            yield _text(text, name, row, line)

    stream = texts()
    first = next(stream, None)  # what is wrong with the file as a whole shows before any work
    if first is None:
        raise DataError(f"{name} has no rows; add some")
    return chain([first], stream)


# Finding the tables of a source


def _source_parts(source: str) -> dict[str, list[_Part]]:
    """Map each split that the source has to its parts; `train` is always there."""
    if source.startswith("hf:"):
        return _hub_parts(source)
    path = Path(source)
    return _folder_parts(path) if path.is_dir() else {"train": [_file_part(path)]}


def _folder_parts(folder: Path) -> dict[str, list[_Part]]:
    for place in (folder, folder / "data"):
        files: dict[str, list[Path]] = {}
        for path in sorted(place.glob("*")):
            stem, suffix = _stem_and_suffix(path)
            match = _SHARD.fullmatch(stem)
            split = _SPLITS.get(match["split"]) if match else None
            if split and _SUFFIXES.get(suffix, "text") != "text":
                files.setdefault(split, []).append(path)
        if "train" in files:
            for paths in files.values():
                _check_shards(paths)
            return {split: [_file_part(path) for path in paths] for split, paths in files.items()}
    found = _listed(sorted(path.name for path in folder.iterdir())) or "nothing"
    raise DataError(
        f"the folder {folder} has no train file (found {found});"
        " expected train.csv, .tsv, .jsonl or .parquet, or name a file"
    )


def _check_shards(paths: list[Path]) -> None:
    """Refuse two files for one split, unless they are all the shards of one table."""
    stems = [_stem_and_suffix(path)[0] for path in paths]
    matches = [match for match in map(_SHARD.fullmatch, stems) if match]
    if len({(match["split"], match["num_shards"]) for match in matches}) > 1 or (
        len(paths) > 1 and matches[0]["num_shards"] is None
    ):
        raise DataError(
            f"{paths[0]} and {paths[-1].name} are both {matches[0]['split']} tables;"
            " keep one, or name the file to use"
        )
    num_shards = int(matches[0]["num_shards"] or 1)
    if len(set(stems)) != num_shards or len(paths) != num_shards:
        raise DataError(
            f"{paths[0]} is one of {num_shards} shards, and {len(paths)} are there;"
            " put all of them in the folder, once each"
        )


def _file_part(path: Path, file_format: str | None = None, *, allow_text: bool = False) -> _Part:
    name = str(path)
    if not path.exists():
        raise DataError(f"there is no file or folder {name}; {_missing_hint(path)}")
    if path.is_dir():
        raise DataError(f"{name} is a folder; name a file in it")
    suffix = _stem_and_suffix(path)[1]
    file_format = file_format or _SUFFIXES.get(suffix)
    if file_format is None or (file_format == "text" and not allow_text):
        known = ", ".join(s for s, f in _SUFFIXES.items() if allow_text or f != "text")
        hints = {
            ".json": "; write one JSON object a line and call it .jsonl",
            ".xlsx": "; save the sheet as 'CSV UTF-8'",
            ".xls": "; save the sheet as 'CSV UTF-8'",
        }
        hint = hints.get(suffix, "; save the table as one of these")
        raise DataError(f"{name} is not a table that can be read (those are {known}){hint}")
    return name, partial(_file_rows, path, file_format)


def _missing_hint(path: Path) -> str:
    close = _close(path.name, [p.name for p in path.parent.glob("*")])
    if close:
        return f"did you mean {_quote(close)}?"
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(path)) and path.suffix not in _SUFFIXES:
        return f"check the path, or write hf:{path} for a dataset of the Hugging Face Hub"
    return "check the path"


def _stem_and_suffix(path: Path) -> tuple[str, str]:
    """Split a file's name in lower case, so that `Train.CSV.gz` is `train` and `.csv`."""
    bare = Path(path.name.lower().removesuffix(".gz"))
    return bare.stem, bare.suffix


# Reading rows


def _read(
    parts: list[_Part],
    text_column: str | None,
    label_column: str | None,
    *,
    with_labels: bool = True,
    known: Collection[str] | None = None,
) -> tuple[Table, list[str]]:
    """Read and check the parts of one split; return it with the names of its columns.

    Blank values are counted, so that one error tells how many there are.
    """
    texts: list[str] = []
    labels: list[str] = []
    chosen: list[str] = []
    blank, num_blank = "", 0
    for name, read in parts:

        def pick(columns: Sequence[str], name: str = name) -> list[int]:
            places = _choose(name, text_column, label_column, with_labels, columns)
            chosen[:] = [columns[place] for place in places]
            return places

        for row, line, values in read(pick):
            if any(map(_is_blank, values)):
                num_blank += 1
                if not blank:
                    kind = "text" if _is_blank(values[0]) else "label"
                    blank = f"{name}: {_where(row, line)} has a blank {kind}"
                continue
            texts.append(_text(values[0], name, row, line))
            if with_labels:
                labels.append(_label(values[1], known, name, row, line))
    if blank:
        if num_blank > 1:
            blank += f", and it is one of {num_blank:,} rows with a blank value"
        raise DataError(f"{blank}; fill it in or delete the row")
    if not texts:
        raise DataError(f"{parts[0][0]} has no rows; add some")
    return Table(texts, labels), chosen


def _is_blank(value: Any) -> bool:
    """Tell whether a value is white space, null or not a number."""
    if type(value) is str:
        return not value or value.isspace()
    return value is None or value != value


def _text(value: Any, name: str, row: int, line: int) -> str:
    if type(value) is not str:
        raise DataError(
            f"{name}: {_where(row, line)} has a text of type {type(value).__name__};"
            " make it a string, or name another column with --text-column"
        )
    _check_characters(value, name, row, line)
    return value


def _label(value: Any, known: Collection[str] | None, name: str, row: int, line: int) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # what pandas makes of whole numbers in a column that had a gap
    if not isinstance(value, str | int):
        raise DataError(
            f"{name}: {_where(row, line)} has the label {_quote(str(value))} of type"
            f" {type(value).__name__}; make it a string or a whole number,"
            " or name another column with --label-column"
        )
    label = sys.intern(str(value).strip())
    if known is None:
        _check_characters(label, name, row, line)
    elif label not in known:
        close = _close(label, known)
        raise DataError(
            f"{name}: {_where(row, line)} has the label {_quote(label)}, which no training row has;"
            + (f" did you mean {_quote(close)}?" if close else " correct it or add training rows")
        )
    return label


def _check_characters(value: str, name: str, row: int, line: int) -> None:
    if "\0" in value:
        raise DataError(f"{name}: {_where(row, line)} has a NUL character; remove it")
    try:
        value.isascii() or value.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{name}: {_where(row, line)} has half of a surrogate pair,"
            f" \\u{ord(value[error.start]):04x}; write the character whole or remove it"
        ) from None


def _file_rows(path: Path, file_format: str, pick: _Pick) -> Iterator[_Row]:
    try:
        if file_format == "parquet":
            yield from _parquet_rows(path, pick)
            return
        zipped = path.suffix.lower() == ".gz"
        with gzip.open(path) if zipped else path.open("rb") as stream:
            yield from _parse(stream, str(path), file_format, pick)
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or _one_line(error)
        raise DataError(f"{path} cannot be read ({reason}); check the file") from error


def _parse(stream: Iterable[bytes], name: str, file_format: str, pick: _Pick) -> Iterator[_Row]:
    lines = _decode(stream, name)
    if file_format == "jsonl":
        yield from _json_rows(lines, name, pick)
    elif file_format == "text":
        for number, line in enumerate(lines, 1):
            yield number, number, [line.rstrip("\r\n")]
    else:
        yield from _csv_rows(lines, name, "\t" if file_format == "tsv" else None, pick)


def _decode(stream: Iterable[bytes], name: str) -> Iterator[str]:
    """Decode UTF-8 line by line, which is what lets an error tell the line."""
    number = 0
    for number, line in enumerate(stream, 1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise DataError(
                f"{name}: line {number} has the byte 0x{line[error.start]:02x} at position"
                f" {error.start + 1}, which is not UTF-8; save the file as UTF-8"
                f" (it may be {_likely_encoding(line)})"
            ) from None
        if "\0" in text:
            raise DataError(
                f"{name}: line {number} has a NUL byte; remove it,"
                " or save the file as UTF-8 if it is UTF-16"
            )
        yield text
    if number == 0:
        raise DataError(f"{name} is empty; put a table into it")


def _likely_encoding(line: bytes) -> str:
    if line.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "UTF-16"
    try:
        line.decode("cp1252")
    except UnicodeDecodeError:
        return "damaged, or in an older encoding"
    return "Windows-1252 or Latin-1"


def _csv_rows(
    lines: Iterator[str], name: str, delimiter: str | None, pick: _Pick
) -> Iterator[_Row]:
    first = next(lines)
    if delimiter is None:  # the one that makes the most columns of the header, the comma on a tie
        delimiter = max(",;\t", key=lambda mark: len(next(csv.reader([first], delimiter=mark))))
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(chain([first], lines), delimiter=delimiter, strict=True)
    row, line = 0, 1  # of the row being read; a row may span lines
    try:
        header = [column.strip() for column in next(reader)]
        if not any(header):
            raise DataError(f"{name}: line 1 is blank; name the columns there")
        places = pick(header)
        line = reader.line_num + 1
        for values in reader:
            if values or len(header) == 1:  # in a wider table a blank line is no row
                row += 1
                if len(values) not in (len(header), 0):
                    raise DataError(
                        f"{name}: {_where(row, line)} has {len(values)} fields where the header has"
                        f" {len(header)}; put a text that holds {_quote(delimiter)} in double quotes"
                    )
                yield row, line, [values[place] for place in places] if values else [""]
            line = reader.line_num + 1
    except csv.Error as error:
        found = {
            "unexpected end of data": "opens a double quote that is never closed",
            f"'{delimiter}' expected after '\"'": "has text after a closing double quote",
        }.get(str(error), f"is not CSV ({_one_line(error)})")
        advice = "close it, and write a double quote inside a quoted text twice"
        if "new-line" in str(error):
            found = "has a bare carriage return"
            advice = "save the file with LF or CRLF at the end of lines"
        raise DataError(f"{name}: {_where(row + 1, line)} {found}; {advice}") from None


def _json_rows(lines: Iterator[str], name: str, pick: _Pick) -> Iterator[_Row]:
    row, wanted = 0, list[str]()
    for line, content in enumerate(lines, 1):
        if not content.strip():
            continue
        row += 1
        try:
            record = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{name}: {_where(row, line)} is not valid JSON ({_one_line(error)});"
                " write one JSON object a line"
            ) from None
        if not isinstance(record, dict):
            raise DataError(
                f"{name}: {_where(row, line)} is a JSON {type(record).__name__} and not an object;"
                ' write one object a line, such as {"text": "...", "label": "..."}'
            )
        if row == 1:
            columns = list(record)
            wanted = [columns[place] for place in pick(columns)]
        yield row, line, [record.get(column) for column in wanted]


def _parquet_rows(path: Path, pick: _Pick) -> Iterator[_Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            wanted = [columns[place] for place in pick(columns)]
            metadata = json.loads((file.schema_arrow.metadata or {}).get(b"huggingface", b"{}"))
            features = metadata.get("info", {}).get("features", {})
            names = [features.get(column, {}).get("names") for column in wanted]
            yield from _arrow_rows(file.iter_batches(columns=wanted), wanted, names)
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise DataError(
            f"{path} is not a Parquet file that can be read ({_one_line(error)});"
            " write it again, or save the table as CSV"
        ) from None


def _arrow_rows(
    batches: Iterable[Any], columns: list[str], names: list[list[str] | None]
) -> Iterator[_Row]:
    """Yield the rows of Arrow batches, with class numbers as their names where there are names."""
    row = 0
    for batch in batches:
        values = [batch.column(column).to_pylist() for column in columns]
        for place, classes in enumerate(names):
            if classes:  # a hidden label is -1, and none of the classes
                by_number = dict(enumerate(classes))
                values[place] = [by_number.get(number) for number in values[place]]
        for row, record in enumerate(zip(*values, strict=True), row + 1):  # noqa: B020
            yield row, row, record


def _hub_parts(source: str) -> dict[str, list[_Part]]:
    import datasets

    _, name, *config = source.split(":")
    try:
        splits = datasets.load_dataset(name, *config)
    except Exception as error:  # whatever the hub, the network or the builder script raises
        raise DataError(
            f"{source} cannot be loaded ({_one_line(error)});"
            " check the name, the network and HF_ENDPOINT, or name a file"
        ) from error
    parts: dict[str, list[_Part]] = {}
    for split, rows in splits.items():
        if split in _SPLITS and _SPLITS[split] not in parts:
            parts[_SPLITS[split]] = [(f"{source} ({split})", partial(_hub_rows, rows))]
    if "train" not in parts:
        raise DataError(
            f"{source} has no train split (found {_listed(list(splits))});"
            " choose another dataset or configuration"
        )
    return parts


def _hub_rows(rows: Any, pick: _Pick) -> Iterator[_Row]:
    wanted = [rows.column_names[place] for place in pick(rows.column_names)]
    names = [getattr(rows.features[column], "names", None) for column in wanted]
    batches = rows.select_columns(wanted).with_format("arrow").iter(batch_size=10_000)
    yield from _arrow_rows(batches, wanted, names)


# Choosing columns


def _choose(
    name: str,
    text_column: str | None,
    label_column: str | None,
    with_labels: bool,
    columns: Sequence[str],
) -> list[int]:
    """Return the place of the text column and, if wanted, of the label column."""
    text = None if text_column is None else _given(name, "text", text_column, columns)
    label = None
    if with_labels and label_column is not None:
        label = _given(name, "label", label_column, columns)
    if text is None:
        text = _usual(name, TEXT_NAMES, columns, label)
    if label is None:
        label = _usual(name, LABEL_NAMES, columns, text)
    if len(columns) == 2 and (text is None) != (label is None):
        text, label = (text, 1 - text) if text is not None else (1 - (label or 0), label)
    if text is None:
        raise _missing_column(name, "text", TEXT_NAMES, columns)
    if not with_labels:
        return [text]
    if label is None:
        raise _missing_column(name, "label", LABEL_NAMES, columns)
    if text == label:
        raise ConfigError(
            f"column {_quote(columns[text])} is named for the texts and for the labels;"
            " give --text-column and --label-column different columns"
        )
    return [text, label]


def _given(name: str, kind: str, column: str, columns: Sequence[str]) -> int:
    if column not in columns:
        close = _close(column, columns)
        raise DataError(
            f"{name} has no column {_quote(column)} (found {_listed(columns)}); "
            + (f"did you mean {_quote(close)}?" if close else f"name one with --{kind}-column")
        )
    return _only(name, column, columns)


def _usual(
    name: str, usual: Sequence[str], columns: Sequence[str], taken: int | None
) -> int | None:
    lowered = {column.casefold(): column for column in reversed(columns)}
    for candidate in usual:
        if candidate in lowered:
            place = _only(name, lowered[candidate], columns)
            if place != taken:
                return place
    return None


def _only(name: str, column: str, columns: Sequence[str]) -> int:
    if columns.count(column) > 1:
        raise DataError(
            f"{name} has {columns.count(column)} columns called {_quote(column)}; rename all but one"
        )
    return columns.index(column)


def _missing_column(
    name: str, kind: str, usual: Sequence[str], columns: Sequence[str]
) -> DataError:
    close = next((c for c in columns if _close(c.casefold(), usual)), None)
    hint = f"did you mean --{kind}-column {close}?" if close else f"name it with --{kind}-column"
    return DataError(
        f"{name} has no {kind} column: found {_listed(columns)},"
        f" expected one of {', '.join(usual[:8])}; {hint}"
    )


# Splitting and counting


def _hold_out(table: Table, sizes: dict[str, int], seed: int) -> tuple[Table, dict[str, Table]]:
    """Split rows off, each class by its share; every class keeps a training row.

    scikit-learn's stratified splits refuse a class of one row and more classes than rows to hold
    out, so the rows are dealt here: whole shares first, then the largest remainders.

    Args:
        table: The rows to split.
        sizes: The number of rows to hold out for each split; fewer where classes run out.
        seed: Decides which rows go, and which of equal remainders count first.

    Returns:
        What is left, and the splits; all of them in the order of `table`.
    """
    import numpy as np

    rng = np.random.default_rng(seed)
    place = {label: i for i, label in enumerate(sorted(set(table.labels)))}
    codes = np.fromiter((place[label] for label in table.labels), np.int64, len(table))  # [N]
    counts = np.bincount(codes)  # [L] rows of each class
    order = rng.permutation(len(table))
    order = order[np.argsort(codes[order], kind="stable")]  # [N] by class, at random within each
    begin = np.cumsum(counts) - counts  # [L] where the next free row of each class is
    free = counts - 1
    owner = np.zeros(len(table), np.int8)  # [N] 0 is training
    for number, size in enumerate(sizes.values(), 1):
        share = size * counts / len(table)
        take = np.minimum(share.astype(np.int64), free)
        by_remainder = np.lexsort((rng.random(len(counts)), take - share))
        while (missing := min(size, free.sum()) - take.sum()) > 0:
            take[[i for i in by_remainder if take[i] < free[i]][:missing]] += 1
        for first, num_rows in zip(begin, take, strict=True):
            owner[order[first : first + num_rows]] = number
        begin, free = begin + take, free - take

    def rows(number: int) -> Table:
        places = np.flatnonzero(owner == number).tolist()
        return Table([table.texts[i] for i in places], [table.labels[i] for i in places])

    return rows(0), {split: rows(number) for number, split in enumerate(sizes, 1)}


def _summarize(
    source: str, columns: list[str], tables: dict[str, Table], labels: tuple[str, ...]
) -> DataSummary:
    train = tables["train"]
    first: dict[str, str] = {}  # text -> its first label
    others: dict[str, set[str]] = {}  # text -> its other labels
    num_duplicates = 0
    for text, label in zip(train.texts, train.labels, strict=True):
        num_known = len(first)
        if first.setdefault(text, label) == label:
            num_duplicates += len(first) == num_known
        elif label in others.setdefault(text, set()):
            num_duplicates += 1
        else:
            others[text].add(label)

    def num_shared(split: str) -> int:
        return sum(text in first for text in tables[split].texts) if split in tables else 0

    digest = hashlib.sha256()
    for split in sorted(tables):
        digest.update(f"{split}:{len(tables[split])}\n".encode())
        for text, label in zip(tables[split].texts, tables[split].labels, strict=True):
            digest.update(f"{len(text)}:{text}{len(label)}:{label}".encode())

    counts = sorted(Counter(train.labels).items(), key=lambda item: (item[1], item[0]))
    return DataSummary(
        source=source,
        text_column=columns[0],
        label_column=columns[1],
        num_train=len(train),
        num_validation=len(tables["validation"]),
        num_test=len(tables["test"]) if "test" in tables else None,
        num_labels=len(labels),
        labels=labels,
        smallest_label=counts[0][0],
        smallest_label_rows=counts[0][1],
        largest_label=counts[-1][0],
        largest_label_rows=counts[-1][1],
        num_duplicates=num_duplicates,
        num_conflicting=sum(text in others for text in train.texts),
        num_train_validation_shared=num_shared("validation"),
        num_train_test_shared=num_shared("test"),
        longest_text_chars=max(len(text) for table in tables.values() for text in table.texts),
        sha256=digest.hexdigest(),
    )


# Wording


def _where(row: int, line: int) -> str:
    return f"row {row}" if row == line else f"row {row} (line {line})"


def _rows(count: int) -> str:
    return f"{count:,} row{'' if count == 1 else 's'}"


def _quote(value: str) -> str:
    """Quote what a table holds, on one line and not too long."""
    return repr(value if len(value) <= 60 else value[:57] + "...")


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(_quote, names[:8])) + (", ..." if len(names) > 8 else "")


def _close(name: str, names: Iterable[str]) -> str | None:
    return next(iter(difflib.get_close_matches(name, list(names), n=1)), None)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."

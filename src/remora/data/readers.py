"""Files as parts: the format by the name, compression, standard input.

Rows are counted from 1 without the header. The line is the one an editor shows; messages name it if
it differs from the row.
"""

from __future__ import annotations

import contextlib
import io
import lzma
import os
import re
import stat
import sys
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import IO

from remora.data import arrow, delimited, json_rows, sheets
from remora.data.parts import Part, Pick, ReadOptions, Remarks, Row
from remora.errors import ConfigError, DataError
from remora.formatting import close_match, listed, one_line, quote

FORMATS = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".tab": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".parquet": "parquet",
    ".xlsx": "xlsx",
    ".txt": "text",
}
COMPRESSIONS = {
    ".gz": "gzip",
    ".bz2": "bz2",
    ".xz": "xz",
    ".zst": "zstd",
    ".lz4": "lz4",
    ".zip": "zip",
}
STANDARD_INPUT = "-"
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_WHOLE = {"parquet", "xlsx"}  # formats whose beginning lies at their end


def suffix_format(path: Path) -> str | None:
    """Return the format that a file's name tells, without that of its compression."""
    if path.suffix.lower() in COMPRESSIONS:
        path = path.with_suffix("")
    return FORMATS.get(path.suffix.lower())


def own_format(path: Path) -> str | None:
    """Return the format that the name of a file tells, or that of the table in an archive."""
    if path.suffix.lower() == ".zip" and suffix_format(path) is None and path.is_file():
        return suffix_format(Path(_member(path)))
    return suffix_format(path)


def file_part(path: Path, options: ReadOptions | None = None, *, allow_text: bool = False) -> Part:
    """Return a file, a pipe or standard input (`-`) as a part, after checking its name.

    Raises:
        ConfigError: The format is not one that the source can have.
        DataError: The file is missing, or nothing tells its format.
    """
    options = options or ReadOptions()
    known = {each for each in FORMATS.values() if allow_text or each != "text"}
    if str(path) == STANDARD_INPUT:
        known -= _WHOLE
    if options.format is not None and options.format not in known:
        place = "standard input" if str(path) == STANDARD_INPUT else "a file"
        raise ConfigError(
            f"{quote(options.format)} is not a format of {place}; choose one of"
            f" {', '.join(sorted(known))}"
        )
    if str(path) == STANDARD_INPUT:
        if options.format is None and not allow_text:
            raise ConfigError(
                "standard input has no name that tells its format; give one with --input-format,"
                " such as csv"
            )
        is_text = options.format in {None, "text"}
        return Part("standard input", partial(_stdin_rows, options), is_text=is_text)
    if not path.exists():
        raise DataError(f"there is no file or folder {path}; {_missing_hint(path)}")
    if path.is_dir():
        return _folder_part(path)
    file_format = options.format or own_format(path)
    if file_format not in known:
        raise _unknown_format(path, allow_text=allow_text)
    has_schema = file_format == "parquet" and path.is_file() and not _compression(path)
    return Part(
        str(path),
        partial(_file_rows, path, file_format, options),
        partial(arrow.file_schema, path) if has_schema else None,
        is_text=file_format == "text",
    )


def saved_parts(folder: Path) -> dict[str, Part]:
    """Return the splits of a folder of `save_to_disk`, each by the name of its own folder."""
    has_several = (folder / arrow.SAVED[0]).is_file()
    return {
        split: replace(part, name=str(folder / split if has_several else folder))
        for split, part in arrow.saved_splits(folder).items()
    }


def _folder_part(folder: Path) -> Part:
    """Return the only table of a folder of `save_to_disk`; raises DataError for other folders."""
    if not arrow.is_saved(folder):
        raise DataError(f"{folder} is a folder; name a file in it")
    parts = saved_parts(folder)
    if len(parts) != 1:
        raise DataError(
            f"{folder} holds {len(parts)} splits; name the folder of one, {listed(list(parts))}"
        )
    return next(iter(parts.values()))


def _compression(path: Path) -> str | None:
    return COMPRESSIONS.get(path.suffix.lower())


def _unknown_format(path: Path, *, allow_text: bool) -> DataError:
    readable = ", ".join(s for s, f in FORMATS.items() if allow_text or f != "text")
    hint = {".xls": "save the sheet as .xlsx", ".ods": "save the sheet as .xlsx"}.get(
        path.suffix.lower(),
        "name its format with --input-format, or save the table as one of these",
    )
    return DataError(
        f"{path} is not a readable table by its name (readable are {readable}); {hint}"
    )


def _missing_hint(path: Path) -> str:
    if close := close_match(path.name, [p.name for p in path.parent.glob("*")]):
        return f"did you mean {quote(close)}?"
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(path)) and path.suffix not in FORMATS:
        return f"check the path, or write hf:{path} for a dataset on the Hugging Face Hub"
    return "check the path"


def _stdin_rows(options: ReadOptions, pick: Pick, remarks: Remarks) -> Iterator[Row]:
    with _standard_input() as stream:
        yield from parse(stream, "standard input", options.format or "text", options, pick, remarks)


@contextlib.contextmanager
def _standard_input() -> Iterator[IO[bytes]]:
    """Open standard input anew: a thread that waits for it must not hold Python's own at exit."""
    try:
        descriptor = os.dup(sys.stdin.fileno())
    except (OSError, ValueError):  # it is no file of the system
        yield sys.stdin.buffer
        return
    with os.fdopen(descriptor, "rb") as stream:
        yield stream


def _file_rows(
    path: Path, file_format: str, options: ReadOptions, pick: Pick, remarks: Remarks
) -> Iterator[Row]:
    try:
        with _opened(path) as file:
            needs_copy = file_format in _WHOLE and not _is_seekable(file)
            stream = io.BytesIO(file.read()) if needs_copy else file
            yield from parse(stream, str(path), file_format, options, pick, remarks)
    except NotImplementedError as error:
        raise DataError(
            f"{path} is compressed in a way that cannot be read ({one_line(error)}); unpack it"
        ) from None
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error, lzma.LZMAError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise DataError(f"{path} cannot be read ({reason}); check the file") from error


def _is_seekable(stream: IO[bytes]) -> bool:
    """Whether a stream can be read from anywhere, at no cost."""
    with contextlib.suppress(OSError, AttributeError):
        return stat.S_ISREG(os.fstat(stream.fileno()).st_mode) and hasattr(stream, "raw")
    return False


def _may_wait(stream: object) -> bool:
    """Whether the next bytes of a stream may be long in coming: those of a pipe or a terminal."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        mode = os.fstat(stream.fileno()).st_mode  # type: ignore[attr-defined]
        return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode) or stat.S_ISCHR(mode)
    return False


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """Open a file, unpacked if it is compressed."""
    compression = _compression(path)
    if compression is None:
        with path.open("rb") as file:
            if file.peek(len(LFS_POINTER)).startswith(LFS_POINTER):
                raise DataError(f"{path} is a pointer of Git LFS, not the file; run: git lfs pull")
            yield file
    elif compression == "zip":
        with zipfile.ZipFile(path) as archive, archive.open(_member(path)) as file:
            yield file
    elif compression == "xz":
        with lzma.open(path) as file:
            yield file
    else:
        import pyarrow

        with pyarrow.input_stream(str(path), compression=compression) as unpacked:
            yield io.BufferedReader(unpacked)


def _member(path: Path) -> str:
    """Return the name of the only table in a zip archive.

    Raises:
        DataError: The file is no archive, or holds no table or several.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = [e for e in archive.infolist() if not e.is_dir()]
    except (OSError, NotImplementedError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} cannot be unpacked ({one_line(error)}); check the file") from error
    hidden = "__MACOSX/", "._"  # what macOS adds
    entries = [e for e in entries if not e.filename.startswith(hidden) and "/._" not in e.filename]
    names = [e.filename for e in entries]
    tables = [name for name in names if suffix_format(Path(name)) not in {None, "text"}]
    tables = tables or (names if len(names) == 1 else [])
    if len(tables) != 1:
        raise DataError(
            f"{path} holds {len(tables) or 'no'} tables (found {listed(names) or 'nothing'});"
            " unpack it and name one file or its folder"
        )
    if next(e for e in entries if e.filename == tables[0]).flag_bits & 1:
        raise DataError(f"{path} is protected by a password; unpack it")
    return tables[0]


def parse(
    stream: IO[bytes] | Iterable[bytes],
    name: str,
    file_format: str,
    options: ReadOptions,
    pick: Pick,
    remarks: Remarks,
) -> Iterator[Row]:
    """Yield the rows of a stream in a format of `FORMATS`; raises DataError."""
    if options.columns and file_format not in {"csv", "tsv", "xlsx"}:
        raise ConfigError(
            f"columns are named for {name}, but a table of format {file_format} names its own;"
            " leave out --columns"
        )
    if file_format == "parquet":
        yield from arrow.parquet_rows(stream, name, pick)
    elif file_format == "xlsx":
        yield from sheets.sheet_rows(stream, name, options.columns, pick)
    elif file_format == "json":
        lines = _decode(stream, name, "add rows")
        yield from json_rows.document_rows(lines, name, pick, remarks)
    elif file_format == "jsonl":
        lines = _decode(stream, name, "add rows")
        yield from json_rows.line_rows(lines, name, pick, remarks, may_wait=_may_wait(stream))
    elif file_format == "text":
        places = pick(["text"], list)
        lines = _decode(stream, name, "give one message a line")
        for number, line in enumerate(lines, 1):
            yield number, number, [line.rstrip("\r\n")] * len(places)
    else:
        delimiter = "\t" if file_format == "tsv" else None
        lines = _decode(stream, name)
        yield from delimited.rows(lines, name, delimiter, options.columns, pick, remarks)


def _decode(
    stream: Iterable[bytes], name: str, if_empty: str = "add a header and rows"
) -> Iterator[str]:
    """Decode UTF-8 line by line, so that an error can name the line."""
    number = 0
    for number, line in enumerate(stream, 1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise DataError(
                f"{name}: line {number} has the byte 0x{line[error.start]:02x} at position"
                f" {error.start + 1}, which is not UTF-8; {_likely(line, number)}"
            ) from None
        if "\0" in text:
            raise DataError(
                f"{name}: line {number} has a NUL byte; remove it,"
                " or save the file as UTF-8 if it is UTF-16"
            )
        yield text
    if number == 0:
        raise DataError(f"{name} is empty; {if_empty}")


def _likely(line: bytes, number: int) -> str:
    """Return what to do about bytes that are not UTF-8."""
    if number == 1 and line.startswith(b"\x1f\x8b"):
        return "it is compressed with gzip, so end its name with .gz"
    if number == 1 and line.startswith(b"PK\x03\x04"):
        return "it is a workbook or a zip archive, so end its name with .xlsx or .zip"
    utf16 = number == 1 and line.startswith((b"\xff\xfe", b"\xfe\xff"))
    return f"save the file as UTF-8 (it may be {'UTF-16' if utf16 else 'Windows-1252 or Latin-1'})"

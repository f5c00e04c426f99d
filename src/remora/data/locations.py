"""The files of a path, a folder, a glob or a URL, by fsspec, and whether one has changed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from remora.data import arrow, readers
from remora.data.parts import Part, Pick, ReadOptions, Remarks, Row
from remora.errors import ConfigError, DataError, RemoraError
from remora.formatting import one_line

_VERSIONS = ("ETag", "etag", "mtime", "LastModified", "last_modified", "updated")
"""Where the file systems of fsspec tell that a file was written again."""


@dataclass(frozen=True, kw_only=True)
class Location:
    """A file at one moment: it has changed if one of these differs."""

    name: str  # a path, or a URL
    size: int  # bytes
    version: str  # what the file system says of its last change, empty if nothing

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON has them."""
        return asdict(self)


def is_url(name: str) -> bool:
    """Whether a name is of another file system than the machine's own."""
    return "://" in name


def open_file_system(name: str) -> tuple[Any, str]:
    """Return the file system of a path or a URL, and its path there.

    Raises:
        ConfigError: If there is no such file system, or the package of it is not installed.
    """
    import fsspec
    import fsspec.core

    if not is_url(name):
        local: Any = fsspec.filesystem("file")
        return local, local._strip_protocol(name)
    try:
        found: tuple[Any, str] = fsspec.core.url_to_fs(name)
    except Exception as error:  # an unknown protocol, or a package of it that is missing
        raise ConfigError(
            f"{name} cannot be opened by fsspec ({one_line(error)}); correct the URL, or install"
            " the package of its file system"
        ) from error
    return found


def find_files(source: str) -> list[Location]:
    """Return the files of a source, sorted by name.

    Args:
        source: A file; a folder, all files in it whose name tells a format; or a glob of files.

    Raises:
        ConfigError: If it is a URL of a file system that is not there.
        DataError: If there is no such file, or the file system fails.
    """
    system, path = open_file_system(source)
    with _reading(source):
        if system.isfile(path):
            found = [system.info(path)]
        elif system.isdir(path):
            found = [each for each in system.ls(path, detail=True) if _is_table(each["name"])]
        else:
            found = list(system.glob(path, detail=True).values()) if _is_glob(path) else []
    files = [each for each in found if each["type"] == "file"]
    if not files and not is_url(source) and not _is_glob(source):
        readers.file_part(Path(source))  # which says what it is instead
    if not files:
        raise DataError(f"there are no tables at {source}; check the path")
    return sorted((_location(system, source, each) for each in files), key=lambda each: each.name)


def _is_glob(path: str) -> bool:
    return any(mark in path for mark in "*?[")


def changed(before: Location) -> bool:
    """Whether a file is another one than it was, or gone."""
    system, path = open_file_system(before.name)
    try:
        return _location(system, before.name, system.info(path)) != before
    except OSError:
        return True


def table_part(location: Location, options: ReadOptions) -> Part:
    """Return a file as a part of a table.

    Raises:
        ConfigError: If there is no such format.
        DataError: If nothing tells the format.
    """
    if not is_url(location.name):
        return readers.file_part(Path(location.name), options, allow_text=True)
    file_format = options.format or readers.suffix_format(Path(location.name))
    if file_format is None:
        raise DataError(
            f"{location.name} is not a readable table by its name; name its format with"
            " --input-format"
        )

    def rows(pick: Pick, remarks: Remarks) -> Iterator[Row]:
        with _reading(location.name), _opened(location.name) as file:
            yield from readers.parse(file, location.name, file_format, options, pick, remarks)

    def schema() -> Any:
        with _reading(location.name), _opened(location.name) as file:
            return arrow.file_schema(file)

    return Part(
        location.name,
        rows,
        schema if file_format == "parquet" else None,
        is_text=file_format == "text",
    )


@contextlib.contextmanager
def _opened(name: str) -> Iterator[IO[bytes]]:
    system, path = open_file_system(name)
    with system.open(path, "rb", compression="infer") as file:
        yield file


@contextlib.contextmanager
def _reading(name: str) -> Iterator[None]:
    """Raise what a file system fails with as a DataError; each has errors of its own."""
    try:
        yield
    except (RemoraError, GeneratorExit):
        raise
    except Exception as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise DataError(
            f"{name} cannot be read ({reason}); check the path and the access"
        ) from error


def _is_table(path: str) -> bool:
    """Whether a file of a folder is a table by its name, and none that begins with _ or a dot."""
    name = Path(path).name
    return readers.suffix_format(Path(name)) is not None and not name.startswith(("_", "."))


def _location(system: Any, source: str, info: dict[str, Any]) -> Location:
    path = str(info["name"])
    version = next((info[key] for key in _VERSIONS if info.get(key) is not None), "")
    return Location(
        name=str(system.unstrip_protocol(path)) if is_url(source) else path,
        size=int(info.get("size") or 0),
        version=str(version),
    )

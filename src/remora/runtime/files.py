"""Files written whole or not at all, and their hashes."""

from __future__ import annotations

import contextlib
import csv
import errno
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from safetensors import SafetensorError

from remora.errors import ConfigError, ResourceError
from remora.formatting import escape_formula, one_line

ELSEWHERE = "choose another folder with --output"

CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO)
"""Numbers of the errors of a disk that is full, broken or only to be read."""


@contextlib.contextmanager
def disk_errors(path: Path, advice: str = ELSEWHERE) -> Iterator[None]:
    """Raise errors of the disk as a ResourceError of one line."""
    try:
        yield
    except (OSError, SafetensorError) as error:  # safetensors has its own for a full disk
        reason = getattr(error, "strerror", None) or error
        raise ResourceError(
            f"cannot write to {path} ({reason}); free space, or {advice}"
        ) from error


def refuse_source(path: Path | str, source: str, flag: str) -> None:
    """Refuse to write over the table that is read; raises ConfigError."""
    try:
        is_source = Path(path).samefile(source)
    except (OSError, ValueError):  # one of them is no file
        return
    if is_source:
        raise ConfigError(f"{path} is the table that is read; name another file with {flag}")


def check_output(
    path: Path | str, flag: str, *, source: str | None = None, suffix: str | None = None
) -> None:
    """Refuse a file that cannot be written, before the work that it is for.

    Args:
        path: The file.
        flag: That names it.
        source: The table that is read, if it is to be kept.
        suffix: Of the only format that can be written, if there is only one.

    Raises:
        ConfigError: If it is the table or a folder, or its name has another suffix.
        ResourceError: If there is no folder for it, or it is write-protected.
    """
    if source is not None:
        refuse_source(path, source, flag)
    path = Path(path)
    if path.is_dir():
        raise ConfigError(f"{path} is a folder; give a file with {flag}")
    if suffix is not None and path.suffix.lower() != suffix:
        name = suffix[1:].upper()
        raise ConfigError(f"{path} is written as {name}; end its name with {suffix}")
    if not path.parent.is_dir():
        raise ResourceError(
            f"cannot write to {path}: there is no folder {path.parent}; make it, or give another"
            f" file with {flag}"
        )
    if path.exists() and not os.access(path, os.W_OK):
        raise ResourceError(f"{path} is write-protected; give another file with {flag}")


@contextlib.contextmanager
def optional(name: str, say: Callable[[str], None], again: str = "") -> Iterator[None]:
    """Report why an optional file of a run cannot be written, and continue without it.

    Args:
        name: The file.
        say: Told so.
        again: Command that writes it, if there is one.
    """
    try:
        yield
    except Exception as error:
        later = f", `{again}` writes it" if again else ""
        reason = one_line(error).partition("; ")[0]
        say(f"{name} could not be written ({reason}); the rest of the run is complete{later}")


def sync(path: Path) -> None:
    """Flush a file, or a folder's entries, to the disk."""
    if os.name == "nt" and path.is_dir():  # Windows cannot open a folder
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_synced(path: Path, text: str) -> None:
    """Write a text file and flush it to the disk, with the same bytes on every system.

    A path that is no UTF-8 is written with escapes, which JSON reads back as they were.
    """
    path.write_text(text, encoding="utf-8", errors="backslashreplace", newline="\n")
    sync(path)


def write_text(path: Path, text: str, advice: str = ELSEWHERE) -> None:
    """Write a file whole or not at all."""
    with replacing(path, advice) as temporary:
        write_synced(temporary, text)


def write_json(path: Path, value: Any) -> None:
    """Write JSON whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_csv(
    path: Path, header: Sequence[str], rows: Iterable[Sequence[str]], advice: str = ELSEWHERE
) -> None:
    """Write a table whole or not at all, its cells safe in a spreadsheet."""
    with replacing(path, advice) as temporary:
        with temporary.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(header)
            writer.writerows([escape_formula(cell) for cell in row] for row in rows)
        sync(temporary)


def write_arrays(path: Path, arrays: Mapping[str, NDArray[Any]], about: Mapping[str, str]) -> None:
    """Write arrays by their names, and what is told of them, as safetensors, whole or not at all.

    Raises:
        ResourceError: If the disk is full.
    """
    from safetensors.numpy import save_file

    with replacing(path) as temporary:
        save_file(dict(arrays), temporary, metadata=dict(about))
        share(temporary)


def share(path: Path) -> None:
    """Give a file the permissions of any new one: safetensors makes files that only we may read."""
    new = path.with_name(f".{path.name}.mode")
    new.touch()
    path.chmod(new.stat().st_mode)
    new.unlink()


@contextlib.contextmanager
def replacing(path: Path, advice: str = ELSEWHERE) -> Iterator[Path]:
    """Give the name of a file to write, which replaces another once it is whole.

    It is hidden and bears the number of this process, so that it is nobody else's file.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with disk_errors(path, advice):
        try:
            yield temporary
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise


def final_name(name: str) -> str:
    """Return the name of the file that one which `replacing` gave would have replaced."""
    return re.sub(r"^\.(.+)\.\d+\.tmp$", r"\1", name)


def folder_bytes(folder: Path, pattern: str = "*") -> int:
    """Return the bytes of the files in a folder, without its subfolders."""
    return sum(path.stat().st_size for path in folder.glob(pattern) if path.is_file())


def weights_sha256(folder: Path) -> str:
    """Return one SHA-256 over a model's weight files, in the order of their names."""
    return sha256(sorted(folder.glob("*.safetensors")))


def sha256(paths: Sequence[Path]) -> str:
    """Return one SHA-256 over the contents of files, in hexadecimal."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()

"""Finds base models: in a folder, a GGUF file, this package, or on the Hugging Face hub."""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import hashlib
import importlib.resources
import os
import re
from collections.abc import Sequence
from pathlib import Path

from remora.errors import ModelError, ResourceError
from remora.formatting import first_line, listed
from remora.models import gguf
from remora.runtime.files import CANNOT_WRITE, sha256

HUB_FILES = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt")
"""Files that are fetched from the hub: never pickled weights, never code."""

HUB_FILES_BUT_WEIGHTS = tuple(pattern for pattern in HUB_FILES if "safetensors" not in pattern)

OTHER_FORMATS = ("consolidated*", "*/*")
"""The same weights in another library's format, which some repositories hold too."""

_CACHE_ERRORS = (*CANNOT_WRITE, errno.EACCES, errno.EPERM)

HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")

EMBEDDED = Path(str(importlib.resources.files("remora") / "bases"))
"""Base models that come with the package, a folder each."""


def find(name: str, *, weights: bool = True) -> Path:
    """Return the folder of a base model, fetched from the hub if `name` is an id there.

    `nano` is the model that comes with the package; a folder of that name is given as ./nano. A
    GGUF file is converted into a folder, once. Without `weights` only a model's configuration and
    its tokenizer are fetched.

    Raises:
        ConfigError: If it is a GGUF file and the package that reads those is not installed.
        ModelError: If there is no such folder, file or id, or it cannot be fetched or converted.
        ResourceError: If memory or disk do not suffice to convert it.
    """
    if not name:
        raise ModelError("model is ''; give the folder of a Hugging Face model, or a hub id")
    if _is_embedded(name):
        return EMBEDDED / name
    if file := gguf.file_of(name):
        return gguf.folder_of(file)
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(
                f"{name} is not a model folder, it has no config.json; "
                "give the folder of a Hugging Face model"
            )
        return folder.resolve()
    if folder.exists():
        raise ModelError(
            f"{name} is a file; give the folder of a Hugging Face model, or a GGUF file"
        )
    if not HUB_ID.fullmatch(name):
        raise ModelError(
            f"there is no folder {name}; give the folder of a Hugging Face model, a hub id such as "
            "Qwen/Qwen2.5-1.5B-Instruct, or nano, the small model in this package"
        )
    folder = fetch(name, HUB_FILES if weights else HUB_FILES_BUT_WEIGHTS)
    if not (folder / "config.json").is_file():
        _refuse_gguf_only(name)
    return folder


def lasting_name(name: str, folder: Path) -> str:
    """Return what remora.json calls a base model: an absolute path, a hub id, or nano.

    Args:
        name: As the user gave it.
        folder: Where `find` found it.
    """
    if not _is_embedded(name) and (file := gguf.file_of(name)):
        return str(file)
    return str(folder) if Path(name).expanduser().is_dir() else name


def _is_embedded(name: str) -> bool:
    """Return whether a base model of this name comes with the package."""
    return re.fullmatch(r"\w+", name) is not None and (EMBEDDED / name).is_dir()


def _refuse_gguf_only(name: str) -> None:
    """Refuse a hub repository that holds a model as GGUF files and nothing else.

    Raises:
        ModelError: If it does.
    """
    from huggingface_hub import HfApi

    found: list[str] = []
    with contextlib.suppress(Exception):  # not there, or no connection now
        files = HfApi().model_info(name).siblings or ()
        found = sorted(f.rfilename for f in files if f.rfilename.lower().endswith(".gguf"))
    if found:
        raise ModelError(
            f"{name} on the hub holds GGUF files only, {listed(found)}; download one with "
            f"`hf download {name} FILE --local-dir .`, and give its path"
        )


def fetch(name: str, patterns: Sequence[str], ignored: Sequence[str] = OTHER_FORMATS) -> Path:
    """Return the folder with a hub repository's files of these patterns, fetched if need be.

    Files of the patterns in `ignored` are not fetched.

    Raises:
        ModelError: If it cannot be fetched, or a file's checksum differs from the hub's.
        ResourceError: If the hub's cache cannot be written.
    """
    from huggingface_hub import is_offline_mode, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        RepositoryNotFoundError,
    )

    try:
        folder = Path(
            snapshot_download(name, allow_patterns=list(patterns), ignore_patterns=list(ignored))
        )
    except GatedRepoError as error:
        raise ModelError(
            f"{name} is gated on the hub; accept its terms on its page, then log in with "
            "`hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"there is neither a folder nor a hub model {name}; check the name, or log in with "
            "`hf auth login` if it is private"
        ) from error
    except Exception as error:  # of the connection, the disk or the hub
        if isinstance(error, OSError) and error.errno in _CACHE_ERRORS:
            raise ResourceError(
                f"{name} cannot be kept in the hub's cache ({error.strerror}: {error.filename}); "
                "free space, or set HF_HOME to another folder"
            ) from error
        if is_offline_mode():
            raise ModelError(
                f"{name} is neither a folder nor complete in the hub's cache, and HF_HUB_OFFLINE "
                "is set; unset it to fetch the missing files, or give a folder"
            ) from error
        reason = first_line(error)
        raise ModelError(
            f"{name} is not a folder and could not be fetched from the hub ({reason}); "
            "check the name and the connection, or give a folder"
        ) from error
    for path in sorted(folder.rglob("*")):
        place = path.relative_to(folder).as_posix()
        if _matches(place, patterns) and not _matches(place, ignored):
            _check_download(path)
    return folder


def _matches(place: str, patterns: Sequence[str]) -> bool:
    """Whether a file's path in a repository is of a pattern; `*` stands for slashes too."""
    return any(fnmatch.fnmatchcase(place, pattern) for pattern in patterns)


def _check_download(path: Path) -> None:
    """Refuse a file whose checksum differs from the hub's; the hub's client checks its size only.

    In the client's cache a file is a link to a blob. The blob's name is the SHA-256 of the file, or
    git's SHA-1 of it if it is small. Without symbolic links, as on Windows by default, the client
    stores files without that name, and no checksum is compared.

    Raises:
        ModelError: If it differs.
    """
    if not path.is_symlink():
        return
    expected = Path(os.readlink(path)).name
    if len(expected) == 64:
        actual = sha256([path])
    elif len(expected) == 40:
        content = path.read_bytes()
        blob = b"blob %d\0%b" % (len(content), content)
        actual = hashlib.sha1(blob, usedforsecurity=False).hexdigest()
    else:
        return
    if actual != expected:
        raise ModelError(
            f"{path} differs from the hub's file, by its checksum; "
            f"remove {path.resolve()} and run the command again"
        )

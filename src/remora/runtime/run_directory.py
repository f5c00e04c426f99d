"""Run directories: their names, the settings and the environment kept in them."""

from __future__ import annotations

import errno
import glob
import importlib.metadata
import json
import os
import platform
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import remora
from remora.config import TrainConfig
from remora.errors import ConfigError, DataError
from remora.formatting import one_line
from remora.runtime.files import disk_errors

HOLDER = "holder.json"
"""Names the process that trains in a run directory, for as long as it does."""


def paths(parent: Path, wanted: str | None, data: str, base: str) -> Iterator[Path]:
    """Yield the paths that a run may take, the first choice first.

    Args:
        parent: Folder of all runs.
        wanted: The run's name; None to make one from the names of data and model.
        data: Source of the rows.
        base: The base model.
    """
    stem = wanted or "-".join(slug(source) for source in (data, base))
    yield parent / stem
    if wanted is None:
        yield from (parent / f"{stem}-{number}" for number in range(2, 10_000))


def create(parent: Path, wanted: str | None, data: str, base: str) -> Path:
    """Make a new run directory; the arguments are those of `paths`.

    Raises:
        ConfigError: If a directory of the wanted name exists.
        ResourceError: If it cannot be made.
    """
    with disk_errors(parent):
        _refuse_file(parent)
        for path in paths(parent, wanted, data, base):
            try:
                path.mkdir(parents=True)
                return path
            except FileExistsError:
                if wanted is not None and (path / HOLDER).is_file():
                    raise ConfigError(
                        f"another process is training in {path}; wait for it, or give another "
                        "--name"
                    ) from None
                if wanted is not None:
                    raise ConfigError(
                        f"{path} exists already; give another --name or remove it"
                    ) from None
    raise ConfigError(f"{parent} holds too many runs named {path.name}; give a --name")


def environment(device: torch.device) -> dict[str, Any]:
    """Return what it takes to repeat a run: versions, device, threads, command and its folder."""
    packages = (
        "torch",
        "transformers",
        "peft",
        "accelerate",
        "tokenizers",
        "numpy",
        "scikit-learn",
    )
    versions = {name: importlib.metadata.version(name) for name in packages}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    return {
        "remora": remora.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": f"{device.type} {name}".strip(),
        "num_threads": torch.get_num_threads(),
        "packages": versions,
        "command": sys.argv,
        "folder": os.getcwd(),
    }


def read_settings(directory: Path) -> TrainConfig:
    """Return the settings of a run from its config.toml.

    Tables named by relative paths that are not there are found from where the run was trained.

    Raises:
        ConfigError: If they are missing or broken.
        DataError: If there is no such folder.
    """
    path = directory / "config.toml"
    if not directory.is_dir():
        raise DataError(f"there is no folder {directory}; give the directory of a finished run")
    try:
        text = path.read_text(encoding="utf-8")
        settings = TrainConfig.from_toml(text, directory)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} cannot be read ({one_line(error)}); give the directory of a finished run"
        ) from error
    try:
        about = json.loads((directory / "environment.json").read_text(encoding="utf-8"))
        folder = os.fspath(about["folder"])
    except (OSError, ValueError, KeyError, TypeError):  # of an earlier version, or damaged
        return settings
    tables = {name: getattr(settings, name) for name in ("data", "validation", "test")}
    elsewhere = {
        name: os.path.join(folder, value)
        for name, value in tables.items()
        if value and not _is_there(value) and _is_there(os.path.join(folder, value))
    }
    return replace(settings, **elsewhere)


def _is_there(path: str) -> bool:
    """Return whether there is a file, a folder, or what a pattern describes."""
    return os.path.exists(path) or bool(glob.glob(path))


def refuse_changed_rows(directory: Path, data: str, sha256: str) -> None:
    """Refuse rows that are not those that a run was trained on.

    Args:
        directory: The run.
        data: Their source, for the message.
        sha256: The hash of the rows as they are now.

    Raises:
        DataError: If they differ, or the run does not say.
    """
    try:
        wanted = json.loads((directory / "data.json").read_text(encoding="utf-8"))["sha256"]
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{directory} has no readable data.json; train it again") from error
    if wanted != sha256:
        raise DataError(
            f"the rows of {data} have changed since {directory} was trained; restore them, or "
            "train again"
        )


def _refuse_file(parent: Path) -> None:
    """Raise the same error on all systems if a file stands where a parent folder is needed."""
    present = next(p for p in (parent, *parent.absolute().parents) if os.path.lexists(p))
    if not present.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(present))


def slug(source: str) -> str:
    """Return the last part of a path or a hub id as a part of a run's name."""
    if os.name == "nt":
        source = source.replace("\\", "/")
    name = source.rstrip("/").split("/")[-1]
    name = re.sub(r"\.(gz|bz2|xz|zst|lz4|zip)$", "", name)
    name = re.sub(r"\.(csv|tsv|tab|jsonl?|ndjson|parquet|xlsx|gguf)$", "", name)
    return re.sub(r"[^\w.-]+", "-", name.removeprefix("hf:")).strip("-.").lower() or "run"

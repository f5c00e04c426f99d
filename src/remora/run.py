"""The run directory: what a run leaves on disk."""

from __future__ import annotations

import contextlib
import csv
import importlib.metadata
import json
import os
import platform
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

import remora
from remora.calibration import Scored
from remora.config import TrainConfig
from remora.errors import ConfigError, ModelError, ResourceError
from remora.table import one_line

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PROBABILITIES = "probabilities.safetensors"
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")


def paths(parent: Path, wanted: str | None, data: str, base: str) -> Iterator[Path]:
    """Yield where a run may lie, the first choice first.

    Args:
        parent: Folder of all runs.
        wanted: Its name; None to make one from the data's and the model's names.
        data: Where the rows come from.
        base: Which base model is adapted.
    """
    stem = wanted or "-".join(_slug(source) for source in (data, base))
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
        for path in paths(parent, wanted, data, base):
            try:
                path.mkdir(parents=True)
                return path
            except FileExistsError:
                if wanted is not None:
                    raise ConfigError(
                        f"{path} exists already; give another --name or remove it"
                    ) from None
    raise ConfigError(f"{parent} holds too many runs named {path.name}; give a --name")


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a failing disk into one line."""
    try:
        yield
    except (OSError, SafetensorError) as error:  # safetensors has its own for a full disk
        reason = getattr(error, "strerror", None) or error
        raise ResourceError(
            f"cannot write to {path} ({reason}); free space, or choose another folder with --output"
        ) from error


def sync(path: Path) -> None:
    """Have the kernel bring a file or a folder to the disk."""
    if os.name == "nt" and path.is_dir():  # folders cannot be opened there
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    with disk_errors(path):
        try:
            temporary.write_text(text, encoding="utf-8")
            sync(temporary)
            os.replace(temporary, path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise


def write_json(path: Path, value: Any) -> None:
    """Write JSON whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_predictions(
    path: Path,
    texts: Sequence[str],
    true: Sequence[str],
    predicted: Sequence[str],
    probability: Sequence[float],
    baseline: Sequence[str] | None = None,
) -> None:
    """Write one row per message, with the baseline's prediction last where there is one."""
    header = ["text", "label", "predicted", "probability"]
    columns = [texts, true, predicted, [f"{p:.6f}" for p in probability]]
    if baseline is not None:
        header, columns = [*header, "baseline"], [*columns, baseline]
    write_csv(path, header, zip(*columns, strict=True))


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Write a table whole or not at all; what a spreadsheet would run as a formula is defused."""
    temporary = path.with_name(path.name + ".tmp")
    with disk_errors(path):
        with temporary.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(header)
            writer.writerows([defused(cell) for cell in row] for row in rows)
        os.replace(temporary, path)


def write_probabilities(path: Path, labels: Sequence[str], splits: Mapping[str, Scored]) -> None:
    """Write the probabilities of splits as safetensors, whole or not at all.

    For each split there are `<split>.probabilities`, float32 [rows, labels], and `<split>.true`,
    int64 [rows], places in the list of labels that is in the file's metadata.
    """
    from safetensors.numpy import save_file

    arrays: dict[str, NDArray[Any]] = {}
    for split, scored in splits.items():
        arrays[f"{split}.probabilities"] = scored.probabilities.astype(np.float32)
        arrays[f"{split}.true"] = scored.true
    temporary = path.with_name(path.name + ".tmp")
    with disk_errors(path):
        save_file(arrays, temporary, metadata={"labels": json.dumps(list(labels))})
        os.replace(temporary, path)


def read_probabilities(path: Path, labels: Sequence[str], split: str) -> Scored | None:
    """Read what `write_probabilities` wrote of a split; None if there is no file or split.

    Raises:
        ModelError: If the file is broken or of other labels.
    """
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="numpy") as file:
            if json.loads(file.metadata()["labels"]) != list(labels):
                raise ModelError(f"{path} is of other labels than the adapter; restore the run")
            if f"{split}.true" not in file.keys():  # noqa: SIM118 - it is no mapping
                return None
            return Scored(
                probabilities=file.get_tensor(f"{split}.probabilities").astype(np.float64),
                true=file.get_tensor(f"{split}.true"),
            )
    except (SafetensorError, KeyError, TypeError, OSError) as error:
        raise ModelError(
            f"{path} is broken ({one_line(error)}); restore it, or delete it to go without"
        ) from error


def defused(cell: str) -> str:
    """Return a cell that no spreadsheet takes for a formula."""
    return f"'{cell}" if cell.startswith(FORMULA_STARTS) else cell


def environment(device: torch.device) -> dict[str, Any]:
    """Return what a repetition of the run would have to match."""
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
    }


def folder_bytes(folder: Path, pattern: str = "*") -> int:
    """Return the bytes of the files in a folder, those below it not counted."""
    return sum(path.stat().st_size for path in folder.glob(pattern) if path.is_file())


def read_settings(directory: Path) -> TrainConfig:
    """Return the settings of a run from its config.toml.

    Raises:
        ConfigError: If they are missing or broken.
    """
    path = directory / "config.toml"
    try:
        settings = tomllib.loads(path.read_text(encoding="utf-8"))
        for name, kind in (("output", Path), ("target_modules", tuple), ("trackers", tuple)):
            if name in settings:
                settings[name] = kind(settings[name])
        return TrainConfig(settings.pop("data"), **settings)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} cannot be read ({one_line(error)}); give the directory of a finished run"
        ) from error


def _slug(source: str) -> str:
    name = re.sub(r"\.(csv|tsv|jsonl|ndjson|parquet)$", "", source.rstrip("/").split("/")[-1])
    return re.sub(r"[^\w.-]+", "-", name.removeprefix("hf:")).strip("-.").lower() or "run"

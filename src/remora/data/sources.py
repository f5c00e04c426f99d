"""The tables of a source: a file, a folder, a sample of this package, or a Hub dataset."""

from __future__ import annotations

import csv
import importlib.resources
import re
from pathlib import Path

from remora.data.arrow import hub_splits, is_saved, saved_splits
from remora.data.parts import Part, ReadOptions
from remora.data.readers import COMPRESSIONS, file_part, suffix_format
from remora.errors import DataError
from remora.formatting import listed, quote

_SPLITS = {
    **{"train": "train", "training": "train", "test": "test"},
    **{"validation": "validation", "val": "validation", "valid": "validation", "dev": "validation"},
}
_SHARD = re.compile(r"(?P<split>[a-z]+)(-\d+-of-(?P<num_shards>\d+))?")


def source_parts(source: str, options: ReadOptions | None = None) -> dict[str, list[Part]]:
    """Return the parts of each split that the source has; `train` is always among them."""
    if source.startswith("hf:"):
        return _known_splits(source, hub_splits(source), "choose another dataset or configuration")
    if source.startswith("sample:"):
        return _folder_parts(_sample_folder(source), options)
    path = Path(source)
    if not path.is_dir():
        return {"train": [file_part(path, options)]}
    if is_saved(path):
        return _known_splits(source, saved_splits(path), "name the folder of one split")
    return _folder_parts(path, options)


def _sample_folder(source: str) -> Path:
    samples = Path(str(importlib.resources.files("remora") / "samples"))
    names = sorted(path.name for path in samples.iterdir() if path.is_dir())
    if (name := source.removeprefix("sample:")) not in names:
        raise DataError(f"there is no sample {quote(name)}; choose one of {listed(names)}")
    return samples / name


def planted_errors(source: str) -> dict[int, str]:
    """Return the correct labels of a sample's deliberately mislabelled training rows.

    Keys are row numbers from 1, without the header. Empty for other sources.
    """
    if not source.startswith("sample:"):
        return {}
    path = _sample_folder(source) / "planted_errors.csv"
    with path.open(encoding="utf-8", newline="") as file:
        return {int(row["row"]) + 1: row["true"] for row in csv.DictReader(file)}


def _known_splits(source: str, splits: dict[str, Part], advice: str) -> dict[str, list[Part]]:
    parts: dict[str, list[Part]] = {}
    for split, part in splits.items():
        if split in _SPLITS:
            parts.setdefault(_SPLITS[split], [part])
    if "train" not in parts:
        raise DataError(f"{source} has no train split (found {listed(list(splits))}); {advice}")
    return parts


def _stem(path: Path) -> str:
    """Return the name of a table's file without its format and compression."""
    if path.suffix.lower() in COMPRESSIONS:
        path = path.with_suffix("")
    return path.stem.lower()


def _folder_parts(folder: Path, options: ReadOptions | None) -> dict[str, list[Part]]:
    for place in (folder, folder / "data"):
        files: dict[str, list[Path]] = {}
        for path in sorted(place.glob("*")):
            match = _SHARD.fullmatch(_stem(path))
            split = _SPLITS.get(match["split"]) if match else None
            if split and path.is_file() and suffix_format(path) not in {None, "text"}:
                files.setdefault(split, []).append(path)
        if "train" in files:
            for paths in files.values():
                _check_shards(paths)
            return {
                split: [file_part(path, options) for path in paths]
                for split, paths in files.items()
            }
    names = listed(sorted(path.name for path in folder.iterdir())) or "nothing"
    raise DataError(
        f"the folder {folder} has no train file (found {names});"
        " add train.csv, .tsv, .jsonl or .parquet, or name a file"
    )


def _check_shards(paths: list[Path]) -> None:
    """Refuse several files for one split, unless they are all shards of one table."""
    matches = [match for match in (_SHARD.fullmatch(_stem(path)) for path in paths) if match]
    split, num_shards = matches[0]["split"], matches[0]["num_shards"]
    if any((match["split"], match["num_shards"]) != (split, num_shards) for match in matches) or (
        num_shards is None and len(paths) > 1
    ):
        raise DataError(
            f"{paths[0]} and {paths[-1].name} are both {_SPLITS[split]} tables;"
            " keep one, or name the file to use"
        )
    num_names = len({match[0] for match in matches})
    if num_shards is not None and not num_names == len(paths) == int(num_shards):
        raise DataError(
            f"{paths[0]} is one of {int(num_shards)} shards, but the folder has {len(paths)};"
            " put all of them in the folder, once each"
        )

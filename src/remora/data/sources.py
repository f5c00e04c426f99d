"""The tables of a source: a file, a folder, a sample of this package, or a Hub dataset."""

from __future__ import annotations

import csv
import importlib.resources
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NamedTuple

from remora.data.arrow import hub_splits, is_saved
from remora.data.parts import Part, ReadOptions
from remora.data.readers import COMPRESSIONS, file_part, own_format, saved_parts, suffix_format
from remora.errors import DataError
from remora.formatting import listed, quote

_SPLITS = {
    **{"train": "train", "training": "train", "test": "test", "testing": "test"},
    **{"validation": "validation", "val": "validation", "valid": "validation", "dev": "validation"},
}
_EVALUATED = "eval", "evaluation"
"""Names of what is measured on: the test table, or that of validation where there is another."""

_SHARD = re.compile(r"(?P<split>[a-z]+)(-(?P<number>\d+)-of-(?P<num_shards>\d+)(-[0-9a-f]+)?)?")


class Source(NamedTuple):
    """The tables of a source."""

    parts: dict[str, list[Part]]  # of each split that it has; `train` is always among them
    others: dict[str, list[str]]  # tables that are not read, by the split that their names tell of


def source_parts(source: str, options: ReadOptions | None = None) -> Source:
    """Return the tables of a source."""
    if source.startswith("hf:"):
        return _known_splits(source, hub_splits(source), "choose another dataset or configuration")
    if source.startswith("sample:"):
        return _folder_parts(_sample_folder(source), options)
    path = Path(source)
    if not path.is_dir():
        return Source({"train": [file_part(path, options)]}, {})
    if is_saved(path):
        return _known_splits(source, saved_parts(path), "name the folder of one split")
    return _folder_parts(path, options)


def held_out_parts(
    given: Mapping[str, str | None], options: ReadOptions | None
) -> dict[str, list[Part]]:
    """Return the tables of splits that were given, None where one was not."""
    paths = {split: Path(path) for split, path in given.items() if path is not None}
    return {split: [_held_out_part(path, options)] for split, path in paths.items()}


def _held_out_part(path: Path, options: ReadOptions | None) -> Part:
    """Return a table of test or validation rows, which may have another format than training's."""
    options, own = options or ReadOptions(), own_format(path)
    own = options.format if own in {None, "text"} else own
    names_its_own = own not in {None, "csv", "tsv", "xlsx"}
    return file_part(path, ReadOptions(own, () if names_its_own else options.columns))


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


def _roles(names: Collection[str]) -> dict[str, str]:
    """Return the splits that names stand for, without those that stand for none."""
    roles = {name: _SPLITS[name] for name in names if name in _SPLITS}
    for name in (each for each in _EVALUATED if each in names):
        free = [split for split in ("test", "validation") if split not in roles.values()]
        roles.update((name, split) for split in free[:1])
    return roles


def _others(names: Mapping[str, str], taken: Collection[str]) -> dict[str, list[str]]:
    """Return names in which that of a split is a word, such as test_data, by the split.

    Args:
        names: Of tables, by what they are called in a message.
        taken: Those that are read.
    """
    others: dict[str, list[str]] = {}
    for spoken, name in names.items():
        words = [word for word in re.split(r"[^a-z]+", name) if word]
        found = {_SPLITS.get(word, "test" if word in _EVALUATED else "") for word in words}
        for split in {"test", "validation"} & found if spoken not in taken else ():
            others.setdefault(split, []).append(spoken)
    return others


def _known_splits(source: str, splits: dict[str, Part], advice: str) -> Source:
    parts: dict[str, list[Part]] = {}
    roles = _roles(splits)
    for split, role in roles.items():
        parts.setdefault(role, [splits[split]])
    if "train" not in parts:
        raise DataError(f"{source} has no train split (found {listed(list(splits))}); {advice}")
    return Source(parts, _others({split: split for split in splits}, roles))


def _stem(path: Path) -> str:
    """Return the name of a table's file without its format and compression."""
    if path.suffix.lower() in COMPRESSIONS:
        path = path.with_suffix("")
    return path.stem.lower()


def _folder_parts(folder: Path, options: ReadOptions | None) -> Source:
    for place in (folder, folder / "data"):
        tables = [
            path
            for path in sorted(place.glob("*"))
            if path.is_file() and suffix_format(path) not in {None, "text"}
        ]
        matches = {path: _SHARD.fullmatch(_stem(path)) for path in tables}
        roles = _roles({match["split"] for match in matches.values() if match})
        files: dict[str, list[Path]] = {}
        for path, match in matches.items():
            if match and (split := roles.get(match["split"])):
                files.setdefault(split, []).append(path)
        if "train" in files:
            for split, paths in files.items():
                _check_shards(split, paths)
            parts = {
                split: [read(path, options) for path in paths]
                for split, paths in files.items()
                for read in [file_part if split == "train" else _held_out_part]
            }
            taken = [path.name for paths in files.values() for path in paths]
            return Source(parts, _others({path.name: _stem(path) for path in tables}, taken))
    names = listed(sorted(path.name for path in folder.iterdir())) or "nothing"
    raise DataError(
        f"the folder {folder} has no train file (found {names});"
        " add train.csv, .tsv, .jsonl or .parquet, or name a file"
    )


def _check_shards(split: str, paths: list[Path]) -> None:
    """Refuse several files for one split, unless they are all shards of one table."""
    matches = [match for match in (_SHARD.fullmatch(_stem(path)) for path in paths) if match]
    name, num_shards = matches[0]["split"], matches[0]["num_shards"]
    if any((match["split"], match["num_shards"]) != (name, num_shards) for match in matches) or (
        num_shards is None and len(paths) > 1
    ):
        raise DataError(
            f"{paths[0]} and {paths[-1].name} are both {split} tables;"
            " keep one, or name the file to use"
        )
    num_names = len({match["number"] for match in matches})
    if num_shards is not None and not num_names == len(paths) == int(num_shards):
        raise DataError(
            f"{paths[0]} is one of {int(num_shards)} shards, but the folder has {len(paths)};"
            " put all of them in the folder, once each"
        )

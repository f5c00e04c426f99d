"""Checks of untrusted files: adapters and base models, before anything acts on them.

Only JSON and safetensors are read. Names must be plain, since PEFT reads others as regular
expressions. Shapes must be those of the configuration, so that it cannot request more memory than
the files themselves hold. No file may lie outside of its folder.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from remora.errors import ModelError
from remora.formatting import one_line

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "remora.json")
AGAIN = "train it again or restore it"
MAX_JSON_BYTES = 32_000_000
MAX_LAYERS = 1_000
MAX_SIZE = 2**24
"""Upper limit of any width, vocabulary or context of a model; Llama 4 Scout's is 10,485,760."""

_COUNTS_LAYERS = re.compile(r"(^|_)(layer|block)(s|_types?)?$")
"""Keys that say how many layers are built; a size of each layer is bounded by the weights' files,
and other numbers of modules by `loading.load_empty`."""

_PLAIN_NAME = re.compile(r"[A-Za-z_][\w.]{0,200}")

# Keys of LoraConfig. Every other key must be empty or have its default.
_ADAPTER_KEYS = {
    *("alpha_pattern", "base_model_name_or_path", "fan_in_fan_out", "inference_mode"),
    *("init_lora_weights", "lora_alpha", "lora_dropout", "modules_to_save"),
    *("peft_type", "peft_version", "r"),
    *("rank_pattern", "revision", "target_modules", "target_parameters", "task_type"),
    *("use_dora", "use_rslora"),
}


def adapter(folder: Path, base: Any, *, num_classes: int | None = None) -> None:
    """Refuse an adapter whose files Remora or PEFT would not have written for this base.

    Args:
        folder: The adapter's folder.
        base: The model that it is for.
        num_classes: Classes of its head, if other than those of the model's; 0 for no head.

    Raises:
        ModelError: If a file differs; nothing has been allocated then.
    """
    for name in ADAPTER_FILES:
        followed(folder / name)
    ranks, default, targets, parameters, is_dora = _read_ranks(folder / "adapter_config.json")
    shapes = read_shapes([folder / "adapter_model.safetensors"])
    for name, module in base.named_modules():
        if not _ends_with(name, targets):
            continue
        weight = getattr(module, "weight", None)
        if weight is None or weight.dim() != 2:
            raise ModelError(
                f"{folder} adapts {name}, which is not a linear layer of its base; {AGAIN}"
            )
        pattern = _ends_with(name, ranks)
        rank = ranks[pattern] if pattern else default
        # Conv1D keeps its weight as [in, out], and 4-bit weights have another shape.
        is_linear = hasattr(module, "in_features")
        into = module.in_features if is_linear else weight.shape[0]
        out = module.out_features if is_linear else weight.shape[1]
        wanted: dict[str, tuple[int, ...]] = {"A.weight": (rank, into), "B.weight": (out, rank)}
        if is_dora:
            wanted["magnitude_vector"] = (out,)
        for part, shape in wanted.items():
            key = f"base_model.model.{name}.lora_{part}"
            if key not in shapes:
                raise _misfit(folder, f"lacks {key}")
            if shapes[key] != shape:
                raise _misfit(folder, f"has {key} with the shape {shapes[key]}, not {shape}")
    _check_experts(folder, base, shapes, parameters, default)
    _check_head(folder, base, shapes, num_classes)


def _check_head(
    folder: Path, base: Any, shapes: Mapping[str, tuple[int, ...]], num_classes: int | None
) -> None:
    """Refuse a head over classes that is not as wide as its base, or one where there is none."""
    path = folder / "adapter_config.json"
    heads = read_json(path).get("modules_to_save") or []
    weight = None if num_classes == 0 else getattr(getattr(base, "score", None), "weight", None)
    if not (isinstance(heads, list) and set(map(str, heads)) <= {"classifier", "score"}):
        raise ModelError(f"{path} sets modules_to_save to more than a head over classes; {AGAIN}")
    if bool(heads) != (weight is not None):
        verb = "has a head over classes, and its remora.json names none"
        if not heads:
            verb = "has no head over classes, and its remora.json names one"
        raise ModelError(f"the adapter in {folder} {verb}; {AGAIN}")
    if weight is None:
        return
    rows, width = weight.shape
    if shapes.get("base_model.model.score.weight") != (num_classes or rows, width):
        raise _misfit(folder, "has no head for the labels in its remora.json")


def whole_head(folder: Path, names: Iterable[str]) -> None:
    """Refuse a whole model whose files lack the head over its classes.

    Raises:
        ModelError: If none of the names is in them.
    """
    if not set(names) & set(read_shapes(sorted(folder.glob("*.safetensors")))):
        raise ModelError(f"the weights in {folder} lack the head over its labels; restore it")


def _check_experts(
    folder: Path, base: Any, shapes: Mapping[str, tuple[int, ...]], targets: list[str], rank: int
) -> None:
    """Refuse adapters of stacked expert weights whose shapes are not those of the configuration."""
    for name, module in base.named_modules():
        wanted: list[tuple[int, ...]] = []
        for part, parameter in module.named_parameters(recurse=False):
            if not _ends_with(f"{name}.{part}", targets):
                continue
            if parameter.dim() != 3:
                raise ModelError(
                    f"{folder} adapts {name}.{part}, which are not experts of its base; {AGAIN}"
                )
            number, *sides = parameter.shape
            out, into = reversed(sides) if getattr(module, "is_transposed", False) else sides
            wanted += [(rank * number, into), (out, rank * number)]
        # PEFT puts one wrapper around another, each with a pair of matrices.
        found = [
            shape
            for key, shape in shapes.items()
            if key.startswith(f"base_model.model.{name}.") and ".lora_" in key
        ]
        if wanted and sorted(found) != sorted(wanted):
            raise _misfit(folder, f"has other shapes for the experts in {name}")


def configuration(folder: Path) -> None:
    """Refuse a base model's configuration that is not a JSON object or has absurd sizes.

    Raises:
        ModelError: If it is refused.
    """
    path = folder / "config.json"
    values = read_json(path)
    for key, value in _numbers(values):
        limit = MAX_LAYERS if _COUNTS_LAYERS.search(key) else MAX_SIZE
        if value > limit and not key.endswith("_id") and "theta" not in key:
            raise ModelError(f"{path} has {key} {value:g}, more than {limit:,}; restore it")


def weights(folder: Path, num_parameters: int, *, quantized: bool) -> None:
    """Refuse a base model whose files lie elsewhere, or hold fewer weights than configured.

    Args:
        folder: The model's folder.
        num_parameters: Parameters of the configuration, tied weights counted once.
        quantized: Whether the files hold several weights in one number.

    Raises:
        ModelError: If it is refused; nothing has been allocated then.
    """
    paths = sorted(folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = read_json(index).get("weight_map")
        if not isinstance(names, Mapping):
            raise ModelError(f"{index} has no weight_map; download the model again")
        for name in set(map(str, names.values())):
            if Path(name).name != name or not (folder / name).is_file():
                raise ModelError(
                    f"{index} names {name!r}, which is not a file beside it; "
                    "download the model again"
                )
    for path in (*paths, folder / "config.json", folder / "tokenizer.json"):
        followed(path)
    held = sum(_size(shape) for shape in read_shapes(paths).values())
    if num_parameters > 1.1 * held * (8 if quantized else 1) + 1_000_000:
        raise ModelError(
            f"the files in {folder} hold {held:,} weights and its configuration needs "
            f"{num_parameters:,}; download the model again"
        )


def followed(path: Path) -> Path:
    """Return the file that a path leads to, if it may be read.

    In the cache of the hub's client, files are links to blobs beside the snapshots. Those may be
    links to blobs that all repositories share.

    Raises:
        ModelError: If it links to a file outside of its folder and of that cache.
    """
    if not path.is_symlink():
        return path
    homes = [path.parent.resolve()]
    if path.parent.parent.name == "snapshots":
        repository = path.parent.parent.parent.resolve()
        homes += [repository / "blobs", repository.parent / "blobs"]
    target = path.resolve()
    if not any(home in target.parents for home in homes):
        raise ModelError(f"{path} links to a file outside of its folder; put the file itself there")
    return target


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object.

    Raises:
        ModelError: If the file holds something else or is too large.
    """
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ModelError(f"{path} is larger than {MAX_JSON_BYTES:,} bytes; restore it")
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"{path} cannot be read ({one_line(error)}); restore it") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} cannot be read (it is not a JSON object); restore it")
    return value


def read_shapes(paths: list[Path]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all tensors in safetensors files, from their headers.

    Raises:
        ModelError: If a file is broken.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for path in paths:
        try:
            with safe_open(path, framework="numpy") as file:
                for name in file.keys():  # noqa: SIM118 - not a mapping
                    shapes[name] = tuple(file.get_slice(name).get_shape())
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{path} cannot be loaded ({one_line(error)}); restore it") from error
    return shapes


def _read_ranks(path: Path) -> tuple[dict[str, int], int, list[str], list[str], bool]:
    """Return an adapter's ranks by layer, default rank, layers, experts, and whether it is DoRA."""
    from peft import LoraConfig

    values = read_json(path)
    if values.get("peft_type") != "LORA":
        raise ModelError(f"{path} has peft_type {values.get('peft_type')!r}, not 'LORA'; {AGAIN}")
    usual = dataclasses.asdict(LoraConfig())
    for key, value in values.items():
        if key not in _ADAPTER_KEYS and value and value != usual.get(key):
            raise ModelError(f"{path} sets {key}, which Remora's adapters do not have; {AGAIN}")
    targets, rank = values.get("target_modules"), values.get("r")
    parameters = values.get("target_parameters") or []
    ranks, scales = values.get("rank_pattern") or {}, values.get("alpha_pattern") or {}
    if not (
        isinstance(targets, list)
        and isinstance(parameters, list)
        and isinstance(ranks, dict)
        and isinstance(scales, dict)
        and all(_is_plain(name) for name in (*targets, *parameters, *ranks, *scales))
    ):
        raise ModelError(f"{path} does not name its layers by plain names; {AGAIN}")
    if not all(_is_rank(number) for number in (rank, *ranks.values())):
        raise ModelError(f"{path} has a rank that is not a positive integer; {AGAIN}")
    if not all(isinstance(values.get(key, False), bool) for key in ("use_dora", "use_rslora")):
        raise ModelError(f"{path} has a use_dora or use_rslora that is not a boolean; {AGAIN}")
    scalars = [values.get("lora_alpha", 1), values.get("lora_dropout", 0), *scales.values()]
    if not all(isinstance(n, int | float) and abs(n) < 1e6 for n in scalars):
        raise ModelError(
            f"{path} has an alpha or dropout that is not a number below 1,000,000; {AGAIN}"
        )
    assert isinstance(rank, int)
    return ranks, rank, targets, parameters, values.get("use_dora") is True


def _misfit(folder: Path, what: str) -> ModelError:
    return ModelError(
        f"the adapter in {folder} {what}, which does not fit its configuration; {AGAIN}"
    )


def _is_plain(name: Any) -> bool:
    return isinstance(name, str) and _PLAIN_NAME.fullmatch(name) is not None


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _ends_with(name: str, ends: Any) -> str | None:
    """Return the layer name that a full name ends with, as PEFT matches it; None if none."""
    return next((end for end in ends if name == end or name.endswith(f".{end}")), None)


def _numbers(value: Any, key: str = "", depth: int = 0) -> Iterator[tuple[str, float]]:
    if isinstance(value, bool) or depth > 20:
        return
    if isinstance(value, int | float):
        yield key, abs(value)
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from _numbers(item, str(name), depth + 1)
    elif isinstance(value, list):
        if _COUNTS_LAYERS.search(key) and len(value) > MAX_LAYERS:
            yield key, len(value)
        for item in value:
            yield from _numbers(item, key, depth + 1)


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size

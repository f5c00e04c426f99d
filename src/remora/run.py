"""The run directory: what a run leaves on disk, and the way of what it trained back into memory."""

from __future__ import annotations

import contextlib
import csv
import importlib.metadata
import json
import os
import platform
import re
import shutil
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

import remora
from remora import admit, lora, model, quantize
from remora.calibration import Scored
from remora.config import TrainConfig
from remora.errors import ConfigError, ModelError, ResourceError
from remora.prompt import Prompt
from remora.table import one_line

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SCHEMA = 1
PROBABILITIES = "probabilities.safetensors"
FOLDERS = {"lora": "adapter", "qlora": "adapter", "full": "model"}
"""Where in a run directory lies what was trained, by the method."""
NUM_BEAMS = 4
"""Labels that stock `generate()` goes on with; docs/export.md has what was measured."""
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")


@dataclass(frozen=True, kw_only=True)
class AdapterCard:
    """remora.json: what the files of PEFT or transformers do not say of what was trained."""

    base_model: str
    base_sha256: str  # of a whole model, its own
    labels: tuple[str, ...]
    instruction: str
    list_labels: bool
    label_texts: Mapping[str, str]
    max_length: int
    method: str = "lora"
    remora_version: str = remora.__version__
    schema: int = SCHEMA

    def prompt(self, tokenizer: Any) -> Prompt:
        """Return the prompt that the adapter was trained with."""
        return Prompt(
            tokenizer,
            self.labels,
            instruction=self.instruction,
            list_labels=self.list_labels,
            label_texts=self.label_texts,
            max_length=self.max_length,
        )


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


def save(
    trained: Any,
    prompt: Prompt,
    card: AdapterCard,
    path: Path,
    weights: dict[str, Tensor] | None = None,
) -> int:
    """Save what was trained beside its card, whole or not at all; return its weights' bytes.

    Args:
        trained: PEFT's model, or a whole one.
        prompt: How it is asked.
        card: What goes with it.
        path: The folder to write.
        weights: Those of a whole model by their names; by default its own.

    Raises:
        ResourceError: If the disk fails.
    """
    import peft

    if isinstance(trained, peft.PeftModel):
        return save_adapter(trained, card, path)
    with _replacing(path) as folder:
        write_model(trained, prompt, card, folder, weights)
    return folder_bytes(path, "*.safetensors")


def save_adapter(adapted: Any, card: AdapterCard, path: Path) -> int:
    """Save an adapter in PEFT's format beside its card, whole or not at all; return its bytes.

    Raises:
        ResourceError: If the disk fails.
    """
    with _replacing(path) as folder:
        for config in adapted.peft_config.values():
            config.base_model_name_or_path = card.base_model
        # Embeddings are never trained; looking whether they are would ask the hub.
        adapted.save_pretrained(folder, save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)
        write_json(folder / "remora.json", asdict(card))
    return (path / "adapter_model.safetensors").stat().st_size


def write_model(
    whole: Any,
    prompt: Prompt,
    card: AdapterCard,
    folder: Path,
    weights: dict[str, Tensor] | None = None,
) -> None:
    """Write a whole model with its tokenizer and card, which gets the hash of these weights."""
    whole.generation_config = _writing_labels(whole.generation_config, prompt)
    with model.without_progress_bar():
        whole.save_pretrained(folder, state_dict=weights)
    prompt.tokenizer.save_pretrained(folder)
    card = replace(card, base_sha256=model.weights_sha256(folder))
    write_json(folder / "remora.json", asdict(card))


def _writing_labels(before: Any, prompt: Prompt) -> Any:
    """Return settings by which stock `generate()` writes the likeliest label.

    A chat model's own ones draw tokens and make repeated ones less probable, such as those of a
    label in the prompt. A greedy search may take the beginning of a less probable label; beams go
    on with several, and a length penalty of 0 compares whole labels by their probability.
    """
    from transformers import GenerationConfig

    ends = before.eos_token_id
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    ends += [end for end in dict.fromkeys(a[-1] for a in prompt.answers) if end not in ends]
    pad = before.pad_token_id
    return GenerationConfig(  # type: ignore[no-untyped-call]
        num_beams=NUM_BEAMS,
        length_penalty=0.0,
        do_sample=False,
        max_new_tokens=max(map(len, prompt.answers)),
        bos_token_id=before.bos_token_id,
        eos_token_id=ends,
        pad_token_id=ends[0] if pad is None else pad,
    )


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Give the name of a folder to make, which takes the place of another once it is whole."""
    temporary = path.with_name(path.name + ".tmp")
    replaced = path.with_name(path.name + ".old")
    with disk_errors(path):
        for left in (temporary, replaced):  # by a save that was interrupted
            shutil.rmtree(left, ignore_errors=True)
        try:
            yield temporary
            for file in temporary.iterdir():
                sync(file)
            sync(temporary)
            if path.exists():
                path.rename(replaced)
            temporary.rename(path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        sync(path.parent)
        shutil.rmtree(replaced, ignore_errors=True)


def load_adapter(
    path: Path,
    *,
    base: str | None,
    dtype: torch.dtype,
    device: torch.device,
    dequantized: bool = False,
) -> tuple[Any, Prompt, AdapterCard]:
    """Load an adapter around its base model, or a whole model.

    The base of an adapter that the method qlora trained is brought to 4 bits as it was then.

    Args:
        path: A run directory, an adapter's folder, or the folder of a whole model that `export` or
            training wrote.
        base: Base model, where it is no longer where the card says.
        dtype: What the base, or the whole model, is stored in.
        device: Where to.
        dequantized: Whether to bring a base in 4 bits back to plain layers, in float32.

    Returns:
        PEFT's model in evaluation mode, or the whole one, the prompt it was trained with, and its
        card.

    Raises:
        ConfigError: If the base would be in 4 bits, and that is not possible here.
        ModelError: If a part is missing or broken, or the base model is another one.
    """
    folder = adapter_folder(path)
    if is_whole(folder):
        return _load_whole(folder, base=base, dtype=dtype, device=device)
    card = read_card(folder)
    source = model.find(base or card.base_model)
    if model.weights_sha256(source) != card.base_sha256:
        raise ModelError(
            f"{folder} was trained on other weights than those in {source}; "
            "give its own base model with --model"
        )
    prompt = card.prompt(model.load_tokenizer(source))
    loaded = load_base(source, card.method, dtype, device)
    if dequantized:
        quantize.dequantize(loaded)
    admit.adapter(folder, loaded)
    import peft

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.filterwarnings("ignore", "Found missing adapter keys", UserWarning)
            adapted = peft.PeftModel.from_pretrained(loaded, folder, local_files_only=True)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise ModelError(
            f"the adapter in {folder} cannot be loaded ({reason}); train it again or restore it"
        ) from error
    # PEFT only warns of missing weights and leaves random ones in their place.
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        names = set(file.keys())
    expected = set(peft.get_peft_model_state_dict(adapted, save_embedding_layers=False))
    if different := sorted(names ^ expected):
        verb = "has" if different[0] in names else "lacks"
        raise ModelError(
            f"the adapter in {folder} {verb} {different[0]}, which does not fit its configuration; "
            "train it again or restore it"
        )
    lora.make_fast(adapted)
    return adapted.to(device).eval(), prompt, card


def load_base(folder: Path, method: str, dtype: torch.dtype, device: torch.device) -> Any:
    """Return the base model in a folder, in evaluation mode, as a method trains an adapter on it.

    Raises:
        ConfigError: If it would be in 4 bits, and that is not possible here.
        ModelError: If it cannot be loaded.
    """
    on = device if method == "qlora" else None
    return model.load(folder, dtype, quantize_on=on).to(device).eval()


def _load_whole(
    folder: Path, *, base: str | None, dtype: torch.dtype, device: torch.device
) -> tuple[Any, Prompt, AdapterCard]:
    """Load a model that needs no base; its card has the hash of its own weights."""
    if base is not None:
        raise ModelError(f"{folder} holds a whole model and needs no base; leave out --model")
    card = _card(folder)
    if model.weights_sha256(folder) != card.base_sha256:
        raise ModelError(
            f"the weights in {folder} are not those that were written; restore them, or export or "
            "train again"
        )
    prompt = card.prompt(model.load_tokenizer(folder))
    return model.load(folder, dtype).to(device).eval(), prompt, card


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


def adapter_folder(path: Path) -> Path:
    """Return the folder of what a run directory's run trained, or the path itself if it is none.

    What is no folder here and reads like an id of the hub is fetched from there.

    Raises:
        ModelError: If it cannot be fetched.
    """
    if _is_hub_id(path):
        return _fetch(path.as_posix())
    folders = (path / name for name in FOLDERS.values())
    return next((folder for folder in folders if folder.is_dir()), path)


def _is_hub_id(path: Path) -> bool:
    """Return whether a path is an id of the hub, such as owner/name.

    It is none where there is a folder `owner`, and in that of all runs: a run whose name is
    misspelt must not become somebody else's adapter.
    """
    return (
        model.HUB_ID.fullmatch(path.as_posix()) is not None
        and path.parent != TrainConfig.output
        and not path.parent.exists()
    )


def _fetch(name: str) -> Path:
    """Fetch a repository of the hub, its large files only if it is one of Remora."""
    folder = model.fetch(name, ("*.json",))
    if not (folder / "remora.json").is_file():
        raise ModelError(
            f"{name} on the hub is no adapter of Remora, it has no remora.json; "
            "give one that `remora push` has published"
        )
    return model.fetch(name, model.HUB_FILES)


def is_full(path: Path) -> bool:
    """Return whether a run directory or a folder holds a model that trained in all its weights.

    Raises:
        ModelError: If its card is broken.
    """
    folder = adapter_folder(path)
    return is_whole(folder) and _card(folder).method == "full"


def is_whole(folder: Path) -> bool:
    """Return whether a folder holds a model that needs no base, with its card."""
    return (folder / "remora.json").is_file() and (folder / "config.json").is_file()


def read_card(folder: Path) -> AdapterCard:
    """Return the card of an adapter's folder.

    Raises:
        ModelError: If it or a file of PEFT's is missing, or it is broken.
    """
    if is_whole(folder):
        raise ModelError(
            f"{folder} holds a whole model and no adapter; give a run that trained an adapter"
        )
    if not folder.is_dir():
        raise ModelError(f"there is no folder {folder}; give a run directory or its adapter folder")
    if (folder / "checkpoints").is_dir():
        raise ModelError(
            f"the run in {folder} is unfinished and has no adapter yet; "
            "finish it with the command that began it"
        )
    for name in ("remora.json", "adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():
            raise ModelError(
                f"{folder} is no adapter of Remora, it has no {name}; "
                "give a run directory or its adapter folder"
            )
    return _card(folder)


def _card(folder: Path) -> AdapterCard:
    path = folder / "remora.json"
    values = admit.read_json(path)
    if values.get("schema", SCHEMA) != SCHEMA:
        raise ModelError(
            f"{folder} has schema {values['schema']}, this version reads {SCHEMA}; "
            "use the version of Remora that wrote it"
        )
    try:
        card = AdapterCard(**{**values, "labels": tuple(values["labels"])})
    except (TypeError, KeyError) as error:
        raise ModelError(f"{path} is broken ({one_line(error)}); restore it") from error
    texts = [card.base_model, card.base_sha256, card.instruction, card.method, card.remora_version]
    if not (
        all(is_text(text) for text in (*texts, *card.labels))
        and card.method in FOLDERS
        and isinstance(card.label_texts, dict)
        and all(is_text(t) and label in card.labels for label, t in card.label_texts.items())
        and 2 <= len(card.labels) == len(set(card.labels))
        and isinstance(card.list_labels, bool)
        and isinstance(card.max_length, int)
        and 1 <= card.max_length <= admit.MAX_SIZE
    ):
        raise ModelError(f"{path} is broken (a value is not of its kind); restore it")
    return card


def is_text(value: Any) -> bool:
    """Return whether a value is a text that UTF-8 can write: JSON also has half characters."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


def _slug(source: str) -> str:
    name = re.sub(r"\.(csv|tsv|jsonl|ndjson|parquet)$", "", source.rstrip("/").split("/")[-1])
    return re.sub(r"[^\w.-]+", "-", name.removeprefix("hf:")).strip("-.").lower() or "run"

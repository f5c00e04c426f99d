"""Base models: where they lie, their tokenizer, configuration and weights."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from remora import admit, attention, quantize
from remora.errors import ModelError

HUB_FILES = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt")
"""What is fetched from the hub: never pickled weights, never code."""

HUB_FILES_BUT_WEIGHTS = tuple(pattern for pattern in HUB_FILES if "safetensors" not in pattern)

OTHER_FORMATS = ("consolidated*", "*/*")
"""The same weights again in the form of another library, which some repositories hold too."""

VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")

HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")

EMBEDDED = Path(__file__).parent / "bases"
"""Base models that come with the package, a folder each."""


def find(name: str, *, weights: bool = True) -> Path:
    """Return the folder of a base model, fetched from the hub if `name` is an id there.

    `nano` is the model that comes with the package; a folder of that name is given as ./nano.
    Without `weights` only a model's configuration and its tokenizer are fetched.

    Raises:
        ModelError: If there is no such folder or id, or it cannot be fetched.
    """
    if re.fullmatch(r"\w+", name) and (EMBEDDED / name).is_dir():
        return EMBEDDED / name
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(
                f"{name} is not a model folder, it has no config.json; "
                "give the folder of a Hugging Face model"
            )
        return folder.resolve()
    if folder.exists():
        raise ModelError(f"{name} is a file; give the folder of a Hugging Face model")
    if not HUB_ID.fullmatch(name):
        raise ModelError(
            f"there is no folder {name}; give the folder of a Hugging Face model, a hub id such as "
            "Qwen/Qwen2.5-1.5B-Instruct, or nano, the small model in this package"
        )
    return fetch(name, HUB_FILES if weights else HUB_FILES_BUT_WEIGHTS)


def fetch(name: str, patterns: Sequence[str]) -> Path:
    """Return the folder with a hub repository's files of these patterns, fetched if need be.

    Raises:
        ModelError: If it cannot be fetched, or a file is not the one that the hub has.
    """
    from huggingface_hub import is_offline_mode, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        RepositoryNotFoundError,
    )

    try:
        folder = Path(
            snapshot_download(
                name, allow_patterns=list(patterns), ignore_patterns=list(OTHER_FORMATS)
            )
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
    except Exception as error:  # of the connection, the disk or the hub: all end here
        if is_offline_mode():
            raise ModelError(
                f"{name} is neither a folder here nor whole in the hub's cache, and HF_HUB_OFFLINE "
                "is set; unset it to fetch what is missing, or give a folder"
            ) from error
        reason = _first_line(error)
        raise ModelError(
            f"{name} is no folder here and could not be fetched from the hub ({reason}); "
            "check the name and the connection, or give a folder"
        ) from error
    for path in sorted(folder.glob("*")):
        if any(path.match(pattern) for pattern in patterns):
            _check_download(path)
    return folder


def _check_download(path: Path) -> None:
    """Refuse a file that is not the one that the hub has; its client looks at the size only.

    In the client's cache a file is a link to a blob. The blob's name is the SHA-256 of the file, or
    git's SHA-1 of it if it is small.

    Raises:
        ModelError: If it is another one.
    """
    if not path.is_symlink():  # on a system without links the client keeps no checksums
        return
    expected = Path(os.readlink(path)).name
    if len(expected) == 64:
        found = _sha256([path])
    elif len(expected) == 40:
        content = path.read_bytes()
        blob = b"blob %d\0%b" % (len(content), content)
        found = hashlib.sha1(blob, usedforsecurity=False).hexdigest()
    else:
        return
    if found != expected:
        raise ModelError(
            f"{path} is not the file that the hub has, its checksum differs; "
            f"remove {path.resolve()} and run the command again"
        )


def load_tokenizer(folder: Path) -> Any:
    """Return the tokenizer in a model's folder.

    Raises:
        ModelError: If there is none that can be read.
    """
    from transformers import AutoTokenizer

    # Without a vocabulary transformers makes an empty tokenizer, and says nothing.
    if not any((folder / name).is_file() for name in VOCABULARY_FILES):
        raise ModelError(f"{folder} has no tokenizer; copy the base model's tokenizer.json into it")
    admit.configuration(folder)  # which transformers looks into
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:
        raise ModelError(
            f"the tokenizer in {folder} cannot be read ({_first_line(error)}); "
            "give a folder with tokenizer.json"
        ) from error
    if not tokenizer.is_fast:
        raise ModelError(f"the tokenizer in {folder} has no tokenizer.json; convert it first")
    return tokenizer


def load_config(folder: Path) -> Any:
    """Return the configuration in a model's folder.

    Raises:
        ModelError: If it cannot be read or is of an unknown architecture.
    """
    from transformers import AutoConfig

    admit.configuration(folder)
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise ModelError(
            f"the configuration in {folder} cannot be read ({_first_line(error)}); "
            "give the folder of a Hugging Face causal language model"
        ) from error


def load(folder: Path, dtype: torch.dtype, *, quantize_on: torch.device | None = None) -> Any:
    """Return the causal language model in a folder, its weights in `dtype`.

    Args:
        folder: Where it lies.
        dtype: What to store it in.
        quantize_on: Device to bring the linear layers to 4 bits on; None to leave them as they are.

    Raises:
        ConfigError: If nothing can be quantized here.
        ModelError: If it is no causal language model or its weights cannot be read.
    """
    quantize.import_quietly()
    from transformers import AutoModelForCausalLM

    config = load_config(folder)
    if not any(folder.glob("*.safetensors")):
        raise ModelError(
            f"{folder} has no weights in safetensors format; pickled weights are never read, "
            "convert them first"
        )
    parameters = {id(p): p.numel() for p in load_empty(config, dtype).parameters()}
    quantized = getattr(config, "quantization_config", None) is not None
    admit.weights(folder, sum(parameters.values()), quantized=quantized)
    how: dict[str, Any] = {}
    if quantize_on is not None:
        quantize.require(quantize_on)
        if quantized:
            raise ModelError(
                f"the weights in {folder} are quantized already; give the model that they were "
                "made from, or use --method lora"
            )
        how = {"quantization_config": quantize.settings(dtype), "device_map": {"": quantize_on}}
    try:
        with without_progress_bar():
            result: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                attn_implementation=_attention(config),
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
                **how,
            )
    except Exception as error:
        raise ModelError(
            f"the model in {folder} cannot be loaded ({_first_line(error)}); "
            "give the folder of a Hugging Face causal language model"
        ) from error
    loaded, info = result
    if missing := sorted(info["missing_keys"]):
        raise ModelError(
            f"the weights in {folder} lack {missing[0]} and {len(missing) - 1} more; "
            "the folder is incomplete, fetch it again"
        )
    attention.install(loaded)
    quantize.install(loaded)
    return loaded


@contextlib.contextmanager
def without_progress_bar() -> Iterator[None]:
    """Keep transformers from showing its own progress bars."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def load_empty(config: Any, dtype: torch.dtype, *, quantized: bool = False) -> Any:
    """Return the causal language model of a configuration without weights, on the device `meta`.

    With `quantized` its linear layers take as much memory as those in 4 bits.

    Raises:
        ModelError: If there is none for it.
    """
    quantize.import_quietly()
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(config)
    config._attn_implementation = _attention(config)
    try:
        with torch.device("meta"):
            make: Any = AutoModelForCausalLM.from_config
            empty = make(config, dtype=dtype)
    except Exception as error:  # of a configuration whose values do not go together
        raise ModelError(
            f"there is no causal language model for this configuration ({_first_line(error)}); "
            "give the folder of a Hugging Face causal language model"
        ) from error
    attention.install(empty)
    if quantized:
        quantize.plan(empty)
    return empty


def set_checkpointing(model: Any, on: bool) -> None:
    """Let the layers be computed again in the backward pass, or keep what they need for it.

    Raises:
        ModelError: If the model cannot.
    """
    verb = "enable" if on else "disable"
    try:
        # The second name is that of transformers before 5.23.
        for name in (f"activation_checkpointing_{verb}", f"gradient_checkpointing_{verb}"):
            if hasattr(model, name):
                getattr(model, name)(*([{"use_reentrant": False}] if on else []))
                return
    except ValueError as error:
        if on:
            raise ModelError(
                "this model cannot compute its layers again; use --checkpointing off"
            ) from error


def _attention(config: Any) -> str:
    """Choose the attention that transformers computes; not all of them can cap the scores."""
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None)
    return "eager" if capped else "sdpa"


def context_length(config: Any, tokenizer: Any) -> int:
    """Return the longest sequence, in tokens, that the model has positions for."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    limits = [n for n in (positions, tokenizer.model_max_length) if n]
    return int(min(limits))


def weights_sha256(folder: Path) -> str:
    """Return one SHA-256 over a model's weight files, in the order of their names."""
    return _sha256(sorted(folder.glob("*.safetensors")))


def _sha256(paths: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__

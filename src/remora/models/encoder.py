"""Sentence encoders: models that make one vector of a text, for the baseline `embeddings`."""

from __future__ import annotations

import importlib.util
import json
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from remora.errors import ConfigError, ModelError
from remora.formatting import first_line, one_line
from remora.models import hub, untrusted
from remora.models.loading import read_config, without_progress_bar

HUB_FILES = ("*.json", "*.txt", "*.model", "*.safetensors", "*/config.json")
OTHER_FORMATS = ("onnx/*", "openvino/*")

MODULES = {"Transformer", "Pooling", "Normalize"}
"""Modules of sentence-transformers that are loaded. Others may read pickles or import code."""


def find(name: str) -> Path:
    """Return the folder of a sentence encoder, fetched from the hub if `name` is an id there.

    Raises:
        ConfigError: If sentence-transformers is not installed.
        ModelError: If there is no such folder or id, or it has files that are not loaded here.
    """
    if importlib.util.find_spec("sentence_transformers") is None:
        raise ConfigError(
            "the baseline embeddings needs sentence-transformers, which is not installed; run "
            "`pip install 'remora[embeddings]'`, or leave it out of --baselines"
        )
    folder = Path(name).expanduser()
    if not folder.is_dir():
        if not hub.HUB_ID.fullmatch(name):
            raise ModelError(
                f"there is no folder {name}; give --embedding-model the folder of a sentence "
                "encoder, or a hub id such as sentence-transformers/all-MiniLM-L6-v2"
            )
        try:
            folder = hub.fetch(name, HUB_FILES, OTHER_FORMATS)
        except ModelError as error:
            flag = " with --embedding-model" if str(error).endswith("give a folder") else ""
            raise ModelError(f"the sentence encoder {error}{flag}") from error
    _check(folder)
    return folder


def load(folder: Path, device: torch.device) -> Any:
    """Return the SentenceTransformer in a folder that `find` has checked.

    Raises:
        ModelError: If it cannot be loaded.
    """
    from sentence_transformers import SentenceTransformer

    try:
        with warnings.catch_warnings(), without_progress_bar():
            warnings.simplefilter("ignore")
            return SentenceTransformer(
                str(folder),
                device=str(device),
                local_files_only=True,
                trust_remote_code=False,
                model_kwargs={"use_safetensors": True},
            )
    except Exception as error:
        raise ModelError(
            f"the sentence encoder in {folder} cannot be loaded ({first_line(error)}); give "
            "another with --embedding-model"
        ) from error


def embed(encoder: Any, texts: Sequence[str]) -> NDArray[np.float32]:
    """Return the embeddings of texts, [texts, width]; long ones are truncated by the encoder."""
    found: NDArray[np.float32] = encoder.encode(
        list(texts), show_progress_bar=False, convert_to_numpy=True
    )
    return found.astype(np.float32)


def _check(folder: Path) -> None:
    """Refuse an encoder that would need code or pickled weights, or more memory than its files.

    Raises:
        ModelError: If it is refused; nothing has been allocated then.
    """
    path = folder / "modules.json"
    if not path.is_file():
        raise ModelError(
            f"{folder} is not a sentence encoder, it has no modules.json; give another with "
            "--embedding-model"
        )
    try:
        modules = json.loads(path.read_text(encoding="utf-8"))
        kinds = [(str(module["type"]), str(module["path"])) for module in modules]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read ({one_line(error)}); restore it") from error
    for kind, place in kinds:
        library, _, name = kind.partition(".")
        is_own = library == "sentence_transformers" and name.split(".")[-1] in MODULES
        is_here = re.fullmatch(r"[\w-]*", place) and not (place and name.endswith("Transformer"))
        if not is_own or not is_here:
            raise ModelError(
                f"{path} has the module {kind!r} in {place!r}, which is not loaded here; give "
                "another encoder with --embedding-model"
            )
    if not any(folder.glob("*.safetensors")):
        raise ModelError(
            f"{folder} has no weights in safetensors format; pickled weights are never read, give "
            "another encoder with --embedding-model"
        )
    empty = _empty(folder)
    untrusted.weights(folder, sum(p.numel() for p in empty.parameters()), quantized=False)


def _empty(folder: Path) -> Any:
    """Return the encoder's transformer without weights.

    Raises:
        ModelError: If its configuration cannot be used.
    """
    from transformers import AutoModel

    make: Any = AutoModel.from_config
    try:
        with torch.device("meta"):
            return make(read_config(folder))
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(
            f"the configuration in {folder} is of no encoder ({first_line(error)}); give another "
            "with --embedding-model"
        ) from error

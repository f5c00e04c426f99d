"""The conversion of a GGUF file by transformers, in a process of its own."""

from __future__ import annotations

import contextlib
import json
import math
import os
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError

from remora.errors import ModelError, RemoraError, ResourceError
from remora.formatting import one_line, quote
from remora.models import gguf_header, loading, untrusted
from remora.models.gguf import ADVICE
from remora.models.gguf_header import FOLDER, Header
from remora.runtime import files, memory

ROPE_FACTORS = "rope_freqs.weight"
"""Tensor by which llama.cpp keeps the scaled positions of Llama 3.1 and later."""

LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8_192,
}
"""What all of Meta's models with scaled positions have in common; the factor differs."""

HEAD_WIDTHS = {"llama", "qwen3"}
"""Architectures whose heads may have another width than transformers takes by itself."""

NUM_LAYERS_27B = {"gemma2": 46, "gemma3": 62}
"""llama.cpp knows Gemma's 27B by these: it scales attention by another width."""


def main(path: str, folder: str) -> None:
    """Convert a file, and print the error, if there is one, as JSON."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    error: dict[str, Any] = {}
    try:
        convert(Path(path), Path(folder))
    except RemoraError as raised:
        error = {"exit_code": raised.exit_code, "message": str(raised)}
    print(json.dumps(error), flush=True)  # noqa: T201


def convert(path: Path, folder: Path) -> None:
    """Convert a GGUF file into a plain model folder.

    Args:
        path: The file.
        folder: An empty folder.

    Raises:
        ConfigError: If the package `gguf` is not installed.
        ModelError: If the file is refused or cannot be converted, or transformers would make
            another model of it.
        ResourceError: If memory or the disk do not suffice.
    """
    header = gguf_header.read(path)
    gguf_header.refuse_unknown(header)
    try:
        _convert(header, folder)
        loading.load_tokenizer(folder)
    except ModelError as error:
        if str(path) in str(error):
            raise
        found = str(error).partition("; ")[0]  # what to do there is for a folder
        raise ModelError(f"{path} cannot be converted ({found}); {FOLDER}") from error


def _convert(header: Header, folder: Path) -> None:
    """Let transformers read the file and write the folder; `convert` says what is raised."""
    path = header.path
    with files.disk_errors(folder, ADVICE), tempfile.TemporaryDirectory(dir=folder) as scratch:
        # transformers reads other files beside a model too, so it gets a folder without any.
        source = _linked(path, Path(scratch))
        try:
            with _parsed_once(path):
                config = _load_config(source, header)
                config.save_pretrained(folder)
                untrusted.configuration(folder)
                empty = _empty(config, header)
                _from_gguf("AutoTokenizer", source).save_pretrained(folder)
                weights = _weights(source, config, header)
            with loading.without_progress_bar():
                empty.save_pretrained(folder, state_dict=weights)
        except (RemoraError, SafetensorError):
            raise
        except Exception as error:
            if isinstance(error, OSError) and error.errno:  # transformers raises others of its own
                raise
            if memory.is_exhausted(error):
                raise ResourceError(f"converting {path} ran out of memory; free some") from error
            found = _absent_token(header) or one_line(error)
            raise ModelError(f"{path} cannot be converted ({found}); {FOLDER}") from error


def _absent_token(header: Header) -> str:
    """Return which special token the vocabulary lacks, "" if none."""
    count = header.metadata["tokenizer.ggml.tokens"]  # the length, as of any array
    for key, value in header.metadata.items():
        is_id = key.startswith("tokenizer.ggml.") and key.endswith("_token_id")
        if is_id and isinstance(value, int) and value >= count:
            return f"{key} is {value} and the vocabulary has {count:,} tokens"
    return ""


def _end_with_parent() -> None:
    """End this process when the one that started it closes the pipe, or is gone."""
    os.read(0, 1)  # not by sys.stdin, whose lock Python would wait for at its end
    os._exit(1)


def _linked(path: Path, folder: Path) -> tuple[Path, str]:
    """Return a folder that holds nothing but a link to a file, and the name of the link."""
    link = folder / "model.gguf"  # files of Ollama have no ending, and transformers goes by it
    try:
        link.symlink_to(path)
    except OSError:  # Windows lets few users do that
        return folder, str(path)
    return folder, link.name


@contextlib.contextmanager
def _parsed_once(path: Path) -> Iterator[None]:
    """Let transformers parse the header once: it would several times, and is slow at it."""
    import gguf

    parsed, before = gguf.GGUFReader(path), gguf.GGUFReader
    gguf.GGUFReader = lambda *_: parsed  # type: ignore[assignment,misc]
    try:
        yield
    finally:
        gguf.GGUFReader = before  # type: ignore[misc]


def _from_gguf(auto: str, source: tuple[Path, str], **settings: Any) -> Any:
    """Return what one of transformers' Auto classes makes of a GGUF file."""
    import transformers

    folder, name = source
    return getattr(transformers, auto).from_pretrained(
        folder, gguf_file=name, local_files_only=True, trust_remote_code=False, **settings
    )


def _load_config(source: tuple[Path, str], header: Header) -> Any:
    """Return the configuration, with what transformers leaves out of it.

    Raises:
        ModelError: If it would be that of another model.
    """
    config = _from_gguf("AutoConfig", source)
    vars(config).pop("_model_name_or_path", None)

    def stated(key: str) -> Any:
        return header.metadata.get(f"{header.architecture}.{key}")

    if header.architecture in NUM_LAYERS_27B:
        is_27b = config.num_hidden_layers == NUM_LAYERS_27B[header.architecture]
        width = config.hidden_size // config.num_attention_heads if is_27b else config.head_dim
        config.query_pre_attn_scalar = width
        for name in ("attn_logit_softcapping", "final_logit_softcapping"):
            if stated(name) is not None:
                setattr(config, name, stated(name))
    elif stated("attention.key_length") and header.architecture in HEAD_WIDTHS:
        config.head_dim = stated("attention.key_length")
    _scale_positions(config, header)
    return config


def _scale_positions(config: Any, header: Header) -> None:
    """Set how positions are scaled, which transformers does not read from GGUF files.

    Raises:
        ModelError: If they are scaled in a way that is not known here.
    """
    prefix = f"{header.architecture}.rope"
    kind = header.metadata.get(f"{prefix}.scaling.type", "none")
    factor = header.metadata.get(f"{prefix}.scaling.factor", 1.0)
    if ROPE_FACTORS in header.tensors and kind == "none":
        scaled = _llama3(config, header)
    elif kind == "linear":
        scaled = {"rope_type": "linear", "factor": factor} if factor not in {0, 1} else {}
    else:
        scaled = {} if kind == "none" else None
    is_known = not any("rope_factors" in name for name in header.tensors)
    if scaled is None or not is_known or f"{prefix}.scale_linear" in header.metadata:
        raise ModelError(
            f"{header.path} scales its positions (rope scaling {quote(str(kind))}) in a way that "
            f"is not read from GGUF files; {FOLDER}"
        )
    if scaled:
        rope = config.rope_parameters
        rope.get("full_attention", rope).update(scaled)  # only those layers of Gemma 3 are scaled


def _llama3(config: Any, header: Header) -> dict[str, Any] | None:
    """Return the scaling of Llama 3.1 and later if a file's factors are of that kind.

    llama.cpp keeps the factor of each frequency; transformers computes them from the parameters
    here. Dubey et al. 2024, The Llama 3 Herd of Models, https://arxiv.org/abs/2407.21783.
    """
    tensor = header.tensors[ROPE_FACTORS]
    offset = header.weights_start + tensor.start
    if tensor.type != gguf_header.F32:
        return None
    found = np.fromfile(header.path, "<f4", tensor.num_weights, offset=offset)
    width, factor = 2 * tensor.num_weights, float(found.max())
    if width != config.head_dim or not factor > 1:
        return None
    turns = LLAMA3["original_max_position_embeddings"] / (
        2 * math.pi * config.rope_parameters["rope_theta"] ** (np.arange(0, width, 2) / width)
    )  # [width / 2], turns of each frequency within the original context
    low, high = LLAMA3["low_freq_factor"], LLAMA3["high_freq_factor"]
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    if not np.allclose(found, 1 / ((1 - smooth) / factor + smooth), rtol=1e-3):
        return None
    return {"rope_type": "llama3", "factor": factor, **LLAMA3}


def _empty(config: Any, header: Header) -> Any:
    """Return the model without weights, if the file holds exactly the weights that it needs.

    Raises:
        ModelError: If it holds others.
    """
    empty = loading.load_empty(config, getattr(torch, header.dtype))
    needed = sum({id(p): p.numel() for p in empty.parameters()}.values())
    unused = {ROPE_FACTORS} | ({"output.weight"} if config.tie_word_embeddings else set())
    held = sum(t.num_weights for name, t in header.tensors.items() if name not in unused)
    if held != needed:
        raise ModelError(
            f"{header.path} holds {held:,} weights and transformers reads {needed:,} for this "
            f"architecture, so it would be another model; {FOLDER}"
        )
    return empty


def _weights(source: tuple[Path, str], config: Any, header: Header) -> dict[str, torch.Tensor]:
    """Return the dequantized weights by transformers' names, tied ones once.

    Raises:
        ModelError: If some are missing or not finite.
    """
    how: dict[str, Any] = {}
    with contextlib.suppress(ImportError):  # before transformers 5.23
        from transformers import GgufConfig

        how = {"quantization_config": GgufConfig(dequantize=True)}
    loaded, info = _from_gguf(
        "AutoModelForCausalLM",
        source,
        config=config,
        dtype=getattr(torch, header.dtype),
        device_map={"": "cpu"},
        output_loading_info=True,
        **how,
    )
    if missing := sorted(map(str, (*info["missing_keys"], *info["mismatched_keys"]))):
        raise ModelError(
            f"{header.path} lacks {missing[0]} and {len(missing) - 1} more weights; "
            f"{gguf_header.AGAIN}"
        )
    weights: dict[str, torch.Tensor] = loaded.state_dict()
    if broken := [name for name, tensor in weights.items() if not tensor.isfinite().all()]:
        raise ModelError(
            f"{header.path} has weights that are not finite, {broken[0]} among them; "
            f"{gguf_header.AGAIN}"
        )
    return weights

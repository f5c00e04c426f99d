"""Loads base models: their tokenizer, configuration, weights and prompt."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from remora.config import TrainConfig
from remora.data.class_prompt import prompt_class
from remora.data.prompt import Prompt
from remora.errors import ModelError
from remora.formatting import first_line
from remora.models import class_head, hub, quantize, untrusted
from remora.runtime import memory
from remora.tree import layouts
from remora.tree.layouts import Layout

MAX_MODULES = 100_000
"""More parts than any model has that transformers builds, and few enough to build in seconds."""

VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


def load_tokenizer(folder: Path) -> Any:
    """Return the tokenizer in a model's folder.

    Raises:
        ModelError: If there is none or it cannot be read.
    """
    from transformers import AutoTokenizer

    # Without a vocabulary transformers makes an empty tokenizer silently.
    if not any((folder / name).is_file() for name in VOCABULARY_FILES):
        raise ModelError(f"{folder} has no tokenizer; copy the base model's tokenizer.json into it")
    untrusted.configuration(folder)  # transformers reads it too
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:
        raise ModelError(
            f"the tokenizer in {folder} cannot be read ({first_line(error)}); "
            "give a folder with tokenizer.json"
        ) from error
    if not tokenizer.is_fast:
        raise ModelError(f"the tokenizer in {folder} has no tokenizer.json; convert it first")
    return tokenizer


def load_config(folder: Path, classes: Sequence[str] = ()) -> Any:
    """Return the configuration in a causal language model's folder.

    Args:
        folder: The folder.
        classes: The labels that a linear head is to score; () for a model that writes them.

    Raises:
        ModelError: If it cannot be read, or is of no causal language model that is known, or of
            none that has such a head.
    """
    config = read_config(folder)
    _refuse_other_kinds(config)
    class_head.describe(config, classes)
    return config


def read_config(folder: Path) -> Any:
    """Return the configuration in the folder of a model of any kind.

    Raises:
        ModelError: If it cannot be read.
    """
    from transformers import AutoConfig

    untrusted.configuration(folder)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        if "auto_map" in untrusted.read_json(folder / "config.json"):
            raise ModelError(
                f"the model in {folder} needs code of its own, which is never run; give a model "
                "that transformers has the code of"
            ) from error
        raise ModelError(
            f"the configuration in {folder} cannot be read ({first_line(error)}); "
            "give the folder of a Hugging Face causal language model"
        ) from error
    return config


def load(
    folder: Path,
    dtype: torch.dtype,
    *,
    classes: Sequence[str] = (),
    quantize_on: torch.device | None = None,
) -> Any:
    """Return the causal language model in a folder, its weights in `dtype`.

    Args:
        folder: The model's folder.
        dtype: Storage type.
        classes: The labels that a linear head scores in place of the vocabulary's; the head is
            new where the folder has none.
        quantize_on: Device to quantize the linear layers to 4 bits on; None to leave them plain.

    Raises:
        ConfigError: If 4-bit weights are not supported here.
        ModelError: If it is not a causal language model or its weights cannot be read.
    """
    # Check the files before anything is allocated.
    config = load_config(folder, classes)
    if not any(folder.glob("*.safetensors")):
        raise ModelError(
            f"{folder} has no weights in safetensors format; pickled weights are never read, "
            "convert them first"
        )
    empty = load_empty(config, dtype)
    parameters = {
        id(p): p.numel() for n, p in empty.named_parameters() if n not in class_head.NAMES
    }
    quantized = getattr(config, "quantization_config", None) is not None
    if quantized or quantize_on is not None:
        quantize.import_quietly()
    untrusted.weights(folder, sum(parameters.values()), quantized=quantized)
    # Quantize while loading.
    how: dict[str, Any] = {}
    if quantize_on is not None:
        quantize.require(quantize_on)
        if quantized:
            raise ModelError(
                f"the weights in {folder} are quantized already; give the original model, or use "
                "--method lora"
            )
        how = {"quantization_config": quantize.settings(dtype), "device_map": {"": quantize_on}}
    try:
        with without_progress_bar():
            result: Any = class_head.auto_class(config).from_pretrained(
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
        advice = "give the folder of a Hugging Face causal language model"
        if quantized or isinstance(error, ImportError):
            other = (
                "the original weights, which are not quantized" if quantized else "another model"
            )
            advice = f"install what it needs, or give {other}"
        raise ModelError(
            f"the model in {folder} cannot be loaded ({first_line(error)}); {advice}"
        ) from error
    loaded, info = result
    # transformers only warns of missing weights and leaves random ones in their place.
    if missing := sorted(set(info["missing_keys"]) - class_head.NAMES):
        raise ModelError(
            f"the weights in {folder} lack {missing[0]} and {len(missing) - 1} more; "
            "download the model again"
        )
    layouts.assign(loaded, layouts.choose("auto", type(loaded), config))
    class_head.install(loaded)
    quantize.install(loaded)
    return loaded


@contextlib.contextmanager
def without_progress_bar() -> Iterator[None]:
    """Keep transformers from showing its own progress bars, and what files lack or have beside."""
    from transformers.utils import logging

    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def load_empty(
    config: Any, dtype: torch.dtype, *, quantized: bool = False, layout: Layout | None = None
) -> Any:
    """Return the causal language model of a configuration without weights, on the device `meta`.

    Args:
        config: The configuration.
        dtype: Storage type.
        quantized: Whether its linear layers have the size of 4-bit ones.
        layout: Layout to compute it in; None for the one that it declares.

    Raises:
        ModelError: If no causal language model has such a configuration.
    """
    # All models pass here before they compute: `load` counts its parameters by this.
    memory.limit_kernel_caches()
    if quantized:
        quantize.import_quietly()
    else:
        quantize.import_peft()
    config = copy.deepcopy(config)
    config._attn_implementation = _attention(config)
    try:
        with torch.device("meta"), _few_modules():
            empty = class_head.auto_class(config).from_config(config, dtype=dtype)
    except Exception as error:  # its values contradict each other
        raise ModelError(
            f"this configuration is of no causal language model ({first_line(error)}); "
            "give the folder of a Hugging Face causal language model"
        ) from error
    layouts.assign(empty, layout or layouts.choose("auto", type(empty), config))
    class_head.install(empty)
    if quantized:
        quantize.plan(empty)
    return empty


@contextlib.contextmanager
def _few_modules() -> Iterator[None]:
    """Refuse to build more modules than any model has, whatever its configuration calls them."""
    from torch.nn.modules.module import register_module_module_registration_hook

    count = 0

    def added(*_: Any) -> None:
        nonlocal count
        count += 1
        if count > MAX_MODULES:
            raise ModelError(f"it asks for more than {MAX_MODULES:,} modules")

    handle = register_module_module_registration_hook(added)
    try:
        yield
    finally:
        handle.remove()


def _refuse_other_kinds(config: Any) -> None:
    """Refuse the configuration of a model that is not a causal language model.

    Raises:
        ModelError: If it is of an encoder, an encoder-decoder or of no language model.
    """
    from transformers import AutoModelForCausalLM

    text = config.get_text_config()
    if getattr(text, "is_encoder_decoder", False):
        kind = "an encoder-decoder"
    elif getattr(text, "is_decoder", True) is False:
        kind = "an encoder"
    elif type(config) not in AutoModelForCausalLM._model_mapping:
        kind = "no language model that writes text"
    else:
        return
    raise ModelError(
        f"{config.model_type} is {kind}; give a causal language model (decoder-only), such as "
        "Qwen/Qwen3-0.6B"
    )


def set_checkpointing(model: Any, on: bool) -> None:
    """Switch gradient checkpointing on or off.

    Raises:
        ModelError: If the model does not support it.
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
                "this model does not support gradient checkpointing; use --checkpointing off"
            ) from error


def _attention(config: Any) -> str:
    """Return the attention implementation of transformers; only eager caps the scores."""
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None)
    fused = getattr(model_class(config), "_supports_sdpa", True)
    return "eager" if capped or not fused else "sdpa"


def model_class(config: Any) -> type:
    """Return the class of the causal language models of a configuration; `object` without one."""
    from transformers import AutoModelForCausalLM

    mapping: Any = AutoModelForCausalLM._model_mapping
    return mapping[type(config)] if type(config) in mapping else object  # noqa: SIM401


def context_length(config: Any, tokenizer: Any) -> int:
    """Return the longest sequence, in tokens, that the model has positions for."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    limits = [n for n in (positions, tokenizer.model_max_length) if n]
    return int(min(limits))


def load_base(
    folder: Path,
    method: str,
    dtype: torch.dtype,
    device: torch.device,
    classes: Sequence[str] = (),
) -> Any:
    """Return the base model in a folder, in evaluation mode, quantized if the method is qlora.

    With `classes` it has a linear head that scores them.

    Raises:
        ConfigError: If it has to be quantized, and that is not supported here.
        ModelError: If it cannot be loaded.
    """
    on = device if method == "qlora" else None
    base = load(folder, dtype, classes=classes, quantize_on=on)
    if on is not None:
        quantize.leave_files(base)
    return base.to(device).eval()


def load_prompt(settings: TrainConfig, labels: Sequence[str], folder: Path) -> Prompt:
    """Return the prompt of some settings, with a model's tokenizer.

    Raises:
        ModelError: If the tokenizer cannot be used.
    """
    tokenizer = load_tokenizer(folder)
    context = context_length(load_config(folder), tokenizer)
    kind = prompt_class(settings.answer, multi_label=settings.multi_label == "on")
    try:
        prompt = kind(
            tokenizer,
            labels,
            instruction=settings.instruction,
            list_labels=settings.list_labels,
            label_texts=settings.label_texts,
            max_length=min(settings.max_length or context, context),
            kept=settings.truncate,
        )
    except ModelError as error:
        raise ModelError(f"{settings.model}: {error}") from error
    refuse_longer_vocabulary(prompt, folder)
    return prompt


def refuse_longer_vocabulary(prompt: Prompt, folder: Path) -> None:
    """Refuse a tokenizer that may write tokens which the model's embedding does not have.

    Special tokens that the prompt does not use do no harm: none comes from a message.

    Raises:
        ModelError: If there are such tokens.
    """
    size = load_config(folder).get_text_config().vocab_size
    tokenizer = prompt.tokenizer
    added = tokenizer.added_tokens_decoder.items()
    special = {number for number, token in added if token.special}
    used = {*prompt.stems([""])[0], *(token for answer in prompt.answers for token in answer)}
    possible = {*tokenizer.get_vocab().values()} - (special - used)
    beyond = [number for number in sorted(possible) if number >= size]
    if beyond:
        raise ModelError(
            f"the tokenizer in {folder} has the token {tokenizer.convert_ids_to_tokens(beyond[0])} "
            f"with the number {beyond[0]:,}, and the model's embedding has {size:,}; restore the "
            "tokenizer that belongs to it, or resize the embedding"
        )


def load_base_and_prompt(
    settings: TrainConfig, labels: Sequence[str], dtype: torch.dtype, device: torch.device
) -> tuple[Any, Prompt, Path]:
    """Return the base model of some settings, its prompt, and the folder that both come from.

    Args:
        settings: Names the base model, the method and the prompt.
        labels: The labels to answer with.
        dtype: Storage type of the base.
        device: Where to put it.

    Raises:
        ConfigError: If it has to be quantized, and that is not supported here.
        ModelError: If there is no such model, or it cannot be loaded.
    """
    folder = hub.find(settings.model)
    prompt = load_prompt(settings, labels, folder)
    base = load_base(folder, settings.method, dtype, device, prompt.classes)
    class_head.begin(base, prompt)
    return base, prompt, folder

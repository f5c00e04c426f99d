"""What was trained, on the disk and back: an adapter or a whole model, with its card."""

from __future__ import annotations

import contextlib
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from remora.data.prompt import Prompt
from remora.errors import ModelError
from remora.models import fused_lora, hub, loading, quantize, untrusted
from remora.models.adapter_card import AdapterCard, adapter_folder, is_whole, parse_card, read_card
from remora.models.loading import load_base
from remora.runtime import files
from remora.runtime.files import disk_errors, folder_bytes, sync, write_json

NUM_BEAMS = 4
"""Labels that stock `generate()` goes on with; docs/export.md has what was measured."""


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
    with loading.without_progress_bar():
        whole.save_pretrained(folder, state_dict=weights)
    prompt.tokenizer.save_pretrained(folder)
    card = replace(card, base_sha256=files.weights_sha256(folder))
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
    source = hub.find(base or card.base_model)
    if files.weights_sha256(source) != card.base_sha256:
        raise ModelError(
            f"{folder} was trained on other weights than those in {source}; "
            "give its own base model with --model"
        )
    prompt = card.prompt(loading.load_tokenizer(source))
    loaded = load_base(source, card.method, dtype, device)
    if dequantized:
        quantize.dequantize(loaded)
    untrusted.adapter(folder, loaded)
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
    fused_lora.make_fast(adapted)
    return adapted.to(device).eval(), prompt, card


def _load_whole(
    folder: Path, *, base: str | None, dtype: torch.dtype, device: torch.device
) -> tuple[Any, Prompt, AdapterCard]:
    """Load a model that needs no base; its card has the hash of its own weights."""
    if base is not None:
        raise ModelError(f"{folder} holds a whole model and needs no base; leave out --model")
    card = parse_card(folder)
    if files.weights_sha256(folder) != card.base_sha256:
        raise ModelError(
            f"the weights in {folder} are not those that were written; restore them, or export or "
            "train again"
        )
    prompt = card.prompt(loading.load_tokenizer(folder))
    return loading.load(folder, dtype).to(device).eval(), prompt, card

"""Saves and loads trained models: an adapter or a whole model, with its card."""

from __future__ import annotations

import contextlib
import copy
import math
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from remora.config import DeviceName, PrecisionName
from remora.data.prompt import Prompt
from remora.errors import ConfigError, ModelError
from remora.formatting import first_line, quote
from remora.models import class_head, fused_lora, gguf, loading, quantize, untrusted
from remora.models.metadata import (
    AdapterCard,
    BaseHash,
    adapter_folder,
    find_base,
    is_full,
    is_whole,
    parse_card,
    read_card,
)
from remora.runtime import files
from remora.runtime.device import Precision, choose_device, choose_precision
from remora.runtime.files import disk_errors, folder_bytes, share, sync, write_json
from remora.tree import layouts
from remora.tree.scoring import Scorer

NUM_BEAMS = 4
"""Beams of stock `generate()`; docs/concepts/exports.md has the measurements."""


def save(
    trained: Any,
    prompt: Prompt,
    card: AdapterCard,
    path: Path,
    weights: dict[str, Tensor] | None = None,
) -> int:
    """Save a trained model with its card, whole or not at all; return the bytes of its weights.

    Args:
        trained: PEFT's model, or a whole one.
        prompt: Its prompt.
        card: Its card.
        path: The folder to write.
        weights: Weights of a whole model by their names; by default its own.

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
    """Save an adapter in PEFT's format with its card, whole or not at all; return its bytes.

    Raises:
        ResourceError: If the disk fails.
    """
    with _replacing(path) as folder:
        for config in adapted.peft_config.values():  # stock PEFT cannot load a GGUF file
            config.base_model_name_or_path = gguf.folder_name(card.gguf_sha256) or card.base_model
        # Embeddings are never trained; to check that, PEFT would ask the hub.
        adapted.save_pretrained(folder, save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)
        write_json(folder / "remora.json", card.to_dict())
    return (path / "adapter_model.safetensors").stat().st_size


def write_model(
    whole: Any,
    prompt: Prompt,
    card: AdapterCard,
    folder: Path,
    weights: dict[str, Tensor] | None = None,
) -> None:
    """Write a whole model with its tokenizer and card; the card gets the hash of these weights."""
    if prompt.classes:
        let_stock_pool(whole.config.get_text_config(), prompt)
        whole.config.problem_type = class_head.SET_KIND if prompt.multi_label else class_head.KIND
    else:
        whole.generation_config = _writing_labels(whole.generation_config, prompt)
    with loading.without_progress_bar():
        whole.save_pretrained(folder, state_dict=weights)
    tokenizer = copy.deepcopy(prompt.tokenizer)
    tokenizer.chat_template = prompt.chat_template
    tokenizer.save_pretrained(folder)
    rendered = prompt.rendered._asdict()
    card = replace(card, base_sha256=files.weights_sha256(folder), rendered=rendered)
    write_json(folder / "remora.json", card.to_dict())


def let_stock_pool(config: Any, prompt: Prompt) -> None:
    """Name a padding token by which stock sequence classification finds the last token of a row.

    It takes the last one that is not padding, so the prompt must not end with the padding token.
    """
    tokenizer = prompt.tokenizer
    last = prompt.stems([""])[0][-1]
    known = (config.pad_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id)
    others = (token for token in range(config.vocab_size) if token != last)
    config.pad_token_id = next(
        (token for token in known if token is not None and token != last), next(others)
    )


def _writing_labels(before: Any, prompt: Prompt) -> Any:
    """Return settings by which stock `generate()` writes the most probable label.

    A chat model's own settings sample tokens and penalize repeated ones, such as those of a label
    in the prompt. A greedy search may follow the beginning of a less probable label; a beam search
    follows several, and a length penalty of 0 compares whole labels by their probability.
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


def _refuse_to_lose(path: Path) -> None:
    """Refuse to replace anything but a saved classifier, or an empty folder."""
    if path.resolve() == Path.cwd():
        raise ConfigError(f"{path} is the current folder; give a path below it")
    if path.is_dir():
        found = sorted(file.name for file in path.iterdir())
        if found and "remora.json" not in found:
            raise ConfigError(
                f"{path} holds {quote(found[0])}, and no saved classifier; give another path"
            )
    elif path.exists():
        raise ConfigError(f"{path} is a file; give the path of a folder")


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Give the name of a folder to make, which replaces another once it is whole.

    Both names that stand beside it for a moment are hidden, so that they are nobody else's.

    Raises:
        ConfigError: If there is something else than a saved classifier.
    """
    _refuse_to_lose(path)
    temporary, replaced = (path.with_name(f".{path.name}.{end}") for end in ("tmp", "old"))
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in (temporary, replaced):  # left by an interrupted save
            shutil.rmtree(left, ignore_errors=True)
        try:
            yield temporary
            for file in temporary.iterdir():
                share(file)
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


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A trained model, loaded and ready to score."""

    model: Any  # PEFT's model, or a whole one where all weights trained; in evaluation mode
    prompt: Prompt  # the one that it was trained with
    card: AdapterCard
    precision: Precision
    device: torch.device

    def scorer(
        self, *, max_tokens: int = 2048, tolerance: float = 1e-2, limit_bytes: int | None = None
    ) -> Scorer:
        """Return a scorer of messages; the arguments are those of `tree.scoring.Scorer`."""
        return Scorer(
            self.model,
            self.prompt,
            max_tokens=max_tokens,
            tolerance=tolerance,
            autocast=self.precision.autocast,
            limit_bytes=limit_bytes,
        )


def open_trained(
    path: str | Path,
    *,
    base: str | None = None,
    device: DeviceName = "auto",
    precision: PrecisionName = "auto",
    dequantized: bool = False,
) -> Trained:
    """Load an adapter around its base model, or a whole model, on a device and in a precision.

    Args:
        path: A run directory, an adapter's folder, the folder of a whole model, or a hub id.
        base: Base model, if it has moved from where the card says.
        device: Where to compute; "auto" takes a GPU if there is one.
        precision: Arithmetic of the forward pass; "auto" takes the device's native one. A model
            whose weights all trained is stored in float32.
        dequantized: Whether to turn a 4-bit base back into plain float32 layers.

    Raises:
        ConfigError: If the device or the precision is not available, or the base is 4-bit and
            cannot be quantized here.
        ModelError: If a file is missing or broken, or the base model is another one.
    """
    path = Path(path)
    chosen = choose_device(device)
    arithmetic = choose_precision(chosen, precision, trains_base=is_full(path))
    model, prompt, card = load_adapter(
        path, base=base, dtype=arithmetic.base, device=chosen, dequantized=dequantized
    )
    return Trained(model=model, prompt=prompt, card=card, precision=arithmetic, device=chosen)


def find_weights(path: Path, *, base: str | None) -> tuple[AdapterCard, int]:
    """Return the card of a trained model, and the number of its weights with those of its base.

    Fetches or converts what is not here yet.

    Raises:
        ModelError: If a file is missing or broken.
    """
    folder = adapter_folder(path)
    folders = [folder]
    if is_whole(folder):
        card = parse_card(folder)
    else:
        card = read_card(folder)
        folders.append(find_base(card, base, folder))
    count = 0
    for file in (file for each in folders for file in each.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as weights:
                shapes = [weights.get_slice(name).get_shape() for name in weights.keys()]  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{file} cannot be read ({first_line(error)}); restore it") from error
        count += sum(math.prod(shape) for shape in shapes)
    return card, count


def load_adapter(
    path: Path,
    *,
    base: str | None,
    dtype: torch.dtype,
    device: torch.device,
    dequantized: bool = False,
) -> tuple[Any, Prompt, AdapterCard]:
    """Load an adapter around its base model, or a whole model.

    The base of an adapter trained with qlora is quantized to 4 bits, as it was in training.

    Args:
        path: A run directory, an adapter's folder, or the folder of a whole model that `export` or
            training wrote.
        base: Base model, if it has moved from where the card says.
        dtype: Storage type of the base or of the whole model.
        device: Where to put it.
        dequantized: Whether to turn a 4-bit base back into plain float32 layers.

    Returns:
        PEFT's model or the whole one, in evaluation mode; the prompt it was trained with; its card.

    Raises:
        ConfigError: If the base is 4-bit and cannot be quantized here.
        ModelError: If a file is missing or broken, or the base model is another one.
    """
    folder = adapter_folder(path)
    if is_whole(folder):
        return _load_whole(folder, base=base, dtype=dtype, device=device)
    card = read_card(folder)
    source = find_base(card, base, folder)
    if not BaseHash.of(source).is_base_of(card):
        raise ModelError(
            f"{folder} was trained on other weights than those in {source}; "
            "give its own base model with --model"
        )
    prompt = card.prompt(loading.load_tokenizer(source))
    loading.refuse_longer_vocabulary(prompt, source)
    loaded = loading.load_base(source, card.method, dtype, device, card.classes)
    layouts.assign(loaded, card.layout)
    if dequantized:
        quantize.dequantize(loaded)
    adapted = _put_adapter(folder, loaded)
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
            f"the weights in {folder} have changed since they were written; restore them, or "
            "export or train again"
        )
    prompt = card.prompt(loading.load_tokenizer(folder))
    loading.refuse_longer_vocabulary(prompt, folder)
    if card.classes:
        untrusted.whole_head(folder, class_head.NAMES)
    loaded = loading.load(folder, dtype, classes=card.classes)
    layouts.assign(loaded, card.layout)
    return loaded.to(device).eval(), prompt, card


def load_into(
    adapted: Any,
    folder: Path,
    compare: Callable[[Any, Any], None],
    rows: Sequence[int | None] = (),
) -> None:
    """Load the weights of an adapter's folder into a new adapter of the same form.

    Args:
        adapted: PEFT's model.
        folder: The adapter's folder.
        compare: Takes PEFT's configuration in the folder and that of the new adapter; raises if
            they differ.
        rows: For each class of the new adapter's head its row in the folder's; None to leave the
            new one as it is. () where the model writes its labels.

    Raises:
        ModelError: If its files are broken, or it has other weights than the new adapter.
    """
    import peft

    head = class_head.head_of(adapted)
    num_classes = len(parse_card(folder).classes)
    untrusted.adapter(folder, adapted.get_base_model(), num_classes=num_classes)
    compare(peft.LoraConfig.from_pretrained(str(folder)), adapted.peft_config["default"])
    with _adapter_errors(folder):
        weights = load_file(folder / "adapter_model.safetensors")
    _refuse_other_names(folder, set(weights), adapted)
    for name in weights.keys() & class_head.SAVED_NAMES:
        own = head.get_parameter(name.rsplit(".", 1)[-1]).detach().clone()
        for index, row in enumerate(rows):
            if row is not None:
                own[index] = weights[name][row]
        weights[name] = own
    peft.set_peft_model_state_dict(adapted, weights)


@contextlib.contextmanager
def _adapter_errors(folder: Path) -> Iterator[None]:
    """Say in one line that an adapter cannot be loaded."""
    try:
        yield
    except Exception as error:
        raise ModelError(
            f"the adapter in {folder} cannot be loaded ({first_line(error)}); "
            "train it again or restore it"
        ) from error


def _refuse_other_names(folder: Path, names: set[str], adapted: Any) -> None:
    """Refuse a file that lacks weights of an adapter, or has others."""
    import peft

    expected = set(peft.get_peft_model_state_dict(adapted, save_embedding_layers=False))
    if different := sorted(names ^ expected):
        verb = "has" if different[0] in names else "lacks"
        raise ModelError(
            f"the adapter in {folder} {verb} {different[0]}, which does not fit its configuration; "
            "train it again or restore it"
        )


def _put_adapter(folder: Path, base: Any) -> Any:
    """Return PEFT's model: the adapter in a folder on its base, every weight of it from the file.

    Raises:
        ModelError: If the adapter does not fit the base, or its files are broken.
    """
    import peft

    untrusted.adapter(folder, base)
    with _adapter_errors(folder), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("ignore", "Found missing adapter keys", UserWarning)
        adapted = peft.PeftModel.from_pretrained(base, folder, local_files_only=True)
    # PEFT only warns of missing weights and leaves random ones in their place.
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        _refuse_other_names(folder, set(file.keys()), adapted)
    return adapted

"""The base model made trainable, and the last preparations before its first step."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from remora.config import TrainConfig
from remora.data.dataset import Dataset
from remora.data.prompt import Prompt, TokenSequence
from remora.data.table import Table
from remora.formatting import listed
from remora.models import gguf, hub, loading, lora, metadata
from remora.planning import plan
from remora.runtime import sharding
from remora.runtime.device import Precision
from remora.training import warm_start
from remora.tree.forward import text_config
from remora.tree.label_search import nodes_not_in_trie

KEPT = {
    "head": "their beginning is kept (--truncate tail or both keeps other parts, windows all)",
    "tail": "their end is kept",
    "both": "beginning and end are kept, half from each",
}
"""What is kept of messages that are too long, in words."""


@contextlib.contextmanager
def accelerator_for(precision: Precision, device: torch.device) -> Iterator[Any]:
    """Give accelerate's Accelerator, and leave the process free for another with other settings."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    accelerator = Accelerator(mixed_precision=precision.mixed_precision, cpu=device.type == "cpu")
    try:
        yield accelerator
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def load_trainable(
    config: TrainConfig, labels: Sequence[str], precision: Precision, device: torch.device
) -> tuple[Any, Prompt, metadata.AdapterCard, Path]:
    """Load the base model and make it trainable: a new adapter, or all weights.

    Returns:
        The trainable model, its prompt, its card, and the folder of its base.

    Raises:
        ModelError: If the model cannot be used.
    """
    base, prompt, folder = loading.load_base_and_prompt(config, labels, precision.base, device)
    adapted = lora.adapt(base, config).to(device)
    base_hash = metadata.BaseHash.of(folder)
    if config.start_from:
        prompt = warm_start.load_adapter_of(config.start_from, config, adapted, prompt, base_hash)
    card = metadata.AdapterCard(
        base_model=hub.lasting_name(config.model, folder),
        base_sha256=base_hash.weights_sha256,
        labels=tuple(labels),
        instruction=config.instruction,
        list_labels=config.list_labels,
        label_texts=prompt.label_texts,
        max_length=prompt.max_length,
        truncate=prompt.kept,
        label_separator=config.label_separator or "",
        rename_labels=config.rename_labels,
        method=config.method,
        answer=config.answer or "words",
        gguf_sha256=base_hash.gguf_sha256,
        gguf_quantization=base_hash.gguf_quantization,
        rendered=prompt.rendered._asdict(),
        multi_label=prompt.multi_label,
        thresholds=(0.5,) * len(labels) if prompt.multi_label else (),  # fitted after training
        split_labels_at=config.split_labels_at,
        label_columns=config.label_columns,
    )
    return adapted, prompt, card, folder


@contextlib.contextmanager
def as_base(
    model: Any, card: metadata.AdapterCard, folder: Path, dtype: torch.dtype
) -> Iterator[None]:
    """Let a trained model be its base again: without its adapter, which comes back at the end.

    If all weights trained, those of the base are loaded into the model, and stay.

    Args:
        model: PEFT's, or a plain one whose weights all trained.
        card: Says which.
        folder: The folder of the base.
        dtype: Storage type of the base.

    Raises:
        ModelError: If the base cannot be loaded again.
    """
    if card.method != "full":
        with model.disable_adapter():
            yield
        return
    before = loading.load(folder, dtype, classes=card.classes)
    with torch.no_grad():
        for own, weight in zip(model.parameters(), before.parameters(), strict=True):
            wide = weight.to(own.dtype)
            own.copy_(sharding.part(wide, own) if sharding.is_sharded(own) else wide)
    del before
    yield


def set_up_layers(model: Any, planned: plan.Plan) -> None:
    """Make a checked model ready for its first step: checkpointing and sharding as planned."""
    if planned.shard:
        model.reset_iter_state()  # of a pass in blocks that the model may have refused
    loading.set_checkpointing(model, planned.checkpointing)


def short_rows(table: Table, prompt: Prompt, count: int = 4) -> list[TokenSequence]:
    """Return the shortest of the first rows, to check a model with."""
    first = sorted(range(min(len(table), 256)), key=lambda i: len(table.texts[i]))[:count]
    return prompt.rows([table.texts[i] for i in first], [table.labels[i] for i in first])[:count]


def introduce(
    config: TrainConfig,
    dataset: Dataset,
    prompt: Prompt,
    adapted: Any,
    parameters: lora.ParameterCount,
    card: metadata.AdapterCard,
) -> Iterator[str]:
    """Yield what will be trained, each derived setting with its origin."""
    layers = ", ".join(f"{name} {count:,}" for name, count in parameters.modules.items())
    trained = "all weights" if config.method == "full" else f"r={config.rank}: {layers}"
    if config.dropout and any(hasattr(layer, "parameter_name") for layer in adapted.modules()):
        trained += "; dropout 0, since PEFT adapts experts without it"
    if parameters.experts and config.method != "full":
        trained += f"; {parameters.experts:,} in experts stay frozen"
    if config.method == "qlora":
        trained += "; the base model is quantized to 4 bits"
    yield (
        f"training {parameters.trainable:,} of {parameters.total:,} parameters "
        f"({parameters.share:.2%}), {trained}"
    )
    if card.gguf_quantization:
        yield f"weights of the base model: {gguf.described(card.gguf_quantization)}"
    width = text_config(adapted).hidden_size
    if config.learning_rate is None:
        rate = config.rate(width)
        why = " with a linear head" if config.learns_a_head else ""
        why += ", halved to learn on" if config.start_from else ""
        yield f"learning rate {rate:.1e}, the default for a hidden size of {width}{why}"
    given = {*config.label_texts}
    if config.start_from:
        yield from warm_start.told(config.start_from, dataset.labels)
        begun_with = metadata.read_card(metadata.adapter_folder(Path(config.start_from)))
        given |= warm_start.texts_of(begun_with, prompt.labels).keys()
    if respelled := [label for label in prompt.label_texts if label not in given]:
        label, text = respelled[0], prompt.label_texts[respelled[0]]
        yield (
            "this tokenizer cannot encode all labels as they are; they are written with spaces, "
            f"{label} as {text!r}"
        )
    if card.hierarchy and not prompt.classes:
        missing = nodes_not_in_trie(prompt.answers, card.hierarchy)
        if missing:
            yield (
                f"this tokenizer's tokens do not follow the levels below {listed(missing)}: as "
                "exact, but slower; a separator such as ' > ', or --label-texts, changes that"
            )
    for what, table in (("training", dataset.train), ("test", dataset.test)):
        if table is not None:
            yield from told_cut(prompt, table.texts, what)


def told_cut(prompt: Prompt, messages: Sequence[str], what: str) -> Iterator[str]:
    """Yield a sentence on messages that are too long, if any are."""
    in_windows = prompt.kept == "windows"
    cut, num_windows = (
        prompt.count_windows(messages) if in_windows else (prompt.count_cut(messages), 0)
    )
    longer = f"{cut:,} of {len(messages):,} {what} messages are longer than {prompt.max_length}"
    if cut and in_windows:
        each = num_windows / cut
        yield f"{longer} tokens and are read in {num_windows:,} windows, {each:.1f} each"
    elif cut:
        yield f"{longer} tokens and are truncated: {KEPT[prompt.kept]}"

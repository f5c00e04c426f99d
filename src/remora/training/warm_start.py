"""Training that begins with another run's adapter: `--from`."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from remora.config import TrainConfig
from remora.data.prompt import Prompt, Rendered
from remora.errors import ConfigError, ModelError
from remora.models import metadata, saved
from remora.models.metadata import AdapterCard, BaseHash

SAME = {"r": "rank", "lora_alpha": "alpha", "use_rslora": "use_rslora", "use_dora": "use_dora"}
"""What both adapters must have in common, by PEFT's names: the settings that say it."""


def load_adapter_of(
    run: str, config: TrainConfig, adapted: Any, prompt: Prompt, base: BaseHash
) -> Prompt:
    """Put the weights of another run's adapter into a new one of the same form.

    Args:
        run: The run's directory, or the folder or hub id of its adapter.
        config: The settings.
        adapted: PEFT's model with a new adapter.
        prompt: The prompt of the settings.
        base: What its base model is recognized by.

    Returns:
        The prompt, in which the labels that the run had too are written and answered as there.

    Raises:
        ConfigError: If the adapters differ in their form, or the prompts in their instruction, or
            in what is written for a label.
        ModelError: If the run has no adapter, a file of it is broken, or its base is another one.
    """
    folder = metadata.adapter_folder(Path(run))
    card = metadata.read_card(folder)
    if metadata.is_whole(folder):
        raise ModelError(
            f"{run} holds a whole model, not an adapter; give --model {folder} to begin with it"
        )
    if not base.is_base_of(card):
        raise ModelError(
            f"{run} was trained on {card.base_model}, and {config.model} has other weights; give "
            f"--model {card.base_model}"
        )
    for name in ("answer", "instruction", "list_labels"):
        if (there := getattr(card, name)) != getattr(config, name):
            raise ConfigError(
                f"{run} was trained with {_setting(name, there)}; give the same, so that its "
                "labels keep their answers"
            )
    if card.multi_label != prompt.multi_label:
        there, here = ("several labels", "one each") if card.multi_label else ("one", "several")
        raise ConfigError(
            f"{run} gives a message {there}, and these rows have {here}; begin with the base model"
        )
    prompt = _with_texts_of(run, card, config, prompt)
    places = {label: index for index, label in enumerate(card.classes)}
    rows = [places.get(label) for label in prompt.classes]
    saved.load_into(adapted, folder, _refuse_other_form(run, config), rows)
    return _with_answers_of(card, prompt)


def told(run: str, labels: tuple[str, ...]) -> Iterator[str]:
    """Yield what joins and what is left of the labels of a run."""
    card = metadata.read_card(metadata.adapter_folder(Path(run)))
    new = [label for label in labels if label not in card.labels]
    kept = len(labels) - len(new)
    yield f"beginning with the adapter of {run}: {kept:,} labels are known, {len(new):,} join"
    if gone := [label for label in card.labels if label not in labels]:
        if len(gone) == 1:
            yield (
                f"1 label of {run} is not in the table and no longer an answer, {gone[0]!r}; add "
                "rows to keep it"
            )
        else:
            yield (
                f"{len(gone):,} labels of {run} are not in the table and no longer answers, such "
                f"as {gone[0]!r}; add rows of theirs to keep them"
            )
    if texts := texts_of(card, labels):
        label, text = next(iter(texts.items()))
        yield f"labels are written as in {run}, such as {label!r} as {text!r}"


def texts_of(card: AdapterCard, labels: Collection[str]) -> dict[str, str]:
    """Return the texts that a run writes for some labels, if other than the labels."""
    return {label: text for label, text in card.label_texts.items() if label in labels}


def _with_texts_of(run: str, card: AdapterCard, config: TrainConfig, prompt: Prompt) -> Prompt:
    """Return the prompt with the texts that a run writes for the labels that both have.

    Raises:
        ConfigError: If the settings give another text for one of them.
    """
    for label, here in config.label_texts.items():
        there = card.label_texts.get(label, label)
        if label in card.labels and here != there:
            raise ConfigError(
                f"{run} writes {there!r} for the label {label!r} and label_texts has {here!r}; "
                "give the same text, or leave it out"
            )
    joined = {label: text for label, text in prompt.label_texts.items() if label not in card.labels}
    texts = joined | texts_of(card, prompt.labels)
    if texts == prompt.label_texts:
        return prompt
    return type(prompt)(
        prompt.tokenizer,
        prompt.labels,
        instruction=prompt.instruction,
        list_labels=prompt.list_labels,
        label_texts=texts,
        max_length=prompt.max_length,
        kept=prompt.kept,
    )


def _refuse_other_form(run: str, config: TrainConfig) -> Any:
    """Return a function that compares PEFT's configurations of two adapters."""

    def compare(there: Any, here: Any) -> None:
        if there.rank_pattern or there.alpha_pattern:
            raise ModelError(
                f"{run} is a compressed adapter, whose layers differ in rank; begin with the run "
                "that it was made from"
            )
        for name, setting in SAME.items():
            if (value := getattr(there, name)) != getattr(here, name):
                raise ConfigError(
                    f"the adapter of {run} has {setting} {value:g} and these settings have "
                    f"{getattr(config, setting):g}; give {_setting(setting, value)}"
                )
        if set(there.target_modules) != set(here.target_modules):
            names = ",".join(sorted(name.rsplit(".", 1)[-1] for name in there.target_modules))
            raise ConfigError(
                f"the adapter of {run} is on other layers; give --target-modules {names}"
            )

    return compare


def _setting(name: str, value: Any) -> str:
    """Return a flag as one would type it."""
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{flag}" if value else f"--no-{flag}"
    return f"--{flag} {value!r}" if isinstance(value, str) else f"--{flag} {value:g}"


def _with_answers_of(card: AdapterCard, prompt: Prompt) -> Prompt:
    """Return the prompt rendered as in a run, as far as both have the same labels."""
    if not card.rendered:
        return prompt
    before, now = Rendered(**card.rendered), prompt.rendered
    # Classes are the places of labels in their own run, whose rows of the head are moved instead.
    answers = {} if card.classes else dict(zip(card.labels, before.answers, strict=True))
    joined = [
        answers.get(label, own) for label, own in zip(prompt.labels, now.answers, strict=True)
    ]
    same = now if card.list_labels else before  # a list of labels names the new ones
    return prompt.pinned(same._replace(answers=joined))

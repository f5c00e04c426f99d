"""remora.json: what the files of PEFT or transformers do not say about a trained model."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import remora
from remora.config import TrainConfig
from remora.config.checks import Answer
from remora.data.class_prompt import prompt_class
from remora.data.cutting import Kept
from remora.data.label_sets import LabelForm
from remora.data.levels import Hierarchy, hierarchy_of
from remora.data.prompt import Prompt, Rendered
from remora.data.values import is_text
from remora.errors import ModelError
from remora.formatting import one_line
from remora.models import gguf, hub, untrusted
from remora.runtime import files
from remora.tree.layouts import Layout

_log = logging.getLogger(__name__)

SCHEMA = 1
FOLDERS = {"lora": "adapter", "qlora": "adapter", "full": "model"}
"""Folder of the trained model in a run directory, by method."""


@dataclass(frozen=True, kw_only=True)
class AdapterCard:
    """The contents of remora.json: the base model, the prompt and the method."""

    base_model: str
    base_sha256: str  # a whole model has the hash of its own weights
    labels: tuple[str, ...]
    instruction: str
    list_labels: bool
    label_texts: Mapping[str, str]
    max_length: int
    method: str = "lora"
    remora_version: str = remora.__version__
    schema: int = SCHEMA
    gguf_sha256: str = ""  # of the GGUF file that the base was converted from, if it was
    gguf_quantization: str = ""  # of its weights there, such as Q4_K_M
    rendered: Mapping[str, Any] = field(default_factory=dict)  # the prompt as it was rendered
    layout: Layout = "tree"  # in which it was trained, and is scored
    answer: Answer = "words"  # that the model writes, or classes that a linear head scores
    text_columns: tuple[str, ...] = ()  # of the training table; a text has several by their names
    label_column: str = ""
    truncate: Kept = "head"  # the part of a message longer than `max_length` that is kept
    multi_label: bool = False  # whether a row may have several labels, each scored by itself
    thresholds: tuple[float, ...] = ()  # probability from which on a row gets each label
    split_labels_at: str | None = None  # how the training table wrote several labels, if in a text
    label_columns: tuple[str, ...] = ()  # its columns of 0 and 1, if it had those

    label_separator: str = ""  # between the parts of labels that form a hierarchy
    rename_labels: Mapping[str, str] = field(default_factory=dict)  # of tables to those of `labels`

    @property
    def label_form(self) -> LabelForm:
        """How the training table wrote the labels of a row."""
        return LabelForm(
            "on" if self.multi_label else "auto", self.split_labels_at, self.label_columns
        )

    def to_dict(self) -> dict[str, Any]:
        """Return what remora.json holds.

        Fields of GGUF files, columns, names to change and a separator are there only where there
        are any; a layout if it is not the tree, what is kept of long messages if it is not their
        head, an answer if it is not words; what is for several labels only where there are several.
        """
        values = asdict(self)
        optional = {"gguf_sha256", "gguf_quantization", "rendered", "text_columns", "label_column"}
        optional |= {"multi_label", "thresholds", "split_labels_at", "label_columns"}
        optional |= {"label_separator", "rename_labels"}
        for name, usual in (("layout", "tree"), ("truncate", "head"), ("answer", "words")):
            if values[name] == usual:
                del values[name]
        return {k: v for k, v in values.items() if v or k not in optional}

    @property
    def hierarchy(self) -> Hierarchy | None:
        """The hierarchy of the labels, None if they are none."""
        return hierarchy_of(self.labels, self.label_separator)

    @property
    def num_upper_levels(self) -> int:
        """The levels above the labels; 0 if they are no hierarchy."""
        return self.hierarchy.depth - 1 if self.hierarchy else 0

    @property
    def classes(self) -> tuple[str, ...]:
        """The labels that a linear head scores; () where the model writes their words."""
        return self.labels if self.answer == "classes" else ()

    def prompt(self, tokenizer: Any) -> Prompt:
        """Return the prompt that the model was trained with, and say what would differ now."""
        prompt = prompt_class(self.answer, multi_label=self.multi_label)(
            tokenizer,
            self.labels,
            instruction=self.instruction,
            list_labels=self.list_labels,
            label_texts=self.label_texts,
            max_length=self.max_length,
            kept=self.truncate,
            rendered=Rendered(**self.rendered) if self.rendered else None,
        )
        if prompt.changed:
            _log.warning(prompt.changed)
        return prompt


@dataclass(frozen=True, kw_only=True)
class BaseHash:
    """What a base model's folder is recognized by."""

    weights_sha256: str
    gguf_sha256: str = ""  # of the GGUF file that these weights were converted from
    gguf_quantization: str = ""

    @classmethod
    def of(cls, folder: Path) -> BaseHash:
        """Return the hashes of a folder.

        Raises:
            ModelError: If its gguf.json is broken.
        """
        sha256, origin = files.weights_sha256(folder), gguf.origin(folder)
        if origin is None or origin.weights_sha256 != sha256:  # changed since
            return cls(weights_sha256=sha256)
        return cls(
            weights_sha256=sha256,
            gguf_sha256=origin.sha256,
            gguf_quantization=origin.quantization,
        )

    def is_base_of(self, card: AdapterCard) -> bool:
        """Return whether an adapter was trained on this base: its weights, or the same GGUF file.

        Another version of a library may round the weights of a GGUF file in another way.
        """
        if card.base_sha256 == self.weights_sha256:
            return True
        return self.gguf_sha256 != "" and card.gguf_sha256 == self.gguf_sha256


def find_base(card: AdapterCard, given: str | None, folder: Path) -> Path:
    """Return the folder of an adapter's base model.

    Args:
        card: The adapter's card, which says where its base was.
        given: Where it is now; None if it has not moved.
        folder: The adapter's folder.

    Raises:
        ModelError: If it is not there, or cannot be fetched.
    """
    return hub.find(base_name(card, given, folder))


def base_name(card: AdapterCard, given: str | None, folder: Path) -> str:
    """Return the name of an adapter's base model, for `hub.find`; arguments as in `find_base`.

    Raises:
        ModelError: If it is a path where nothing is any more.
    """
    if given is None and Path(card.base_model).is_absolute() and not Path(card.base_model).exists():
        raise ModelError(
            f"{folder} was trained on {card.base_model}, which is not there; say where it is now "
            "with --model"
        )
    return given or card.base_model


def adapter_folder(path: Path) -> Path:
    """Return the folder of a run directory's trained model, or the path itself if it is no run.

    A path that does not exist and reads like a hub id is fetched from the hub.

    Raises:
        ModelError: If it cannot be fetched, or the run is not finished: the weights that it holds
            by then are those of its best validation so far.
    """
    if _is_hub_id(path):
        return _fetch(path.as_posix())
    if (path / "config.toml").is_file() and not (path / "evaluation.json").is_file():
        raise ModelError(
            f"the run in {path} is not finished; resume it with the command that started it"
        )
    return trained_folder(path)


def trained_folder(path: Path) -> Path:
    """Return what `adapter_folder` does of a local path, of a run that may not be finished."""
    folders = (path / name for name in FOLDERS.values())
    return next((folder for folder in folders if folder.is_dir()), path)


def _is_hub_id(path: Path) -> bool:
    """Return whether a path is a hub id such as owner/name.

    It is not if there is a folder `owner`, or if `owner` is the folder of all runs: a misspelt run
    must not become somebody else's adapter.
    """
    return (
        hub.HUB_ID.fullmatch(path.as_posix()) is not None
        and path.parent != TrainConfig.output
        and not path.parent.exists()
    )


def _fetch(name: str) -> Path:
    """Fetch a hub repository; its large files only if it was published by Remora."""
    folder = hub.fetch(name, ("*.json",))
    if not (folder / "remora.json").is_file():
        raise ModelError(
            f"{name} on the hub was not trained by Remora, it has no remora.json; "
            "give a model that `remora push` has published"
        )
    return hub.fetch(name, hub.HUB_FILES)


def as_trained(prompt: Prompt, run: Path) -> Prompt:
    """Return a prompt as it was rendered for a run's training, if the run says so.

    Raises:
        ModelError: If the run's card is broken.
    """
    card = card_of_run(run)
    if card is None or not card.rendered or card.labels != prompt.labels:
        return prompt
    return prompt.pinned(Rendered(**card.rendered))


def card_of_run(run: Path) -> AdapterCard | None:
    """Return the card of what a run trained, an adapter or a whole model; None if it has none.

    Raises:
        ModelError: If it is broken.
    """
    folder = trained_folder(run)
    return parse_card(folder) if (folder / "remora.json").is_file() else None


def is_full(path: Path) -> bool:
    """Return whether a run directory or a folder holds a model trained with method full.

    Raises:
        ModelError: If its card is broken.
    """
    folder = trained_folder(path) if path.is_dir() else adapter_folder(path)
    return is_whole(folder) and parse_card(folder).method == "full"


def is_whole(folder: Path) -> bool:
    """Return whether a folder holds a whole model and its card, so that it needs no base."""
    return (folder / "remora.json").is_file() and (folder / "config.json").is_file()


def read_card(folder: Path) -> AdapterCard:
    """Return the card of an adapter's folder.

    Raises:
        ModelError: If the card or a file of PEFT's is missing or broken.
    """
    if is_whole(folder):
        raise ModelError(
            f"{folder} holds a whole model, not an adapter; give a run that trained an adapter"
        )
    if not folder.is_dir():
        raise ModelError(f"there is no folder {folder}; give a run directory or its adapter folder")
    for name in ("remora.json", "adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():
            raise ModelError(
                f"{folder} is not an adapter of Remora, it has no {name}; "
                "give a run directory or its adapter folder"
            )
    return parse_card(folder)


def parse_card(folder: Path) -> AdapterCard:
    """Return the card in a folder, every value checked.

    Raises:
        ModelError: If it is missing or broken, or of another schema.
    """
    path = folder / "remora.json"
    values = untrusted.read_json(path)
    if values.get("schema", SCHEMA) != SCHEMA:
        raise ModelError(
            f"{folder} has schema {values['schema']}, this version reads {SCHEMA}; "
            "use the version of Remora that wrote it"
        )
    try:
        columns = tuple(values.get("text_columns", ()))
        lists = {"labels": tuple(values["labels"]), "text_columns": columns}
        lists |= {n: tuple(values[n]) for n in ("thresholds", "label_columns") if n in values}
        card = AdapterCard(**{**values, **lists})
    except (TypeError, KeyError) as error:
        raise ModelError(f"{path} is broken ({one_line(error)}); restore it") from error
    texts = [card.base_model, card.base_sha256, card.instruction, card.method, card.remora_version]
    texts += [card.gguf_sha256, card.gguf_quantization, card.label_column, *card.text_columns]
    texts += [card.label_separator]
    if not (
        all(is_text(text) for text in (*texts, *card.labels))
        and card.method in FOLDERS
        and card.layout in get_args(Layout)
        and card.answer in get_args(Answer)
        and card.truncate in get_args(Kept)
        and isinstance(card.label_texts, dict)
        and all(is_text(t) and label in card.labels for label, t in card.label_texts.items())
        and isinstance(card.rename_labels, dict)
        and {*card.rename_labels.values()} <= {*card.labels}
        and 2 <= len(card.labels) == len(set(card.labels))
        and isinstance(card.list_labels, bool)
        and isinstance(card.max_length, int)
        and 1 <= card.max_length <= untrusted.MAX_SIZE
        and _is_rendered(card.rendered, len(card.labels))
        and _is_multi_label(card)
    ):
        raise ModelError(f"{path} is broken (a value has the wrong type); restore it")
    return card


def _is_multi_label(card: AdapterCard) -> bool:
    """Return whether what a card says on several labels a row is right, or it says nothing."""
    if not isinstance(card.multi_label, bool):
        return False
    if not card.multi_label:
        return not (card.thresholds or card.split_labels_at or card.label_columns)
    return (
        card.answer == "classes"
        and len(card.thresholds) == len(card.labels)
        and all(isinstance(each, float) and 0 <= each <= 1 for each in card.thresholds)
        and (card.split_labels_at is None or is_text(card.split_labels_at))
        and all(is_text(each) for each in card.label_columns)
    )


def _is_rendered(value: Any, num_labels: int) -> bool:
    """Return whether a value is a rendered prompt as `Rendered` has it, or none."""
    if value == {}:
        return True
    if not isinstance(value, dict) or set(value) != set(Rendered._fields):
        return False
    sequences = value["answers"]
    return (
        all(is_text(value[name]) for name in ("head", "tail", "opening", "ending"))
        and isinstance(sequences, list)
        and len(sequences) == num_labels
        and all(isinstance(tokens, list) for tokens in (value["prefix"], *sequences))
        and all(sequences)
        and all(
            type(token) is int and 0 <= token < untrusted.MAX_SIZE
            for tokens in (value["prefix"], *sequences)
            for token in tokens
        )
    )


def set_thresholds(folder: Path, thresholds: Sequence[float]) -> None:
    """Write the thresholds by which a row gets its labels into the card in a folder."""
    card = replace(parse_card(folder), thresholds=tuple(map(float, thresholds)))
    files.write_json(folder / "remora.json", card.to_dict())

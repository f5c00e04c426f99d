"""One base model in memory with many adapters, or one whole model, and their scorers."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from remora.data.levels import Hierarchy
from remora.data.prompt import Prompt
from remora.errors import ModelError
from remora.formatting import one_line
from remora.models import class_head, fused_lora, loading, metadata, saved, untrusted
from remora.runtime.device import Precision
from remora.serving import snapshot
from remora.serving.snapshot import Snapshot
from remora.tree import layouts
from remora.tree.scoring import Scorer


@dataclass(frozen=True, kw_only=True)
class Generation:
    """An adapter as it was on the disk at one moment."""

    sha256: str
    labels: tuple[str, ...]
    module: str  # its name in PEFT's model, empty for a whole model
    scorer: Scorer
    text_columns: tuple[str, ...] = ()  # of its training table
    thresholds: tuple[float, ...] = ()  # of labels, where a text may get several
    hierarchy: Hierarchy | None = None  # of its labels


class AdapterSet:
    """Loads adapters around one base model, and swaps one for its next generation."""

    def __init__(
        self,
        folders: Mapping[str, Path],
        *,
        base: str | None,
        precision: Precision,
        device: torch.device,
        micro_batch_tokens: int,
        tolerance: float,
    ) -> None:
        """Load the base model and all adapters, or one whole model.

        Args:
            folders: A run directory or an adapter's folder for each adapter's id, or that of a
                single whole model.
            base: Base model, if it has moved from where the first adapter's card says.
            precision: Arithmetic and storage of the base model.
            device: Where to compute.
            micro_batch_tokens: Most tokens computed at once.
            tolerance: Maximum total probability left on unexplored labels.

        Raises:
            ModelError: If a part is missing or broken, adapters have different base models, or a
                whole model is not alone.
        """
        self._folders = {name: metadata.adapter_folder(path) for name, path in folders.items()}
        self._device = device
        self._precision = precision
        self._micro_batch_tokens = micro_batch_tokens
        self._tolerance = tolerance
        self._adapted: Any = None  # PEFT's model; None where a whole model is served
        self._num_loaded = 0
        self._generations: dict[str, Generation] = {}
        if wholes := [name for name, folder in self._folders.items() if metadata.is_whole(folder)]:
            self._load_whole(wholes[0], base)
        else:
            self._load_adapters(base)

    @property
    def generations(self) -> Mapping[str, Generation]:
        """The current generation of each adapter."""
        return dict(self._generations)

    def activate(self, adapter: str) -> Generation:
        """Have PEFT's model compute with an adapter; return its current generation."""
        generation = self._generations[adapter]
        if self._adapted is not None:
            self._adapted.set_adapter(generation.module)
        return generation

    @contextlib.contextmanager
    def snapshot(self, adapter: str) -> Iterator[Snapshot]:
        """Copy the files of an adapter's folder as they are now; from any thread.

        Raises:
            ModelError: If they cannot be used, or the model is a whole one.
        """
        if self._adapted is None:
            raise ModelError(
                f"{adapter} is a whole model, which is not replaced while it is served; start the "
                "service again"
            )
        with snapshot.taken(self._folders[adapter]) as copied:
            self._refuse_other_base(adapter, copied.card)
            yield copied

    def replace(self, adapter: str, copied: Snapshot) -> bool:
        """Replace an adapter by its next generation; return whether its files have changed.

        Raises:
            ModelError: If the new one cannot be used; the generation before stays.
        """
        before = self._generations[adapter]
        if copied.sha256 == before.sha256:
            return False
        after = self._add(adapter, copied)
        self._adapted.set_adapter(after.module)
        self._adapted.delete_adapter(before.module)
        self._generations[adapter] = after
        return True

    def _load_whole(self, name: str, base: str | None) -> None:
        """Load a model that has no adapter; its generation is the hash of its weights."""
        if len(self._folders) > 1:
            raise ModelError(
                f"{name} is a whole model, which shares no base with others; serve it by itself"
            )
        whole, prompt, card = saved.load_adapter(
            self._folders[name], base=base, dtype=self._precision.base, device=self._device
        )
        self.base_sha256 = card.base_sha256
        self._generations[name] = Generation(
            sha256=card.base_sha256,
            labels=card.labels,
            module="",
            scorer=self._scorer(whole, prompt, card),
            text_columns=card.text_columns,
            thresholds=card.thresholds,
            hierarchy=card.hierarchy,
        )

    def _load_adapters(self, base: str | None) -> None:
        """Load the base model, and all adapters around it."""
        cards = {name: metadata.read_card(folder) for name, folder in self._folders.items()}
        name, card = next(iter(cards.items()))
        source = metadata.find_base(card, base, self._folders[name])
        self._base_hash = metadata.BaseHash.of(source)
        self.base_sha256 = self._base_hash.weights_sha256
        self._method, self._answer = card.method, card.answer
        for name, other in cards.items():
            self._refuse_other_base(name, other)
        self._tokenizer = loading.load_tokenizer(source)
        self._base = loading.load_base(
            source, self._method, self._precision.base, self._device, card.classes
        )
        layouts.assign(self._base, card.layout)
        # The base's names and shapes without adapters, which new adapters are checked against.
        self._skeleton = loading.load_empty(
            loading.load_config(source, card.classes), self._precision.base
        )
        for name in self._folders:
            with snapshot.taken(self._folders[name]) as copied:
                self._refuse_other_base(name, copied.card)
                self._generations[name] = self._add(name, copied)

    def _refuse_other_base(self, adapter: str, card: metadata.AdapterCard) -> None:
        if not self._base_hash.is_base_of(card):
            raise ModelError(
                f"the adapter {adapter} was trained on other base weights than those that are "
                "served; serve it by itself, or give the base model with --model"
            )
        if (card.method == "qlora") != (self._method == "qlora"):
            raise ModelError(
                f"the adapter {adapter} was trained by {card.method} and those that are served by "
                f"{self._method}, one of them on a base quantized to 4 bits; serve it by itself"
            )
        if card.answer != self._answer:
            raise ModelError(
                f"the adapter {adapter} answers by {card.answer} and those that are served by "
                f"{self._answer}, so they share no head; serve it by itself"
            )

    def _add(self, adapter: str, copied: Snapshot) -> Generation:
        """Load an adapter beside the others."""
        import peft

        self._num_loaded += 1
        # PEFT looks for an adapter's name within the names of weights: none may contain another.
        module = f"generation_{self._num_loaded:09d}"
        settings: dict[str, Any] = {"adapter_name": module, "low_cpu_mem_usage": True}
        try:
            if copied.card.classes:
                for model in (self._skeleton, self._adapted or self._base):
                    class_head.resize(model, len(copied.card.classes))
            untrusted.adapter(copied.folder, self._skeleton)
            prompt = copied.card.prompt(self._tokenizer)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)
                warnings.filterwarnings("ignore", "Found missing adapter keys", UserWarning)
                if self._adapted is None:
                    self._adapted = peft.PeftModel.from_pretrained(
                        self._base, copied.folder, local_files_only=True, **settings
                    )
                else:
                    self._adapted.load_adapter(
                        copied.folder, local_files_only=True, torch_device="cpu", **settings
                    )
            self._refuse_missing(module, copied.folder)
        except Exception as error:  # of PEFT, of safetensors or of the configuration's values
            if self._adapted is not None and module in self._adapted.peft_config:
                self._adapted.delete_adapter(module)
            folder = self._folders[adapter]
            if isinstance(error, ModelError):
                raise snapshot.renamed(error, copied.folder, folder) from error
            raise ModelError(
                f"the adapter in {folder} cannot be loaded ({one_line(error)}); train it again or "
                "restore it"
            ) from error
        self._unmap(module)
        fused_lora.make_fast(self._adapted)
        self._adapted.to(self._device).eval()
        return Generation(
            sha256=copied.sha256,
            labels=copied.card.labels,
            module=module,
            scorer=self._scorer(self._adapted, prompt, copied.card),
            text_columns=copied.card.text_columns,
            thresholds=copied.card.thresholds,
            hierarchy=copied.card.hierarchy,
        )

    def _refuse_missing(self, module: str, folder: Path) -> None:
        """Refuse an adapter that PEFT has left random weights in: it only warns of those."""
        import peft

        with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
            names = set(file.keys())
        state: Any = peft.get_peft_model_state_dict(
            self._adapted, adapter_name=module, save_embedding_layers=False
        )
        if different := sorted(names ^ set(state)):
            verb = "has" if different[0] in names else "lacks"
            raise ModelError(
                f"the adapter in {folder} {verb} {different[0]}, which does not fit its "
                "configuration; train it again or restore it"
            )

    def _unmap(self, module: str) -> None:
        """Copy an adapter's weights into memory: PEFT leaves them mapped from the snapshot's file.

        Windows would not delete that file, and Linux would keep its space on the disk.
        """
        for name, parameter in self._adapted.named_parameters():
            if f".{module}." in f"{name}.":  # a weight of a dictionary ends with it
                parameter.data = parameter.data.clone()

    def _scorer(self, scored: Any, prompt: Prompt, card: metadata.AdapterCard) -> Scorer:
        return Scorer(
            scored,
            prompt,
            max_tokens=self._micro_batch_tokens,
            tolerance=self._tolerance,
            autocast=self._precision.autocast,
            layout=card.layout,
        )

"""One base model in memory with many adapters, and the thread that answers requests with them.

Requests wait in one queue. The thread takes the oldest, and with it all that wait for the same
adapter, and scores their texts as one token tree behind the adapter's cached prefix. What arrives
meanwhile forms the next batch, so batches grow with the load and nobody waits for company.

An adapter is swapped between two batches. A request is taken by one batch, so it is answered by one
generation of its adapter, whose SHA-256 its answer bears.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import shutil
import tempfile
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open

from remora.data.prompt import Prompt
from remora.errors import ModelError
from remora.formatting import one_line
from remora.models import adapter_card, fused_lora, hub, loading, saved, untrusted
from remora.runtime import files
from remora.runtime.device import Precision
from remora.tree.scoring import Scorer

BATCH_TEXTS = 64
"""Texts at which a batch takes no further request; as many as `predict` scores at a time."""

FILES = ("adapter_config.json", "adapter_model.safetensors", "remora.json")
"""The files of an adapter; its SHA-256 is that of all three, one after the other."""

COPIES = 5
"""How often a folder is looked at that is replaced meanwhile, or is not there for a moment."""

_log = logging.getLogger(__name__)


class QueueFullError(Exception):
    """So many texts are waiting that a request was not taken."""


@dataclass(frozen=True, kw_only=True)
class Generation:
    """An adapter as it was found on the disk at one moment."""

    sha256: str
    labels: tuple[str, ...]
    module: str  # its name in PEFT's model
    scorer: Scorer


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The probabilities of one request's texts, and whose they are."""

    sha256: str
    labels: tuple[str, ...]
    probabilities: NDArray[np.float64]  # [texts, labels]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What one batch took."""

    adapter: str
    num_requests: int
    num_texts: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class _Request:
    adapter: str
    texts: Sequence[str]
    future: Future[Answer]


@dataclass(frozen=True, kw_only=True)
class _Copy:
    """An adapter's files as they were at one moment."""

    folder: Path
    sha256: str
    card: adapter_card.AdapterCard


class Engine:
    """Answers requests for any of its adapters, one batch at a time, in a thread of its own."""

    def __init__(
        self,
        folders: Mapping[str, Path],
        *,
        base: str | None,
        precision: Precision,
        device: torch.device,
        micro_batch_tokens: int,
        tolerance: float,
        max_queue: int,
        on_batch: Callable[[Batch], None] = lambda _: None,
    ) -> None:
        """Load the base model and all adapters, or one whole model.

        Args:
            folders: A run directory or an adapter's folder for each adapter's id, or that of a
                whole model alone.
            base: Base model, where it is no longer where the first adapter's card says.
            precision: The arithmetic.
            device: Where to compute.
            micro_batch_tokens: Most tokens computed at once.
            tolerance: Most probability that labels not looked at may hold together.
            max_queue: Most texts that wait.
            on_batch: Told of each batch, in the engine's thread.

        Raises:
            ModelError: If a part is missing or broken, adapters have different base models, or a
                whole model is not alone.
        """
        self._folders = {name: adapter_card.adapter_folder(path) for name, path in folders.items()}
        self._device = device
        self._precision = precision
        self._micro_batch_tokens = micro_batch_tokens
        self._tolerance = tolerance
        self._max_queue = max_queue
        self._on_batch = on_batch
        self._adapted: Any = None
        self._num_loaded = 0
        self._generations: dict[str, Generation] = {}
        if wholes := [
            name for name, folder in self._folders.items() if adapter_card.is_whole(folder)
        ]:
            self._load_whole(wholes[0], base)
        else:
            self._load_adapters(base)
        self._changed = threading.Condition()
        self._waiting: deque[_Request] = deque()
        self._num_waiting = 0  # texts
        self._loads: deque[tuple[str, _Copy, Future[bool]]] = deque()
        self._stopping = False
        self._thread = threading.Thread(target=self._work, name="remora-engine", daemon=True)
        self._thread.start()

    @property
    def generations(self) -> Mapping[str, Generation]:
        """The generation that each adapter is at."""
        return dict(self._generations)

    @property
    def num_waiting(self) -> int:
        """Texts that wait."""
        return self._num_waiting

    @property
    def is_full(self) -> bool:
        """Whether no request would be taken."""
        return self._num_waiting >= self._max_queue

    def classify(self, adapter: str, texts: Sequence[str]) -> Future[Answer]:
        """Hand texts in for an adapter that there is; the answer's future can be cancelled.

        Raises:
            QueueFullError: If too many texts wait already.
        """
        future: Future[Answer] = Future()
        with self._changed:
            if self._stopping or self._num_waiting + len(texts) > self._max_queue:
                raise QueueFullError
            self._waiting.append(_Request(adapter=adapter, texts=texts, future=future))
            self._num_waiting += len(texts)
            self._changed.notify()
        return future

    def reload(self, adapter: str) -> bool:
        """Read an adapter's folder again, and let it take over between two batches; return whether.

        It does not where the files are those that are served already. Not for the engine's thread.

        Raises:
            ModelError: If what is there cannot be used; what was served goes on being served.
        """
        if self._adapted is None:
            raise ModelError(
                f"{adapter} is a whole model, which is not replaced while it is served; start the "
                "service again"
            )
        with _copied(self._folders[adapter]) as copy:
            self._refuse_other_base(adapter, copy.card)
            future: Future[bool] = Future()
            with self._changed:
                if self._stopping:
                    raise ModelError("the service is stopping; start it again")
                self._loads.append((adapter, copy, future))
                self._changed.notify()
            return future.result()

    def stop(self) -> None:
        """Answer what waits, take nothing more, and end the thread."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

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
            scorer=self._scorer(whole, prompt),
        )

    def _load_adapters(self, base: str | None) -> None:
        """Load the base model, and all adapters around it."""
        cards = {name: adapter_card.read_card(folder) for name, folder in self._folders.items()}
        source = hub.find(base or next(iter(cards.values())).base_model)
        self.base_sha256 = files.weights_sha256(source)
        self._method = next(iter(cards.values())).method
        for name, card in cards.items():
            self._refuse_other_base(name, card)
        self._tokenizer = loading.load_tokenizer(source)
        self._base = loading.load_base(source, self._method, self._precision.base, self._device)
        # Names and shapes as they are without adapters, to hold adapters against.
        self._skeleton = loading.load_empty(loading.load_config(source), self._precision.base)
        for name, folder in self._folders.items():
            with _copied(folder) as copy:
                self._refuse_other_base(name, copy.card)
                self._generations[name] = self._add(name, copy)

    def _scorer(self, scored: Any, prompt: Prompt) -> Scorer:
        return Scorer(
            scored,
            prompt,
            max_tokens=self._micro_batch_tokens,
            tolerance=self._tolerance,
            autocast=self._precision.autocast,
        )

    def _refuse_other_base(self, adapter: str, card: adapter_card.AdapterCard) -> None:
        if card.base_sha256 != self.base_sha256:
            raise ModelError(
                f"the adapter {adapter} was trained on other base weights than those that are "
                "served; serve it by itself, or give the base model with --model"
            )
        if (card.method == "qlora") != (self._method == "qlora"):
            raise ModelError(
                f"the adapter {adapter} was trained by {card.method} and what is served by "
                f"{self._method}, one of them on a base model in 4 bits; serve it by itself"
            )

    def _add(self, adapter: str, copy: _Copy) -> Generation:
        """Put an adapter beside the others."""
        import peft

        self._num_loaded += 1
        # PEFT finds an adapter's weights by looking for its name in theirs: none may hold another.
        module = f"generation_{self._num_loaded:09d}"
        settings: dict[str, Any] = {"adapter_name": module, "low_cpu_mem_usage": True}
        try:
            untrusted.adapter(copy.folder, self._skeleton)
            prompt = copy.card.prompt(self._tokenizer)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)
                warnings.filterwarnings("ignore", "Found missing adapter keys", UserWarning)
                if self._adapted is None:
                    self._adapted = peft.PeftModel.from_pretrained(
                        self._base, copy.folder, local_files_only=True, **settings
                    )
                else:
                    self._adapted.load_adapter(
                        copy.folder, local_files_only=True, torch_device="cpu", **settings
                    )
            self._refuse_missing(module, copy.folder)
        except Exception as error:  # of PEFT, of safetensors or of the configuration's values
            if self._adapted is not None and module in self._adapted.peft_config:
                self._adapted.delete_adapter(module)
            folder = self._folders[adapter]
            if isinstance(error, ModelError):
                raise _named(error, copy.folder, folder) from error
            raise ModelError(
                f"the adapter in {folder} cannot be loaded ({one_line(error)}); train it again or "
                "restore it"
            ) from error
        fused_lora.make_fast(self._adapted)
        self._adapted.to(self._device).eval()
        return Generation(
            sha256=copy.sha256,
            labels=copy.card.labels,
            module=module,
            scorer=self._scorer(self._adapted, prompt),
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

    def _work(self) -> None:
        while True:
            with self._changed:
                while not (self._waiting or self._loads or self._stopping):
                    self._changed.wait()
                loads = list(self._loads)
                self._loads.clear()
                taken = self._take()
                if not (loads or taken or self._waiting) and self._stopping:
                    return
            for adapter, copy, future in loads:
                self._swap(adapter, copy, future)
            if taken:
                self._answer(taken)

    def _take(self) -> list[_Request]:
        """Take the oldest request and what else waits for its adapter, up to a batch."""
        taken: list[_Request] = []
        left: deque[_Request] = deque()
        num_texts = 0
        for request in self._waiting:
            if request.future.cancelled():
                self._num_waiting -= len(request.texts)
            elif num_texts < BATCH_TEXTS and (not taken or request.adapter == taken[0].adapter):
                taken.append(request)
                num_texts += len(request.texts)
                self._num_waiting -= len(request.texts)
            else:
                left.append(request)
        self._waiting = left
        return [r for r in taken if r.future.set_running_or_notify_cancel()]

    def _swap(self, adapter: str, copy: _Copy, future: Future[bool]) -> None:
        before = self._generations[adapter]
        if copy.sha256 == before.sha256:
            future.set_result(False)
            return
        try:
            after = self._add(adapter, copy)
            self._adapted.set_adapter(after.module)
            self._adapted.delete_adapter(before.module)
            self._generations[adapter] = after
        except Exception as error:
            future.set_exception(error)
        else:
            future.set_result(True)

    def _answer(self, requests: Sequence[_Request]) -> None:
        """Score some requests for one adapter together; one that cannot be, spoils no other."""
        began = time.perf_counter()
        generation = self._generations[requests[0].adapter]
        texts = [text for request in requests for text in request.texts]
        try:
            if self._adapted is not None:
                self._adapted.set_adapter(generation.module)
            probabilities = generation.scorer.probabilities(texts)
        except Exception as error:
            if len(requests) > 1:
                for request in requests:
                    self._answer([request])
                return
            _log.exception("a request for %s could not be answered", requests[0].adapter)
            requests[0].future.set_exception(error)
            return
        start = 0
        self._on_batch(
            Batch(
                adapter=requests[0].adapter,
                num_requests=len(requests),
                num_texts=len(texts),
                seconds=time.perf_counter() - began,
            )
        )
        for request in requests:
            end = start + len(request.texts)
            request.future.set_result(
                Answer(
                    sha256=generation.sha256,
                    labels=generation.labels,
                    probabilities=probabilities[start:end],
                )
            )
            start = end


@contextlib.contextmanager
def _copied(folder: Path) -> Iterator[_Copy]:
    """Copy an adapter's files, all from one folder even while another takes its place.

    Raises:
        ModelError: If one is missing or broken.
    """
    with tempfile.TemporaryDirectory(prefix="remora-") as made:
        for attempt in range(COPIES):
            last = attempt + 1 == COPIES
            try:
                before = folder.stat()
                digest = hashlib.sha256()
                for name in FILES:
                    source = untrusted.followed(folder / name)
                    shutil.copyfile(source, Path(made, name), follow_symlinks=False)
                    digest.update(Path(made, name).read_bytes())
                after = folder.stat()
                if (before.st_ino, before.st_dev) == (after.st_ino, after.st_dev):
                    break
            except OSError as error:
                if last:
                    adapter_card.read_card(folder)  # which says what is missing
                    raise ModelError(
                        f"{folder} cannot be read ({one_line(error)}); restore it"
                    ) from error
            if last:
                raise ModelError(f"{folder} changes while it is read; try again when it is whole")
            time.sleep(0.05)
            for path in Path(made).iterdir():
                path.unlink()
        try:
            card = adapter_card.read_card(Path(made))
        except ModelError as error:
            raise _named(error, Path(made), folder) from error
        yield _Copy(folder=Path(made), sha256=digest.hexdigest(), card=card)


def _named(error: ModelError, copy: Path, folder: Path) -> ModelError:
    """Return an error of a copy as one of the folder that was copied."""
    return ModelError(str(error).replace(str(copy), str(folder)))

"""One base model in memory with many adapters, and the thread that answers requests with them.

Requests wait in one queue. The thread takes the oldest, and with it all that wait for the same
adapter, and scores their texts as one token tree behind the adapter's cached prefix. What arrives
meanwhile forms the next batch, so batches grow with the load and nobody waits for company.

An adapter is swapped between two batches. A request is taken by one batch, so it is answered by one
generation of its adapter, whose SHA-256 its answer bears.
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from remora import lora, model, run
from remora.errors import ModelError
from remora.plan import Precision
from remora.score import Scorer
from remora.table import one_line

BATCH_TEXTS = 64
"""Texts at which a batch takes no further request; as many as `predict` scores at a time."""

READS = 3
"""How often a folder is read anew that is replaced while it is read."""

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
class _Files:
    """The files of an adapter, read at one moment."""

    sha256: str
    config: dict[str, Any]
    card: run.AdapterCard
    weights: bytes


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
        max_queue: int,
        on_batch: Callable[[Batch], None] = lambda _: None,
    ) -> None:
        """Load the base model and all adapters.

        Args:
            folders: A run directory or an adapter's folder for each adapter's id.
            base: Base model, where it is no longer where the first adapter's card says.
            precision: The arithmetic.
            device: Where to compute.
            micro_batch_tokens: Most tokens computed at once.
            max_queue: Most texts that wait.
            on_batch: Told of each batch, in the engine's thread.

        Raises:
            ModelError: If a part is missing or broken, or adapters have different base models.
        """
        self._folders = {name: run.adapter_folder(path) for name, path in folders.items()}
        self._device = device
        self._precision = precision
        self._micro_batch_tokens = micro_batch_tokens
        self._max_queue = max_queue
        self._on_batch = on_batch
        cards = {name: run.read_card(folder) for name, folder in self._folders.items()}
        first = next(iter(cards.values()))
        source = model.find(base or first.base_model)
        self.base_sha256 = model.weights_sha256(source)
        for name, card in cards.items():
            self._refuse_other_base(name, card)
        self._tokenizer = model.load_tokenizer(source)
        self._base = model.load(source, precision.base).to(device).eval()
        self._adapted: Any = None
        self._num_loaded = 0
        self._generations: dict[str, Generation] = {}
        for name, folder in self._folders.items():
            self._generations[name] = self._add(name, _read(folder))
        self._changed = threading.Condition()
        self._waiting: deque[_Request] = deque()
        self._num_waiting = 0  # texts
        self._loads: deque[tuple[str, _Files, Future[bool]]] = deque()
        self._stopping = False
        self._is_idle = True
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
    def is_idle(self) -> bool:
        """Whether nothing waits and nothing is computed."""
        with self._changed:
            return self._is_idle and not self._waiting

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
        files = _read(self._folders[adapter])
        self._refuse_other_base(adapter, files.card)
        future: Future[bool] = Future()
        with self._changed:
            self._loads.append((adapter, files, future))
            self._changed.notify()
        return future.result()

    def stop(self) -> None:
        """Answer what waits, take nothing more, and end the thread."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    def _refuse_other_base(self, adapter: str, card: run.AdapterCard) -> None:
        if card.base_sha256 != self.base_sha256:
            raise ModelError(
                f"the adapter {adapter} was trained on other base weights than those that are "
                "served; serve it by itself, or give the base model with --model"
            )

    def _add(self, adapter: str, files: _Files) -> Generation:
        """Put an adapter beside the others."""
        import peft
        from safetensors.torch import load

        self._num_loaded += 1
        # PEFT finds an adapter's weights by looking for its name in theirs: none may hold another.
        module = f"generation_{self._num_loaded:09d}"
        try:
            kind: Any = peft.PeftConfig
            config = kind.from_peft_type(**files.config)
            tensors = {name: tensor.float() for name, tensor in load(files.weights).items()}
            prompt = files.card.prompt(self._tokenizer)
            if self._adapted is None:
                self._adapted = peft.get_peft_model(
                    self._base, config, adapter_name=module, low_cpu_mem_usage=True
                )
            else:
                self._adapted.add_adapter(module, config, low_cpu_mem_usage=True)
            expected = set(_state(self._adapted, module))
            if different := sorted(set(tensors) ^ expected):
                verb = "has" if different[0] in tensors else "lacks"
                raise ModelError(f"it {verb} {different[0]}, against its configuration")
            peft.set_peft_model_state_dict(
                self._adapted, tensors, adapter_name=module, low_cpu_mem_usage=True
            )
        except Exception as error:  # of PEFT, of safetensors or of the configuration's values
            if self._adapted is not None and module in self._adapted.peft_config:
                self._adapted.delete_adapter(module)
            raise ModelError(
                f"the adapter {adapter} in {self._folders[adapter]} cannot be loaded "
                f"({one_line(error)}); train it again or restore it"
            ) from error
        lora.make_fast(self._adapted)
        self._adapted.to(self._device).eval()
        scorer = Scorer(
            self._adapted,
            prompt,
            max_tokens=self._micro_batch_tokens,
            autocast=self._precision.autocast,
        )
        return Generation(
            sha256=files.sha256, labels=files.card.labels, module=module, scorer=scorer
        )

    def _work(self) -> None:
        while True:
            with self._changed:
                self._is_idle = True
                while not (self._waiting or self._loads or self._stopping):
                    self._changed.wait()
                loads = list(self._loads)
                self._loads.clear()
                taken = self._take()
                if not (loads or taken or self._waiting) and self._stopping:
                    return
                self._is_idle = False
            for adapter, files, future in loads:
                self._swap(adapter, files, future)
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

    def _swap(self, adapter: str, files: _Files, future: Future[bool]) -> None:
        before = self._generations[adapter]
        if files.sha256 == before.sha256:
            future.set_result(False)
            return
        try:
            self._generations[adapter] = self._add(adapter, files)
            self._adapted.set_adapter(self._generations[adapter].module)
            self._adapted.delete_adapter(before.module)
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


def _state(adapted: Any, module: str) -> dict[str, Any]:
    import peft

    state: dict[str, Any] = peft.get_peft_model_state_dict(
        adapted, adapter_name=module, save_embedding_layers=False
    )
    return state


def _read(folder: Path) -> _Files:
    """Read an adapter's files, all from the same folder even while another takes its place.

    Raises:
        ModelError: If one is missing or broken.
    """
    for attempt in range(READS):
        try:
            before = folder.stat()
            card = run.read_card(folder)
            contents = {
                name: (folder / name).read_bytes()
                for name in ("adapter_config.json", "adapter_model.safetensors", "remora.json")
            }
            after = folder.stat()
            same = (before.st_ino, before.st_dev) == (after.st_ino, after.st_dev)
            if same and card == run.read_card(folder):
                break
        except (OSError, ModelError) as error:
            if attempt + 1 == READS:
                if isinstance(error, ModelError):
                    raise
                raise ModelError(
                    f"the adapter in {folder} cannot be read ({one_line(error)}); restore it"
                ) from error
        time.sleep(0.05)
    else:
        raise ModelError(f"{folder} changes while it is read; put the finished folder in place")
    digest = hashlib.sha256()
    for _, content in sorted(contents.items()):
        digest.update(content)
    try:
        config = json.loads(contents["adapter_config.json"])
        if config["peft_type"] != "LORA":
            raise ValueError(f"it is of the kind {config['peft_type']}, not LORA")
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{folder / 'adapter_config.json'} is broken ({one_line(error)}); restore it"
        ) from error
    return _Files(
        sha256=digest.hexdigest(),
        config=config,
        card=card,
        weights=contents["adapter_model.safetensors"],
    )

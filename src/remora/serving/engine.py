"""The thread that answers requests, in batches of texts for one adapter.

Requests wait in one queue. The thread takes the oldest request, and with it all others for the same
adapter, and scores their texts as one token tree behind the adapter's cached prefix. Requests that
arrive meanwhile form the next batch: batches grow with the load, and no request waits for others.

An adapter is swapped between two batches. Each request is computed in one batch, so one generation
of its adapter answers it, and the answer gives that generation's SHA-256.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from remora.data.levels import Hierarchy
from remora.errors import ModelError
from remora.runtime.device import Precision
from remora.serving.adapters import AdapterSet, Generation
from remora.serving.predictor import BATCH_ROWS
from remora.serving.snapshot import Snapshot

BATCH_TEXTS = BATCH_ROWS
"""Texts at which a batch takes no further request; `predict` scores as many at a time."""

_log = logging.getLogger(__name__)


class QueueFullError(Exception):
    """So many texts are waiting that a request was not taken."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The probabilities of one request's texts, and the generation that gave them."""

    sha256: str
    labels: tuple[str, ...]
    probabilities: NDArray[np.float64]  # [texts, labels]
    thresholds: tuple[float, ...] = ()  # of labels, where a text may get several
    hierarchy: Hierarchy | None = None  # of the labels


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The size of a batch that was computed, and its time."""

    adapter: str
    num_requests: int
    num_texts: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class _Request:
    adapter: str
    texts: Sequence[str]
    future: Future[Answer]


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
        """Load the models as `AdapterSet` does, and start the thread.

        Args:
            folders: See `AdapterSet`, as the four that follow.
            base: Base model, if it has moved.
            precision: Arithmetic and storage of the base model.
            device: Where to compute.
            micro_batch_tokens: Most tokens computed at once.
            tolerance: Maximum total probability left on unexplored labels.
            max_queue: Most texts that wait.
            on_batch: Called after each batch, in the engine's thread.

        Raises:
            ModelError: If a part is missing or broken, adapters have different base models, or a
                whole model is not alone.
        """
        self._adapters = AdapterSet(
            folders,
            base=base,
            precision=precision,
            device=device,
            micro_batch_tokens=micro_batch_tokens,
            tolerance=tolerance,
        )
        self._max_queue = max_queue
        self._on_batch = on_batch
        self._changed = threading.Condition()
        self._waiting: deque[_Request] = deque()
        self._num_waiting = 0  # texts
        self._reloads: deque[tuple[str, Snapshot, Future[bool]]] = deque()
        self._stopping = False
        self._thread = threading.Thread(target=self._work, name="remora-engine", daemon=True)
        self._thread.start()

    @property
    def base_sha256(self) -> str:
        """SHA-256 of the base model's weights, or the whole model's."""
        return self._adapters.base_sha256

    @property
    def generations(self) -> Mapping[str, Generation]:
        """The current generation of each adapter."""
        return self._adapters.generations

    @property
    def num_waiting(self) -> int:
        """The number of texts that wait."""
        return self._num_waiting

    @property
    def is_full(self) -> bool:
        """Whether no request would be taken."""
        return self._num_waiting >= self._max_queue

    def classify(self, adapter: str, texts: Sequence[str]) -> Future[Answer]:
        """Queue texts for one of the adapters; the answer's future can be cancelled.

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
        """Read an adapter's folder again; return whether its files have changed.

        A changed adapter takes over between two batches. Not for the engine's thread, which this
        waits for.

        Raises:
            ModelError: If the new files cannot be used; the generation before stays.
        """
        with self._adapters.snapshot(adapter) as copied:
            future: Future[bool] = Future()
            with self._changed:
                if self._stopping:
                    raise ModelError("the service is stopping; start it again")
                self._reloads.append((adapter, copied, future))
                self._changed.notify()
            return future.result()

    def stop(self) -> None:
        """Answer the requests that wait, take no others, and end the thread."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        while True:
            with self._changed:
                while not (self._waiting or self._reloads or self._stopping):
                    self._changed.wait()
                reloads = list(self._reloads)
                self._reloads.clear()
                taken = self._take()
                if not (reloads or taken or self._waiting) and self._stopping:
                    return
            for adapter, copied, future in reloads:
                self._replace(adapter, copied, future)
            if taken:
                self._answer(taken)

    def _take(self) -> list[_Request]:
        """Take the oldest request and others for the same adapter, up to a batch."""
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

    def _replace(self, adapter: str, copied: Snapshot, future: Future[bool]) -> None:
        try:
            future.set_result(self._adapters.replace(adapter, copied))
        except Exception as error:
            future.set_exception(error)

    def _answer(self, requests: Sequence[_Request]) -> None:
        """Score requests for one adapter together; if that fails, each of them by itself."""
        began = time.perf_counter()
        adapter = requests[0].adapter
        texts = [text for request in requests for text in request.texts]
        try:
            generation = self._adapters.activate(adapter)
            probabilities = generation.scorer.probabilities(texts)
        except Exception as error:
            if len(requests) > 1:
                for request in requests:
                    self._answer([request])
                return
            _log.exception("a request for %s could not be answered", adapter)
            requests[0].future.set_exception(error)
            return
        self._on_batch(
            Batch(
                adapter=adapter,
                num_requests=len(requests),
                num_texts=len(texts),
                seconds=time.perf_counter() - began,
            )
        )
        start = 0
        for request in requests:
            end = start + len(request.texts)
            request.future.set_result(
                Answer(
                    sha256=generation.sha256,
                    labels=generation.labels,
                    probabilities=probabilities[start:end],
                    thresholds=generation.thresholds,
                    hierarchy=generation.hierarchy,
                )
            )
            start = end

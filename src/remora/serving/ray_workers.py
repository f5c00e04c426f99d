"""Workers of Ray: each holds a `Predictor`, and answers batches of messages in turn.

The process that reads and writes hands them messages and gets answers, in the order of the rows.
So a worker that dies has written nothing: its batches go to others, and no row can be there twice.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import secrets
import socket
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch

from remora.config import PredictConfig
from remora.errors import ConfigError, ResourceError
from remora.formatting import one_line, spoken_bytes
from remora.models import metadata
from remora.runtime.device import choose_precision
from remora.serving.predictor import Answer, Predictor

QUEUED, MOST_QUEUED = 2, 32
"""Batches that each worker has, at least and at most: one that it computes, and the next ones."""

QUEUED_SECONDS = 1.0
"""Work that each worker has before it, since a part that is written keeps this process that long
from handing out more."""

AHEAD = 2
"""Times as many batches that may be read ahead of the one that is written next."""

MAX_DEATHS = 3
"""Workers that may die over one batch, or while they load the model, before the run gives up."""

PROCESS_BYTES = 600_000_000
"""Memory of a worker beside its weights: Python, torch and a pass of short messages."""

OBJECT_STORE_BYTES = 256 << 20
"""Shared memory of a Ray that is started here; batches of messages are small."""

TOKENS = {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"}
"""Variables by which Ray asks for a token, or gives one."""

CONNECT_SECONDS, PATIENCE_SECONDS = 10.0, 120.0

Tag = TypeVar("Tag")


@dataclass(frozen=True, kw_only=True)
class Room:
    """What each worker gets, and how many there are."""

    num_workers: int
    cores: int
    gpus: int
    memory_bytes: int

    def __str__(self) -> str:
        workers = f"{self.num_workers} worker{'' if self.num_workers == 1 else 's'}"
        return f"{workers}, each with " + (
            "a GPU" if self.gpus else f"{self.cores} core{'' if self.cores == 1 else 's'}"
        )


def require() -> None:
    """Refuse to compute on Ray without it; raises ConfigError."""
    if importlib.util.find_spec("ray") is None:
        raise ConfigError(
            "engine ray needs Ray, which is not installed; run pip install 'remora[ray]'"
        )


@contextlib.contextmanager
def connected(address: str | None) -> Iterator[Any]:
    """Join a cluster, or start Ray on this machine; gives the module `ray`.

    Args:
        address: That of a cluster, or auto; None to start one that ends with the context.

    Raises:
        ConfigError: If Ray is not installed, or the cluster cannot be joined.
    """
    require()
    if address is not None:
        _refuse_silent(address)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would tell its makers of each start
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # by default they yield to everything else
    # Its ports are open to the network, so it must ask for a token; this one is kept nowhere.
    if address is None and not TOKENS & os.environ.keys():  # Ray reads them when it is imported
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    import ray

    with contextlib.suppress(ImportError):
        from ray._private import worker

        # It would print the death of a worker on standard output; we say it ourselves.
        worker.listen_error_messages = lambda *_: None
    how: dict[str, Any] = {"address": address}
    if address is None:
        how = {
            "address": "local",
            "include_dashboard": False,
            "object_store_memory": OBJECT_STORE_BYTES,
        }
    heard: list[str] = []
    try:
        with _heard() as heard:
            ray.init(logging_level="ERROR", log_to_driver=False, **how)
    except Exception as error:  # of Ray, of the network, of another version over there
        if "InvalidAuthToken" in "".join(heard):  # the error itself says that nothing answers
            has = "refuses the token in" if TOKENS & os.environ.keys() else "asks for a token in"
            raise ConfigError(
                f"the Ray cluster at {address} {has} RAY_AUTH_TOKEN; set RAY_AUTH_MODE=token, and "
                "RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH as they are there"
            ) from error
        where = "started" if address is None else f"joined at {address}"
        raise ConfigError(
            f"Ray cannot be {where} ({one_line(error)}); "
            + ("free memory and disk" if address is None else "check --address, and its version")
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _heard() -> Iterator[list[str]]:
    """Keep what is written to standard error meanwhile, by libraries in C++ too.

    Gives a list that has it in the end. If all goes well it is written after all.
    """
    heard: list[str] = []
    with tempfile.TemporaryFile() as file:
        before = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield heard
        finally:
            os.dup2(before, 2)
            os.close(before)
            file.seek(0)
            heard.append(file.read().decode(errors="replace"))
    sys.stderr.write(heard[0])


def _refuse_silent(address: str) -> None:
    """Refuse an address where nothing listens at once: Ray tries for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if address == "auto" or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"no Ray cluster answers at {address} ({getattr(error, 'strerror', None) or error});"
            f" start it with `ray start"
            " --head`, or correct --address"
        ) from error


def find_room(ray: Any, config: PredictConfig, num_weights: int) -> Room:
    """Return how many workers the cluster has room for, or as many as are wanted.

    Args:
        ray: The module, connected.
        config: The settings.
        num_weights: Of the model; a worker without a GPU holds them in memory.

    Raises:
        ResourceError: If it has no room for them.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    most_cores = int(max((node.get("CPU", 0) for node in nodes), default=0))
    has_gpus = any(node.get("GPU", 0) >= 1 for node in nodes)
    gpus = int(config.device == "cuda" or (config.device == "auto" and has_gpus))
    cores = 1 if gpus else max(1, min(config.worker_cores, most_cores))
    # On a GPU the weights pass through the memory of the machine once, one worker after another.
    memory_bytes = PROCESS_BYTES + (0 if gpus else num_weights * _weight_bytes(config))
    needs = {"CPU": cores, "memory": memory_bytes} | ({"GPU": 1} if gpus else {})
    fitting = {
        what: [int(node.get(what, 0) // count) for node in nodes] for what, count in needs.items()
    }
    room = sum(min(counts) for counts in zip(*fitting.values(), strict=True))
    wanted = config.workers or max(1, room)
    if wanted > room:
        scarce = min(fitting, key=lambda what: sum(fitting[what]))
        each = {
            "CPU": f"{cores} core{'' if cores == 1 else 's'}",
            "GPU": "a GPU",
            "memory": f"{spoken_bytes(memory_bytes)} of memory",
        }
        raise ResourceError(
            f"the cluster has room for {room} of {wanted} workers, which need {each[scarce]} each;"
            f" give {f'--workers {room}' if room else 'a smaller model, or a larger cluster'}"
        )
    return Room(num_workers=wanted, cores=cores, gpus=gpus, memory_bytes=memory_bytes)


def _weight_bytes(config: PredictConfig) -> int:
    full = metadata.is_full(config.adapter)
    cpu = torch.device("cpu")
    return choose_precision(cpu, config.precision, trains_base=full).base.itemsize


class _Actor:
    """What runs in a worker's process."""

    def __init__(self, predictor: Predictor) -> None:
        self._predictor = predictor

    def open(self) -> None:
        """Load the model; by itself, so that its error arrives as it is."""
        self._predictor.open()

    def answers(self, texts: Sequence[str | None]) -> list[Answer]:
        """Return the answer to each message."""
        return self._predictor.classify(texts)


@dataclass
class _Batch(Generic[Tag]):
    """Messages that are to be answered."""

    tag: Tag
    texts: Sequence[str | None]
    answers: list[Answer] | None = None
    num_deaths: int = 0  # of workers that were computing it


@dataclass
class _Worker(Generic[Tag]):
    """An actor, and the batches that it has."""

    actor: Any
    opening: Any  # the reference of its first call, None once it has the model
    batches: dict[Any, _Batch[Tag]] = field(default_factory=dict)  # by the references of the calls
    since: float = 0.0  # when it was given its first batch, or has last answered


class Workers(Generic[Tag]):
    """Answers batches by workers that are replaced when they die."""

    def __init__(
        self, ray: Any, predictor: Predictor, room: Room, say: Callable[[str], None]
    ) -> None:
        """Start the workers, which load the model; the first batch waits for one of them.

        Args:
            ray: The module, connected.
            predictor: What each worker holds.
            room: How many there are, and what each gets.
            say: Told of workers that die.
        """
        self._ray, self._predictor, self._room, self._say = ray, predictor, room, say
        self._workers: list[_Worker[Tag]] = []
        self._began, self._told = time.monotonic(), False  # of the wait for the first worker
        self._num_deaths = 0  # while loading, since a worker has last loaded the model
        self._seconds: float | None = None  # of a worker for a batch, a moving average
        for _ in range(room.num_workers):
            self._start()

    def answered(
        self,
        batches: Iterator[tuple[Tag, Sequence[str | None]]],
        check: Callable[[], object] = lambda: None,
    ) -> Iterator[tuple[Tag, list[Answer]]]:
        """Yield the answers to batches of messages, in their order.

        Args:
            batches: A tag of each batch, which comes back with its answers, and the messages.
            check: Called every second or more often; what it raises ends the work.

        Raises:
            ResourceError: If workers die again and again.
            RemoraError: What a worker raises, or `batches`: this one after the answers before it.
        """
        waiting: deque[_Batch[Tag]] = deque()  # in order, until they are yielded
        unsent: deque[_Batch[Tag]] = deque()
        failed: BaseException | None = None
        ended = False
        while True:
            while not ended and len(waiting) < AHEAD * self._depth() * len(self._workers):
                try:
                    tag, texts = next(batches)
                except StopIteration:
                    ended = True
                except Exception as error:
                    failed, ended = error, True
                else:
                    waiting.append(_Batch(tag, texts))
                    unsent.append(waiting[-1])
            while waiting and (answers := waiting[0].answers) is not None:
                yield waiting.popleft().tag, answers
            if ended and not waiting:
                break
            check()
            self._send(unsent)
            self._receive(unsent)
        if failed is not None:
            raise failed

    def _start(self) -> None:
        options = {"num_cpus": self._room.cores, "memory": self._room.memory_bytes}
        if self._room.gpus:
            options["num_gpus"] = self._room.gpus
        actor = self._ray.remote(_Actor).options(**options).remote(self._predictor)
        self._workers.append(_Worker(actor, actor.open.remote()))

    def _depth(self) -> int:
        """Return how many batches each worker may have."""
        if self._seconds is None:
            return QUEUED
        return min(MOST_QUEUED, QUEUED + int(QUEUED_SECONDS / max(self._seconds, 1e-3)))

    def _time(self, worker: _Worker[Tag]) -> None:
        """Note how long a worker took for a batch, now that its answers are here."""
        now = time.monotonic()
        seconds, worker.since = now - worker.since, now
        before = seconds if self._seconds is None else self._seconds
        self._seconds = 0.9 * before + 0.1 * seconds

    def _send(self, unsent: deque[_Batch[Tag]]) -> None:
        """Give each worker that has the model as many batches as it may have."""
        for num_had in range(self._depth()):  # one for each, before a second for any
            for worker in self._workers:
                if unsent and worker.opening is None and len(worker.batches) == num_had:
                    batch = unsent.popleft()
                    if num_had == 0:
                        worker.since = time.monotonic()
                    worker.batches[worker.actor.answers.remote(batch.texts)] = batch

    def _receive(self, unsent: deque[_Batch[Tag]]) -> None:
        """Wait until a worker has answered, has loaded the model, or has died."""
        owners = {
            reference: worker
            for worker in self._workers
            for reference in ([worker.opening] if worker.opening else worker.batches)
        }
        ready, _ = self._ray.wait(list(owners), num_returns=len(owners), timeout=0)
        if not ready:  # several may be ready, but one is enough
            ready, _ = self._ray.wait(list(owners), num_returns=1, timeout=1.0)
        if not ready and all(worker.opening for worker in self._workers):
            self._tell_of_waiting()
        for reference in ready:
            worker = owners[reference]
            if worker not in self._workers:  # which has died with an earlier one of these
                continue
            try:
                answers = self._ray.get(reference)
            except self._ray.exceptions.RayTaskError as error:
                raise (error.cause or error) from None
            except self._ray.exceptions.RayError as error:
                self._replace(worker, unsent, error)
            else:
                if worker.opening is not None:
                    worker.opening = None
                    self._num_deaths = 0
                else:
                    worker.batches.pop(reference).answers = answers
                    self._time(worker)

    def _tell_of_waiting(self) -> None:
        if not self._told and time.monotonic() - self._began > PATIENCE_SECONDS:
            self._told = True
            free = self._ray.available_resources()
            self._say(
                f"no worker is ready after {PATIENCE_SECONDS:.0f} s; {free.get('CPU', 0):.0f} cores"
                f" and {spoken_bytes(free.get('memory', 0))} of the cluster are free"
            )

    def _replace(
        self, worker: _Worker[Tag], unsent: deque[_Batch[Tag]], error: BaseException
    ) -> None:
        """Give the batches of a dead worker to others, and start another in its place."""
        self._workers.remove(worker)
        computing = next(iter(worker.batches.values()), None)
        if computing is None:
            self._num_deaths += 1
        else:
            computing.num_deaths += 1
        deaths = self._num_deaths if computing is None else computing.num_deaths
        if deaths >= MAX_DEATHS:
            what = "loading the model" if computing is None else "computing the same rows"
            raise ResourceError(
                f"{deaths} workers died {what} ({one_line(error)}); they may be out of memory:"
                " give fewer --workers or --micro-batch-tokens"
            )
        unsent.extendleft(reversed(worker.batches.values()))
        self._say("a worker died; another takes over its rows")
        self._start()

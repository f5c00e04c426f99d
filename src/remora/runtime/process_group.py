"""The processes of a run, one for each device: their collective calls, and a lost process.

Every process has all rows and computes its part of each effective batch; gradients are summed. So
an optimizer step averages over the same rows as in one process. The order of the collective calls
below must be the same in every process: a call waits until all have made it.
"""

from __future__ import annotations

import contextlib
import datetime
import io
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from torch import Tensor

from remora.errors import ConfigError, PeerLostError, RemoraError
from remora.runtime.heartbeat import BEAT_SECONDS, Heartbeat
from remora.runtime.launch import LAUNCHER, LISTENER, leave, speaks, world_size

Result = TypeVar("Result")

JOIN_SECONDS = 120


class ProcessGroup:
    """The processes of a run. A process alone is the first of one, and communicates nothing."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    @property
    def is_first(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    def part(self, rows: Sequence[Result]) -> Sequence[Result]:
        """Return this process's part of some rows; the parts in order are all of them."""
        return rows[len(rows) * self.rank // self.size : len(rows) * (self.rank + 1) // self.size]

    def total(self, value: float) -> float:
        """Return the sum of a number over the processes."""
        if self.size == 1:
            return value
        number = torch.tensor([value], dtype=torch.float64)
        self._add_up(number)
        return float(number)

    def any(self, value: bool) -> bool:
        """Return whether it is true in any process."""
        return self.total(float(value)) > 0

    def sum_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Sum the gradients over all processes. A process without gradients adds zeros."""
        if self.size == 1 or not parameters:
            return
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        self._add_up(flat)
        parts = torch.split(flat, [p.numel() for p in parameters])
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.grad = part.view_as(parameter)

    def gather(self, value: Any) -> list[Any]:
        """Return the value of each process, in their order; it must be JSON."""
        if self.size == 1:
            return [value]
        return [json.loads(part) for part in self._gather(json.dumps(value).encode())]

    def gather_arrays(self, array: NDArray[Any]) -> list[NDArray[Any]]:
        """Return the array of each process, in their order; shapes may differ."""
        if self.size == 1:
            return [array]
        written = io.BytesIO()
        np.save(written, array, allow_pickle=False)
        parts = self._gather(written.getvalue())
        return [np.load(io.BytesIO(part), allow_pickle=False) for part in parts]

    def share(self, value: Any) -> Any:
        """Return the first process's value; it must be JSON."""
        return self.gather(value if self.is_first else None)[0]

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Raise an error of one process in every process.

        Raises:
            RemoraError: The error of the first process that has one; it names the process, unless
                all have the same.
        """
        own: RemoraError | None = None
        try:
            yield
        except RemoraError as error:
            if self.size == 1 or isinstance(error, PeerLostError):
                raise
            own = error
        errors = self.gather(None if own is None else [type(own).__name__, str(own)])
        failed = [rank for rank, error in enumerate(errors) if error]
        if not failed:
            return
        rank = failed[0]
        name, message = errors[rank]
        if any(error != errors[rank] for error in errors):
            message = f"process {rank} of {self.size}: {message}"
        kinds = {kind.__name__: kind for kind in RemoraError.__subclasses__()}
        shared = kinds.get(name, RemoraError)(message)
        shared.is_shared = True
        raise shared from own

    def refuse_differences(self, values: Mapping[str, Any]) -> None:
        """Make sure that every process has the same values; they must be JSON.

        Raises:
            ConfigError: If one differs; it names the value and the process.
        """
        first, *others = self.gather(dict(values))
        for rank, other in enumerate(others, 1):
            for name, value in first.items():
                if other[name] != value:
                    error = ConfigError(
                        f"process {rank} of {self.size} has {name} {other[name]}, process 0 has "
                        f"{value}; give all processes the same"
                    )
                    error.is_shared = True
                    raise error

    def _add_up(self, tensor: Tensor) -> None:
        from torch import distributed

        self._wait(lambda: distributed.all_reduce(tensor))

    def _gather(self, data: bytes) -> list[bytes]:
        from torch import distributed

        own = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        length = torch.tensor([len(data)])
        lengths = [torch.zeros_like(length) for _ in range(self.size)]
        self._wait(lambda: distributed.all_gather(lengths, length))
        longest = max(int(each) for each in lengths)
        parts = [torch.zeros(longest, dtype=torch.uint8) for _ in lengths]
        padded = torch.nn.functional.pad(own, (0, longest - len(own)))
        self._wait(lambda: distributed.all_gather(parts, padded))
        return [
            part[: int(each)].numpy().tobytes() for part, each in zip(parts, lengths, strict=True)
        ]

    def _wait(self, call: Callable[[], object]) -> None:
        try:
            call()
        except RuntimeError as error:
            raise _lost(self.size, error) from error


def _lost(size: int, error: RuntimeError) -> PeerLostError:
    return PeerLostError(
        f"a process of the {size} is gone ({str(error).splitlines()[0][:100]}); run the same "
        "command again to resume"
    )


def _is_of_a_peer(error: RuntimeError) -> bool:
    """Whether an error comes from a collective call, such as those of sharded weights."""
    from torch import distributed

    return isinstance(error, distributed.DistError) or "gloo" in str(error)


@contextlib.contextmanager
def join() -> Iterator[ProcessGroup]:
    """Join the other processes of this run, if there are any; leave together at the end.

    Raises:
        ConfigError: If there are more processes than GPUs.
        PeerLostError: If one does not join, or is lost later.
    """
    size = world_size()
    if size == 1:
        yield ProcessGroup()
        return
    from torch import distributed
    from torch.distributed.distributed_c10d import PrefixStore

    # One GPU for each process.
    _watch_launcher()
    if torch.cuda.is_available():
        device, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if device >= count:
            raise ConfigError(
                f"process {device} has no GPU, this machine has {count}; start {count} processes"
            )
        torch.cuda.set_device(device)
    # Connect, and check that all are here.
    try:
        waiting = datetime.timedelta(seconds=JOIN_SECONDS)
        store, rank, size = _meet(waiting)
        pulse = Heartbeat(store.clone(), rank, size)
        store.set_timeout(waiting)
        distributed.init_process_group(
            _backend(),
            store=PrefixStore("group", store),
            rank=rank,
            world_size=size,
            timeout=datetime.timedelta(days=1),  # the pulse ends who waits for a lost process
        )
        group = ProcessGroup(rank, size)
        group.gather(rank)
    except (RuntimeError, ValueError, KeyError) as error:
        raise PeerLostError(
            f"the {size} processes of this run could not connect "
            f"({str(error).splitlines()[0][:100]}); start all of them"
        ) from error
    # Run, and leave together.
    pulse.start()
    try:
        yield group
        group.gather(rank)  # a process that has ended before the others would look lost
    except RuntimeError as error:
        if isinstance(error, RemoraError) or not _is_of_a_peer(error):
            raise
        # Collective calls of sharded weights may hang, and Python could not shut down in order.
        lost = _lost(size, error)
        if speaks(lost):
            print(f"error: {lost}", file=sys.stderr)  # noqa: T201
        leave(PeerLostError.exit_code)
    finally:
        pulse.stop()
        with contextlib.suppress(RuntimeError):
            distributed.destroy_process_group()


def _backend() -> str:
    """Return the libraries that communicate; NCCL is not built for Windows."""
    from torch import distributed

    has_nccl = torch.cuda.is_available() and distributed.is_nccl_available()
    return "cpu:gloo,cuda:nccl" if has_nccl else "gloo"


def _meet(waiting: datetime.timedelta) -> tuple[Any, int, int]:
    """Return the store that all processes write to, this one's rank and their number.

    The launcher hands the first process an open socket where it can, see `launch.run`.
    """
    from torch import distributed
    from torch.distributed.rendezvous import rendezvous

    listener = os.environ.get(LISTENER)
    if listener is None:
        store, rank, size = next(rendezvous("env://", timeout=waiting))
        return store, rank, size
    rank, size = int(os.environ["RANK"]), world_size()
    store = distributed.TCPStore(  # type: ignore[attr-defined]
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        size,
        is_master=rank == 0,
        timeout=waiting,
        master_listen_fd=int(listener) if rank == 0 else None,
    )
    return store, rank, size


def _watch_launcher() -> None:
    """End this process when the one that launched it is gone."""
    launcher = os.environ.get(LAUNCHER)
    if launcher is None:
        return

    def watch() -> None:
        with contextlib.suppress(psutil.NoSuchProcess):  # it is gone already
            process = psutil.Process(int(launcher))
            while _is_running(process):
                time.sleep(BEAT_SECONDS)
        os._exit(PeerLostError.exit_code)

    threading.Thread(target=watch, daemon=True).start()


def _is_running(launcher: psutil.Process) -> bool:
    """Whether the launcher runs; another process with its id, which began later, is not it.

    Its id is not compared with that of the parent: in a virtual environment on Windows another
    python.exe stands between the two.
    """
    try:
        is_older = launcher.create_time() <= psutil.Process().create_time()
        is_alive = launcher.is_running() and launcher.status() != psutil.STATUS_ZOMBIE
    except psutil.AccessDenied:
        return True
    return bool(is_older and is_alive)

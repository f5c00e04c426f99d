"""How many threads compute on a CPU: fewer while other processes keep its cores busy.

OpenMP's threads share the work of each operation, some thousand times a step, and wait for each
other by spinning. Where another process has one of the cores, all wait for the thread that shares
it. With as many threads as there are free cores none does. Other ways to wait cost more on a
machine without other work than they save beside it (docs/log.md, "Beside other work").

The wheels of numpy and of scipy each bring an OpenBLAS with threads of its own, which wait in the
same way, for each other too. So independent fits get one thread each, and a fit by itself leaves
them to numpy, whose matrix products they pay for (docs/log.md, "Threads of regressions").
"""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import psutil
import torch

from remora.runtime import memory

INTERVAL_SECONDS = 1.0
"""Least time over which the load is measured."""

REMEMBERED_SECONDS = 3.0
"""Time in which the largest load counts, so that the number does not go up and down."""

FIXED_BY = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_THREAD_LIMIT")
"""Variables by which a user, or `--devices`, says how many threads compute; they stay."""

Item = TypeVar("Item")
Result = TypeVar("Result")


def adapt(device: torch.device) -> str | None:
    """Fit the number of threads to the load of the machine, at most once a second.

    Called by the thread that computes, between steps. As many as torch has at the first call are
    the most, and in use again when the load is over.

    Returns:
        What changed, in a sentence, the first time; None if there is nothing to say.
    """
    return _adapter().adapt() if device.type == "cpu" else None


def each(
    function: Callable[[Item], Result], items: Sequence[Item], item_bytes: int = 0
) -> Iterator[Result]:
    """Yield the result of each item in order: several at once, in one thread of BLAS each.

    Args:
        function: Leaves Python's lock while it computes, as numpy and scikit-learn do.
        items: What it is called with.
        item_bytes: Memory that one call takes; fewer run at once where less is free.
    """
    count = torch.get_num_threads()
    free = memory.free_bytes(torch.device("cpu"))
    if item_bytes and free is not None:
        count = min(count, max(1, free // item_bytes))
    with _blas(1), ThreadPoolExecutor(count) as pool:
        yield from pool.map(function, items)


@contextlib.contextmanager
def by_itself() -> Iterator[None]:
    """Let a fit that runs alone have as many threads of BLAS as torch has, all of them numpy's."""
    with _blas(torch.get_num_threads()):
        yield


@contextlib.contextmanager
def _blas(of_numpy: int) -> Iterator[None]:
    """Limit the threads of numpy's BLAS; scipy's has one, unless both share a library."""
    import scipy.linalg  # noqa: F401 - what is not loaded cannot be limited
    from threadpoolctl import ThreadpoolController

    loaded = ThreadpoolController().select(user_api="blas")
    with contextlib.ExitStack() as limits:
        for library in loaded.info():
            is_scipys = not {"scipy.libs", "scipy"}.isdisjoint(Path(library["filepath"]).parts)
            most = 1 if is_scipys else of_numpy
            if library["num_threads"] > most:
                chosen = loaded.select(filepath=library["filepath"])
                limits.enter_context(chosen.limit(limits=most))
        yield


@functools.cache
def _adapter() -> Adapter:
    return Adapter(torch.get_num_threads(), os.environ)


class Adapter:
    """Counts what others take of the cores that this process may use, and sets the threads."""

    def __init__(self, most: int, environment: Mapping[str, str]) -> None:
        """Begin to measure.

        Args:
            most: Threads on a machine without other work.
            environment: The process's variables.
        """
        self._most = most
        is_fixed = most == 1 or any(environment.get(name) for name in FIXED_BY)
        self._is_told = False
        self._loads: list[tuple[float, float]] = []  # when, and how many cores
        self._before = None if is_fixed else _times()

    def adapt(self) -> str | None:
        """See `adapt` of the module."""
        if self._before is None or time.perf_counter() - self._before[0] < INTERVAL_SECONDS:
            return None
        now = _times()
        if now is None:
            return None
        seconds, busy, own = (b - a for a, b in zip(self._before, now, strict=True))
        self._before = now
        self._loads = [each for each in self._loads if now[0] - each[0] < REMEMBERED_SECONDS]
        self._loads.append((now[0], max(0.0, busy - own) / seconds))
        others = round(max(load for _, load in self._loads))
        wanted = min(self._most, max(1, len(_cores()) - others))
        if wanted == torch.get_num_threads():
            return None
        torch.set_num_threads(wanted)
        if self._is_told or wanted == self._most:
            return None
        self._is_told = True
        cores = "1 core is" if others == 1 else f"{others} cores are"
        return (
            f"{cores} busy with other work: computing with {wanted} "
            f"thread{'s' * (wanted > 1)} of {self._most} while that lasts"
        )


def _times() -> tuple[float, float, float] | None:
    """Return the clock, and the CPU time of all processes on our cores and of this one, in s.

    None if the system does not say, as Linux without /proc.
    """
    try:
        each = psutil.cpu_times(percpu=True)
        cores = [each[index] for index in _cores()]
    except (psutil.Error, OSError, IndexError, RuntimeError, NotImplementedError):
        return None
    busy = 0.0
    for core in cores:
        # A guest's time is in `user` too; what the hypervisor took is nobody's here.
        idle = core.idle + getattr(core, "iowait", 0.0) + getattr(core, "steal", 0.0)
        guests = getattr(core, "guest", 0.0) + getattr(core, "guest_nice", 0.0)
        busy += sum(core) - idle - guests
    return time.perf_counter(), busy, time.process_time()


def _cores() -> list[int]:
    """Return the indices of the cores that this process may use."""
    count = os.cpu_count() or 1
    if not hasattr(os, "sched_getaffinity"):
        return list(range(count))
    return sorted(index for index in os.sched_getaffinity(0) if index < count)

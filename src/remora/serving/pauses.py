"""Batches of an input that may pause: what has come is answered, not kept until a batch is full."""

from __future__ import annotations

import os
import queue
import stat
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

Item = TypeVar("Item")

WAIT_SECONDS = 0.25
"""Longest time that an item of a batch waits for more of them."""


def may_pause(source: str) -> bool:
    """Whether a source is a pipe or a terminal, and no file."""
    try:
        mode = (
            os.fstat(sys.stdin.fileno()).st_mode if source == "-" else Path(source).stat().st_mode
        )
    except (OSError, ValueError):  # standard input that is no file of the system, or no such file
        return False
    return not stat.S_ISREG(mode)


def batches(items: Iterator[Item], size: int, *, pausing: bool) -> Iterator[list[Item]]:
    """Yield batches of up to `size` items.

    Args:
        items: The items; what they raise is raised here, after the items before it were yielded.
        size: The most items of a batch.
        pausing: Whether a batch that is not full is yielded when no item comes for a moment.
            Batches of other sizes change results by rounding, so files do without.
    """
    if not pausing:
        yield from _full(items, size)
        return
    waiting: queue.Queue[tuple[str, Any]] = queue.Queue(maxsize=4 * size)
    threading.Thread(target=_read, args=(items, waiting), daemon=True).start()
    while True:
        try:
            kind, value = waiting.get(timeout=1.0)  # Windows cannot interrupt a wait without end
        except queue.Empty:
            continue
        batch: list[Item] = []
        until = time.monotonic() + WAIT_SECONDS
        while kind == "item":
            batch.append(value)
            if len(batch) == size:
                break
            try:
                kind, value = waiting.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                break
        if batch:
            yield batch
        if kind == "error":
            raise value
        if kind == "end":
            return


def _full(items: Iterator[Item], size: int) -> Iterator[list[Item]]:
    """Yield full batches; what came before an error is a batch of its own."""
    batch: list[Item] = []
    error: Exception | None = None
    while error is None:
        try:
            batch.append(next(items))
        except StopIteration:
            break
        except Exception as raised:
            error = raised
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
    if error is not None:
        raise error


def _read(items: Iterator[Item], waiting: queue.Queue[tuple[str, Any]]) -> None:
    """Put items into the queue, which holds a few only, so that memory stays flat."""
    try:
        for item in items:
            waiting.put(("item", item))
    except BaseException as error:
        waiting.put(("error", error))
    else:
        waiting.put(("end", None))

"""Memory of this process and its device: used, free, given back."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import re
import sys
from pathlib import Path

import torch

KEPT_KERNELS = 128
"""Kernels that a processor's library keeps compiled, one for each shape of a product; see below."""

_MMAP_THRESHOLD = -3  # glibc's M_MMAP_THRESHOLD

ADDRESS_BYTES = 400_000_000
"""Addresses, not memory, that a run takes: glibc reserves 64 MiB for each of three threads, and
the libraries of the baseline are mapped at the end. A limit on the address space counts them."""


# torch's 16-bit products on processors compile a kernel for each shape and keep 1,024 of them, half
# a megabyte each. Micro-batches are of ever new lengths, so none but those of the same length, in
# other layers, are of use again. Both caches look here when the first product is computed.
for _name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
    os.environ.setdefault(_name, str(KEPT_KERNELS))


def peak_bytes(device: torch.device) -> int:
    """Return the most memory used so far: of the device, or of the process on a processor."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_reserved(device))
    if device.type == "mps":
        return int(torch.mps.driver_allocated_memory())
    own = _proc_bytes("/proc/self/status", "VmHWM")  # the one below begins with the parent's
    if own is not None:
        return own
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def used_bytes() -> int:
    """Return the memory that this process uses now; where that is not known, its peak."""
    resident = _proc_bytes("/proc/self/status", "VmRSS")
    return peak_bytes(torch.device("cpu")) if resident is None else resident


def free_bytes(device: torch.device) -> int | None:
    """Return how much more memory this process can take on a device, or None if nobody says.

    On a processor the least of what the machine has available, what the container's control group
    (versions 1 and 2) leaves, and what the limit of the address space leaves.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + int(unused)
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    limits = [_proc_bytes("/proc/meminfo", "MemAvailable"), _group_bytes(), _address_bytes()]
    known = [limit for limit in limits if limit is not None]
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # they share it
    return max(0, min(known)) // processes if known else None


def begin(device: torch.device) -> None:
    """Set up torch's allocator for CUDA for a run, and measure its peak from here on.

    Its segments may grow, so that it holds less that is of no use: micro-batches are of ever new
    lengths. What the user sets by torch's variables stays.
    """
    if device.type != "cuda":
        return
    set_by_user = {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys()
    if sys.platform == "linux" and not set_by_user:
        change = getattr(torch._C, "_accelerator_setAllocatorSettings", None)  # of newer versions
        with contextlib.suppress(AttributeError, RuntimeError):  # not of this build of torch
            (change or torch.cuda.memory._set_allocator_settings)("expandable_segments:True")
    release(device)
    torch.cuda.reset_peak_memory_stats(device)


def is_exhausted(error: BaseException) -> bool:
    """Whether an error says that memory ran out."""
    words = (
        "out of memory",
        "can't allocate memory",
        "bad_alloc",
        "not enough memory",
        "could not create a primitive",  # oneDNN's, where a kernel cannot be mapped
    )
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)
    )


def refuse_to_exhaust(device: torch.device, needed: int) -> None:
    """Fail before memory is taken that is not there.

    A processor has no error for it: the kernel kills the process. Devices report it themselves.

    Raises:
        torch.OutOfMemoryError: If a processor's memory does not suffice for so many bytes.
    """
    if device.type == "cpu" and needed > (free_bytes(device) or needed):
        release(device)
        free = free_bytes(device)
        if free is not None and needed > free:
            raise torch.OutOfMemoryError(f"not enough memory: {needed:,} of {free:,} bytes")


def release(device: torch.device) -> None:
    """Give cached memory back."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()
    else:
        trim()


def keep_within(device: torch.device, limit: int) -> None:
    """Give back what a processor's allocator holds, where the process has more than a limit."""
    if device.type == "cpu" and used_bytes() > limit:
        trim()


def map_arrays(device: torch.device) -> None:
    """Have a processor's arrays of a megabyte or more mapped each on its own, not in the heap.

    Then no pieces of them are held once they are freed. That takes time, since their pages are
    mapped and cleared again and again. What the user has set stays.
    """
    set_by_user = "MALLOC_MMAP_THRESHOLD_" in os.environ or "mmap_threshold" in os.environ.get(
        "GLIBC_TUNABLES", ""
    )
    if device.type == "cpu" and not set_by_user:
        with contextlib.suppress(AttributeError, OSError, TypeError):  # only glibc has it
            ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 1 << 20)


def trim() -> None:
    """Give back what the process has freed and its allocator holds on to, in pieces."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # only glibc has it
        ctypes.CDLL(None).malloc_trim(0)


def _proc_bytes(path: str, name: str) -> int | None:
    """Return a line such as `MemAvailable:   123 kB`, in bytes."""
    text = _read(Path(path)) or ""
    found = re.search(rf"^{name}:\s+(\d+) kB", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else None


CONTROL_GROUPS = Path("/sys/fs/cgroup")


def _group_bytes() -> int | None:
    """Return what the process's control groups leave: the tightest from its own up to the root."""
    free: list[int] = []
    for line in (_read(Path("/proc/self/cgroup")) or "").splitlines():
        _, controllers, own = line.split(":", 2)
        if controllers == "":
            root, limit, used = CONTROL_GROUPS, "memory.max", "memory.current"
        elif controllers == "memory":
            root, limit, used = (
                CONTROL_GROUPS / "memory",
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
            )
        else:
            continue
        folder = root / own.lstrip("/")
        # In a container the path may be the host's; the root is then the container's own group.
        for place in (folder, *folder.parents):
            maximum, current = _read(place / limit), _read(place / used)
            if maximum and current and maximum.strip().isdigit():
                cache = re.search(
                    r"^(?:total_)?inactive_file (\d+)", _read(place / "memory.stat") or "", re.M
                )
                free.append(int(maximum) - int(current) + (int(cache[1]) if cache else 0))
            if place == root:
                break
    return min(free, default=None)


def _address_bytes() -> int | None:
    """Return what the limit of the address space (ulimit -v) leaves."""
    import resource

    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    used = _proc_bytes("/proc/self/status", "VmSize")
    if limit == resource.RLIM_INFINITY or used is None:
        return None
    return max(0, limit - used - ADDRESS_BYTES)


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return None

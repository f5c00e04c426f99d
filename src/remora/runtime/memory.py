"""Memory of this process and its device: used, free, given back."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import os
import re
import sys
from pathlib import Path

import psutil
import torch

KEPT_KERNELS = 128
"""Compiled kernels that a CPU library keeps, one for each shape of a product."""

ADDRESS_BYTES = 400_000_000
"""Addresses, not memory, that a run takes: glibc reserves 64 MiB for each of three threads, and
the libraries of the baseline are mapped at the end. A limit on the address space counts them, so
the rest is kept free."""

CONTROL_GROUPS = Path("/sys/fs/cgroup")

_CPU = torch.device("cpu")
_MMAP_THRESHOLD = -3  # glibc's M_MMAP_THRESHOLD
_WITHOUT_GLIBC = (AttributeError, OSError, TypeError)  # what ctypes raises on other systems


def limit_kernel_caches() -> None:
    """Limit the kernels that torch's CPU libraries keep compiled, before they compute anything.

    For 16-bit products they compile a kernel for each shape and keep 1,024 of them, half a megabyte
    each. Micro-batches keep changing length, so a kernel serves only the other layers of the same
    micro-batch. Both caches read their variable when the first product is computed, so this is
    called before; later it has no effect. Values that the user has set stay.
    """
    for name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(KEPT_KERNELS))


def peak_bytes(device: torch.device) -> int:
    """Return the most memory used so far: of the device, or on CPU of this process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_reserved(device))
    if device.type == "mps":
        return int(torch.mps.driver_allocated_memory())
    own = _status_bytes("VmHWM")  # the one from getrusage begins with the parent's
    if own is not None:
        return own
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def used_bytes() -> int:
    """Return the memory that this process uses now; its peak if that is unknown."""
    try:
        return int(psutil.Process().memory_info().rss)
    except (psutil.Error, OSError):  # Linux without /proc
        return peak_bytes(_CPU)


def free_bytes(device: torch.device, *, is_shared: bool = True) -> int | None:
    """Return how much more memory this process can take on a device, or None if unknown.

    On CPU the least of: what the machine has available, what the container's control group
    (versions 1 and 2) leaves, and what the limit of the address space leaves. Processes that train
    together share it, unless the others wait.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + int(unused)
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    limits = [_available_bytes(), _group_bytes(), _address_bytes()]
    known = [limit for limit in limits if limit is not None]
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if is_shared else 1
    return max(0, min(known)) // processes if known else None


def begin(device: torch.device) -> None:
    """Set up a device's memory for a run, and on CUDA measure the peak from here on.

    Segments of torch's CUDA allocator may grow, so that fewer unusable pieces are left when
    micro-batches change length. Settings that the user made by torch's variables stay.
    """
    limit_kernel_caches()
    if device.type != "cuda":
        return
    set_by_user = {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys()
    if sys.platform == "linux" and not set_by_user:
        change = getattr(torch._C, "_accelerator_setAllocatorSettings", None)  # newer versions
        with contextlib.suppress(AttributeError, RuntimeError):  # not in this build of torch
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
    """Fail before more CPU memory is allocated than is free.

    The kernel would kill the process without an error. GPUs report it themselves.

    Raises:
        torch.OutOfMemoryError: If less CPU memory is free than needed, in bytes.
    """
    if device.type == "cpu" and needed > (free_bytes(device) or needed):
        release(device)
        free = free_bytes(device)
        if free is not None and needed > free:
            raise torch.OutOfMemoryError(f"not enough memory: {needed:,} of {free:,} bytes")


def release(device: torch.device) -> None:
    """Give cached memory back to the device or the operating system."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()
    else:
        trim()


def keep_within(device: torch.device, limit: int) -> None:
    """Give freed CPU memory back if the process uses more than a limit, in bytes."""
    if device.type == "cpu" and used_bytes() > limit:
        trim()


def map_arrays(device: torch.device) -> None:
    """Map each CPU array of a megabyte or more on its own, outside the heap.

    Then freed arrays leave no fragments. It takes time, since their pages are mapped and cleared
    again and again. Settings that the user made stay. Only glibc can.
    """
    set_by_user = "MALLOC_MMAP_THRESHOLD_" in os.environ or "mmap_threshold" in os.environ.get(
        "GLIBC_TUNABLES", ""
    )
    if device.type == "cpu" and not set_by_user:
        with contextlib.suppress(*_WITHOUT_GLIBC):
            ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 1 << 20)


def trim() -> None:
    """Give back memory that the process has freed and its allocator keeps. Only glibc can."""
    with contextlib.suppress(*_WITHOUT_GLIBC):
        ctypes.CDLL(None).malloc_trim(0)


def _available_bytes() -> int | None:
    """Return what the machine has available."""
    try:
        return int(psutil.virtual_memory().available)
    except (psutil.Error, OSError):  # Linux without /proc
        return None


def _group_bytes() -> int | None:
    """Return what the process's control groups leave: the tightest from its own up to the root."""
    free: list[int] = []
    for line in (_read(Path("/proc/self/cgroup")) or "").splitlines():
        _, controllers, own = line.split(":", 2)
        if controllers == "":  # version 2
            root, limit, used = CONTROL_GROUPS, "memory.max", "memory.current"
        elif controllers == "memory":  # version 1
            root = CONTROL_GROUPS / "memory"
            limit, used = "memory.limit_in_bytes", "memory.usage_in_bytes"
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
    """Return what the limit of the address space (ulimit -v) leaves; only Linux enforces one."""
    if sys.platform != "linux":
        return None
    try:
        import resource
    except ImportError:  # a Python that was built without it
        return None
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    used = _status_bytes("VmSize")
    if limit == resource.RLIM_INFINITY or used is None:
        return None
    taken = _addresses_alone() - _addresses_at_first()
    return max(0, limit - used - max(0, ADDRESS_BYTES - taken))


def _addresses_alone() -> int:
    """Return the bytes of the address space that hold no memory now."""
    return (_status_bytes("VmSize") or 0) - (_status_bytes("VmRSS") or 0)


@functools.cache
def _addresses_at_first() -> int:
    """Return what `_addresses_alone` was when a run first asked, before it took its own."""
    return _addresses_alone()


def _status_bytes(name: str) -> int | None:
    """Return a line of Linux's status of this process, such as `VmHWM:   123 kB`, in bytes."""
    text = _read(Path("/proc/self/status")) or ""
    line = re.search(rf"^{name}:\s+(\d+) kB", text, re.MULTILINE)
    return int(line[1]) * 1024 if line else None


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return None

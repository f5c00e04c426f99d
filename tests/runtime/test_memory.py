"""How much memory this process uses and may use, on systems that need not be this one."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from conftest import tiny_config
from remora.models import loading
from remora.runtime import memory

CPU = torch.device("cpu")


def test_the_tightest_control_group_counts(monkeypatch, tmp_path) -> None:
    inner = tmp_path / "outer" / "inner"
    inner.mkdir(parents=True)
    (tmp_path / "outer" / "memory.max").write_text("1000000\n")
    (tmp_path / "outer" / "memory.current").write_text("600000\n")
    (tmp_path / "outer" / "memory.stat").write_text("anon 1\ninactive_file 100000\n")
    (inner / "memory.max").write_text("max\n")
    (inner / "memory.current").write_text("600000\n")
    real = memory._read
    monkeypatch.setattr(memory, "CONTROL_GROUPS", tmp_path)
    monkeypatch.setattr(
        memory,
        "_read",
        lambda path: "0::/outer/inner\n" if str(path) == "/proc/self/cgroup" else real(path),
    )
    assert memory._group_bytes() == 500_000
    assert memory.free_bytes(torch.device("cpu")) == 500_000


@pytest.mark.parametrize(
    ("error", "exhausted"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("could not create a primitive"), True),
        (MemoryError(), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_errors_of_memory_are_told_from_others(error: Exception, exhausted: bool) -> None:
    assert memory.is_exhausted(error) is exhausted


def test_the_peak_of_memory_is_in_bytes() -> None:
    before = memory.peak_bytes(torch.device("cpu"))
    block = np.ones(256 << 20, dtype=np.uint8)
    after = memory.peak_bytes(torch.device("cpu"))
    assert block.nbytes <= after < 256 << 30
    assert after >= before > 16 << 20


def test_used_and_available_memory_are_the_systems() -> None:
    before = memory.used_bytes()
    block = np.ones(64 << 20, dtype=np.uint8)
    assert 60 << 20 < memory.used_bytes() - before < 80 << 20
    assert memory.used_bytes() <= memory.peak_bytes(CPU)
    del block
    free = memory.free_bytes(CPU)
    assert free is not None
    assert 0 < free <= psutil.virtual_memory().total


def test_processes_of_a_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_available_bytes", lambda: 1_000)
    monkeypatch.setattr(memory, "_group_bytes", lambda: None)
    monkeypatch.setattr(memory, "_address_bytes", lambda: 900)
    assert memory.free_bytes(CPU) == 900
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert memory.free_bytes(CPU) == 300


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits the address space")
def test_addresses_that_a_run_has_taken_are_not_kept_free_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import resource

    status = {"VmSize": 1_000_000_000, "VmRSS": 400_000_000}
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (2_000_000_000, -1))
    monkeypatch.setattr(memory, "_status_bytes", status.get)
    memory._addresses_at_first.cache_clear()
    try:
        at_plan = memory._address_bytes()
        assert at_plan == 1_000_000_000 - memory.ADDRESS_BYTES
        status["VmSize"] += 300_000_000  # arenas and libraries
        assert memory._address_bytes() == at_plan
        status |= {"VmSize": 1_500_000_000, "VmRSS": 600_000_000}  # 200 MB of arrays
        assert memory._address_bytes() == at_plan - 200_000_000
        status["VmSize"] += 200_000_000  # more than foreseen
        assert memory._address_bytes() == 300_000_000
    finally:
        memory._addresses_at_first.cache_clear()


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A system without resource, /proc and glibc, whose processes say their own peak."""
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setitem(sys.modules, "resource", None)
    monkeypatch.setattr(memory, "_read", lambda path: None)

    def no_library(name: Any) -> Any:
        raise TypeError("LoadLibrary() argument 1 must be str, not None")

    monkeypatch.setattr(ctypes, "CDLL", no_library)
    info = SimpleNamespace(rss=5_000, peak_wset=7_000)
    monkeypatch.setattr(psutil, "Process", lambda: SimpleNamespace(memory_info=lambda: info))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=9_000))


@pytest.mark.usefixtures("windows")
def test_windows_has_no_limits_but_the_machine() -> None:
    assert memory.peak_bytes(CPU) == 7_000
    assert memory.used_bytes() == 5_000
    assert memory.free_bytes(CPU) == 9_000
    memory.map_arrays(CPU)
    memory.keep_within(CPU, 1)
    memory.release(CPU)


def test_macos_has_its_peak_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(memory, "_read", lambda path: None)
    monkeypatch.setattr(resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=12_345))
    assert memory.peak_bytes(CPU) == 12_345
    assert memory.free_bytes(CPU) == pytest.approx(psutil.virtual_memory().available, rel=0.2)
    libc = SimpleNamespace()  # has no malloc_trim
    monkeypatch.setattr(ctypes, "CDLL", lambda name: libc)
    memory.map_arrays(CPU)
    memory.trim()


def test_without_proc_the_peak_stands_for_what_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any) -> Any:
        raise FileNotFoundError("/proc")

    monkeypatch.setattr(memory, "_read", lambda path: None)
    monkeypatch.setattr(psutil, "Process", missing)
    monkeypatch.setattr(psutil, "virtual_memory", missing)
    monkeypatch.setattr(memory, "peak_bytes", lambda device: 4_321)
    assert memory.used_bytes() == 4_321
    assert memory.free_bytes(CPU) is None


def test_kernel_caches_are_limited_before_a_model_computes(monkeypatch) -> None:
    monkeypatch.delenv("LRU_CACHE_CAPACITY", raising=False)
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "7")
    loading.load_empty(tiny_config("qwen2"), torch.float32)
    assert os.environ["LRU_CACHE_CAPACITY"] == str(memory.KEPT_KERNELS)
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "7"  # as the user set it


IMPORTED = """
import os
before = dict(os.environ)
import remora.runtime.memory, remora.training.loop
changed = {name for name in before.keys() | os.environ.keys()
           if before.get(name) != os.environ.get(name)}
assert not changed & {"LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"}, changed
"""


def test_importing_sets_no_cache() -> None:
    own = {k: v for k, v in os.environ.items() if not k.endswith("CACHE_CAPACITY")}
    subprocess.run([sys.executable, "-c", IMPORTED], env=own, check=True, timeout=120)


MAPPED = """
import ctypes
import torch
from remora.runtime import memory

class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in ("arena", "chunks", "fast", "mapped", "bytes")]
    _fields_ += [(f"other{i}", ctypes.c_size_t) for i in range(5)]

def mapped():
    libc.mallinfo2.restype = Info
    return libc.mallinfo2().mapped

libc = ctypes.CDLL(None)
torch.empty(30 << 20, dtype=torch.uint8)  # glibc takes its size for the least to be mapped
before, kept = mapped(), [torch.empty(2 << 20, dtype=torch.uint8)]
assert mapped() == before
memory.map_arrays(torch.device("cpu"))
kept.append(torch.empty(2 << 20, dtype=torch.uint8))
assert mapped() == before + 1
"""


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallinfo2"),
    reason="needs glibc 2.33",
)
def test_arrays_can_be_mapped_one_by_one() -> None:
    own = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    subprocess.run([sys.executable, "-c", MAPPED], env=own, check=True, timeout=60)

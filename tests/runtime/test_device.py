"""The device and its arithmetic, for devices that need not be here."""

from __future__ import annotations

import pytest
import torch

from remora.errors import ConfigError
from remora.runtime import device

CUDA = torch.device("cuda")
CPU = torch.device("cpu")
WIDE, BRAIN, HALF = torch.float32, torch.bfloat16, torch.float16


def pretend_gpu(monkeypatch, name, capability):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _=None: name)
    # As a T4 does: it answers yes and emulates.
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)


@pytest.mark.parametrize(
    ("name", "capability", "dtype", "in_accelerate", "reason"),
    [
        ("Tesla P40", (6, 1), WIDE, "no", "no fast 16-bit"),
        ("Tesla V100", (7, 0), HALF, "fp16", "loss scaling"),
        ("Tesla T4", (7, 5), HALF, "fp16", "no native bfloat16; float16 with loss scaling"),
        ("A100", (8, 0), BRAIN, "bf16", "native bfloat16"),
        ("L4", (8, 9), BRAIN, "bf16", "native bfloat16"),
        ("H100", (9, 0), BRAIN, "bf16", "native bfloat16"),
        ("B200", (10, 0), BRAIN, "bf16", "native bfloat16"),
    ],
)
def test_a_gpu_computes_in_what_it_has_natively(
    monkeypatch, name, capability, dtype, in_accelerate, reason
):
    pretend_gpu(monkeypatch, name, capability)
    chosen = device.choose_precision(CUDA, "auto")
    assert (chosen.compute, chosen.base) == (dtype, dtype)
    assert chosen.mixed_precision == in_accelerate
    assert chosen.autocast == (None if dtype is WIDE else dtype)
    assert chosen.reason.startswith(name)
    assert reason in chosen.reason
    told = f"{str(dtype)[6:]} arithmetic, float32 adapter ({name}"
    assert str(chosen).startswith(told)


@pytest.mark.parametrize(("native", "dtype"), [(True, BRAIN), (False, WIDE)])
def test_a_processor_computes_in_bfloat16_only_with_the_instructions(monkeypatch, native, dtype):
    monkeypatch.setattr(device, "_cpu_has_bfloat16", lambda: native)
    chosen = device.choose_precision(CPU, "auto")
    assert (chosen.compute, chosen.base) == (dtype, dtype)
    assert chosen.autocast == (BRAIN if native else None)


@pytest.mark.parametrize(
    ("flags", "native"),
    [
        ("flags\t\t: fpu avx2 avx512f avx512_bf16", True),
        ("flags\t\t: fpu amx_bf16 amx_tile", True),
        ("Features\t: fp asimd bf16 i8mm", True),
        ("flags\t\t: fpu avx2 avx512f avx512_vnni", False),
        ("flags\t\t: fpu avx512_bf16x", False),
    ],
)
def test_the_processors_flags_are_read(monkeypatch, flags, native):
    text = f"processor\t: 0\nmodel name\t: a processor\n{flags}\n"
    monkeypatch.setattr(device.Path, "read_text", lambda *_, **__: text)
    assert device._cpu_has_bfloat16() is native


def test_without_cpuinfo_nothing_is_assumed(monkeypatch):
    def missing(*_, **__):
        raise FileNotFoundError

    monkeypatch.setattr(device.Path, "read_text", missing)
    assert not device._cpu_has_bfloat16()


def test_apple_gpus_compute_in_float32():
    assert device.choose_precision(torch.device("mps"), "auto").compute is WIDE


def test_bfloat16_that_is_asked_for_and_emulated_is_said(monkeypatch):
    pretend_gpu(monkeypatch, "Tesla T4", (7, 5))
    asked = device.choose_precision(CUDA, "bfloat16")
    assert (asked.compute, asked.base) == (BRAIN, BRAIN)
    assert "emulates" in asked.reason
    monkeypatch.setattr(device, "_cpu_has_bfloat16", lambda: False)
    assert "emulates" in device.choose_precision(CPU, "bfloat16").reason


def test_what_is_asked_for_and_native_needs_no_warning(monkeypatch):
    pretend_gpu(monkeypatch, "A100", (8, 0))
    for asked in ("bfloat16", "float16", "float32"):
        chosen = device.choose_precision(CUDA, asked)
        assert chosen.compute is getattr(torch, asked)
        assert chosen.reason == "as requested"


def test_float16_on_a_processor_is_refused():
    with pytest.raises(ConfigError, match=r"^float16 is not computed on a CPU; use --prec"):
        device.choose_precision(CPU, "float16")


@pytest.mark.parametrize(
    ("cuda", "mps", "best"),
    [(True, False, "cuda"), (False, True, "mps"), (False, False, "cpu"), (True, True, "cuda")],
)
def test_the_fastest_device_that_is_here_is_taken(monkeypatch, cuda, mps, best):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert device.choose_device("auto").type == best
    assert device.choose_device("cpu").type == "cpu"


@pytest.mark.parametrize("missing", ["cuda", "mps"])
def test_a_device_that_is_not_here_is_refused(monkeypatch, missing):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(
        ConfigError, match=f"no {missing} device is available; choose from cpu, auto"
    ):
        device.choose_device(missing)

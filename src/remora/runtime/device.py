"""The device to compute on, and the precision that it computes in."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from remora.config import DeviceName, PrecisionName
from remora.errors import ConfigError


@dataclass(frozen=True)
class Hardware:
    """A device as far as it is known. `memory_bytes` is None if unknown."""

    type: str  # cpu, cuda or mps
    name: str
    native: torch.dtype  # the fastest precision that is safe to train in
    memory_bytes: int | None = None
    teraflops: float | None = None  # published, dense, in the native precision

    @property
    def reason(self) -> str:
        """Why that is the native precision."""
        if self.type == "cpu":
            has = "has" if self.native is torch.bfloat16 else "has no"
            return f"{self.name} {has} bfloat16 instructions"
        if self.type == "mps":
            return "float32 is the safe choice on Apple GPUs"
        return {
            torch.bfloat16: f"{self.name} has native bfloat16",
            torch.float16: f"{self.name} has no native bfloat16; float16 with loss scaling",
            torch.float32: f"{self.name} has no fast 16-bit arithmetic",
        }[self.native]


def _gpu(name: str, native: torch.dtype, gigabytes: int, teraflops: float) -> Hardware:
    return Hardware("cuda", name, native, gigabytes * 10**9, teraflops)


KNOWN_DEVICES = {
    "p100": _gpu("Tesla P100", torch.float32, 16, 9.3),
    "v100": _gpu("Tesla V100", torch.float16, 16, 125),
    "t4": _gpu("Tesla T4", torch.float16, 16, 65),
    "rtx3090": _gpu("GeForce RTX 3090", torch.bfloat16, 24, 71),
    "a10": _gpu("A10", torch.bfloat16, 24, 125),
    "a100": _gpu("A100", torch.bfloat16, 40, 312),
    "rtx4090": _gpu("GeForce RTX 4090", torch.bfloat16, 24, 165),
    "l4": _gpu("L4", torch.bfloat16, 24, 121),
    "l40s": _gpu("L40S", torch.bfloat16, 48, 362),
    "h100": _gpu("H100", torch.bfloat16, 80, 989),
    "h200": _gpu("H200", torch.bfloat16, 141, 989),
}
"""Devices that a run can be planned for on another machine: nominal memory, published peak rate."""


@dataclass(frozen=True, kw_only=True)
class Precision:
    """The number formats of a run. Trainable weights are always float32.

    Attributes:
        compute: Precision of the forward and backward pass; 16-bit runs under autocast.
        base: Storage type of the base model.
        reason: Why, in a few words.
    """

    compute: torch.dtype
    base: torch.dtype
    reason: str

    @property
    def mixed_precision(self) -> str:
        """The precision as accelerate names it: no, bf16 or fp16."""
        names = {torch.bfloat16: "bf16", torch.float16: "fp16"}
        return names.get(self.compute, "no")

    @property
    def autocast(self) -> torch.dtype | None:
        """The 16-bit type to compute in under autocast, or None."""
        return None if self.mixed_precision == "no" else self.compute

    def __str__(self) -> str:
        name = str(self.compute).removeprefix("torch.")
        what = "weights" if self.base is torch.float32 != self.compute else "adapter"
        return f"{name} arithmetic, float32 {what} ({self.reason})"


def choose_device(requested: DeviceName) -> torch.device:
    """Return the device to compute on.

    Raises:
        ConfigError: If the requested device is not available.
    """
    present = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if requested == "auto":
        return torch.device(next(name for name, here in present.items() if here))
    if not present[requested]:
        here = ", ".join(name for name, is_here in present.items() if is_here)
        raise ConfigError(f"no {requested} device is available; choose from {here}, auto")
    return torch.device(requested)


def choose_precision(
    device: torch.device,
    requested: PrecisionName,
    *,
    hardware: Hardware | None = None,
    trains_base: bool = False,
) -> Precision:
    """Choose a precision that the device computes natively.

    bfloat16 is chosen only if the hardware has it: a T4 reports that it supports bfloat16 but
    emulates it, and so does a CPU without AVX512-BF16, AMX or Arm BF16 instructions.

    Args:
        device: Where to compute.
        requested: The user's choice.
        hardware: The device's properties; by default those that it reports.
        trains_base: Whether the base model trains too, and so has to be stored in float32.

    Raises:
        ConfigError: If the device cannot compute in the requested precision.
    """
    hardware = hardware or hardware_here(device)
    compute, reason = hardware.native, hardware.reason
    if requested != "auto":
        compute, reason = getattr(torch, requested), "as requested"
        if compute is torch.float16 and hardware.type == "cpu":
            raise ConfigError(
                "float16 is not computed on a CPU; use --precision bfloat16 or float32"
            )
        if compute is torch.bfloat16 and hardware.native is not torch.bfloat16:
            reason = "as requested; this device emulates it, slowly"
    return Precision(compute=compute, base=torch.float32 if trains_base else compute, reason=reason)


def hardware_here(device: torch.device) -> Hardware:
    """Return the properties that a device of this machine reports."""
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        native = torch.float32
        if capability >= (8, 0):
            native = torch.bfloat16
        elif capability >= (7, 0):
            native = torch.float16
        return Hardware("cuda", torch.cuda.get_device_name(device), native)
    if device.type == "mps":
        return Hardware("mps", "Apple GPU", torch.float32)
    native = torch.bfloat16 if _cpu_has_bfloat16() else torch.float32
    return Hardware("cpu", "this CPU", native)


def _cpu_has_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 in hardware, by its flags; False except on Linux."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    words = set(text.replace(":", " ").split())
    return bool(words & {"avx512_bf16", "amx_bf16", "bf16"})

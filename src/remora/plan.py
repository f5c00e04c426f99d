"""The precision decision: which arithmetic, where, and why."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from remora import config
from remora.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Precision:
    """What numbers a run computes with. What trains is float32 in any case.

    Attributes:
        compute: Arithmetic of the forward and backward pass, under autocast where it is 16-bit.
        base: What the frozen base model is stored in.
        reason: Why, in a few words.
    """

    compute: torch.dtype
    base: torch.dtype
    reason: str

    @property
    def mixed_precision(self) -> str:
        """The decision in accelerate's words: no, bf16 or fp16."""
        names = {torch.bfloat16: "bf16", torch.float16: "fp16"}
        return names.get(self.compute, "no")

    @property
    def autocast(self) -> torch.dtype | None:
        """The 16-bit arithmetic to compute in, or None."""
        return None if self.mixed_precision == "no" else self.compute

    def __str__(self) -> str:
        name = str(self.compute).removeprefix("torch.")
        return f"{name} arithmetic, float32 adapter ({self.reason})"


def choose_device(requested: config.Device) -> torch.device:
    """Return the device to compute on.

    Raises:
        ConfigError: If the requested device is not there.
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
        raise ConfigError(f"there is no {requested} device here; choose from {here}, auto")
    return torch.device(requested)


def choose_precision(device: torch.device, requested: config.Precision) -> Precision:
    """Decide on the arithmetic from what the device does natively.

    bfloat16 is used only where the hardware has it: a T4 says that it supports bfloat16 but
    emulates it, and so does a processor without the AVX512-BF16, AMX or Arm BF16 instructions.

    Raises:
        ConfigError: If the requested arithmetic does not exist on the device.
    """
    best, reason = _native(device)
    if requested != "auto":
        compute: torch.dtype = getattr(torch, requested)
        if compute is torch.float16 and device.type == "cpu":
            raise ConfigError(
                "float16 arithmetic is not for training on a processor; "
                "use --precision bfloat16 or float32"
            )
        slow = compute is torch.bfloat16 and best is not torch.bfloat16
        note = "asked for; this device emulates it, slowly" if slow else "asked for"
        return Precision(compute=compute, base=compute, reason=note)
    return Precision(compute=best, base=best, reason=reason)


def _native(device: torch.device) -> tuple[torch.dtype, str]:
    """Return the fastest arithmetic that is safe to train in, and why."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        name = torch.cuda.get_device_name(device)
        if major >= 8:
            return torch.bfloat16, f"{name} has native bfloat16"
        if (major, minor) >= (7, 0):
            return torch.float16, f"{name} has no native bfloat16; float16 with loss scaling"
        return torch.float32, f"{name} has no fast 16-bit arithmetic"
    if device.type == "mps":
        return torch.float32, "float32 is the safe choice on Apple GPUs"
    if _processor_has_bfloat16():
        return torch.bfloat16, "this processor has bfloat16 instructions"
    return torch.float32, "this processor has no bfloat16 instructions"


def _processor_has_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 in hardware, by the flags that Linux shows."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    words = set(text.replace(":", " ").split())
    return bool(words & {"avx512_bf16", "amx_bf16", "bf16"})


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most memory used so far: of the device, or of the process on a processor."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    if device.type == "mps":
        return int(torch.mps.driver_allocated_memory())
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024

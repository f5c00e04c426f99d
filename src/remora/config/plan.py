"""The settings of `remora plan`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cyclopts import Parameter

from remora.config.checks import MemorySize, to_bytes
from remora.config.help_pages import grouped
from remora.config.train import TrainConfig


@grouped(device="Speed and memory", json="Output")
@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class PlanConfig(TrainConfig):
    """Settings of `remora plan`: those of `remora train`, and the device to plan for."""

    device: Literal[
        "auto",
        "cpu",
        "cuda",
        "mps",
        "p100",
        "v100",
        "t4",
        "rtx3090",
        "a10",
        "a100",
        "rtx4090",
        "l4",
        "l40s",
        "h100",
        "h200",
    ] = "auto"  # type: ignore[assignment]
    """Device to plan for: one of this machine, or a GPU named here, which need not be in it."""

    device_memory: MemorySize | None = None
    """Memory of the device to plan for, such as 16GB; by default all of it."""

    json: bool = False
    """Write the plan as JSON to standard output."""

    def memory_bytes(self) -> int | None:
        """Return the memory to plan for in bytes, None if it was not given."""
        return None if self.device_memory is None else to_bytes(self.device_memory)

"""The settings of `remora plan`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cyclopts import Parameter

from remora.config.checks import Method, PrecisionName, parse_bytes
from remora.config.train import TrainConfig

# cyclopts resolves the annotations of inherited fields by the names of this module.
_ANNOTATIONS = (Method, Path, PrecisionName)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class PlanConfig(TrainConfig):
    """Settings of `remora plan`: those of `remora train`, and the machine to plan for."""

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
    """Where to compute: here, or on one of these devices that need not be here."""

    device_memory: str | None = None
    """Memory of the device to plan for, such as 16GB; by default what is there."""

    json: bool = False
    """Write the plan as JSON to standard output."""

    def __post_init__(self) -> None:
        """Check every value; raises ConfigError."""
        super().__post_init__()
        self.memory_bytes()

    def memory_bytes(self) -> int | None:
        """Return the memory to plan for in bytes, None where it was not given.

        Raises:
            ConfigError: If it is no amount of memory.
        """
        return parse_bytes("device_memory", self.device_memory, "16GB or 15.5GiB")

"""Types and checks that the settings of several verbs share."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from remora.errors import ConfigError

PrecisionName = Literal["auto", "float32", "bfloat16", "float16"]

DeviceName = Literal["auto", "cpu", "cuda", "mps"]

Method = Literal["lora", "qlora", "full"]


def parse_bytes(name: str, amount: str | None, examples: str) -> int | None:
    """Return an amount of memory in bytes; raises ConfigError if it is none."""
    if amount is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT])(i?)B?", amount.strip(), re.I)
    if not found or not float(found[1]):
        raise ConfigError(f"{name} is {amount!r}; give an amount such as {examples}")
    power = "KMGT".index(found[2].upper()) + 1
    return int(float(found[1]) * (1024 if found[3] else 1000) ** power)


def is_from(least: int, value: int | None) -> bool:
    """Whether a value is None or at least so much."""
    return value is None or value >= least


def is_plain_name(name: str | None) -> bool:
    """Whether a name is None or one part of a path."""
    return name is None or (Path(name).name == name and name not in {"", ".", ".."})

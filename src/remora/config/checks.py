"""Types and constraints that the settings of several verbs share."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

from cyclopts import Parameter

from remora.errors import ConfigError

_SURROGATE = re.compile("[\ud800-\udfff]")

DEFAULT_MICRO_BATCH_TOKENS = 2048
"""Larger micro-batches of a token tree are hardly faster, and need more memory."""


@dataclass(frozen=True)
class Constraint:
    """Which values a setting may have; a setting that is None is not given, and always allowed."""

    wanted: str
    """The allowed values as an error names them, after "give"."""

    holds: Callable[[Any], bool]


def check(settings: object, *conflicts: tuple[bool, str]) -> None:
    """Check the constraints in the types of a dataclass's fields, and conflicts between fields.

    Args:
        settings: The dataclass, whose fields may be of types such as `Count`.
        conflicts: Whether each conflict is there, and the message that names it.

    Raises:
        ConfigError: Naming everything that is wrong.
    """
    hints = get_type_hints(type(settings), include_extras=True)
    problems = [
        f"{name} is {value!r}; give {constraint.wanted}"
        for name, hint in hints.items()
        for constraint in _constraints(hint)
        if (value := getattr(settings, name)) is not None and not constraint.holds(value)
    ]
    problems += [message for is_there, message in conflicts if is_there]
    if problems:
        raise ConfigError("; ".join(problems))


def unwritable(settings: Any) -> list[tuple[bool, str]]:
    """Return a conflict for each text that is no UTF-8, such as a path of other bytes.

    The settings of a run are kept as TOML, which cannot hold it. Python marks such bytes by halves
    of surrogate pairs, all bytes above ASCII in the C locale where its UTF-8 mode is switched off.
    """
    return [
        (
            True,
            f"{entry.name} is {str(each)!r}, which is no UTF-8; rename it, or set PYTHONUTF8=1 if"
            " your terminal writes UTF-8",
        )
        for entry in dataclasses.fields(settings)
        for value in [getattr(settings, entry.name)]
        for each in (value if isinstance(value, tuple) else (value,))
        if isinstance(each, str | Path) and _SURROGATE.search(str(each))
    ]


def _constraints(hint: Any) -> Iterator[Constraint]:
    yield from (each for each in getattr(hint, "__metadata__", ()) if isinstance(each, Constraint))
    for part in get_args(hint):  # such as the Count in Count | None
        yield from _constraints(part)


def as_names(given: Any) -> tuple[str, ...] | None:
    """Return one name or a list of names as a tuple of them, and None as it is."""
    return None if given is None else (given,) if isinstance(given, str) else tuple(given)


def split_names(given: Any) -> tuple[str, ...]:
    """Return the names in one text or several, separated by commas, each once."""
    names = (name.strip() for each in as_names(given) or () for name in each.split(","))
    return tuple(dict.fromkeys(names))


def to_bytes(amount: str) -> int:
    """Return an amount of memory in bytes, 0 if it is none."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT])(i?)B?", amount.strip(), re.I)
    if not match:
        return 0
    power = "KMGT".index(match[2].upper()) + 1
    return int(float(match[1]) * (1024 if match[3] else 1000) ** power)


def curve_sizes(text: str) -> tuple[int | None, ...]:
    """Return the sizes of a text such as 5,10,all, None for all; () if it is none."""
    words = text.replace(" ", "").split(",")
    numbers = words[:-1] if words[-1] == "all" else words
    if len(words) < 2 or not all(re.fullmatch(r"0*[1-9]\d{0,8}", each) for each in numbers):
        return ()
    sizes = [int(each) for each in numbers]
    if sizes != sorted(set(sizes)):
        return ()
    return (*sizes, *([None] if words[-1] == "all" else []))


def to_seconds(text: str) -> float | None:
    """Return the seconds of a text such as 11h30m, None if it is no time."""
    match = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", text)
    if not match or not any(match.groups()):
        return None
    hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return 3600.0 * hours + 60.0 * minutes + seconds


def _is_plain_name(name: str) -> bool:
    """Whether a name is one part of a path."""
    return Path(name).name == name and name not in {"", ".", ".."}


Count = Annotated[int, Constraint("a whole number from 1", lambda n: n >= 1)]
CountOrZero = Annotated[int, Constraint("a whole number from 0", lambda n: n >= 0)]
Positive = Annotated[float, Constraint("a number above 0", lambda x: 0 < x < math.inf)]
PositiveOrZero = Annotated[float, Constraint("a number from 0", lambda x: 0 <= x < math.inf)]
Fraction = Annotated[float, Constraint("a number from 0 to below 1", lambda x: 0 <= x < 1)]
Share = Annotated[float, Constraint("a number from 0 to 1", lambda x: 0 <= x <= 1)]
Accuracy = Annotated[
    float, Constraint("a share above 0 and at most 1, such as 0.98", lambda x: 0 < x <= 1)
]
FileSize = Annotated[str, Constraint("an amount such as 3MB or 500kB", lambda x: to_bytes(x) > 0)]
MemorySize = Annotated[
    str, Constraint("an amount such as 16GB or 15.5GiB", lambda x: to_bytes(x) > 0)
]
Port = Annotated[int, Constraint("a whole number from 0 to 65535", lambda n: 0 <= n <= 65_535)]
Separator = Annotated[str, Constraint("a text such as ' > ' or /", lambda text: text != "")]
PlainName = Annotated[str, Constraint("a name without slashes", _is_plain_name)]

Answer = Literal["words", "classes"]
SelectionMetric = Literal["accuracy", "micro_f1", "macro_f1", "log_loss"]
DeviceName = Literal["auto", "cpu", "cuda", "mps"]
Method = Literal["lora", "qlora", "full"]
Names = Annotated[tuple[str, ...], Parameter(show_default=",".join, negative=())]
TableFormat = Literal["csv", "tsv", "jsonl", "json", "parquet", "xlsx"]
MessageFormat = Literal["text", "csv", "tsv", "jsonl", "json", "parquet", "xlsx"]
PrecisionName = Literal["auto", "float32", "bfloat16", "float16"]
CurveSizes = Annotated[
    str,
    Constraint(
        "two or more whole numbers that increase, such as 5,10,20,50,all",
        lambda x: bool(curve_sizes(x)),
    ),
]
Duration = Annotated[
    str, Constraint("a time such as 11h30m, 45m or 90s", lambda x: to_seconds(x) is not None)
]
LearningRate = Annotated[float, Constraint("a number above 0 and at most 1", lambda x: 0 < x <= 1)]
LearningRateRatio = Annotated[
    float, Constraint("a number above 0 and at most 1000", lambda x: 0 < x <= 1000)
]
GradientNorm = Annotated[float, Constraint("a number above 0", lambda x: x > 0)]
Initialization = Annotated[
    Literal["default", "gaussian"],
    Constraint(
        "default or gaussian, the others change the base model",
        lambda x: x in {"default", "gaussian"},
    ),
]


def is_read_once(source: str) -> bool:
    """Return whether a table is standard input, a pipe or a terminal, which end when read."""
    if source == "-" or source.startswith(("/dev/stdin", "/dev/fd/", "/proc/self/fd/")):
        return True
    with contextlib.suppress(OSError, ValueError):  # no path at all
        return Path(source).is_fifo() or Path(source).is_char_device()
    return False

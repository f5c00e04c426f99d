"""Types and constraints that the settings of several verbs share."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from cyclopts import Parameter

from remora.errors import ConfigError
from remora.formatting import cut

_SURROGATE = re.compile("[\ud800-\udfff]")
_IN_QUOTES = re.compile(r"""(?:^|(?<=,))\s*"(?:[^"]|"")*"\s*(?=,|$)""")

_PATHS = (str, os.PathLike)
_SCALARS: dict[Any, tuple[Any, Callable[[Any], Any], str]] = {
    bool: (bool, bool, "True or False"),
    int: (Integral, int, "a whole number"),
    float: (Real, lambda x: x if isinstance(x, int) else float(x), "a number"),
    str: (_PATHS, os.fsdecode, "a text"),
    Path: (_PATHS, Path, "a path"),
    NoneType: (NoneType, lambda x: x, "None"),
}
"""What may be given for a type, how it becomes one, and how an error names it."""

DEFAULT_MICRO_BATCH_TOKENS = 2048
"""Larger micro-batches of a token tree are hardly faster, and need more memory."""


@dataclass(frozen=True)
class Constraint:
    """Which values a setting may have; a setting that is None is not given, and always allowed."""

    wanted: str
    """The allowed values as an error names them, after "give"."""

    holds: Callable[[Any], bool]


@dataclass(frozen=True)
class Conversion:
    """How what is given in Python becomes a value of the type, such as one name a list of names."""

    by: Callable[[Any], Any]


@dataclass(frozen=True)
class Also:
    """What may be given in Python beside the type, and is kept as it is."""

    wanted: str
    """All that may be given as an error names it, after "give"."""

    kind: type


def convert(settings: Any) -> None:
    """Bring the fields of a dataclass to their types, as the command line does before.

    Numbers of NumPy become Python's, a text becomes a path where the field is one, a list a tuple.
    `check` does this too; call it before where conflicts need the types.

    Args:
        settings: The dataclass.

    Raises:
        ConfigError: Naming every value that is of another type or breaks its constraint.
    """
    wrong = set()
    for name, hint in _hints(settings.__class__).items():
        try:
            object.__setattr__(settings, name, _typed(hint, getattr(settings, name)))
        except TypeError:
            wrong.add(name)
    if wrong:
        raise ConfigError("; ".join(_problems(settings, wrong)))


def check(settings: object, *conflicts: tuple[bool, str]) -> None:
    """Check the types of a dataclass's fields, their constraints, and conflicts between fields.

    Args:
        settings: The dataclass, whose fields may be of types such as `Count`.
        conflicts: Whether each conflict is there, and the message that names it.

    Raises:
        ConfigError: Naming everything that is wrong.
    """
    convert(settings)
    problems = [*_problems(settings), *(message for is_there, message in conflicts if is_there)]
    if problems:
        raise ConfigError("; ".join(problems))


def _problems(settings: Any, wrong: Iterable[str] = ()) -> Iterator[str]:
    """Yield a message for each value of a wrong type, and for each that breaks its constraint."""
    for name, hint in _hints(settings.__class__).items():
        value = getattr(settings, name)
        if name in wrong:
            yield f"{name} is {cut(' '.join(repr(value).split()), 60)}; give {_wanted(hint)}"
        elif value is not None:
            for constraint in _marks(hint, Constraint):
                if not constraint.holds(value):
                    yield f"{name} is {value!r}; give {constraint.wanted}"


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def _typed(hint: Any, value: Any) -> Any:
    """Return a value as one of a type.

    Raises:
        TypeError: If it is none.
    """
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Annotated:
        is_kept = any(isinstance(mark, Also) and isinstance(value, mark.kind) for mark in parts)
        for mark in parts:
            value = mark.by(value) if isinstance(mark, Conversion) else value
        return value if is_kept else _typed(parts[0], value)
    if origin in {Union, UnionType}:
        for part in parts:
            with contextlib.suppress(TypeError):
                return _typed(part, value)
    if origin is Literal and isinstance(value, str) and value in parts:
        return parts[parts.index(value)]
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(_typed(parts[0], each) for each in value)
    if origin is dict and isinstance(value, Mapping):  # by labels, which may be numbers in Python
        return {str(key): _typed(parts[1], each) for key, each in value.items()}
    return _scalar(hint, value)


def _scalar(kind: Any, value: Any) -> Any:
    """Return a value as one of a type that holds no others; raises TypeError if it is none."""
    if getattr(value, "shape", None) == () and hasattr(value, "item"):  # of NumPy or PyTorch
        value = value.item()
    if kind in _SCALARS and (kind is bool or not isinstance(value, bool)):
        taken, read, _ = _SCALARS[kind]
        if isinstance(value, taken):
            return read(value)
    raise TypeError


def _wanted(hint: Any) -> str:
    """Return the values of a type as an error names them, after "give"."""
    for mark in _marks(hint, Constraint | Also):
        return str(mark.wanted)
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Literal:
        return f"{', '.join(parts[:-1])} or {parts[-1]}"
    if origin is tuple:
        return "a list of paths" if parts[0] is Path else "a list of names"
    if origin is dict:
        return "texts by labels, such as {'late': 'delivery'}"
    return _wanted(parts[0]) if parts else _SCALARS[hint][-1]


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


def _marks(hint: Any, kind: Any) -> Iterator[Any]:
    """Yield what is of a kind in the annotations of a type."""
    yield from (each for each in getattr(hint, "__metadata__", ()) if isinstance(each, kind))
    for part in get_args(hint):  # such as the Count in Count | None
        yield from _marks(part, kind)


def as_names(given: Any) -> tuple[str, ...] | None:
    """Return one name or a list of names as a tuple of them, and None as it is."""
    return None if given is None else (given,) if isinstance(given, str) else tuple(given)


def split_names(given: Any) -> tuple[str, ...]:
    """Return the names in one text or several, separated by commas, each once.

    A name with a comma in it is in double quotes, as in CSV. It keeps them, so that what is
    returned can be split again.
    """
    hidden = (_IN_QUOTES.sub(lambda x: x[0].replace(",", "\0"), x) for x in as_names(given) or ())
    names = (name.replace("\0", ",").strip() for each in hidden for name in each.split(","))
    return tuple(dict.fromkeys(names))


def _module_names(given: Any) -> tuple[str, ...]:
    return tuple(filter(None, split_names(given)))


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
Names = Annotated[
    tuple[str, ...], Parameter(show_default=",".join, negative=()), Conversion(split_names)
]
OneOrMore = Annotated[tuple[str, ...], Conversion(as_names)]
ModuleNames = Annotated[tuple[str, ...], Conversion(_module_names)]
ClassWeights = Annotated[str, Also("balanced, a table's path or weights by labels", Mapping)]
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

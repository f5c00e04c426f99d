"""Text for people: names quoted and listed, amounts of memory and time, errors on one line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


def quote(value: str) -> str:
    """Quote what a table holds, on one line and not too long."""
    return repr(value if len(value) <= 60 else value[:57] + "...")


def listed(names: Sequence[str]) -> str:
    """Quote the first eight of some names."""
    return ", ".join(map(quote, names[:8])) + (", ..." if len(names) > 8 else "")


def close_match(name: str, names: Iterable[str]) -> str | None:
    """Return the one of some names that was probably meant."""
    return next(iter(difflib.get_close_matches(name, list(names), n=1)), None)


def one_line(error: BaseException) -> str:
    """Return the message of a foreign error on one line and not too long."""
    said = f"no {error}" if isinstance(error, KeyError) else str(error)
    text = " ".join(said.split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."


def spoken_bytes(count: float) -> str:
    """Return an amount of memory as a person reads it."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def spoken_seconds(seconds: float) -> str:
    """Return a time as a person reads it."""
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return (
                f"{seconds / length:.0f} {unit}"
                if seconds >= 10 * length
                else (f"{seconds / length:.1f} {unit}")
            )
    return f"{seconds:.0f} s"


def first_line(error: Exception) -> str:
    """Return the first line of a foreign error's message, or its type."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__

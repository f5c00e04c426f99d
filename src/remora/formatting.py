"""Text for messages and cells: quoted names, lists, sizes, times, errors on one line, formulas."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

MAX_MESSAGE_CHARS = 1_000
"""Of one message on a page."""

FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")


def quote(value: str) -> str:
    """Return a value of a table quoted on one line, truncated to 60 characters."""
    return repr(value if len(value) <= 60 else value[:57] + "...")


def listed(names: Sequence[str]) -> str:
    """Return the first eight names, quoted and separated by commas."""
    return ", ".join(map(quote, names[:8])) + (", ..." if len(names) > 8 else "")


def close_match(name: str, names: Iterable[str]) -> str | None:
    """Return the name most similar to `name`, None if none is similar."""
    return next(iter(difflib.get_close_matches(name, list(names), n=1)), None)


def one_line(error: BaseException) -> str:
    """Return the message of another library's error on one line, truncated to 200 characters."""
    message = f"no {error}" if isinstance(error, KeyError) else str(error)
    text = " ".join(message.split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."


def spoken_bytes(count: float) -> str:
    """Return a number of bytes in words, such as 1.50 GB."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def spoken_seconds(seconds: float) -> str:
    """Return a time in words, such as 5.0 min."""
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            digits = 0 if seconds >= 10 * length else 1
            return f"{seconds / length:.{digits}f} {unit}"
    return f"{seconds:.0f} s"


def spoken_time(seconds: float) -> str:
    """Return a time in words as `spoken_seconds` does, below ten seconds with a decimal."""
    return f"{seconds:.1f} s" if seconds < 10 else spoken_seconds(seconds)


def first_line(error: Exception) -> str:
    """Return the first line of another library's error message, or the error's type."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def escape_formula(cell: str) -> str:
    """Return a cell that no spreadsheet reads as a formula: with a quote in front."""
    return f"'{cell}" if cell.startswith(FORMULA_STARTS) else cell


def unescape_formula(cell: str) -> str:
    """Undo `escape_formula`."""
    return cell[1:] if cell.startswith("'") and escape_formula(cell[1:]) == cell else cell


def cut(text: str, num_chars: int | None = None) -> str:
    """Return a message, truncated if it is too long for a page, or to a number of characters."""
    longest = MAX_MESSAGE_CHARS if num_chars is None else num_chars
    return text if len(text) <= longest else text[:longest] + " …"

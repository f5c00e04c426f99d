"""Lines and tables on standard output, and what is told meanwhile on standard error."""

from __future__ import annotations

import contextlib
from typing import IO, Any, cast

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

_COMMAND = 4
"""Spaces before a command that one may copy."""


class _Output(Console):
    """A console whose reader may end: that is told as by `print`, rich would exit with 1."""

    def on_broken_pipe(self) -> None:
        """Raise the BrokenPipeError that rich has caught."""
        raise  # noqa: PLE0704 - rich calls this where it has caught it


class ProgressConsole(Console):
    """Standard error. What cannot be written there is dropped, since no run may end for it."""

    def __init__(self) -> None:
        super().__init__(stderr=True, highlight=False)

    @property
    def file(self) -> IO[str]:
        """The stream, which never fails."""
        return cast(IO[str], _Dropping(super().file))

    @file.setter
    def file(self, new: IO[str]) -> None:
        self._file = new


class _Dropping:
    """A stream that drops what cannot be written: the disk is full, or the reader has ended."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write a text, if that is possible."""
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush the stream, if that is possible."""
        with contextlib.suppress(OSError):
            self._stream.flush()


def show_line(text: str) -> None:
    """Print a sentence on standard output."""
    print_line(standard_output(), text)


def standard_output() -> Console:
    """Return a console on standard output that highlights nothing."""
    return _Output(highlight=False)


def print_line(console: Console, text: str) -> None:
    """Print a sentence: one line, or in a terminal broken at words, further lines indented.

    A line that begins with four spaces is a command to be copied, and never broken. Nor is a word,
    such as a path.
    """
    indent = len(text) - len(text.lstrip(" "))
    if not console.is_terminal or indent >= _COMMAND:
        console.print(text, markup=False, soft_wrap=True)
        return
    lines = [text[:indent]]
    for word in text[indent:].split(" "):
        longer = f"{lines[-1]} {word}" if lines[-1].strip() else lines[-1] + word
        if cell_len(longer) > console.width and lines[-1].strip():
            longer = " " * (indent + 2) + word
            lines.append("")
        lines[-1] = longer
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)


def figures_table(*columns: str, num_names: int = 1) -> Table:
    """Return a table without borders; all columns but the first `num_names` hold numbers."""
    table = Table(*columns, box=None, pad_edge=False)
    for column in table.columns[num_names:]:
        column.justify = "right"
    return table


def escaped(text: str) -> str:
    """Return a text for a table's cell, in which rich reads no markup."""
    return text.replace("[", r"\[")


def spoken_file_bytes(count: float) -> str:
    """Return a file's size, with a decimal from megabytes on."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit != "MB" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"

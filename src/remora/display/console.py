"""Lines and tables on standard output."""

from __future__ import annotations

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

_COMMAND = 4
"""Spaces before a command that one may copy."""


def show_line(text: str) -> None:
    """Print a sentence on standard output."""
    print_line(standard_output(), text)


def standard_output() -> Console:
    """Return a console on standard output that highlights nothing."""
    return Console(highlight=False)


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

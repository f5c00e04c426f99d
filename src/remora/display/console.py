"""Lines and tables on standard output."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table


def show_line(text: str) -> None:
    """Print a sentence on standard output."""
    print_line(standard_output(), text)


def standard_output() -> Console:
    """Return a console on standard output that highlights nothing."""
    return Console(highlight=False)


def print_line(console: Console, text: str) -> None:
    """Print a text as it is, on one line of any length."""
    console.print(text, markup=False, soft_wrap=True)


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

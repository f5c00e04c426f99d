"""What to do next on standard output."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from rich.console import Console

from remora.display.console import print_line, standard_output
from remora.evaluation.findings import NextStep


def show_next_steps(steps: Sequence[NextStep], console: Console | None = None) -> None:
    """Print what to do next: sentence, evidence and command of each step.

    On a terminal, lines break at words; a command stays on one line, to be copied.
    """
    console = console or standard_output()
    if not steps:
        return
    print_line(console, "\nwhat to do next")
    for number, step in enumerate(steps, 1):
        _print(console, step.sentence, f"{number}. ")
        for clause in step.evidence:
            _print(console, clause, "   - ")
        print_line(console, f"   {step.command}")


def _print(console: Console, text: str, before: str) -> None:
    """Print a text behind a mark, on a terminal with a hanging indent."""
    if not console.is_terminal:
        print_line(console, before + text)
        return
    lines = textwrap.wrap(
        text,
        max(20, console.width),
        initial_indent=before,
        subsequent_indent=" " * len(before),
        break_long_words=False,
        break_on_hyphens=False,
    )
    print_line(console, "\n".join(lines))

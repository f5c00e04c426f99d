"""What to do next on standard output."""

from __future__ import annotations

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
        print_line(console, f"{number}. {step.sentence}")
        for clause in step.evidence:
            print_line(console, f"   - {clause}")
        print_line(console, f"    {step.command}")

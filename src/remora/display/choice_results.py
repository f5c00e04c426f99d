"""The choice between models on standard output."""

from __future__ import annotations

from rich.console import Console

from remora.display.console import escaped, figures_table, print_line, standard_output
from remora.formatting import spoken_bytes, spoken_time
from remora.training.choose import Choice, Option


def show_choice(choice: Choice, console: Console | None = None) -> None:
    """Print the options from cheap to dear, why some were not trained, and the one to take."""
    console = console or standard_output()
    table = figures_table("option", "accuracy", "95% interval", "time", "memory", "weights")
    for option in choice.options:
        table.add_row(escaped(option.name), *_figures(option))
    console.print(table)
    print_line(console, "")
    for option in choice.options:
        if option.left_out:
            print_line(console, f"{option.name} was not trained: {option.left_out}")
    print_line(console, choice.answer)
    if choice.page:
        print_line(console, f"page       {choice.page}")


def _figures(option: Option) -> tuple[str, ...]:
    """Return the cells of an option; what was only planned begins with a tilde."""
    planned = "~" if option.left_out else ""
    low, high = option.accuracy_interval or (0.0, 0.0)
    return (
        "" if option.accuracy is None else f"{option.accuracy:.2%}",
        "" if option.accuracy is None else f"{low:.1%} to {high:.1%}",
        "" if option.seconds is None else planned + spoken_time(option.seconds),
        "" if option.peak_bytes is None else planned + spoken_bytes(option.peak_bytes),
        "" if option.num_bytes is None else spoken_bytes(option.num_bytes),
    )

"""The choice between models, and between settings, on standard output."""

from __future__ import annotations

import math

from rich.console import Console

from remora.display.console import escaped, figures_table, print_line, standard_output
from remora.formatting import spoken_bytes, spoken_time
from remora.training.choose import Choice, Option
from remora.training.tune import LOWER_IS_BETTER, Tuned


def show_choice(choice: Choice, console: Console | None = None) -> None:
    """Print the options from cheap to dear, why some were not trained, and the one to take."""
    console = console or standard_output()
    of_sets = any(option.micro_f1 is not None for option in choice.options)
    what = "micro-F1" if of_sets else "accuracy"
    table = figures_table("option", what, "95% interval", "time", "memory", "weights")
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
    low, high = option.interval or (0.0, 0.0)
    return (
        "" if option.reached is None else f"{option.reached:.2%}",
        "" if option.reached is None else f"{low:.1%} to {high:.1%}",
        "" if option.seconds is None else planned + spoken_time(option.seconds),
        "" if option.peak_bytes is None else planned + spoken_bytes(option.peak_bytes),
        "" if option.num_bytes is None else spoken_bytes(option.num_bytes),
    )


def show_tuned(tuned: Tuned, console: Console | None = None) -> None:
    """Print the trials, the best first, and what its settings reach on the test rows.

    Trials that ended early, and their best evaluation until then, come last.
    """
    console = console or standard_output()
    names = list(tuned.trials[0].settings)
    table = figures_table("trial", *names, tuned.metric.replace("_", "-"), "evaluations", "time")
    sign = 1 if tuned.metric in LOWER_IS_BETTER else -1

    def rank(place: int) -> tuple[bool, float]:
        trial = tuned.trials[place]
        value = math.inf if trial.validation is None else sign * trial.validation
        return bool(trial.ended), value

    ranked = sorted(range(len(tuned.trials)), key=rank)
    for place in ranked:
        trial = tuned.trials[place]
        given, early = place == 0, trial.ended
        table.add_row(
            f"{place + 1}{' (given)' if given else ''}{' (early)' if early else ''}",
            *(f"{v:g}" if isinstance(v, float) else str(v) for v in trial.settings.values()),
            "" if trial.validation is None else f"{trial.validation:.4f}",
            str(trial.evaluations),
            spoken_time(trial.seconds),
        )
    console.print(table)
    metrics = tuned.figures["metrics"]
    what = "micro_f1" if "micro_f1" in metrics else "accuracy"  # of several labels a row, or one
    low, high = metrics[f"{what}_interval"]
    print_line(console, "")
    print_line(
        console,
        f"{what.replace('_f', '-F'):<11}{metrics[what]:.2%}  (95% interval {low:.1%} to "
        f"{high:.1%}) on {metrics['num_rows']:,} {tuned.figures['measured_on']} rows with the "
        f"settings of trial {tuned.best + 1}; validation rows chose them, so their figures are "
        "optimistic",
    )
    print_line(console, f"run        {tuned.run}")

"""What a review decided, and what training on it changed, on standard output."""

from __future__ import annotations

from rich.console import Console

from remora.display.console import print_line, standard_output
from remora.evaluation.change import Change, Figures, Message
from remora.formatting import quote
from remora.review.queue import Summary


def show_review(summary: Summary, console: Console | None = None) -> None:
    """Print how many rows are decided, and the next command."""
    console = console or standard_output()
    print_line(
        console,
        f"decided    {summary.num_decided:,} of {summary.num_rows:,} rows: "
        f"{summary.num_relabelled:,} relabelled, {summary.num_kept:,} kept, "
        f"{summary.num_deleted:,} deleted",
    )
    if summary.num_open:
        print_line(console, f"left       {summary.num_open:,}; go on with `{summary.again}`")
    if summary.num_relabelled or summary.num_deleted:
        print_line(console, f"next       {summary.next}")


def show_change(change: Change, console: Console | None = None) -> None:
    """Print what changed from one run to the next, on the same rows."""
    console = console or standard_output()
    print_line(console, f"\nbefore     {change.before}")
    print_line(console, f"after      {change.after}")
    what = "" if change.micro_f1 is None else " of rows with all labels right"
    _show_figures(change.figures, f"{change.measured_on} rows", console, what)
    if change.micro_f1 is not None:
        micro = change.micro_f1
        low, high = (100 * bound for bound in micro.interval)
        print_line(
            console,
            f"micro-F1   {100 * (micro.after - micro.before):+.2f} points, from {micro.before:.2%} "
            f"to {micro.after:.2%} (95% interval {low:+.1f} to {high:+.1f}, paired bootstrap)",
        )
    if change.num_corrected or change.num_deleted:
        print_line(
            console,
            f"           of these rows {change.num_corrected:,} were relabelled too and "
            f"{change.num_deleted:,} deleted; above, both runs are measured with the labels as "
            "given, below with those decided",
        )
        if change.corrected:
            rows = f"{change.measured_on} rows as decided"
            _show_figures(change.corrected, rows, console, what)
    if change.baselines:
        moved = "; ".join(
            f"{each.description} {100 * (each.after - each.before):+.2f} points"
            for each in change.baselines
        )
        print_line(console, f"           the baselines on the same rows: {moved}")
    for name, count, messages in (
        ("now right", change.figures.num_now_right, change.now_right),
        ("now wrong", change.figures.num_now_wrong, change.now_wrong),
    ):
        print_line(console, f"{name:<11}{count:,} messages" + (", such as" if count else ""))
        for each in messages:
            print_line(console, f"           {_spoken(each)}")


def _show_figures(figures: Figures, rows: str, console: Console, what: str) -> None:
    low, high = (100 * bound for bound in figures.interval)
    chance = ": may be chance" if figures.may_be_chance else ""
    print_line(
        console,
        f"change     {100 * figures.difference:+.2f} points{what}, from {figures.before:.2%} to "
        f"{figures.after:.2%} on {figures.num_rows:,} {rows} (95% interval {low:+.1f} to "
        f"{high:+.1f}, exact McNemar test p = {figures.p_value:.2g}{chance})",
    )


def _spoken(message: Message) -> str:
    predicted = f"{message.before} before, {message.after} now"
    if message.true in (message.before, message.after):
        return f"{quote(message.text)}: {predicted}"
    return f"{quote(message.text)} ({message.true}): {predicted}"

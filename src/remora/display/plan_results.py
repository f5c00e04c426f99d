"""A plan on standard output."""

from __future__ import annotations

from rich.console import Console

from remora.display.console import figures_table, print_line, standard_output
from remora.formatting import spoken_bytes
from remora.planning.plan import Plan


def show_plan(plan: Plan, console: Console | None = None) -> None:
    """Print a plan: memory by component, the settings with their reasons, and whether it fits."""
    console = console or standard_output()
    table = figures_table("peak memory", "")
    for name, count in vars(plan.memory).items():
        table.add_row(name.replace("_", " "), spoken_bytes(count))
    available = plan.available_bytes
    room = "" if available is None else f" of {spoken_bytes(available)}"
    table.add_row("total", f"{spoken_bytes(plan.peak_bytes)}{room}")
    console.print(table)
    for line in _lines(plan):
        print_line(console, line)
    if plan.fits:
        print_line(console, f"\nfits on {plan.device}")
        return
    print_line(console, f"\ndoes not fit on {plan.device}; alternatives, cheapest first:")
    for alternative in plan.alternatives:
        print_line(console, f"  {alternative}")


def _lines(plan: Plan) -> tuple[str, ...]:
    """Return the settings with their reasons, a line each."""
    saved = plan.padded_tokens / plan.tree_tokens
    packed = "trees" if plan.layout == "tree" else "rows sorted by length"
    time = "" if plan.estimated is None else f"{plan.estimated}, "
    active = "" if plan.active_parameters is None else f" ({plan.active_parameters:,} active)"
    return (
        f"\nparameters  {plan.parameters:,}{active}, of which {plan.trainable:,} trainable "
        f"({plan.trainable / plan.parameters:.2%}): {spoken_bytes(plan.adapter_bytes_32)} in "
        f"32 bits, {spoken_bytes(plan.adapter_bytes_16)} in 16 bits",
        f"tokens      {plan.prefix_tokens} shared by all rows, then on average "
        f"{plan.message_tokens:.1f} in a message and {plan.answer_tokens:.1f} in an answer; "
        f"computed per row: {plan.padded_tokens:.1f} padded, {plan.tree_tokens:.1f} in {packed} "
        f"({saved:.1f} times fewer)",
        f"operations  {plan.operations_per_example / 1e9:,.1f} GFLOP per example",
        f"arithmetic  {plan.precision}",
        f"micro-batch at most {plan.micro_batch_tokens:,} tokens (the largest has "
        f"{plan.largest_micro_batch:,}), checkpointing {'on' if plan.checkpointing else 'off'}: "
        f"{plan.why}",
        f"time        {plan.num_steps:,} steps of {plan.batch_size} rows, {plan.num_evaluations:,} "
        f"evaluations of {plan.eval_rows:,}, {plan.num_scored_rows:,} held-out rows: "
        f"{time}{plan.seconds_are}",
        f"disk        {spoken_bytes(plan.disk_bytes)} for the run, "
        f"{spoken_bytes(plan.free_disk_bytes)} free{'' if plan.fits_disk else ': TOO LITTLE'}; "
        f"{spoken_bytes(plan.download_bytes)} to download",
    )

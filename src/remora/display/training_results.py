"""The result of a training run and of a learning curve on standard output."""

from __future__ import annotations

from rich.console import Console

from remora.diagnosis.curve_answer import LearningCurve
from remora.display.console import (
    figures_table,
    print_line,
    spoken_file_bytes,
    standard_output,
)
from remora.display.evaluation_results import show_metrics, show_reliability
from remora.evaluation.significance import accuracy_verdict
from remora.formatting import spoken_seconds
from remora.training.finish import TrainResult


def show_result(result: TrainResult, console: Console | None = None) -> None:
    """Print the result of a run: accuracy beside the baseline, then its costs."""
    console = console or standard_output()

    # Accuracy, beside the baseline
    show_metrics(result.metrics, result.measured_on, console)
    show_reliability(result.reliability, console)
    base, ours = result.baseline, result.metrics
    low, high = base.metrics.accuracy_interval
    note = ""
    if base.num_train_rows < base.num_all_train_rows:
        note = f", on {base.num_train_rows:,} of {base.num_all_train_rows:,} training rows"
    print_line(
        console,
        f"baseline   {base.metrics.accuracy:.2%}  (95% interval {low:.1%} to {high:.1%})  "
        f"{base.description}, {base.seconds:.1f} s{note}",
    )
    verdict = accuracy_verdict(ours.accuracy, base.metrics.accuracy, result.p_value)
    print_line(console, f"           {verdict}")

    # Costs
    size = spoken_file_bytes(result.adapter_bytes)
    trained = f"model      {size}"
    if result.method != "full":
        larger = result.base_bytes / result.adapter_bytes
        trained = f"adapter    {size}, the base model is {larger:.0f} times larger"
    print_line(console, f"{trained}; {result.parameters.share:.2%} of the parameters trained")
    print_line(
        console,
        f"speed      {result.examples_per_second:.1f} examples/s, "
        f"{result.supervised_tokens_per_second:.0f} supervised tokens/s; "
        f"{result.num_steps} steps, {spoken_file_bytes(result.peak_memory_bytes)} peak memory",
    )
    print_line(console, f"time       {_shares(result)}")
    if result.speed_up is not None:
        print_line(
            console,
            f"           {result.num_processes} processes: {result.speed_up:.2f} times the speed "
            f"of one ({result.speed_up / result.num_processes:.0%} efficiency), estimated from "
            "each one's compute time",
        )

    # Files
    print_line(console, f"run        {result.directory}")
    if (page := result.directory / "report.html").is_file():
        print_line(console, f"report     {page}")


def _shares(result: TrainResult) -> str:
    """Return the time of a run by what it was spent on."""
    steps = result.train_seconds - result.validation_seconds
    total = result.train_seconds + result.test_seconds
    parts = {
        "validation": result.validation_seconds,
        "scoring held-out rows": result.test_seconds,
    }
    measuring = ", ".join(
        f"{name} {spoken_seconds(part)} ({part / total:.0%})" for name, part in parts.items()
    )
    return f"training {spoken_seconds(steps)}, {measuring}"


def show_learning_curve(curve: LearningCurve, console: Console | None = None) -> None:
    """Print the accuracy with each number of rows per class, its extrapolation, and the answer."""
    console = console or standard_output()

    # Sizes
    table = figures_table(
        *("rows per class", "rows", "accuracy", "95% interval", "baseline", "p", "time")
    )
    for size in curve.sizes:
        low, high = size.accuracy_interval
        table.add_row(
            "all" if size.per_class is None else f"{size.per_class:,}",
            f"{size.num_rows:,}",
            f"{size.accuracy:.2%}",
            f"{low:.1%} to {high:.1%}",
            f"{size.baseline_accuracy:.2%}",
            f"{size.p_value:.2g}",
            spoken_seconds(size.train_seconds),
        )
    print_line(console, "")
    console.print(table)
    print_line(
        console, f"\non {curve.num_measured:,} {curve.measured_on} rows, the same for all sizes"
    )
    for size in curve.sizes:
        if size.num_short:
            print_line(
                console,
                f"{size.spoken}: {size.num_short:,} classes have fewer, all of which are used",
            )

    # The extrapolation and the answer
    if further := curve.extrapolation:
        low, high = further.accuracy_interval
        print_line(
            console,
            f"{further.num_rows:,} rows should give {further.accuracy:.1%} ({low:.1%} to "
            f"{high:.1%}): error {further.floor:.3f} + {further.scale:.3f} "
            f"(rows / {further.num_rows // 2:,})^-{further.exponent:.2f}",
        )
    print_line(console, curve.caution)
    print_line(console, curve.answer)

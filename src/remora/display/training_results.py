"""The result of a training run and of a learning curve on standard output."""

from __future__ import annotations

from rich.console import Console

from remora.diagnosis.curve_answer import LearningCurve
from remora.display.console import (
    escaped,
    figures_table,
    print_line,
    spoken_file_bytes,
    standard_output,
)
from remora.display.evaluation_results import show_levels, show_metrics, show_reliability
from remora.evaluation.multi_label import MultiLabelMetrics
from remora.evaluation.rivals import spoken_micro_f1
from remora.formatting import spoken_seconds, spoken_time
from remora.training.finish import TrainResult


def show_result(result: TrainResult, console: Console | None = None) -> None:
    """Print the result of a run: accuracy beside the baselines, then its costs."""
    console = console or standard_output()

    # Accuracy, beside the baselines
    show_metrics(result.metrics, result.measured_on, console)
    show_levels(result.metrics, result.baseline.metrics if result.baseline else None, console)
    show_reliability(result.reliability, console)
    if result.rivals:
        _show_rivals(result, console)

    # Costs
    size = spoken_file_bytes(result.adapter_bytes)
    trained = f"model      {size}"
    if result.method != "full":
        larger = result.base_bytes / result.adapter_bytes
        trained = f"adapter    {size}, the base model is {larger:.0f} times larger"
    print_line(console, f"{trained}; {result.parameters.share:.2%} of the parameters trained")
    speed = "not measured in so few steps"
    if result.examples_per_second:
        speed = (
            f"{result.examples_per_second:.1f} examples/s, "
            f"{result.supervised_tokens_per_second:.0f} supervised tokens/s"
        )
    print_line(
        console,
        f"speed      {speed}; {result.num_steps} steps, "
        f"{spoken_file_bytes(result.peak_memory_bytes)} peak memory",
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


def _show_rivals(result: TrainResult, console: Console) -> None:
    """Print the baselines, each with its lead over the trained model, and the verdict."""
    accuracy = "exact" if isinstance(result.metrics, MultiLabelMetrics) else "accuracy"
    table = figures_table(
        *("baseline", accuracy, "95% interval", "macro-F1", "time", "points", "p")
    )
    for each in result.rivals:
        low, high = each.accuracy_interval
        table.add_row(
            escaped(each.description),
            f"{each.accuracy:.2%}",
            f"{low:.1%} to {high:.1%}",
            f"{each.macro_f1:.2%}",
            spoken_time(each.seconds),
            f"{100 * each.difference:+.1f}",
            f"{each.p_value:.2g}",
        )
    print_line(console, "")
    console.print(table)
    for each in result.rivals:
        if each.rows:
            print_line(console, f"{each.description}: {each.rows}")
        if each.micro_f1 is not None:
            print_line(console, spoken_micro_f1(each))
    print_line(console, f"{result.verdict}\n")


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

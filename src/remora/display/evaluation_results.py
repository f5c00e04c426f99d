"""Metrics, reliability and comparisons on standard output."""

from __future__ import annotations

from rich.console import Console

from remora.data.summary import IMBALANCED_SHARE
from remora.display.console import (
    escaped,
    figures_table,
    print_line,
    spoken_file_bytes,
    standard_output,
)
from remora.evaluation.calibration import Abstention, Reliability
from remora.evaluation.compare import Comparison
from remora.evaluation.contenders import Contender, Pair
from remora.evaluation.metrics import LevelMetrics, Metrics
from remora.evaluation.multi_label import MultiLabelMetrics

NUM_CONFUSIONS = 5


def show_metrics(metrics: Metrics, measured_on: str, console: Console | None = None) -> None:
    """Print the metrics of one evaluation: per class, most confused pairs, and the summary."""
    console = console or standard_output()
    if isinstance(metrics, MultiLabelMetrics):
        show_multi_label(metrics, measured_on, console)
        return
    table = figures_table("label", "precision", "recall", "F1", "rows")
    for row in metrics.per_class:
        figures = (f"{row.precision:.2f}", f"{row.recall:.2f}", f"{row.f1:.2f}", f"{row.support:,}")
        table.add_row(escaped(row.label), *figures)
    console.print(table)
    if metrics.confused_pairs:
        console.print("\nmost confused label pairs")
    for pair in metrics.confused_pairs[:NUM_CONFUSIONS]:
        share = pair.count / pair.num_rows
        print_line(
            console,
            f"  {pair.count:>4}  {pair.first} / {pair.second}: {pair.first_as_second} rows of the "
            f"first predicted as the second, {pair.second_as_first} of the second as the first "
            f"({share:.0%} of their rows)",
        )
    low, high = metrics.accuracy_interval
    note = "" if measured_on == "test" else ", which also selected the weights: slightly optimistic"
    print_line(
        console,
        f"\naccuracy   {metrics.accuracy:.2%}  (95% interval {low:.1%} to {high:.1%})  "
        f"on {metrics.num_rows:,} {measured_on} rows{note}",
    )
    log_loss = "" if metrics.log_loss is None else f", log-loss {metrics.log_loss:.3f}"
    print_line(console, f"macro-F1   {metrics.macro_f1:.2%}{log_loss}")
    largest = max(metrics.per_class, key=lambda each: each.support)
    if (share := largest.support / metrics.num_rows) >= IMBALANCED_SHARE:
        print_line(console, f"majority   {share:.2%} accuracy by always answering {largest.label}")


def show_multi_label(metrics: MultiLabelMetrics, measured_on: str, console: Console) -> None:
    """Print the metrics of rows with several labels: per label, then the summary."""
    table = figures_table("label", "precision", "recall", "F1", "rows", "threshold")
    thresholds = metrics.thresholds or (None,) * len(metrics.per_class)
    for row, threshold in zip(metrics.per_class, thresholds, strict=True):
        figures = (f"{row.precision:.2f}", f"{row.recall:.2f}", f"{row.f1:.2f}", f"{row.support:,}")
        shown = "" if threshold is None else f"{threshold:.3f}"
        table.add_row(escaped(row.label), *figures, shown)
    console.print(table)
    note = (
        "" if measured_on == "test" else ", which also selected weights and thresholds: optimistic"
    )

    def told(name: str, value: float, interval: tuple[float, float], more: str = "") -> None:
        low, high = interval
        spoken = f"{name:<11}{value:.2%}  (95% interval {low:.1%} to {high:.1%}){more}"
        print_line(console, spoken)

    print_line(
        console,
        f"\n{metrics.num_rows:,} {measured_on} rows with {metrics.labels_per_row:.2f} labels each, "
        f"{metrics.predicted_per_row:.2f} predicted{note}",
    )
    told("micro-F1", metrics.micro_f1, metrics.micro_f1_interval)
    told("macro-F1", metrics.macro_f1, metrics.macro_f1_interval)
    told("exact", metrics.accuracy, metrics.accuracy_interval, " of the rows with all labels right")
    if metrics.label_ranking is not None and metrics.label_ranking_interval is not None:
        log_loss = "" if metrics.log_loss is None else f", log-loss {metrics.log_loss:.3f}"
        told("ranking", metrics.label_ranking, metrics.label_ranking_interval, log_loss)
    print_line(
        console,
        f"majority   {metrics.constant_accuracy:.2%} exact by always answering {metrics.constant}",
    )


def show_levels(
    metrics: Metrics, baseline: Metrics | None = None, console: Console | None = None
) -> None:
    """Print the metrics of each level of labels that form a hierarchy; nothing for others."""
    if not metrics.levels:
        return
    console = console or standard_output()
    columns = ("accuracy", "95% interval", "macro-F1", "95% interval")
    table = figures_table("level", "", *columns, num_names=2)
    theirs = baseline.levels if baseline else ()
    for ours in metrics.levels:
        table.add_row(f"{ours.level} ({ours.num_nodes:,} nodes)", "model", *_of_level(ours))
        if theirs:
            table.add_row("", "SVM", *_of_level(theirs[ours.level - 1]))
    print_line(console, "")
    console.print(table)
    print_line(console, "")


def _of_level(level: LevelMetrics) -> list[str]:
    figures = (level.accuracy, level.accuracy_interval), (level.macro_f1, level.macro_f1_interval)
    return [
        text
        for value, (low, high) in figures
        for text in (f"{value:.2%}", f"{low:.1%} to {high:.1%}")
    ]


def show_reliability(reliability: Reliability, console: Console | None = None) -> None:
    """Print the calibration of one evaluation, and abstention and out-of-scope detection if any."""
    console = console or standard_output()
    scaled = ""
    if reliability.temperature is not None:
        scaled = (
            f"; {reliability.scaled_calibration_error:.3f} at temperature "
            f"{reliability.temperature:.2f}, fitted on {reliability.num_validation:,} validation "
            "rows"
        )
    print_line(
        console,
        f"confidence expected calibration error {reliability.calibration_error:.3f} "
        f"({len(reliability.bins)} bins of equal mass){scaled}",
    )
    if reliability.abstention is not None:
        print_line(console, f"abstain    {_abstention(reliability.abstention)}")
    if reliability.out_of_scope is not None:
        outside = reliability.out_of_scope
        refused = "" if outside.refused is None else f"; {outside.refused:.1%} below the threshold"
        print_line(
            console,
            f"scope      AUROC {outside.auroc:.3f} of the confidence on {outside.num_rows:,} "
            f"out-of-scope messages{refused}",
        )


def _abstention(abstention: Abstention) -> str:
    """Return a sentence on the result of a threshold."""
    wanted = f"{abstention.wanted_accuracy:.1%} accuracy"
    if abstention.threshold is None:
        return (
            f"no threshold reaches {wanted} on {abstention.chosen_on}; train longer or ask for less"
        )
    chosen = f"threshold {abstention.threshold:.4f} for {wanted}, chosen on "
    chosen += (
        f"{abstention.num_chosen_on:,} validation rows"
        if abstention.chosen_on == "validation"
        else "these same rows, so the accuracy is slightly optimistic"
    )
    if abstention.accuracy is None or abstention.accuracy_interval is None:
        return f"{chosen}: no row reaches it"
    low, high = abstention.accuracy_interval
    return (
        f"{chosen}: answers {abstention.coverage:.1%} of the rows, {abstention.accuracy:.2%} of "
        f"them correctly (95% interval {low:.1%} to {high:.1%})"
    )


def show_comparison(comparison: Comparison, console: Console | None = None) -> None:
    """Print runs side by side, their pairwise differences, and the answer last."""
    console = console or standard_output()

    # Accuracies and costs
    of_sets = comparison.measure != "accuracy"
    gains = figures_table("run", comparison.measure, "95% interval", "macro-F1")
    if of_sets:
        gains.add_column("all labels right", justify="right")
    costs = figures_table("run", "trained", "artifact", "examples/s", "memory", "time")
    for each in comparison.contenders:
        low, high = each.score_interval
        figures = [f"{each.score:.2%}", f"{low:.1%} to {high:.1%}", f"{each.macro_f1:.2%}"]
        figures += [f"{each.accuracy:.2%}"] if of_sets else []
        gains.add_row(escaped(each.name), *figures)
        costs.add_row(escaped(each.name), *_costs(each))
    console.print(gains)
    console.print()
    console.print(costs)

    # Differences
    print_line(console, f"\non {comparison.num_rows:,} rows, smallest first")
    for pair in comparison.shown_pairs:
        print_line(console, f"  {_difference(pair, comparison.contenders[0])}")
    repeated = [each for each in comparison.shared_mistakes if each.count > 1]
    if repeated:
        print_line(console, "\nmistakes that every run makes; check these labels first")
    for mistake in repeated:
        print_line(
            console, f"  {mistake.count:>4}  {mistake.true} predicted as {mistake.predicted}"
        )

    if comparison.by_label:
        changes = comparison.by_label
        named = "" if len(comparison.runs) == 2 else f" of {changes.first} over {changes.second}"
        print_line(console, f"\nby label{named}: {changes.summary[0].lower()}{changes.summary[1:]}")

    # The answer
    print_line(console, "")
    for text in (*comparison.notes, comparison.bar, comparison.value, comparison.answer):
        if text is not None:
            print_line(console, text)


def _costs(contender: Contender) -> tuple[str, ...]:
    share, artifact = contender.trainable_share, contender.artifact_bytes
    speed, memory = contender.examples_per_second, contender.peak_memory_bytes
    return (
        "" if share is None else f"{share:.2%}",
        "" if artifact is None else spoken_file_bytes(artifact),
        "" if speed is None else f"{speed:.1f}",
        "" if memory is None else spoken_file_bytes(memory),
        f"{contender.train_seconds:.0f} s",
    )


def _difference(pair: Pair, any_of_them: Contender) -> str:
    points, test = any_of_them.points, any_of_them.test
    return (
        f"{pair.first} over {pair.second}: {100 * pair.difference:+.2f} {points}; only the first "
        f"is right on {pair.only_first_right} rows, only the second on {pair.only_second_right}, "
        f"p = {pair.p_value:.2g} ({test}; {pair.adjusted_p_value:.2g} adjusted for all "
        f"pairs, Holm); both wrong on {pair.both_wrong} rows ({pair.both_wrong_by_chance:.1f} "
        f"expected by chance), {pair.same_wrong_label} of them with the same label"
    )

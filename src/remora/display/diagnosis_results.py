"""A diagnosis on standard output."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from remora.diagnosis.diagnose import Diagnosis
from remora.diagnosis.several_labels import SetDiagnosis
from remora.display.console import escaped, figures_table, print_line, standard_output
from remora.evaluation import run_commands

NUM_LABELS = 10
"""Labels that are shown of those that are doubted."""


def show_diagnosis(
    diagnosis: Diagnosis | SetDiagnosis, run: Path, console: Console | None = None
) -> None:
    """Print the most confused label pairs with their causes, and the rows to look at.

    Where rows have several labels, print the labels that are most often doubted.
    """
    console = console or standard_output()
    if isinstance(diagnosis, SetDiagnosis):
        _show_sets(diagnosis, run, console)
        return
    for pair in diagnosis.pairs:
        print_line(console, f"{pair.first} / {pair.second}: {pair.verdict}")
        print_line(
            console,
            f"    {pair.reason}; merged into one label, accuracy would be "
            f"{pair.accuracy_if_merged:.2%}; with the boundary that the judges draw, "
            f"{pair.accuracy_if_redefined:.2%}",
        )
    for line in (*_accuracy(diagnosis), *_duplicates(diagnosis), *_labels(diagnosis, run)):
        print_line(console, line)


def _show_sets(diagnosis: SetDiagnosis, run: Path, console: Console) -> None:
    if diagnosis.labels:
        table = figures_table("label", "rows", "probably wrong", "probably missing")
        for each in diagnosis.labels[:NUM_LABELS]:
            figures = (f"{each.num_rows:,}", f"{each.num_wrong:,}", f"{each.num_missing:,}")
            table.add_row(escaped(each.label), *figures)
        console.print(table)
        if len(diagnosis.labels) > NUM_LABELS:
            more = len(diagnosis.labels) - NUM_LABELS
            print_line(console, f"and {more:,} labels more; diagnosis.json has all")
    wrong, missing = diagnosis.wrong_interval, diagnosis.missing_interval
    lines = [
        f"\njudges     {diagnosis.method}",
        f"micro-F1   {diagnosis.out_of_sample_micro_f1:.2%} out of sample on "
        f"{diagnosis.num_rows:,} rows; the run {diagnosis.micro_f1:.2%} on held-out rows",
        _spoken_duplicates(diagnosis, "have a text that occurs with other labels too"),
        f"noise      an estimated {diagnosis.wrong:.2%} of the {diagnosis.num_labels:,} labels "
        f"given to these rows are wrong (95% interval {wrong[0]:.2%} to {wrong[1]:.2%})",
        f"           and about {diagnosis.missing * diagnosis.num_labels:,.0f} more belong to rows "
        f"that lack them, {diagnosis.missing:.2%} of those given ({missing[0]:.2%} to "
        f"{missing[1]:.2%})",
        _suspects(diagnosis, run),
        *_decided(diagnosis),
        f"           {diagnosis.not_judged}",
    ]
    for line in lines:
        print_line(console, line)


def _accuracy(diagnosis: Diagnosis) -> list[str]:
    """Return the accuracy of judges and run, and its ceiling."""
    ceiling = diagnosis.ceiling
    low, high = ceiling.interval
    return [
        f"\njudges     {diagnosis.method}",
        f"accuracy   {diagnosis.out_of_sample_accuracy:.2%} out of sample on "
        f"{diagnosis.num_rows:,} rows; the run {diagnosis.accuracy:.2%} on held-out rows",
        f"ceiling    at most {ceiling.accuracy:.2%} on the held-out rows (95% interval "
        f"{low:.2%} to {high:.2%}): an estimated {ceiling.wrong:.2%} are annotation mistakes, and "
        f"{ceiling.overlapping:.2%} lie in overlapping classes",
        f"           could be lower: another {ceiling.alike:.2%}, which every classifier gives the "
        "same other label, may be mislabelled, or just hard",
    ]


def _duplicates(diagnosis: Diagnosis) -> list[str]:
    """Return the duplicates across splits and labels, and the words tied to a label."""
    lines = [_spoken_duplicates(diagnosis, "have a near-duplicate with another label")]
    if diagnosis.num_conflicts:
        recall = diagnosis.num_covered / diagnosis.num_conflicts
        lines.append(
            f"           {diagnosis.num_covered:,} of {diagnosis.num_conflicts:,} such pairs have "
            f"a row among the suspects, or labels that overlap: recall {recall:.1%}"
        )
    if diagnosis.tied_tokens:
        shown = ", ".join(
            f"{each.token} ({each.label}, {each.num_rows} rows)"
            for each in diagnosis.tied_tokens[:5]
        )
        lines.append(f"tied       rare words that occur with a single label: {shown}")
    return lines


def _spoken_duplicates(diagnosis: Diagnosis | SetDiagnosis, conflict: str) -> str:
    return (
        f"duplicates {diagnosis.num_test_exact:,} test rows also appear in training, and "
        f"{diagnosis.num_test_near:,} nearly do; {diagnosis.num_conflicting:,} training rows "
        f"{conflict}"
    )


def _labels(diagnosis: Diagnosis, run: Path) -> list[str]:
    """Return the share of wrong labels, and the file of suspects."""
    low, high = diagnosis.wrong_interval
    lines = [
        f"noise      an estimated {diagnosis.wrong:.2%} of the training labels are wrong "
        f"(95% interval {low:.2%} to {high:.2%})",
        _suspects(diagnosis, run),
        *_decided(diagnosis),
    ]
    if planted := diagnosis.planted:
        lines.append(
            f"planted    {planted.num_found:,} of the {planted.num_wrong:,} deliberately wrong "
            f"labels of this sample are among them: recall {planted.recall:.1%}, precision "
            f"{planted.precision:.1%}; {planted.num_suggested:,} with the correct label suggested"
        )
    return lines


def _decided(diagnosis: Diagnosis | SetDiagnosis) -> list[str]:
    count = diagnosis.num_decided
    return [f"           {count:,} rows decided before are not among them"] if count else []


def _suspects(diagnosis: Diagnosis | SetDiagnosis, run: Path) -> str:
    """Return how many rows are listed, band by band, and what to do with them."""
    path = run / "relabel.csv"
    if not diagnosis.suspects:
        return f"suspects   none in {path}"
    bands = ", ".join(f"{count:,} {band}" for band, count in diagnosis.bands.items() if count)
    return (
        f"suspects   {len(diagnosis.suspects):,} rows in {path}: {bands}; decide with "
        f"`{run_commands.command('review', run)}`, or in its last column"
    )

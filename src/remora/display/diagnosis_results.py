"""A diagnosis on standard output."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from remora.diagnosis.diagnose import Diagnosis
from remora.display.console import print_line, standard_output


def show_diagnosis(diagnosis: Diagnosis, run: Path, console: Console | None = None) -> None:
    """Print the most confused label pairs with their causes, and the rows to look at."""
    console = console or standard_output()
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
    lines = [
        f"duplicates {diagnosis.num_test_exact:,} test rows also appear in training, and "
        f"{diagnosis.num_test_near:,} nearly do; {diagnosis.num_conflicting:,} training rows have "
        "a near-duplicate with another label",
    ]
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


def _labels(diagnosis: Diagnosis, run: Path) -> list[str]:
    """Return the share of wrong labels, and the file of suspects."""
    low, high = diagnosis.wrong_interval
    lines = [
        f"noise      an estimated {diagnosis.wrong:.2%} of the training labels are wrong "
        f"(95% interval {low:.2%} to {high:.2%})",
        _suspects(diagnosis, run),
    ]
    if diagnosis.num_decided:
        lines.append(f"           {diagnosis.num_decided:,} rows decided before are not among them")
    if planted := diagnosis.planted:
        lines.append(
            f"planted    {planted.num_found:,} of the {planted.num_wrong:,} deliberately wrong "
            f"labels of this sample are among them: recall {planted.recall:.1%}, precision "
            f"{planted.precision:.1%}; {planted.num_suggested:,} with the correct label suggested"
        )
    return lines


def _suspects(diagnosis: Diagnosis, run: Path) -> str:
    """Return how many rows are listed, band by band, and what to do with them."""
    path = run / "relabel.csv"
    if not diagnosis.suspects:
        return f"suspects   none in {path}"
    bands = ", ".join(f"{count:,} {band}" for band, count in diagnosis.bands.items() if count)
    return (
        f"suspects   {len(diagnosis.suspects):,} rows in {path}: {bands}; decide with "
        f"`remora review {run}`, or in its last column"
    )

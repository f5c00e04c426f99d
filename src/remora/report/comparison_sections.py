"""The contents of the page of a comparison, as its template reads them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import remora
from remora.evaluation import results
from remora.evaluation.compare import Comparison, run_names
from remora.evaluation.contenders import labels_of
from remora.evaluation.findings import NextStep
from remora.evaluation.label_changes import LabelChanges
from remora.evaluation.results import Results
from remora.formatting import cut
from remora.report import charts
from remora.report.run_tables import NUM_STATIC_MESSAGES, fitting, setting_rows


@dataclass(frozen=True, kw_only=True)
class SharedMistake:
    """A message that every run gives the same wrong label."""

    row: int  # in predictions.csv, from 1
    text: str
    true: str
    predicted: str


@dataclass(frozen=True, kw_only=True)
class Message:
    """A message that one of two runs gets right and the other wrong."""

    row: int  # in predictions.csv, from 1
    text: str
    label: int  # an index into the label set
    right: float  # the probability that the run gives that is right
    predicted: int  # by the run that is wrong
    wrong: float  # its probability


@dataclass(frozen=True, kw_only=True)
class OnlyRight:
    """The messages that only one of two runs gets right, the surest mistake first."""

    right: str  # names of the runs
    wrong: str
    count: int
    messages: list[Message]  # as many as the page holds

    @property
    def static(self) -> list[Message]:
        """The messages that the page shows without a script."""
        return self.messages[:NUM_STATIC_MESSAGES]


@dataclass(frozen=True, kw_only=True)
class ScriptData:
    """The data that comparison.js reads, by these names."""

    labels: list[str]
    lists: list[list[Message]]  # only the first run right, only the second


@dataclass(frozen=True, kw_only=True)
class SideBySide:
    """The two best runs: their figures by label, and where only one is right."""

    changes: LabelChanges
    labels: list[str]
    places: dict[str, int]  # the index of each label
    lists: tuple[OnlyRight, OnlyRight]  # only the first run right, only the second


@dataclass(frozen=True, kw_only=True)
class Link:
    """A run, and the address of its report as the page links it; None if there is none."""

    name: str
    address: str | None


@dataclass(frozen=True, kw_only=True)
class ComparisonPage:
    """What the page of a comparison shows."""

    version: str
    comparison: Comparison
    next_steps: tuple[NextStep, ...]
    reports: list[Link]  # of each run, in the order of the comparison
    intervals: charts.Intervals
    side_by_side: SideBySide | None  # None if there is only one run
    shared_mistakes: list[SharedMistake]
    num_shared_mistakes: int
    names: list[str]  # of the runs, in the order of the values in `differences`
    differences: list[tuple[str, list[str]]]  # settings that differ, a value for each run

    @property
    def data(self) -> ScriptData | None:
        """What the script reads."""
        both = self.side_by_side
        if both is None:
            return None
        return ScriptData(labels=both.labels, lists=[each.messages for each in both.lists])


def collect(
    comparison: Comparison,
    directories: Sequence[Path],
    next_steps: tuple[NextStep, ...],
    folder: Path,
) -> ComparisonPage:
    """Collect what the page of a comparison shows.

    Args:
        comparison: As `compare_runs` returns it.
        directories: Of its runs, in the order in which they were compared.
        next_steps: What to do next.
        folder: Where the page will be; links are relative to it.

    Raises:
        DataError: If the files of a run are broken.
    """
    runs = [results.read(directory) for directory in directories]
    names = run_names(directories)
    found = dict(zip(names, runs, strict=True))
    mistakes = _shared_mistakes(runs)
    return ComparisonPage(
        version=remora.__version__,
        comparison=comparison,
        next_steps=next_steps,
        reports=[
            Link(
                name=each.name,
                address=_address(found[each.name].directory / "report.html", folder),
            )
            for each in comparison.runs
        ],
        intervals=charts.intervals(
            [
                (
                    "baseline" if each.is_baseline else "ours",
                    each.name,
                    each.score,
                    each.score_interval,
                )
                for each in comparison.contenders
            ]
        ),
        side_by_side=_side_by_side(comparison.by_label, found),
        shared_mistakes=mistakes[:NUM_STATIC_MESSAGES],
        num_shared_mistakes=len(mistakes),
        names=names,
        differences=_differences(directories),
    )


def _address(path: Path, folder: Path) -> str | None:
    """Return a file as a page in a folder links it, None if there is no such file.

    It is relative, so that the folders can be moved together; quoted, it is never taken for an
    address of another kind, whatever the folders' names are.
    """
    if not path.is_file():
        return None
    try:
        relative = os.path.relpath(path.resolve(), folder.resolve())
    except ValueError:  # on Windows, another drive
        return path.resolve().as_uri()
    return quote(os.fsencode(Path(relative).as_posix()))


def _side_by_side(changes: LabelChanges | None, runs: dict[str, Results]) -> SideBySide | None:
    """Return two runs side by side; None without two, or where rows have several labels."""
    if changes is None or runs[changes.first].multi_label:
        return None
    first, second = runs[changes.first], runs[changes.second]
    labels = labels_of([first, second])
    places = {label: place for place, label in enumerate(labels)}
    return SideBySide(
        changes=changes,
        labels=labels,
        places=places,
        lists=(
            _only_right(changes.first, changes.second, first, second, places),
            _only_right(changes.second, changes.first, second, first, places),
        ),
    )


def _only_right(
    right: str, wrong: str, better: Results, worse: Results, places: dict[str, int]
) -> OnlyRight:
    """Return the messages that the one run gets right and the other one wrong."""
    messages = sorted(_messages(better, worse, places), key=lambda each: -each.wrong)
    return OnlyRight(right=right, wrong=wrong, count=len(messages), messages=fitting(messages))


def _messages(better: Results, worse: Results, place: dict[str, int]) -> Iterator[Message]:
    rows = zip(better.texts, better.true, better.predicted, worse.predicted, strict=True)
    for row, (text, true, ours, theirs) in enumerate(rows):
        if ours == true != theirs:
            yield Message(
                row=row + 1,
                text=cut(text),
                label=place[true],
                right=round(better.probability[row], 4),
                predicted=place[theirs],
                wrong=round(worse.probability[row], 4),
            )


def _shared_mistakes(runs: Sequence[Results]) -> list[SharedMistake]:
    """Return the messages that every run gives the same wrong label."""
    predictions = zip(*(each.predicted for each in runs), strict=True)
    return [
        SharedMistake(row=row, text=cut(text), true=true, predicted=given[0])
        for row, (text, true, given) in enumerate(
            zip(runs[0].texts, runs[0].true, predictions, strict=True), 1
        )
        if len(set(given)) == 1 and given[0] != true
    ]


def _differences(directories: Sequence[Path]) -> list[tuple[str, list[str]]]:
    """Return the settings that differ between runs, with each run's value."""
    settings = [dict(setting_rows(results.read_settings(directory))) for directory in directories]
    names = dict.fromkeys(name for each in settings for name in each)
    values = [(name, [each.get(name, "none") for each in settings]) for name in names]
    return [(name, each) for name, each in values if len(set(each)) > 1]

"""report.html and the page of a comparison, each one file that loads nothing from elsewhere."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import remora
from remora.config import ReportConfig
from remora.errors import ConfigError, ResourceError
from remora.evaluation import charts, multi_label_report, report_sections, results
from remora.evaluation.compare import Comparison
from remora.evaluation.rendering import (
    csp_hash,
    json_for_html,
    of_this_version,
    rendered,
    template_text,
)
from remora.evaluation.results import Results
from remora.evaluation.run_files import NUM_STATIC_MESSAGES, cut, setting_rows
from remora.runtime import files


@dataclass(frozen=True, kw_only=True)
class SharedMistake:
    """A message that every run gives the same wrong label."""

    row: int  # in predictions.csv, from 1
    text: str
    true: str
    predicted: str


@dataclass(frozen=True, kw_only=True)
class ComparisonPage:
    """What the page of a comparison shows."""

    version: str
    comparison: Comparison
    names: list[str]  # of the runs
    intervals: charts.Intervals
    shared_mistakes: list[SharedMistake]
    num_shared_mistakes: int
    differences: list[tuple[str, list[str]]]  # settings that differ, a value for each run


def write_report(config: ReportConfig) -> Path:
    """Write the report of a finished run; return its path.

    Raises:
        ConfigError: If the output is a folder.
        DataError: If the run is not finished, or its files are broken.
        ResourceError: If the report cannot be written.
    """
    return write(config.run, config.output)


def refresh(directory: Path, say: Callable[[str], None]) -> None:
    """Write report.html again after its files have changed; report it if that fails."""
    with files.optional("report.html", say):
        write(directory)


def write(directory: Path, output: Path | None = None) -> Path:
    """Write the report of a finished run, whole or not at all; return its path.

    Raises:
        ConfigError: If the output is a folder.
        DataError: If the run is not finished, or its files are broken.
        ResourceError: If the report cannot be written.
    """
    path = output or directory / "report.html"
    check_output(path, "output")
    files.write_text(path, page(directory))
    return path


def write_comparison(path: Path, comparison: Comparison, directories: Sequence[Path]) -> None:
    """Write the page of a comparison, whole or not at all.

    Raises:
        DataError: If the files of a run are broken.
        ResourceError: If the page cannot be written.
    """
    files.write_text(path, comparison_page(comparison, directories))


def write_chart(path: Path, chart: charts.Chart) -> None:
    """Write a chart as an SVG file, whole or not at all.

    Raises:
        ResourceError: If it cannot be written.
    """
    files.write_text(path, rendered("chart.svg", {"chart": chart}))


def check_output(path: Path, flag: str) -> None:
    """Refuse an output file that cannot be written.

    Raises:
        ConfigError: If it is a folder.
        ResourceError: If it is write-protected.
    """
    if path.is_dir():
        raise ConfigError(f"{path} is a folder; give a file with --{flag}")
    if path.exists() and not os.access(path, os.W_OK):
        raise ResourceError(f"{path} is write-protected; give another file with --{flag}")


def page(directory: Path) -> str:
    """Return the report of a finished run as HTML.

    Texts of the user enter the page in two ways only: escaped by Jinja, or as JSON, from which
    the script sets text contents. The browser runs only the style and the script, which it knows by
    their hashes.

    Raises:
        DataError: If the run is not finished, or its files are broken.
    """
    from markupsafe import Markup

    run = results.read(directory)
    if run.multi_label:
        with of_this_version(directory):
            return rendered("multi_label_report.html", {"report": multi_label_report.collect(run)})
    script = template_text("report.js")
    with of_this_version(directory):
        report = report_sections.collect(run)
        return rendered(
            "report.html",
            {"report": report, "data": Markup(json_for_html(report.data))},
            script=Markup(script),
            script_hash=csp_hash(script),
        )


def comparison_page(comparison: Comparison, directories: Sequence[Path]) -> str:
    """Return the page of a comparison as HTML; it has no script, and texts are escaped.

    Raises:
        DataError: If the files of a run are broken.
    """
    runs = [results.read(directory) for directory in directories]
    mistakes = _shared_mistakes(runs)
    contenders = comparison.contenders
    with of_this_version(directories[0]):
        page = ComparisonPage(
            version=remora.__version__,
            comparison=comparison,
            names=[each.name for each in contenders if not each.is_baseline],
            intervals=charts.intervals(
                [
                    ("baseline" if each.is_baseline else "ours", each.name, vars(each))
                    for each in contenders
                ]
            ),
            shared_mistakes=mistakes[:NUM_STATIC_MESSAGES],
            num_shared_mistakes=len(mistakes),
            differences=_differences(directories),
        )
        return rendered("comparison.html", {"page": page})


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

"""report.html and the page of a comparison, each one file that loads nothing from elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from remora.config import ReportConfig
from remora.evaluation import results, run_commands
from remora.evaluation.compare import Comparison
from remora.evaluation.findings import NextStep
from remora.evaluation.run_facts import read_facts
from remora.report import charts, comparison_sections, multi_label_sections, sections
from remora.report.rendering import (
    csp_hash,
    json_for_html,
    rendered,
    template_text,
)
from remora.runtime import files


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
    with files.optional("report.html", say, run_commands.command("report", directory)):
        write(directory)


def write(directory: Path, output: Path | None = None) -> Path:
    """Write the report of a finished run, whole or not at all; return its path.

    Raises:
        ConfigError: If the output is a folder.
        DataError: If the run is not finished, or its files are broken.
        ResourceError: If the report cannot be written.
    """
    path = output or directory / "report.html"
    if directory.is_dir():  # reading the run says so otherwise
        files.check_output(path, "--output")
    files.write_text(path, page(directory))
    return path


def write_comparison(
    path: Path,
    comparison: Comparison,
    directories: Sequence[Path],
    next_steps: tuple[NextStep, ...] = (),
) -> None:
    """Write the page of a comparison, whole or not at all.

    Raises:
        DataError: If the files of a run are broken.
        ResourceError: If the page cannot be written.
    """
    written = comparison_page(comparison, directories, next_steps, path.parent)
    files.write_text(path, written, "give another file with --report")


def write_chart(path: Path, chart: charts.Chart) -> None:
    """Write a chart as an SVG file, whole or not at all.

    Raises:
        ResourceError: If it cannot be written.
    """
    files.write_text(path, rendered("chart.svg", {"chart": chart}))


def page(directory: Path) -> str:
    """Return the report of a finished run as HTML.

    Texts of the user enter the page in two ways only: escaped by Jinja, or as JSON, from which
    the script sets text contents. The browser runs only the style and the script, which it knows by
    their hashes.

    Raises:
        DataError: If the run is not finished, or its files are broken.
    """
    facts = read_facts(directory)
    with results.of_this_version(directory):
        if facts.run.multi_label:
            shown = multi_label_sections.collect(facts)
            return rendered("multi_label_report.html", {"report": shown})
        report = sections.collect(facts)
        return _scripted("report.html", {"report": report}, report.data)


def comparison_page(
    comparison: Comparison,
    directories: Sequence[Path],
    next_steps: tuple[NextStep, ...] = (),
    folder: Path = Path(),
) -> str:
    """Return the page of a comparison as HTML; texts enter it as they enter a report.

    Args:
        comparison: As `compare_runs` returns it.
        directories: Of its runs, in the order in which they were compared.
        next_steps: What to do next.
        folder: Where the page will be; its links to the runs' reports are relative.

    Raises:
        DataError: If the files of a run are broken.
    """
    with results.of_this_version(directories[0]):
        page = comparison_sections.collect(comparison, directories, next_steps, folder)
        return _scripted("comparison.html", {"page": page}, page.data)


def _scripted(name: str, context: Mapping[str, Any], data: Any) -> str:
    """Return a page of a template with its script, which reads `data`."""
    from markupsafe import Markup

    script = "".join(map(template_text, ("page.js", name.replace(".html", ".js"))))
    return rendered(
        name,
        {**context, "data": Markup(json_for_html(data))},
        script=Markup(script),
        script_hash=csp_hash(script),
    )

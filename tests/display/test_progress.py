"""A run's progress as it is shown in a terminal."""

from __future__ import annotations

from io import StringIO

from rich.console import Console

from remora.display.progress import TerminalReporter
from remora.runtime.reporter import Validation


def shown(reporter: TerminalReporter) -> str:
    """The lines of the bars that are shown now."""
    assert reporter._progress is not None
    file = StringIO()
    Console(file=file, width=100, highlight=False).print(reporter._progress.get_renderable())
    return file.getvalue()


def test_scoring_has_a_bar_from_its_first_row_to_its_last() -> None:
    now = [0.0]
    reporter = TerminalReporter(Console(file=StringIO(), width=100, force_terminal=True))
    with reporter.live():
        assert reporter._progress is not None
        reporter._progress.get_time = lambda: now[0]
        reporter.scoring("validation", 0, 1_000)
        assert "validation" in shown(reporter)
        assert "0/1,000" in shown(reporter)
        for done in (100, 200, 300):
            now[0] += 10
            reporter.scoring("validation", done, 1_000)
        assert "300/1,000" in shown(reporter)
        assert "0:01:10" in shown(reporter)  # left: 700 rows, 10 in a second
        reporter.scoring("validation", 1_000, 1_000)
        assert "validation" not in shown(reporter)
        reporter.scoring("test", 0, 10)
        assert "0/10" in shown(reporter)


def test_an_evaluation_is_a_line() -> None:
    file = StringIO()
    reporter = TerminalReporter(Console(file=file, width=100))
    reporter.validated(Validation(step=25, accuracy=0.5, loss=1.25, rows=300, best=True))
    assert file.getvalue() == (
        "step 25: validation accuracy 50.0%, loss 1.250, on 300 rows, best so far\n"
    )

"""A run's progress as it is shown in a terminal."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from remora.display.progress import TerminalReporter
from remora.runtime.reporter import Step, Validation


def shown(reporter: TerminalReporter) -> str:
    """The lines of the bars that are shown now."""
    assert reporter._progress is not None
    file = StringIO()
    Console(file=file, width=100, highlight=False).print(reporter._progress.get_renderable())
    return file.getvalue()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_what_cannot_be_shown_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    with open("/dev/full", "w", buffering=1) as full:
        monkeypatch.setattr(sys, "stderr", full)
        reporter = TerminalReporter()
        with reporter.live():
            reporter.say("one line")
            reporter.scoring("test", 1, 10)
        monkeypatch.undo()
        with contextlib.suppress(OSError):
            full.close()


def test_a_reader_that_has_ended_is_no_reason_to_end() -> None:
    code = (
        "import sys\n"
        "from remora.display.progress import TerminalReporter\n"
        "reporter = TerminalReporter()\n"
        "for _ in range(3): reporter.say('one line')\n"
        "print('done')"
    )
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=writing, text=True, check=False
    )
    os.close(writing)
    assert done.stdout == "done\n"


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


STEP = Step(
    step=1200,
    num_steps=12_000,
    epoch=1.0,
    loss=0.123,
    grad_norm=1.0,
    learning_rate=1e-4,
    examples_per_second=1234.5,
    supervised_tokens_per_second=99.0,
    peak_memory_bytes=12_340_000_000,
)


@pytest.mark.parametrize(
    ("width", "figures"),
    [
        (100, "1234.5 examples/s  loss 0.123  12.34 GB peak"),
        (80, "1234.5 examples/s  loss 0.123"),
        (60, "1234.5 examples/s"),
    ],
)
def test_the_training_bar_drops_figures_that_a_terminal_has_no_room_for(width, figures) -> None:
    reporter = TerminalReporter(Console(file=StringIO(), width=width, force_terminal=True))
    with reporter.live():
        reporter.stepped(STEP)
        file = StringIO()
        Console(file=file, width=width, highlight=False).print(reporter._progress.get_renderable())
    (line,) = file.getvalue().splitlines()
    assert line.rstrip().endswith(f"left {figures}")
    assert "1,200/12,000" in line


def test_a_sentence_breaks_at_words_and_is_indented() -> None:
    file = StringIO()
    console = Console(file=file, width=30, force_terminal=True, highlight=False)
    reporter = TerminalReporter(console)
    reporter.say("plan: 1.97 GB peak memory, micro-batches of at most 2,048 tokens [x]")
    reporter.say("  or the folder /a/very/long/path/that/no/line/of/this/terminal/holds")
    reporter.say("    remora train sample:support --model nano --epochs 5")
    reporter.say("消息消息 消息消息 消息消息 消息消息")
    assert file.getvalue().splitlines() == [
        "plan: 1.97 GB peak memory,",
        "  micro-batches of at most",
        "  2,048 tokens [x]",
        "  or the folder",
        "    /a/very/long/path/that/no/line/of/this/terminal/holds",
        "    remora train sample:support --model nano --epochs 5",
        "消息消息 消息消息 消息消息",  # two columns a character
        "  消息消息",
    ]


def test_a_sentence_in_a_log_is_one_line() -> None:
    file = StringIO()
    TerminalReporter(Console(file=file, width=30)).say("one two three " * 10)
    assert len(file.getvalue().splitlines()) == 1

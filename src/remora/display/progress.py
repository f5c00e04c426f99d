"""A run's progress on standard error."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.status import Status
from rich.text import Text

from remora.display.console import ProgressConsole, print_line, spoken_file_bytes
from remora.runtime.reporter import Reporter, Step, Validation

_OTHERS = 51
"""Columns of a terminal that the training bar takes without its figures."""


class _TimeLeft(TimeRemainingColumn):
    """The time left, or once all is done, what it took."""

    def render(self, task: Task) -> Text:
        return super().render(task) + ("" if task.finished else " left")


STATUS_SECONDS = 30.0
"""Time between two lines of a status where a line cannot be replaced."""


class TerminalReporter(Reporter):
    """Shows a run on standard error: sentences, and one progress bar."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or ProgressConsole()
        self._progress: Progress | None = None
        self._training: TaskID | None = None
        self._scoring: TaskID | None = None
        self._scored = ""  # what that bar is of
        self._line: Status | None = None
        self._told_at = -STATUS_SECONDS

    @contextlib.contextmanager
    def live(self) -> Iterator[TerminalReporter]:
        """Show the progress bar while the context lasts."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=20 if self._console.width >= 80 else 10),
            TextColumn("{task.completed:,.0f}/{task.total:,.0f}"),
            _TimeLeft(elapsed_when_finished=True),
            TextColumn("{task.fields[figures]}"),
        )
        with Progress(*columns, console=self._console, transient=True) as self._progress:
            yield self
        self._progress = None

    @contextlib.contextmanager
    def status_line(self) -> Iterator[TerminalReporter]:
        """Show the line of `status` while the context lasts."""
        with self._console.status("") as self._line:
            yield self
        self._line = None

    def say(self, line: str) -> None:
        """Print a sentence."""
        print_line(self._console, line)

    def stepped(self, step: Step) -> None:
        """Advance the training bar."""
        if self._progress is None:
            return
        if self._training is None:
            self._training = self._progress.add_task("train", total=step.num_steps, figures="")
        speed = f"{step.examples_per_second:.1f} examples/s" if step.examples_per_second else ""
        loss, memory = f"loss {step.loss:.3f}", f"{spoken_file_bytes(step.peak_memory_bytes)} peak"
        room = self._console.width - (_OTHERS if self._console.width >= 80 else _OTHERS - 10)
        self._progress.update(
            self._training,
            completed=step.step,
            total=step.num_steps,
            figures=_that_fit(room, speed, loss, memory),
        )

    def validated(self, validation: Validation) -> None:
        """Print a line for an evaluation."""
        mark = ", best so far" if validation.best else ""
        figures = f"accuracy {validation.accuracy:.1%}, "
        if validation.micro_f1 is not None:
            figures = f"exact match {validation.accuracy:.1%}, micro-F1 {validation.micro_f1:.1%}, "
        if validation.macro_f1 is not None:
            figures += f"macro-F1 {validation.macro_f1:.1%}, "
        self.say(
            f"step {validation.step}: validation {figures}"
            f"loss {validation.loss:.3f}, on {validation.rows:,} rows{mark}"
        )

    def scoring(self, what: str, done: int, total: int) -> None:
        """Advance the bar of an evaluation, and remove it when done."""
        if self._progress is None:
            return
        if self._scoring is not None and self._scored != what:  # of one that has failed
            self._progress.remove_task(self._scoring)
            self._scoring = None
        if self._scoring is None:
            self._scoring, self._scored = (
                self._progress.add_task(what, total=total, figures=""),
                what,
            )
        self._progress.update(self._scoring, completed=done)
        if done >= total:
            self._progress.remove_task(self._scoring)
            self._scoring = None

    def status(self, line: str) -> None:
        """Show a line in the place of the one before; in a log, now and then."""
        if self._line is not None and self._console.is_terminal:
            self._line.update(line)
        elif time.monotonic() - self._told_at >= STATUS_SECONDS:
            self._told_at = time.monotonic()
            self.say(line)


def _that_fit(room: int, *figures: str) -> str:
    """Return those of the figures, from the first on, that a line has room for."""
    shown = ""
    for figure in filter(None, figures):
        longer = f"{shown}  {figure}" if shown else figure
        shown = longer if len(longer) <= room else shown
    return shown

"""metrics.jsonl, and the experiment trackers that accelerate knows."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from remora.errors import ConfigError
from remora.formatting import one_line
from remora.runtime import files
from remora.training import resume
from remora.training.checkpoint import Checkpoint
from remora.training.session import Session
from remora.tree.forward import text_config

PROJECT = "remora"
NAMED = {
    "wandb": ("WANDB_PROJECT", "name"),
    "mlflow": ("MLFLOW_EXPERIMENT_NAME", "run_name"),
    "trackio": ("TRACKIO_PROJECT", "name"),
    "swanlab": ("SWANLAB_PROJECT", "experiment_name"),
}
"""Trackers that keep runs in projects: the user's own setting for the project, and the argument
that names a run."""

Record = Mapping[str, Any]


def check(names: Sequence[str]) -> None:
    """Refuse trackers that accelerate does not know, or would leave out because of a package."""
    if not names:
        return
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    known, available = set(LOGGER_TYPE_TO_CLASS), {str(t) for t in get_available_trackers()}
    for name in names:
        if name not in known:
            choices = ", ".join(sorted(known))
            raise ConfigError(f"there is no tracker {name!r}; choose from {choices}")
        if name not in available:
            raise ConfigError(f"the tracker {name} is not installed; install its package first")


class Trackers:
    """The trackers of a run. One that fails is told of once and left out: training goes on."""

    def __init__(self, say: Callable[[str], None]) -> None:
        """Begin without any.

        Args:
            say: Told which tracker failed, and why.
        """
        self._say = say
        self._started: dict[str, Any] = {}

    def start(self, names: Sequence[str], directory: Path, settings: Record) -> None:
        """Start trackers for the run of a directory, and give them its settings.

        Raises:
            ConfigError: If one does not start, such as without a login or its server.
        """
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        for name in dict.fromkeys(names):
            kind = LOGGER_TYPE_TO_CLASS[name]
            variable, argument = NAMED.get(name, ("", ""))
            project = os.environ.get(variable, PROJECT) if variable else directory.name
            where = (str(directory),) if kind.requires_logging_directory else ()
            try:
                tracker = kind(project, *where, **({argument: directory.name} if argument else {}))
                tracker.start()
                self._started[name] = tracker
                tracker.store_init_configuration(dict(settings))
            except Exception as error:
                self.finish()
                raise ConfigError(
                    f"the tracker {name} does not start ({one_line(error)}); mend that, or leave "
                    "it out of --trackers"
                ) from error

    def log(self, record: Record, step: int) -> None:
        """Hand on the finite numbers of a record."""
        numbers = {name: value for name, value in record.items() if _is_finite(value)}
        self._each(lambda tracker: tracker.log(numbers, step=step))

    def finish(self) -> None:
        """Close all of them."""
        self._each(lambda tracker: tracker.finish())
        self._started.clear()

    def _each(self, act: Callable[[Any], None]) -> None:
        for name, tracker in list(self._started.items()):
            try:
                act(tracker)
            except Exception as error:
                del self._started[name]
                self._say(f"the tracker {name} failed and gets no more ({one_line(error)})")


def _is_finite(value: object) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and math.isfinite(value)  # type: ignore[arg-type]


@contextlib.contextmanager
def open_trackers(session: Session, directory: Path) -> Iterator[Trackers]:
    """Start the trackers that a session's settings name; all processes call it together.

    In other processes than the first there are none.

    Raises:
        ConfigError: If one does not start.
    """
    trackers = Trackers(session.reporter.say)
    if session.config.trackers:
        with session.group.together():
            if session.group.is_first:
                trackers.start(session.config.trackers, directory, _settings(session))
    try:
        yield trackers
    finally:
        trackers.finish()


def _settings(session: Session) -> dict[str, Any]:
    """Return what a tracker shows of a run's settings, as texts and numbers."""
    rate = session.config.rate(text_config(session.model).hidden_size)
    settings = replace(session.settings, learning_rate=rate)
    values = {each.name: getattr(settings, each.name) for each in fields(settings)}
    values |= {
        "num_train_rows": len(session.dataset.train),
        "num_labels": len(session.dataset.labels),
        "trainable_parameters": session.parameters.trainable,
    }
    return {
        name: value if isinstance(value, str | int | float) else json.dumps(value, default=str)
        for name, value in values.items()
        if value not in (None, (), {})
    }


@contextlib.contextmanager
def metrics_log(
    directory: Path, session: Session, resumed: Checkpoint | None, trackers: Trackers
) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Give a function that appends a record to metrics.jsonl, and hands it to the trackers.

    In other processes than the first it does nothing.
    """
    if not session.group.is_first:
        yield lambda record: None
        return
    last = resumed.state["progress"] if resumed else {"step": 0, "evaluated": 0}
    resume.cut_log(directory / "metrics.jsonl", last["step"], last["evaluated"])
    with (
        files.disk_errors(directory),
        (directory / "metrics.jsonl").open(
            "a", encoding="utf-8", newline="\n", buffering=1
        ) as file,
    ):

        def log(record: dict[str, Any]) -> None:
            finite = {
                k: None if isinstance(v, float) and not math.isfinite(v) else v
                for k, v in record.items()
            }
            file.write(json.dumps(finite) + "\n")
            trackers.log(record, record["step"])

        yield log

"""metrics.jsonl, and the experiment trackers that accelerate knows."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from remora.errors import ConfigError
from remora.runtime import files
from remora.training import resume
from remora.training.checkpoint import Checkpoint
from remora.training.session import Session


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


@contextlib.contextmanager
def metrics_log(
    directory: Path, session: Session, resumed: Checkpoint | None
) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Give a function that appends a record to metrics.jsonl and to the trackers asked for.

    In other processes than the first it does nothing.
    """
    if not session.group.is_first:
        yield lambda record: None
        return
    last = resumed.state["progress"] if resumed else {"step": 0, "evaluated": 0}
    resume.cut_log(directory / "metrics.jsonl", last["step"], last["evaluated"])
    trackers, accelerator = session.config.trackers, session.accelerator
    if trackers:
        from accelerate.tracking import filter_trackers

        accelerator.project_configuration.set_directories(str(directory))
        accelerator.log_with = filter_trackers(list(trackers), str(directory))
        accelerator.init_trackers(directory.name)
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
            if trackers:
                accelerator.log(record, step=record["step"])

        yield log

"""Resuming an unfinished run: which one, whether it is the same run, and the lock on it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from remora.config import TrainConfig
from remora.config.several_labels import settled
from remora.errors import ConfigError
from remora.runtime import files, run_directory
from remora.runtime.process_group import ProcessGroup
from remora.training import checkpoint
from remora.training.checkpoint import Checkpoint

CHECKPOINTS, LOCK, HOLDER = "checkpoints", ".lock", run_directory.HOLDER

FREE = {
    *("data", "validation", "test", "text_column", "label_column"),  # the rows' hash tells
    *("input_format", "columns", "strict", "merge_labels", "rename_labels", "corrections"),
    *("multi_label", "split_labels_at", "label_columns"),
    "model",  # the weights' hash tells
    *("name", "output", "trackers", "checkpoint_minutes", "max_time"),
    *("baselines", "embedding_model"),  # they come after the training
    "tolerance",  # changes no weights, and a run that scores for long may be finished sooner
    *(
        "micro_batch_tokens",
        "checkpointing",
        "devices",
        "shard",
        "layout",
    ),  # change no result but by rounding
}
"""Settings that may differ when a run resumes."""


def unfinished(config: TrainConfig, data_sha256: str, say: Callable[[str], None]) -> Path | None:
    """Return the directory of the unfinished run that these settings resume.

    Raises:
        ConfigError: If the run of the wanted name is another one, or the data has changed.
    """
    for path in run_directory.paths(config.output, config.name, config.data, config.model):
        if not path.is_dir():
            return None
        if is_finished(path) or (config.name is None and not _is_run(path)):
            continue
        settings, data = differences(path, config, data_sha256)
        if data or (settings and config.name):
            raise ConfigError(
                f"{path} is an unfinished run with other settings or data "
                f"({'; '.join(settings + data)}); run its own command, give another --name, or "
                "remove it"
            )
        if settings:
            say(
                f"{path} is an unfinished run with other settings, left as it is: "
                f"{'; '.join(settings)}"
            )
            continue
        return path
    return None


def find(
    config: TrainConfig,
    data_sha256: str,
    group: ProcessGroup,
    stack: contextlib.ExitStack,
    say: Callable[[str], None],
) -> tuple[Path | None, Checkpoint | None]:
    """Return the run directory to resume in and its newest checkpoint, if there are any.

    Args:
        config: The settings of this run.
        data_sha256: The hash of its rows.
        group: The first process finds and locks the directory; the others read the same.
        stack: Holds the lock until the end.
        say: Told of runs and checkpoints that are skipped.

    Raises:
        ConfigError: If the run of the wanted name is another one, or the data has changed.
        ModelError: If all checkpoints are damaged.
    """
    directory, resumed = None, None
    with group.together():
        if group.is_first and (directory := unfinished(config, data_sha256, say)):
            stack.enter_context(hold(directory))
            resumed = checkpoint.newest(directory / CHECKPOINTS, say)
    shared = group.share([directory and str(directory), resumed and resumed.name])
    with group.together():
        if not group.is_first and shared[0]:
            directory = Path(shared[0])
            resumed = checkpoint.load(directory / CHECKPOINTS / shared[1]) if shared[1] else None
    return directory, resumed


def fixed(config: TrainConfig) -> dict[str, Any]:
    """Return the settings that may not differ: between processes, and when a run resumes."""
    config = settled(config, is_multi_label=config.multi_label == "on")
    return {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(TrainConfig)
        if field.name not in FREE
    }


def as_before(config: TrainConfig, resumed: Checkpoint | None) -> TrainConfig:
    """Return the settings with the choices of the plan that a checkpoint was saved under."""
    if resumed is None:
        return config
    tokens = resumed.state["progress"]["micro_batch_tokens"]
    return dataclasses.replace(
        config,
        micro_batch_tokens=min(tokens, config.micro_batch_tokens or tokens),
        checkpointing=resumed.state["checkpointing"],
        shard=resumed.state.get("shard", config.shard),
        layout=resumed.state.get("layout", config.layout),
    )


def refuse_other_base(directory: Path, sha256: str) -> None:
    """Refuse to resume on other base weights than the run started with.

    Raises:
        ConfigError: If they differ.
    """
    began = _read_json(directory / "environment.json").get("base_sha256", sha256)
    if began != sha256:
        raise ConfigError(
            f"{directory} was started on a base model with the hash {began[:12]}, this one has "
            f"{sha256[:12]}; restore that model, give another --name, or remove the run"
        )


@contextlib.contextmanager
def hold(directory: Path) -> Iterator[None]:
    """Lock a run directory that is not finished against other processes.

    Raises:
        ConfigError: If a process has locked it, naming that process, or has finished the run.
    """
    from filelock import FileLock, Timeout

    holder = directory / HOLDER
    lock = FileLock(directory / LOCK)
    with files.disk_errors(directory, "resume where the run can be written"):
        try:
            lock.acquire(blocking=False)
        except Timeout:  # an OSError too
            other = _read_json(holder)
            raise ConfigError(
                f"{directory} is locked by process {other.get('process', '?')} on "
                f"{other.get('host', '?')}; wait for it, or stop it"
            ) from None
    try:
        if is_finished(directory):
            raise ConfigError(f"{directory} was finished by another process; its results are there")
        files.write_json(holder, {"process": os.getpid(), "host": platform.node()})
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


def cut_log(path: Path, step: int, evaluated: int) -> None:
    """Drop the records that come after a checkpoint from metrics.jsonl."""
    kept = []
    with contextlib.suppress(FileNotFoundError):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):  # the last may be broken
                record = json.loads(line)
                last = evaluated if "validation_accuracy" in record else step
                if record["step"] <= last:
                    kept.append(line + "\n")
    files.write_text(path, "".join(kept))


def finish(directory: Path) -> None:
    """Delete the checkpoints of a run whose results are written: it will not be resumed."""
    retired = directory / f"{CHECKPOINTS}.old"
    with contextlib.suppress(FileNotFoundError):
        (directory / CHECKPOINTS).rename(retired)
    shutil.rmtree(retired, ignore_errors=True)
    with contextlib.suppress(OSError):
        (directory / LOCK).unlink()


def is_finished(directory: Path) -> bool:
    """Return whether all results of a run are written."""
    return (directory / "evaluation.json").is_file() and not (directory / CHECKPOINTS).is_dir()


def _is_run(directory: Path) -> bool:
    """Return whether a folder is a run's, or one that was interrupted while it was made."""
    names = {path.name for path in directory.iterdir()}
    if "config.toml" in names:
        return True
    return {files.final_name(name) for name in names} <= {*_FIRST_FILES, "config.toml"}


def differences(
    directory: Path, config: TrainConfig, data_sha256: str
) -> tuple[list[str], list[str]]:
    """Return what differs between a run of a directory and this one: settings, and data."""
    if not _is_run(directory):
        return [], ["it holds other files and no config.toml"]
    if not (directory / "config.toml").is_file():  # interrupted while it was made
        return [], []
    try:
        began = fixed(run_directory.read_settings(directory))
    except ConfigError:
        return ["config.toml cannot be read"], []
    settings = [
        f"{name} {began[name]} there, {value} here"
        for name, value in fixed(config).items()
        if began[name] != value
    ]
    sha256 = str(_read_json(directory / "data.json").get("sha256"))
    if settings or sha256 == data_sha256:  # the hash is of the splits, which settings make
        return settings, []
    return [], [f"data {sha256[:12]} there, {data_sha256[:12]} here"]


_FIRST_FILES = {"environment.json", "data.json", "plan.json", LOCK, HOLDER}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}

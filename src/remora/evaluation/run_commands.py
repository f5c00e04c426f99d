"""Commands to paste after a run: real paths, quoted for the shell."""

from __future__ import annotations

import math
import os
import shlex
import subprocess
from pathlib import Path

from remora.evaluation.run_facts import RunFacts

MODELS = (
    ("Qwen/Qwen2.5-0.5B-Instruct", 494_032_768),
    ("Qwen/Qwen2.5-1.5B-Instruct", 1_543_714_304),
    ("Qwen/Qwen2.5-7B-Instruct", 7_615_616_512),
)
"""Base models to go on to, with their parameters; all under the Apache 2.0 licence."""


def command(*words: object) -> str:
    """Return a command line of remora, quoted for the shell of this system."""
    given = ["remora", *map(str, words)]
    return subprocess.list2cmdline(given) if os.name == "nt" else shlex.join(given)


def train_again(facts: RunFacts, *flags: object) -> str:
    """Return the command that trains with the settings of a run, but for some flags.

    Rows that came through a pipe are to be given again, as a table in its place.
    """
    name = facts.settings.get("name")
    rows = () if facts.can_read_again else ("TABLE",)
    other: tuple[str, ...] = () if name is None else ("--name", _unused(facts, name))
    return command("train", *rows, "--config", facts.directory / "config.toml", *other, *flags)


def train_longer(facts: RunFacts) -> str:
    """Return the command that trains for twice as long, and for as long as is usual at least."""
    if not facts.epochs or not facts.steps_per_epoch:
        return train_again(facts, "--max-steps", 2 * facts.num_steps)
    epochs = math.ceil(max(2 * facts.epochs, facts.default_epochs or 0))
    if facts.settings.get("max_steps"):  # which counts whatever the epochs are
        return train_again(facts, "--max-steps", epochs * facts.steps_per_epoch)
    return train_again(facts, "--epochs", epochs)


def larger_model(facts: RunFacts) -> str | None:
    """Return the next base model with at least twice the parameters.

    None if there is none, or the run began with an adapter, which needs the base model it has.
    """
    if facts.settings.get("start_from"):
        return None
    return next((name for name, count in MODELS if count >= 2 * facts.base_parameters), None)


def smaller_model(facts: RunFacts) -> str | None:
    """Return the largest base model with at most half of the parameters, or None likewise."""
    if facts.settings.get("start_from"):
        return None
    found = [name for name, count in MODELS if 2 * count <= facts.base_parameters]
    return found[-1] if found else None


def curve_sizes(facts: RunFacts) -> str | None:
    """Return the sizes of a learning curve up to all rows, each twice the one before.

    None if no label has enough training rows for two sizes.
    """
    counts = facts.rows_per_label.values() or (facts.summary.get("largest_label_rows") or 0,)
    most = max(counts)
    sizes = sorted({most // part for part in (8, 4, 2)} - {0, most})
    return ",".join([*map(str, sizes), "all"]) if len(sizes) > 1 else None


def _unused(facts: RunFacts, name: str) -> str:
    """Return a name made from that of a run, which no other run has."""
    folder = Path(facts.settings.get("output", facts.directory.parent))
    names = (f"{name}-{number}" for number in range(2, 10_000))
    return next((each for each in names if not (folder / each).exists()), f"{name}-again")

"""What the files of a run hold, as tables and lists that fit a page."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeVar

from remora.evaluation.run_facts import RunFacts
from remora.formatting import cut, spoken_bytes, unescape_formula

MAX_CHARS = 1_500_000  # of all messages of a list together
MAX_MESSAGES = 25_000
NUM_STATIC_MESSAGES = 20


class Shown(Protocol):
    """A message as a page shows it."""

    @property
    def text(self) -> str:
        """Its text, cut."""


MessageT = TypeVar("MessageT", bound=Shown)


def fitting(messages: Sequence[MessageT]) -> list[MessageT]:
    """Return as many of the first messages as a page can hold."""
    ends = itertools.accumulate(len(message.text) for message in messages)
    num_fitting = sum(1 for _ in itertools.takewhile(lambda end: end <= MAX_CHARS, ends))
    return list(messages[: min(num_fitting, MAX_MESSAGES)])


def suspect_rows(facts: RunFacts) -> list[dict[str, str]]:
    """Return the first rows of relabel.csv, [] if someone has broken or removed the file."""
    try:
        return [
            {"row": row["row"]}
            | {k: cut(unescape_formula(row[k])) for k in ("text", "label", "suggested")}
            for row in facts.sheet[:NUM_STATIC_MESSAGES]
        ]
    except KeyError:
        return []


def memory_rows(planned: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the components of planned memory with their sizes."""
    memory = planned["memory"]
    return [(name.replace("_", " "), spoken_bytes(count)) for name, count in memory.items()]


def plan_rows(planned: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the device, model, rows and tokens of a plan."""
    fewer = planned["padded_tokens"] / planned["tree_tokens"]
    packed = "sorted by length" if planned.get("layout") == "rows" else "in trees"
    return [
        ("device", planned["device"]),
        ("parameters", f"{planned['parameters']:,}"),
        ("trainable", f"{planned['trainable']:,}"),
        ("training rows", f"{planned['num_rows']:,}"),
        ("steps", f"{planned['num_steps']:,} of {planned['batch_size']:,} rows"),
        ("tokens per row, padded", f"{planned['padded_tokens']:.1f}"),
        (f"tokens per row, {packed}", f"{planned['tree_tokens']:.1f} ({fewer:.1f} times fewer)"),
        ("operations per example", f"{planned['operations_per_example'] / 1e9:,.1f} GFLOP"),
    ]


def environment_rows(facts: RunFacts) -> list[tuple[str, str]]:
    """Return the entries of environment.json."""
    environment = dict(facts.environment)
    if environment.get("command"):
        environment["command"] = shlex.join(environment["command"])
    return setting_rows(environment)


def setting_rows(values: Mapping[str, Any], above: str = "") -> list[tuple[str, str]]:
    """Return a file's keys and values as text; nested keys are joined by colons."""
    rows = []
    for name, value in values.items():
        if isinstance(value, dict) and value:
            rows += setting_rows(value, f"{above}{name}: ")
        else:
            rows.append((above + name.replace("_", " "), _spoken(value)))
    return rows


def resolved(facts: RunFacts) -> dict[str, Any]:
    """Return the settings with what a run has chosen in place of what was left to it.

    The peak learning rate and the epochs are in metrics.jsonl, the adapted layers in the adapter's
    configuration, and device, precision and micro-batch in the plan.
    """
    records = [each for each in facts.records if "loss" in each]
    settings, plan = facts.settings, facts.plan
    found: dict[str, Any] = {}
    if records:
        rate = max(each.get("learning_rate", 0.0) for each in records)
        found = {"learning_rate": f"{rate:.2g}", "epochs": f"{records[-1].get('epoch', 0):.1f}"}
    modules = facts.adapter.get("target_modules")
    if modules:
        found["target_modules"] = (
            modules if isinstance(modules, str) else ", ".join(sorted(modules))
        )
    found |= {k: plan[k] for k in ("device", "precision", "layout") if k in plan}
    if "checkpointing" in plan:
        found["checkpointing"] = "on" if plan["checkpointing"] else "off"
    if settings.get("multi_label") == "auto":  # else it would be "on"
        found["multi_label"] = "off"
    if "micro_batch_tokens" in plan:
        found["micro_batch_tokens"] = plan["micro_batch_tokens"]
    if "shard" in plan:
        found["shard"] = "on" if plan["shard"] else "off"
    chosen = {
        name: f"{_spoken(value)} (by default)"
        for name, value in found.items()
        if settings.get(name) in (None, [], "auto")
    }
    return {**settings, **chosen}


def _spoken(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(_spoken, value)) or "none"
    if isinstance(value, int):
        return f"{value:,}"
    return "none" if value is None else str(value)

"""Base model and adapter as one plain model, and whether it still is the same classifier."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from remora.config import ExportConfig
from remora.data.prompt import Prompt
from remora.errors import ModelError
from remora.evaluation.results import Results
from remora.models import adapter_card, hub, loading, saved
from remora.runtime import files
from remora.runtime.device import choose_device
from remora.runtime.reporter import Reporter
from remora.tree import scoring
from remora.tree.scoring import Scorer

TOLERANCES = {"float32": 0.01, "float16": 0.05, "bfloat16": 0.3}
"""Most that storing merged weights may change a log-probability, in nats; docs/log.md has what was
measured."""

FLOOR = 1e-3
"""Probabilities below it are taken for it: what no answer depends on is not compared."""

SEARCH_TOLERANCE = 1e-4
"""Probability that labels not looked at may hold; well below the floor."""

LEAST_EFFECT = 0.01
"""An adapter that changes no log-probability by so much, in nats, cannot be told from its base."""


@dataclass(frozen=True, kw_only=True)
class Parity:
    """How far a merged model is from the adapter that was merged, on the rows measured."""

    dtype: str  # what the merged weights are stored in
    num_rows: int
    num_flips: int  # rows that get another label
    num_near_ties: int  # of those, rows whose two labels the adapter itself holds nearly alike
    largest_difference: float  # of a log-probability, in nats
    allowed: float

    @property
    def holds(self) -> bool:
        """Whether the two are one model but for rounding; false where a figure is NaN."""
        return self.num_flips == self.num_near_ties and self.largest_difference <= self.allowed


def merge(config: ExportConfig, folder: Path, found: Results, reporter: Reporter) -> Parity:
    """Write base model and adapter into an empty folder, read it back and compare it.

    Args:
        config: The settings.
        folder: Where to.
        found: The run's rows.
        reporter: Told how it goes.

    Raises:
        ModelError: If adapter or base model cannot be used, or the merged model answers otherwise.
        ResourceError: If the disk fails.
    """
    device = choose_device(config.device)
    adapted, prompt, card = saved.load_adapter(
        config.run, base=config.model, dtype=torch.float32, device=device
    )
    source = hub.find(config.model or card.base_model)
    stored = loading.load_config(source).dtype or torch.float32
    dtype = getattr(torch, config.dtype) if config.dtype else stored
    name = str(dtype).removeprefix("torch.")
    reporter.say(f"merging in float32, to be stored in {name}")

    def scorer(scored: Any, prompt: Prompt) -> Scorer:
        return Scorer(
            scored, prompt, max_tokens=config.micro_batch_tokens, tolerance=SEARCH_TOLERANCE
        )

    wanted = scoring.score_table(scorer(adapted, prompt), found.texts, "adapter", reporter)
    tolerance = TOLERANCES.get(name, TOLERANCES["bfloat16"])
    with adapted.disable_adapter():
        effect = _effect(scorer(adapted, prompt), found.texts, wanted, enough=10 * tolerance)
    if not effect >= LEAST_EFFECT:
        raise ModelError(
            f"the adapter changes no log-probability by more than {effect:.2g}, so a merged model "
            "could not be told from its base; train it longer"
        )
    if card.method == "qlora":  # merged into 4 bits, the update would be rounded away
        del adapted
        gc.collect()
        adapted, _, _ = saved.load_adapter(
            config.run, base=config.model, dtype=torch.float32, device=device, dequantized=True
        )
    with files.disk_errors(folder):
        _write(adapted, prompt, card, dtype, folder)
    del adapted
    gc.collect()  # the layers hold on to themselves
    merged, prompt, _ = saved.load_adapter(folder, base=None, dtype=torch.float32, device=device)
    got = scoring.score_table(scorer(merged, prompt), found.texts, "merged", reporter)
    parity = _compare(wanted, got, dtype=name, allowed=min(tolerance, effect / 10))
    if not parity.holds:
        raise ModelError(_refusal(parity))
    return parity


def _write(
    adapted: Any, prompt: Prompt, card: adapter_card.AdapterCard, dtype: torch.dtype, folder: Path
) -> None:
    """Merge an adapter into its base, in place, and write the model with its tokenizer and card."""
    merged = adapted.merge_and_unload().to(dtype)
    if not all(parameter.isfinite().all() for parameter in merged.parameters()):
        raise ModelError(
            f"the merged model has weights that are no numbers in {dtype}; use --dtype float32, or "
            "train the adapter again"
        )
    saved.write_model(merged, prompt, card, folder)


def _effect(
    base: Scorer, texts: Sequence[str], adapted: NDArray[np.float64], *, enough: float
) -> float:
    """Return how far the adapter moves a log-probability at most; stops where it is enough."""
    largest, done = 0.0, 0
    for batch, probabilities in base.stream(texts, batch_rows=32):
        moved = _differences(adapted[done : done + len(batch)], probabilities)
        largest, done = max(largest, float(moved.max())), done + len(batch)
        if largest >= enough:
            break
    return largest


def _differences(one: NDArray[np.float64], other: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return how far log-probabilities are apart, [rows, labels], both raised to the floor."""
    logs = (np.log(np.maximum(probabilities, FLOOR)) for probabilities in (one, other))
    difference: NDArray[np.float64] = np.abs(np.subtract(*logs))
    return difference


def _compare(
    wanted: NDArray[np.float64], got: NDArray[np.float64], *, dtype: str, allowed: float
) -> Parity:
    """Compare probabilities [rows, labels] of a merged model with those of the adapter."""
    rows = np.arange(len(wanted))
    first, second = wanted.argmax(1), got.argmax(1)
    flipped = first != second
    with np.errstate(divide="ignore"):
        gap = np.log(wanted[rows, first]) - np.log(wanted[rows, second])
    return Parity(
        dtype=dtype,
        num_rows=len(wanted),
        num_flips=int(flipped.sum()),
        num_near_ties=int((flipped & (gap <= allowed)).sum()),
        largest_difference=float(_differences(wanted, got).max()),
        allowed=allowed,
    )


def _refusal(parity: Parity) -> str:
    advice = "use --dtype float32" if parity.dtype != "float32" else "use the adapter as it is"
    return (
        f"stored in {parity.dtype}, the merged model is not the adapter: {parity.num_flips:,} of "
        f"{parity.num_rows:,} rows get another label, {parity.num_near_ties:,} of them near ties, "
        f"and log-probabilities differ by up to {parity.largest_difference:.3g} where "
        f"{parity.allowed:.3g} is allowed, so nothing was written; {advice}"
    )

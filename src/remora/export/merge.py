"""Base model and adapter merged into one plain model, and checked to be the same classifier."""

from __future__ import annotations

import functools
import gc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from remora.config import ExportConfig
from remora.data.prompt import Prompt
from remora.errors import ModelError
from remora.evaluation.results import Results
from remora.models import loading, metadata
from remora.models.saved import Trained, open_trained, write_model
from remora.runtime import files
from remora.runtime.reporter import Reporter
from remora.tree import scoring
from remora.tree.scoring import Scorer

TOLERANCES = {"float32": 0.01, "float16": 0.05, "bfloat16": 0.3}
"""The largest difference of a log-probability that storing merged weights may make, in nats;
docs/log.md has the measurements."""

FLOOR = 1e-3
"""Smaller probabilities are raised to this before they are compared: no answer depends on them."""

SEARCH_TOLERANCE = 1e-4
"""Maximum total probability left on unexplored labels; well below the floor."""

LEAST_EFFECT = 0.01
"""An adapter that changes every log-probability by less, in nats, is the same as its base."""


@dataclass(frozen=True, kw_only=True)
class Parity:
    """The differences of a merged model from the adapter that was merged, on the run's rows."""

    dtype: str  # storage type of the merged weights
    num_rows: int
    num_flips: int  # rows that get another label
    num_near_ties: int  # of those, rows whose two labels the adapter itself finds about as likely
    largest_difference: float  # of a log-probability, in nats
    allowed: float

    @property
    def holds(self) -> bool:
        """Whether the two differ by rounding only; false if a figure is NaN."""
        return self.num_flips == self.num_near_ties and self.largest_difference <= self.allowed


def merge(config: ExportConfig, folder: Path, results: Results, reporter: Reporter) -> Parity:
    """Write base model and adapter as one into an empty folder, read it back and compare it.

    Args:
        config: The settings.
        folder: Where to write.
        results: The run's rows.
        reporter: Shows the progress.

    Raises:
        ModelError: If adapter or base model cannot be used, or the merged model gives other
            answers.
        ResourceError: If the disk fails.
    """
    open_run = functools.partial(
        open_trained, config.run, base=config.model, device=config.device, precision="float32"
    )
    card = metadata.read_card(metadata.adapter_folder(config.run))
    source = metadata.find_base(card, config.model, config.run)
    base = loading.load_config(source)
    if getattr(base, "quantization_config", None) is not None:
        raise ModelError(
            f"the weights in {source} are stored quantized, so a merged update would be rounded "
            "away; use the adapter as it is, or train on the original weights with --method qlora"
        )
    trained = open_run()
    stored = base.dtype or torch.float32
    dtype = getattr(torch, config.dtype) if config.dtype else stored
    name = str(dtype).removeprefix("torch.")
    reporter.say(f"merging in float32, storing in {name}")

    def scorer(scored: Trained) -> Scorer:
        return scored.scorer(max_tokens=config.micro_batch_tokens, tolerance=SEARCH_TOLERANCE)

    # The adapter's probabilities, and how far they are from the base's
    wanted = scoring.score_table(scorer(trained), results.texts, "adapter", reporter)
    tolerance = TOLERANCES.get(name, TOLERANCES["bfloat16"])
    with trained.model.disable_adapter():
        effect = _effect(scorer(trained), results.texts, wanted, enough=10 * tolerance)
    if not effect >= LEAST_EFFECT:
        raise ModelError(
            f"the adapter changes no log-probability by more than {effect:.2g}, so a merged model "
            "would be indistinguishable from its base; train it longer"
        )

    # Merge and write
    if trained.card.method == "qlora":  # merged into 4 bits, the update would be rounded away
        del trained
        gc.collect()
        trained = open_run(dequantized=True)
    _write(trained, dtype, folder)
    del trained
    gc.collect()  # the layers hold references to themselves

    # Read it back and compare
    merged = open_trained(folder, device=config.device, precision="float32")
    got = scoring.score_table(scorer(merged), results.texts, "merged", reporter)
    del merged
    gc.collect()  # Windows renames no folder whose weights are still mapped into memory
    parity = compare_probabilities(
        wanted, got, card.thresholds, dtype=name, allowed=min(tolerance, effect / 10)
    )
    if not parity.holds:
        raise ModelError(_refusal(parity))
    return parity


def write_merged(config: ExportConfig, dtype: torch.dtype, folder: Path) -> Prompt:
    """Write base model and adapter as one into an empty folder, unchecked; return the prompt.

    Raises:
        ModelError: If adapter or base model cannot be used.
        ResourceError: If the disk fails.
    """
    is_quantized = metadata.read_card(metadata.adapter_folder(config.run)).method == "qlora"
    trained = open_trained(
        config.run,
        base=config.model,
        device="cpu",
        precision="float32",
        dequantized=is_quantized,  # merged into 4 bits, the update would be rounded away
    )
    prompt = trained.prompt
    _write(trained, dtype, folder)
    del trained
    gc.collect()  # the layers hold references to themselves
    return prompt


def _write(trained: Trained, dtype: torch.dtype, folder: Path) -> None:
    """Merge an adapter into its base, in place, and write the model with its tokenizer and card."""
    merged = trained.model.merge_and_unload().to(dtype)
    if not all(parameter.isfinite().all() for parameter in merged.parameters()):
        raise ModelError(
            f"the merged model has weights that are not finite in {dtype}; use --dtype float32, or "
            "train the adapter again"
        )
    with files.disk_errors(folder):
        write_model(merged, trained.prompt, trained.card, folder)


def _effect(
    base: Scorer, texts: Sequence[str], adapted: NDArray[np.float64], *, enough: float
) -> float:
    """Return the largest change of a log-probability by the adapter; stops once it is enough."""
    largest, done = 0.0, 0
    for batch, probabilities in base.stream(texts, batch_rows=32):
        moved = _differences(adapted[done : done + len(batch)], probabilities)
        largest, done = max(largest, float(moved.max())), done + len(batch)
        if largest >= enough:
            break
    return largest


def _differences(one: NDArray[np.float64], other: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the differences of log-probabilities above the floor, [rows, labels], in nats."""
    logs = (np.log(np.maximum(probabilities, FLOOR)) for probabilities in (one, other))
    difference: NDArray[np.float64] = np.abs(np.subtract(*logs))
    return difference


def compare_probabilities(
    wanted: NDArray[np.float64],
    got: NDArray[np.float64],
    thresholds: Sequence[float] = (),
    *,
    dtype: str,
    allowed: float,
) -> Parity:
    """Compare the probabilities of a merged model with the adapter's, both [rows, labels].

    With thresholds, of labels where a row may have several, labels are those whose probability
    reaches theirs, and a probability close to it is a near tie.
    """
    rows = np.arange(len(wanted))
    if thresholds:
        limits = np.array(thresholds)
        changed = (wanted >= limits) != (got >= limits)  # [rows, labels]
        with np.errstate(divide="ignore"):
            near = np.abs(np.log(wanted) - np.log(limits)) <= allowed
        flipped, are_ties = changed.any(1), (near | ~changed).all(1)
    else:
        first, second = wanted.argmax(1), got.argmax(1)
        flipped = first != second
        with np.errstate(divide="ignore"):
            gap = np.log(wanted[rows, first]) - np.log(wanted[rows, second])
        are_ties = gap <= allowed
    return Parity(
        dtype=dtype,
        num_rows=len(wanted),
        num_flips=int(flipped.sum()),
        num_near_ties=int((flipped & are_ties).sum()),
        largest_difference=float(_differences(wanted, got).max()),
        allowed=allowed,
    )


def _refusal(parity: Parity) -> str:
    advice = "use --dtype float32" if parity.dtype != "float32" else "use the adapter as it is"
    return (
        f"stored in {parity.dtype}, the merged model is not the same classifier: "
        f"{parity.num_flips:,} of {parity.num_rows:,} rows get another label, "
        f"{parity.num_near_ties:,} of them near ties, and log-probabilities differ by up to "
        f"{parity.largest_difference:.3g} ({parity.allowed:.3g} allowed), so nothing was written; "
        f"{advice}"
    )

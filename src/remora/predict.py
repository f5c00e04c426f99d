"""A trained adapter at work: classify messages, or measure it on a table."""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Iterator
from typing import TextIO

import numpy as np

from remora import calibration, data, evaluate, run, score, store
from remora.config import EvalConfig, PredictConfig
from remora.device import Precision, choose_device, choose_precision
from remora.errors import ConfigError
from remora.progress import Reporter
from remora.score import Scorer


def load_scorer(
    config: PredictConfig | EvalConfig, *, tolerance: float = 1e-2
) -> tuple[Scorer, Precision]:
    """Load an adapter around its base model, or a whole model, ready to score.

    Raises:
        ModelError: If a part is missing or broken, or the base model is another one.
    """
    device = choose_device(config.device)
    precision = choose_precision(
        device, config.precision, trains_base=store.is_full(config.adapter)
    )
    adapted, prompt, _ = store.load_adapter(
        config.adapter, base=config.model, dtype=precision.base, device=device
    )
    scorer = Scorer(
        adapted,
        prompt,
        max_tokens=config.micro_batch_tokens,
        tolerance=tolerance,
        autocast=precision.autocast,
    )
    return scorer, precision


def predictions(config: PredictConfig) -> Iterator[tuple[str, list[tuple[str, float]]]]:
    """Yield each message with its `top_k` likeliest labels and their probabilities, as they come.

    Raises:
        RemoraError: If the adapter, its base model or a message cannot be used.
    """
    scorer, _ = load_scorer(config, tolerance=config.tolerance)
    labels = scorer.prompt.labels
    if config.top_k > len(labels):
        raise ConfigError(
            f"top_k is {config.top_k} and the adapter has {len(labels)} labels; give no more"
        )
    texts = data.stream_texts(
        config.source, text_column=config.text_column, format=config.input_format
    )
    for messages, probabilities in scorer.stream(texts, batch_rows=64):
        order = np.argsort(-probabilities, axis=1, kind="stable")[:, : config.top_k]
        for message, row, best in zip(messages, probabilities, order, strict=True):
            yield message, [(labels[i], float(row[i])) for i in best]


def write_predictions(config: PredictConfig, output: TextIO) -> None:
    """Write predictions as CSV, or as JSON lines, one for each message and in their order."""
    writer = csv.writer(output, lineterminator="\n")
    found = predictions(config)
    first = next(found)  # what is wrong with adapter or table shows before anything is written
    if not config.json:
        more = [
            f"{name}_{k}" for k in range(2, config.top_k + 1) for name in ("label", "probability")
        ]
        writer.writerow(["text", "label", "probability", *more])
    for message, best in itertools.chain([first], found):
        if config.json:
            ranked = [{"label": label, "probability": round(p, 6)} for label, p in best]
            output.write(json.dumps({"text": message, "labels": ranked}, ensure_ascii=False) + "\n")
        else:
            figures = [cell for label, p in best for cell in (run.defused(label), f"{p:.6f}")]
            writer.writerow([run.defused(message), *figures])
        output.flush()


def evaluate_adapter(
    config: EvalConfig, *, reporter: Reporter | None = None
) -> tuple[evaluate.Metrics, calibration.Reliability]:
    """Measure an adapter on a table of texts and labels.

    Returns:
        The figures of the predictions, and how far their probabilities can be trusted. Temperature
        and threshold come from the validation rows that the run directory keeps.

    Raises:
        RemoraError: If the adapter or the table cannot be used.
    """
    reporter = reporter or Reporter()
    scorer, precision = load_scorer(config)
    labels = scorer.prompt.labels
    table = data.read_table(
        config.data, text_column=config.text_column, label_column=config.label_column, known=labels
    )
    outside = None
    if config.out_of_scope is not None:
        outside = list(data.stream_texts(config.out_of_scope, text_column=config.text_column))
    validation = run.read_probabilities(config.adapter / run.PROBABILITIES, labels, "validation")
    reporter.say(f"{len(table):,} rows; {precision}")
    scored = score.score_rows(scorer, table, "test", reporter)
    reliability = calibration.assess(
        scored,
        validation,
        abstain_at_accuracy=config.abstain_at_accuracy,
        out_of_scope=None if outside is None else scorer.probabilities(outside),
    )
    probabilities = scored.probabilities
    predicted = [labels[i] for i in probabilities.argmax(1)]
    if config.predictions is not None:
        run.write_predictions(
            config.predictions, table.texts, table.labels, predicted, probabilities.max(1).tolist()
        )
    return evaluate.measure(labels, table.labels, predicted, probabilities), reliability

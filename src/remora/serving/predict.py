"""A trained adapter at work: classify messages, or measure it on a table."""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Iterator
from typing import TextIO

import numpy as np

from remora.config import EvalConfig, PredictConfig
from remora.data.table import read_table, stream_texts
from remora.errors import ConfigError
from remora.evaluation import calibration, predictions
from remora.evaluation.metrics import Metrics, measure
from remora.models import adapter_card, saved
from remora.runtime import files
from remora.runtime.device import Precision, choose_device, choose_precision
from remora.runtime.reporter import Reporter
from remora.tree import scoring
from remora.tree.scoring import Scorer


def load_scorer(
    config: PredictConfig | EvalConfig, *, tolerance: float = 1e-2
) -> tuple[Scorer, Precision]:
    """Load an adapter around its base model, or a whole model, ready to score.

    Raises:
        ModelError: If a part is missing or broken, or the base model is another one.
    """
    device = choose_device(config.device)
    precision = choose_precision(
        device, config.precision, trains_base=adapter_card.is_full(config.adapter)
    )
    adapted, prompt, _ = saved.load_adapter(
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


def predict_stream(config: PredictConfig) -> Iterator[tuple[str, list[tuple[str, float]]]]:
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
    texts = stream_texts(config.source, text_column=config.text_column, format=config.input_format)
    for messages, probabilities in scorer.stream(texts, batch_rows=64):
        order = np.argsort(-probabilities, axis=1, kind="stable")[:, : config.top_k]
        for message, row, best in zip(messages, probabilities, order, strict=True):
            yield message, [(labels[i], float(row[i])) for i in best]


def write_predictions(config: PredictConfig, output: TextIO) -> None:
    """Write predictions as CSV, or as JSON lines, one for each message and in their order."""
    writer = csv.writer(output, lineterminator="\n")
    found = predict_stream(config)
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
            figures = [cell for label, p in best for cell in (files.defused(label), f"{p:.6f}")]
            writer.writerow([files.defused(message), *figures])
        output.flush()


def evaluate_adapter(
    config: EvalConfig, *, reporter: Reporter | None = None
) -> tuple[Metrics, calibration.Reliability]:
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
    table = read_table(
        config.data, text_column=config.text_column, label_column=config.label_column, known=labels
    )
    outside = None
    if config.out_of_scope is not None:
        outside = list(stream_texts(config.out_of_scope, text_column=config.text_column))
    validation = predictions.read_probabilities(
        config.adapter / predictions.PROBABILITIES, labels, "validation"
    )
    reporter.say(f"{len(table):,} rows; {precision}")
    scored = scoring.score_rows(scorer, table, "test", reporter)
    reliability = calibration.assess(
        scored,
        validation,
        abstain_at_accuracy=config.abstain_at_accuracy,
        out_of_scope=None if outside is None else scorer.probabilities(outside),
    )
    probabilities = scored.probabilities
    predicted = [labels[i] for i in probabilities.argmax(1)]
    if config.predictions is not None:
        predictions.write_predictions(
            config.predictions, table.texts, table.labels, predicted, probabilities.max(1).tolist()
        )
    return measure(labels, table.labels, predicted, probabilities), reliability

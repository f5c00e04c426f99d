"""The verbs predict and eval: classify messages with a trained model, or measure it on a table."""

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
from remora.models.saved import open_trained
from remora.runtime import files
from remora.runtime.reporter import Reporter
from remora.tree import scoring

BATCH_ROWS = 64
"""Messages that are scored at a time."""


def predict_stream(config: PredictConfig) -> Iterator[tuple[str, list[tuple[str, float]]]]:
    """Yield each message with its `top_k` likeliest labels and their probabilities, as they come.

    Raises:
        RemoraError: If the model, its base model or a message cannot be used.
    """
    trained = open_trained(
        config.adapter, base=config.model, device=config.device, precision=config.precision
    )
    scorer = trained.scorer(max_tokens=config.micro_batch_tokens, tolerance=config.tolerance)
    labels = scorer.prompt.labels
    if config.top_k > len(labels):
        raise ConfigError(
            f"top_k is {config.top_k} but the model has {len(labels)} labels; give at most "
            f"{len(labels)}"
        )
    texts = stream_texts(config.source, text_column=config.text_column, format=config.input_format)
    for messages, probabilities in scorer.stream(texts, batch_rows=BATCH_ROWS):
        order = np.argsort(-probabilities, axis=1, kind="stable")[:, : config.top_k]
        for message, row, best in zip(messages, probabilities, order, strict=True):
            yield message, [(labels[i], float(row[i])) for i in best]


def write_predictions(config: PredictConfig, output: TextIO) -> None:
    """Write the predictions for all messages in their order, as CSV or as JSON lines."""
    writer = csv.writer(output, lineterminator="\n")
    predicted = predict_stream(config)
    first = next(predicted)  # errors of the model or the table come before anything is written
    if not config.json:
        more = [
            f"{name}_{k}" for k in range(2, config.top_k + 1) for name in ("label", "probability")
        ]
        writer.writerow(["text", "label", "probability", *more])
    for message, best in itertools.chain([first], predicted):
        if config.json:
            ranked = [{"label": label, "probability": round(p, 6)} for label, p in best]
            output.write(json.dumps({"text": message, "labels": ranked}, ensure_ascii=False) + "\n")
        else:
            figures = [
                cell for label, p in best for cell in (files.escape_formula(label), f"{p:.6f}")
            ]
            writer.writerow([files.escape_formula(message), *figures])
        output.flush()


def evaluate_adapter(
    config: EvalConfig, *, reporter: Reporter | None = None
) -> tuple[Metrics, calibration.Reliability]:
    """Measure a trained model on a table of texts and labels.

    Returns:
        The metrics of the predictions, and how reliable their probabilities are. Temperature and
        threshold come from the validation rows that the run directory keeps.

    Raises:
        RemoraError: If the model or the table cannot be used.
    """
    reporter = reporter or Reporter()
    trained = open_trained(
        config.adapter, base=config.model, device=config.device, precision=config.precision
    )
    scorer = trained.scorer(max_tokens=config.micro_batch_tokens)
    labels = scorer.prompt.labels

    # The rows: the table's, those out of scope, and the run's own validation rows
    table = read_table(
        config.data, text_column=config.text_column, label_column=config.label_column, known=labels
    )
    outside = None
    if config.out_of_scope is not None:
        outside = list(stream_texts(config.out_of_scope, text_column=config.text_column))
    validation = predictions.read_probabilities(
        config.adapter / predictions.PROBABILITIES, labels, "validation"
    )

    # Score and measure
    reporter.say(f"{len(table):,} rows; {trained.precision}")
    if scorer.remark:
        reporter.say(scorer.remark)
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

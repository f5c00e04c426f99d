"""The verbs predict and eval: classify messages with a trained model, or measure it on a table."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TextIO

import numpy as np

from remora.config import EvalConfig, PredictConfig
from remora.data.label_forms import most_frequent_forms
from remora.data.parts import ReadOptions, Remarks
from remora.data.table import Stream, open_stream, read_table
from remora.errors import ConfigError, DataError
from remora.evaluation import calibration, predictions
from remora.evaluation.metrics import Metrics, measure
from remora.models.saved import Trained, open_trained
from remora.runtime import files
from remora.runtime.reporter import Reporter
from remora.serving import pauses
from remora.serving.prediction_files import (
    CsvWriter,
    JsonWriter,
    ParquetWriter,
    Ranked,
    Writer,
    check_output,
)
from remora.tree import scoring
from remora.tree.scoring import Scorer

BATCH_ROWS = 64
"""Messages that are scored at a time."""


def predict_stream(config: PredictConfig) -> Iterator[tuple[str, Ranked]]:
    """Yield each message with its `top_k` likeliest labels and their probabilities, as they come.

    A blank message is left out.

    Raises:
        RemoraError: If the model, its base model or a message cannot be used.
    """
    trained = _open(config)
    stream = _open_source(config, trained, Remarks())
    for batch in _answered(config, trained, stream):
        yield from ((text, ranked) for text, _, ranked in batch if text is not None)


def write_predictions(
    config: PredictConfig, output: TextIO, say: Callable[[str], None] = lambda line: None
) -> None:
    """Write the predictions for all messages in their order, beside the columns of the input.

    Args:
        config: The settings.
        output: Where to write CSV or JSON lines, if the settings name no file.
        say: Told at the end what is worth a line.

    Raises:
        RemoraError: If the model, its base model or a message cannot be used.
    """
    if config.output is not None:
        check_output(config.output)
    trained, remarks = _open(config), Remarks()
    threshold = _threshold(config, trained)
    stream = _open_source(config, trained, remarks)
    answered = _answered(config, trained, stream)
    num_rows = num_withheld = 0
    # Errors of the model or the table come before anything is written.
    first = next(answered)
    with _writer(config, stream, output) as writer:
        batch: list[tuple[str | None, list[object], Ranked]] | None = first
        while batch is not None:
            for _, values, ranked in batch:
                sure = bool(ranked) and (threshold is None or ranked[0][1] >= threshold)
                writer.write(values, ranked, ranked[0][0] if sure else None)
                num_rows += 1
                num_withheld += bool(ranked) and not sure
            writer.flush()
            batch = next(answered, None)
    for line in remarks.lines():
        say(line)
    if threshold is not None:
        say(
            f"{num_withheld:,} of {num_rows:,} rows are below the threshold {threshold:.4f} and "
            "have no label"
        )


def _open(config: PredictConfig) -> Trained:
    trained = open_trained(
        config.adapter, base=config.model, device=config.device, precision=config.precision
    )
    labels = trained.prompt.labels
    if config.top_k > len(labels):
        raise ConfigError(
            f"top_k is {config.top_k} but the model has {len(labels)} labels; give at most "
            f"{len(labels)}"
        )
    return trained


def _open_source(config: PredictConfig, trained: Trained, remarks: Remarks) -> Stream:
    return open_stream(
        config.source,
        text_column=config.text_column,
        options=ReadOptions(config.input_format, config.columns),
        keep=config.id_column,
        trained=trained.card.text_columns,
        remarks=remarks,
    )


def _answered(
    config: PredictConfig, trained: Trained, stream: Stream
) -> Iterator[list[tuple[str | None, list[object], Ranked]]]:
    """Yield batches of rows: the text, None if blank; the values to keep; the likeliest labels."""
    scorer = trained.scorer(max_tokens=config.micro_batch_tokens, tolerance=config.tolerance)
    pausing = pauses.may_pause(config.source)
    for batch in pauses.batches(stream.rows, BATCH_ROWS, pausing=pausing):
        ranked = iter(
            _ranked(scorer, [text for text, _ in batch if text is not None], config.top_k)
        )
        yield [(text, kept, [] if text is None else next(ranked)) for text, kept in batch]


def _ranked(scorer: Scorer, texts: list[str], top_k: int) -> list[Ranked]:
    if not texts:
        return []
    labels, probabilities = scorer.prompt.labels, scorer.probabilities(texts)
    order = np.argsort(-probabilities, axis=1, kind="stable")[:, :top_k]
    return [
        [(labels[i], float(row[i])) for i in best]
        for row, best in zip(probabilities, order, strict=True)
    ]


def _threshold(config: PredictConfig, trained: Trained) -> float | None:
    """Return the probability below which a row gets no label, None if all get one."""
    wanted = config.abstain_at_accuracy
    if wanted is None:
        return config.threshold
    path = config.adapter / predictions.PROBABILITIES
    validation = predictions.read_probabilities(path, trained.prompt.labels, "validation")
    if validation is None:
        raise DataError(
            f"{config.adapter} has no probabilities of validation rows to choose a threshold on;"
            " give a run directory, or a --threshold"
        )
    threshold = calibration.choose_threshold(validation, wanted)
    if threshold is None:
        raise DataError(
            f"no threshold reaches an accuracy of {wanted:.1%} on the validation rows of"
            f" {config.adapter}; ask for less, or give a --threshold"
        )
    return threshold


@contextlib.contextmanager
def _writer(config: PredictConfig, stream: Stream, output: TextIO) -> Iterator[Writer]:
    """Open what writes the predictions; a file is there whole or not at all."""
    columns = list(stream.columns)
    abstains = config.threshold is not None or config.abstain_at_accuracy is not None
    path = config.output
    with contextlib.ExitStack() as stack:
        writer: Writer
        if path is not None:
            temporary = stack.enter_context(files.replacing(path))
            if path.suffix.lower() == ".parquet":
                writer = ParquetWriter(temporary, columns, config.top_k, stream.schema)
            else:
                output = stack.enter_context(
                    temporary.open("w", encoding="utf-8", errors="backslashreplace", newline="")
                )
        if config.json or (path is not None and path.suffix.lower() == ".jsonl"):
            writer = JsonWriter(output, columns, abstains=abstains)
        elif path is None or path.suffix.lower() == ".csv":
            writer = CsvWriter(output, columns, config.top_k, safe=config.spreadsheet_safe)
        yield writer
        writer.close()


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
    card, remarks = trained.card, Remarks()
    options = ReadOptions(config.input_format, config.columns)
    table = read_table(
        config.data,
        text_column=config.text_column,
        label_column=config.label_column,
        known=labels,
        options=options,
        strict=config.strict,
        forms=most_frequent_forms(labels) if config.merge_labels else None,
        remarks=remarks,
        trained=(*card.text_columns, card.label_column) if card.text_columns else (),
    )
    outside = None
    if config.out_of_scope is not None:
        rows = open_stream(
            config.out_of_scope,
            text_column=config.text_column,
            keep=(),
            trained=card.text_columns,
            remarks=remarks,
        ).rows
        outside = [text for text, _ in rows if text is not None]
    validation = predictions.read_probabilities(
        config.adapter / predictions.PROBABILITIES, labels, "validation"
    )

    # Score and measure
    for line in remarks.lines():
        reporter.say(line)
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

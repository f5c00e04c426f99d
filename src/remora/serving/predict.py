"""The verbs predict and eval: classify messages with a trained model, or measure it on a table."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import TextIO

import numpy as np

from remora.config import EvalConfig, PredictConfig
from remora.data.label_forms import most_frequent_forms, renamed
from remora.data.parts import ReadOptions, Remarks
from remora.data.table import Stream, open_stream, read_table
from remora.errors import ConfigError, DataError
from remora.evaluation import calibration, multi_label, predictions
from remora.evaluation.level_metrics import with_levels
from remora.evaluation.metrics import Metrics
from remora.models.metadata import AdapterCard
from remora.models.saved import open_trained
from remora.runtime import files
from remora.runtime.reporter import Reporter
from remora.serving import pauses
from remora.serving.label_set_columns import open_predictions
from remora.serving.prediction_files import Ranked, check_names, check_output
from remora.serving.predictor import BATCH_ROWS, Answer, Predictor
from remora.tree import scoring


def predict_stream(config: PredictConfig) -> Iterator[tuple[str, Ranked]]:
    """Yield each message with its `top_k` likeliest labels and their probabilities, as they come.

    A blank message is left out.

    Raises:
        RemoraError: If the model, its base model or a message cannot be used.
    """
    predictor = Predictor.of(config)
    stream = _open_source(config, predictor, Remarks())
    for batch in _answered(config, predictor, stream):
        yield from ((text, answer.ranked) for text, _, answer in batch if text is not None)


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
        check_output(config.output, config.source)
    predictor, remarks = Predictor.of(config), Remarks()
    predictor.open()
    stream = _open_source(config, predictor, remarks)
    answered = _answered(config, predictor, stream)
    num_rows = num_withheld = 0
    # Errors of the model or the table come before anything is written.
    first = next(answered)
    card = predictor.trained.card
    with open_predictions(
        config, card, stream.columns, stream.schema, config.output or output
    ) as writer:
        batch: list[tuple[str | None, list[object], Answer]] | None = first
        while batch is not None:
            for _, values, answer in batch:
                writer.write(values, *answer)
                num_rows += 1
                num_withheld += bool(answer.ranked) and answer.label is None
            writer.flush()
            batch = next(answered, None)
    for line in (*remarks.lines(), *predictor.remarks()):
        say(line)
    if predictor.threshold is not None:
        say(withheld(num_withheld, num_rows, predictor.threshold))


def withheld(num_withheld: int, num_rows: int, threshold: float) -> str:
    """Return the sentence on the rows that got no label."""
    return (
        f"{num_withheld:,} of {num_rows:,} rows are below the threshold {threshold:.4f} and "
        "have no label"
    )


def _open_source(config: PredictConfig, predictor: Predictor, remarks: Remarks) -> Stream:
    stream = open_stream(
        config.source,
        text_column=config.text_column,
        options=ReadOptions(config.input_format, config.columns),
        keep=config.id_column,
        trained=predictor.trained.card.text_columns,
        remarks=remarks,
    )
    check_names(config, stream.columns)
    return stream


def _answered(
    config: PredictConfig, predictor: Predictor, stream: Stream
) -> Iterator[list[tuple[str | None, list[object], Answer]]]:
    """Yield batches of rows: the text, None if blank; the values to keep; the answer."""
    pausing = pauses.may_pause(config.source)
    for batch in pauses.batches(stream.rows, BATCH_ROWS, pausing=pausing):
        answers = predictor.classify([text for text, _ in batch])
        yield [(*row, answer) for row, answer in zip(batch, answers, strict=True)]


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
    if config.predictions is not None:
        files.check_output(config.predictions, "--predictions", source=config.data, suffix=".csv")
    trained = open_trained(
        config.adapter, base=config.model, device=config.device, precision=config.precision
    )
    scorer = trained.scorer(max_tokens=config.micro_batch_tokens)
    labels = scorer.prompt.labels

    # The rows: the table's, those out of scope, and the run's own validation rows
    card, remarks = trained.card, Remarks()
    _refuse_settings(config, card)
    options = ReadOptions(config.input_format, config.columns)
    known = (*labels, *card.rename_labels)
    table = read_table(
        config.data,
        text_column=config.text_column,
        label_column=config.label_column,
        known=known,
        options=options,
        strict=config.strict,
        forms=most_frequent_forms(known) if config.merge_labels else None,
        remarks=remarks,
        trained=(*card.text_columns, card.label_column) if card.text_columns else (),
        form=replace(card.label_form, columns=()) if config.label_column else card.label_form,
    )
    table = table.relabelled(partial(renamed, names=card.rename_labels))
    if table.multi_label and not card.multi_label:
        raise DataError(
            f"{config.data} has rows with several labels, and {config.adapter} was trained on rows "
            "with one; give rows with one label"
        )
    outside = _read_outside(config, card, remarks)
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
    if isinstance(scored, predictions.ScoredSets):
        scored = replace(scored, thresholds=np.array(card.thresholds))
    reliability = calibration.assess(
        scored,
        validation,
        abstain_at_accuracy=config.abstain_at_accuracy,
        out_of_scope=None if outside is None else scorer.probabilities(outside),
    )
    if scorer.told_cut:
        reporter.say(scorer.told_cut)
    given = multi_label.labels_given(scored, labels)
    if config.predictions is not None:
        predictions.write_predictions(
            config.predictions,
            table.texts,
            table.labels,
            given,
            scored.confidence.tolist(),
            advice="give another file with --predictions",
        )
    metrics = multi_label.measured(scored, table, labels)
    return with_levels(metrics, card.hierarchy, table.labels, given), reliability


def _read_outside(config: EvalConfig, card: AdapterCard, remarks: Remarks) -> list[str] | None:
    """Return the messages that no label fits, None if none are given; raises DataError."""
    if config.out_of_scope is None:
        return None
    rows = open_stream(
        config.out_of_scope,
        text_column=config.text_column,
        keep=(),
        trained=card.text_columns,
        remarks=remarks,
    ).rows
    texts = [text for text, _ in rows if text is not None]
    if not texts:
        raise DataError(
            f"{config.out_of_scope} has blank texts only; give messages that no label fits"
        )
    return texts


def _refuse_settings(config: EvalConfig, card: AdapterCard) -> None:
    """Refuse what needs one label a row; raises ConfigError."""
    for name in ("abstain_at_accuracy", "out_of_scope"):
        if card.multi_label and getattr(config, name) is not None:
            raise ConfigError(
                f"{name} is for models of one label a row, and {config.adapter} gives several; "
                "leave it out"
            )

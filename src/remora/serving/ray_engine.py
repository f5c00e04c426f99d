"""`predict --engine ray`: files of any size to a folder of parts, by workers of Ray.

One process reads, in order, and writes; workers answer messages. So the rules of reading and the
forms of the output are those of `predict`, workers need the model and nothing else, and every row
is written once whoever dies: a part is whole or not there, and no other process writes.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from remora.config import PredictConfig
from remora.data import locations
from remora.data.locations import Location
from remora.data.parts import ReadOptions, Remarks
from remora.data.table import Stream, open_part
from remora.errors import DataError
from remora.formatting import listed
from remora.models import metadata, saved
from remora.models.metadata import AdapterCard
from remora.runtime import files
from remora.runtime.reporter import Reporter
from remora.runtime.stop import Stop
from remora.serving import pauses, ray_workers
from remora.serving.label_set_columns import open_predictions
from remora.serving.part_files import PartFolder, Row
from remora.serving.predict import withheld
from remora.serving.prediction_files import (
    ROW_GROUP_ROWS,
    check_format,
    check_names,
    input_schema,
)
from remora.serving.predictor import (
    BATCH_ROWS,
    Answer,
    Predictor,
    check_top_k,
    find_threshold,
    find_thresholds,
)
from remora.serving.ray_workers import Workers

CHUNK_ROWS = 4 * BATCH_ROWS
"""Rows that a worker gets at a time: the batches are those of `predict`, and a call costs a ms."""

RATE_SECONDS = 60.0
"""Time over which the shown rate is measured."""

DEPENDS_ON = (
    *("text_column", "id_column", "input_format", "columns", "top_k", "threshold"),
    *("abstain_at_accuracy", "spreadsheet_safe", "tolerance", "micro_batch_tokens", "precision"),
)
"""The settings that rows depend on: another value of one is another run."""


def write_parts(config: PredictConfig, reporter: Reporter | None = None) -> None:
    """Write the predictions for all rows of all files as parts of a folder.

    Parts that an earlier start has finished stay as they are, and their rows are not computed.

    Args:
        config: The settings, with `output`.
        reporter: Told of the progress, and of what is worth a line.

    Raises:
        Stopped: If SIGTERM or SIGINT asked for it.
        RemoraError: If the model, the cluster, a table or the folder cannot be used. What was
            answered before is kept, and the same command resumes there.
    """
    reporter, remarks = reporter or Reporter(), Remarks()
    assert config.output is not None
    check_format(config.output)

    # What there is to do, and what is done
    ray_workers.require()
    card, num_weights = saved.find_weights(config.adapter, base=config.model)
    check_top_k(config, card.labels)
    find_thresholds(config, card)  # refuses what is not for several labels
    threshold = None if card.multi_label else find_threshold(config, card.labels)
    sources = locations.find_files(config.source)
    columns, schema = _shared_columns(config, sources, card)
    folder = PartFolder(config.output, _settings(config, schema), sources)
    with folder.locked():
        if folder.journal.finished:
            reporter.say(f"all {_counted(folder)} are there already")
            return
        if folder.journal.parts:
            reporter.say(f"{_counted(folder)} are there already; resuming after them")

        # The rows, in order, to the workers and back
        stop = Stop()
        with ray_workers.connected(config.address) as ray, stop.listening(), stop.deferred():
            room = ray_workers.find_room(ray, config, num_weights)
            reporter.say(f"{len(sources):,} file{'' if len(sources) == 1 else 's'}; {room}")
            # The threshold as it is, since workers may lack the run that it was chosen on
            if threshold is not None:
                config = dataclasses.replace(config, threshold=threshold, abstain_at_accuracy=None)
            workers: Workers[tuple[int, list[Row]]] = Workers(
                ray, Predictor.of(config), room, reporter.say
            )
            batches = _batches(config, sources, folder, card, remarks)
            answered = workers.answered(
                (((place, rows), [text for text, _ in rows]) for place, rows in batches),
                stop.check,
            )
            progress = _Progress(reporter, room.num_workers)
            opened = functools.partial(open_predictions, config, card, columns, schema)
            folder.write(_with_rows(answered), config.part_rows, opened, progress.advance)
            folder.finish()

    # What is worth a line
    for line in remarks.lines():
        reporter.say(line)
    journal = folder.journal
    if threshold is not None:
        reporter.say(withheld(journal.num_withheld, journal.num_rows(), threshold))
    reporter.say(f"{_counted(folder)} in {config.output}{progress.rate()}")


def _counted(folder: PartFolder) -> str:
    num_parts = len(folder.journal.parts)
    parts = f"{num_parts:,} part{'' if num_parts == 1 else 's'}"
    return f"{folder.journal.num_rows():,} rows in {parts}"


def _settings(config: PredictConfig, schema: Any) -> dict[str, Any]:
    """Return what the rows depend on beside the sources."""
    found: dict[str, Any] = {name: getattr(config, name) for name in DEPENDS_ON}
    adapter = metadata.adapter_folder(config.adapter)
    names = ("adapter_model.safetensors", "adapter_config.json", "remora.json")
    # A whole model has the last alone, which holds the hash of its weights.
    found["adapter"] = files.sha256([adapter / n for n in names if (adapter / n).is_file()])[:16]
    return found | {"schema": None if schema is None else str(schema.remove_metadata())}


def _opened(
    config: PredictConfig, location: Location, card: AdapterCard, remarks: Remarks
) -> Stream:
    return open_part(
        locations.table_part(location, ReadOptions(config.input_format, config.columns)),
        text_column=config.text_column,
        keep=config.id_column,
        trained=card.text_columns,
        remarks=remarks,
    )


def _shared_columns(
    config: PredictConfig, sources: Sequence[Location], card: AdapterCard
) -> tuple[list[str], Any]:
    """Return the columns that are kept, and their schema of Arrow if the output has one.

    Looks into every file, so that one that differs shows before any work.

    Raises:
        DataError: If a file has other columns than the first, or no rows.
    """
    columns: list[str] | None = None
    schema = None
    for location in sources:
        stream = _opened(config, location, card, Remarks())
        if columns is None:
            columns, schema = list(stream.columns), stream.schema
            check_names(config, columns)
            if check_format(str(config.output)) == ".parquet":
                first = [kept for _, kept in islice(stream.rows, ROW_GROUP_ROWS)]
                schema = input_schema(columns, list(zip(*first, strict=True)), schema)
        elif list(stream.columns) != columns:
            raise DataError(
                f"{location.name} has the columns {listed(stream.columns)}, where"
                f" {sources[0].name} has {listed(columns)}; give all files the same columns"
            )
    assert columns is not None
    return columns, schema


def _batches(
    config: PredictConfig,
    sources: Sequence[Location],
    folder: PartFolder,
    card: AdapterCard,
    remarks: Remarks,
) -> Iterator[tuple[int, list[Row]]]:
    """Yield the rows that no part has yet, in batches, each with the place of its source."""
    parts = folder.journal.parts
    current = parts[-1]["source"] if parts else 0  # those before it are whole
    for place, location in enumerate(sources[current:], current):
        rows = iter(_opened(config, location, card, remarks).rows)
        num_done = folder.journal.num_rows(place) if place == current else 0
        for _ in islice(rows, num_done):
            pass
        for batch in pauses.batches(rows, CHUNK_ROWS, pausing=False):
            yield place, batch
        if locations.changed(location):
            raise DataError(f"{location.name} changed while it was read; give another --output")


def _with_rows(
    answered: Iterator[tuple[tuple[int, list[Row]], list[Answer]]],
) -> Iterator[tuple[int, list[Row], list[Answer]]]:
    for (place, rows), answers in answered:
        yield place, rows, answers


class _Progress:
    """Reports rows, and rows a second over all workers."""

    def __init__(self, reporter: Reporter, num_workers: int) -> None:
        self._reporter = reporter
        self._workers = f"{num_workers} worker{'' if num_workers == 1 else 's'}"
        self._first: tuple[float, int] | None = None  # when so many rows were done
        self._last: deque[tuple[float, int]] = deque()
        self._done = 0

    def advance(self, num_rows: int) -> None:
        """Count rows that are written."""
        self._done += num_rows
        self._last.append((time.monotonic(), self._done))
        self._first = self._first or self._last[0]  # the workers were loading the model until then
        while self._last[-1][0] - self._last[0][0] > RATE_SECONDS:
            self._last.popleft()
        rate = _rate(self._last[0], self._last[-1])
        self._reporter.status(f"{self._done:,} rows{rate}, {self._workers}")

    def rate(self) -> str:
        """Return the rate over all, nothing where it could not be measured."""
        return _rate(self._first, self._last[-1]) if self._first else ""


def _rate(first: tuple[float, int], last: tuple[float, int]) -> str:
    seconds, num_rows = last[0] - first[0], last[1] - first[1]
    return f", {num_rows / seconds:,.0f} rows/s" if num_rows and seconds > 0 else ""

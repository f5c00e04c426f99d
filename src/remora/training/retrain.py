"""A run trained again on its rows as a person has corrected them, and what that changed."""

from __future__ import annotations

import itertools
import re
import tempfile
from dataclasses import replace
from pathlib import Path

from remora.config import RetrainConfig, TrainConfig
from remora.config.train import CORRECTIONS
from remora.data.corrections import RELABEL, Sheet, read_sheet
from remora.data.dataset import Dataset, load_again
from remora.errors import DataError
from remora.evaluation import results
from remora.evaluation.change import Change, measure_change
from remora.evaluation.run_commands import command
from remora.models import metadata
from remora.runtime import files, run_directory
from remora.runtime.reporter import Reporter
from remora.training import resume
from remora.training.finish import TrainResult, held_out_rows
from remora.training.run import train


def retrain_run(
    config: RetrainConfig, *, reporter: Reporter | None = None
) -> tuple[TrainResult, Change]:
    """Train with a run's settings on its corrected training rows; compare the two runs.

    Validation and test rows, and their labels, are those of the run. What the run itself was
    corrected by still applies to the rows that the new decisions do not list.

    Returns:
        The results of the new run, and what has changed.

    Raises:
        DataError: If the run is not finished or its rows have changed, or there is no decision that
            changes a training row.
        RemoraError: As `train` does.
    """
    reporter = reporter or Reporter()
    before = results.read(config.run)
    with tempfile.TemporaryDirectory(prefix="remora-") as folder:
        settings, dataset = _corrected(config, Path(folder), reporter)
        assert dataset.corrections is not None
        result = train(settings, reporter=reporter)
    after = results.read(result.directory)
    _, held_out = held_out_rows(dataset)
    decisions = dataset.corrections.decisions
    decided = [
        decisions.get(row, label)
        for row, label in zip(held_out.rows, held_out.labels, strict=bool(held_out.rows))
    ]
    return result, measure_change(before, after, decided or None)


def _corrected(
    config: RetrainConfig, folder: Path, reporter: Reporter
) -> tuple[TrainConfig, Dataset]:
    """Return the settings of the new run, and its rows; files that it needs are in the folder."""
    path = config.corrections or config.run / RELABEL
    if config.corrections is None and not path.is_file():
        raise DataError(
            f"{config.run} has no {RELABEL}; run `{command('diagnose', config.run)}` and "
            f"`{command('review', config.run)}` first"
        )
    run = config.run if config.run.name else config.run.resolve()
    old = run_directory.read_settings(run)
    card = metadata.card_of_run(run)
    moved = metadata.base_name(card, config.model, run) if card else config.model
    old = replace(old, model=moved or old.model)
    old = replace(old, learning_curve=None, rows_per_class=old.num_per_class)
    settings = replace(
        old,
        corrections=str(path),
        name=config.name or _free_name(run),
        output=run.parent,
    )
    before, dataset = load_again(old), load_again(settings)
    run_directory.refuse_changed_rows(config.run, old.data, before.summary.sha256)
    if before.corrections and (sheet := _with_earlier(read_sheet(path), before.corrections.sheet)):
        settings = replace(settings, corrections=str(folder / CORRECTIONS))
        files.write_csv(folder / CORRECTIONS, sheet.columns, sheet.rows())
        dataset = load_again(settings)
        reporter.say(
            f"{config.run} was corrected before; its decisions on rows that {path} does not list"
            " still apply"
        )
    assert dataset.corrections is not None
    if before.summary.sha256 == dataset.summary.sha256:
        raise DataError(
            f"{path} holds no decision that changes a training row; decide with "
            f"`{command('review', config.run)}`"
        )
    return settings, dataset


def _with_earlier(sheet: Sheet, earlier: Sheet) -> Sheet | None:
    """Return a sheet with earlier records on rows that it does not list; None without any."""
    listed = {record["row"].strip() for record in sheet.records}
    more = [record for record in earlier.records if record["row"].strip() not in listed]
    if not more:
        return None
    records = tuple({name: each.get(name, "") for name in sheet.columns} for each in more)
    return replace(
        sheet,
        records=sheet.records + records,
        lines=sheet.lines + tuple(range(len(records))),
    )


def _free_name(run: Path) -> str:
    """Return the name of the new run: of the old one with -cleaned, and a number if it is taken."""
    stem = re.sub(r"-cleaned(-\d+)?$", "", run.name) + "-cleaned"
    names = itertools.chain([stem], (f"{stem}-{number}" for number in itertools.count(2)))
    return next(name for name in names if not resume.is_finished(run.parent / name))

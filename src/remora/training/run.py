"""A training run: everything around the loop, in its order."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from remora.config import TrainConfig
from remora.config.several_labels import settled
from remora.config.train import CORRECTIONS
from remora.data.dataset import Dataset, load_data
from remora.errors import ConfigError, ResourceError
from remora.evaluation.multi_label import with_thresholds
from remora.models import metadata, saved
from remora.planning import plan
from remora.runtime import files, launch, memory, run_directory, sharding
from remora.runtime.process_group import join
from remora.runtime.reporter import Reporter
from remora.runtime.stop import Stop
from remora.training import resume, rivals, tracking
from remora.training.checkpoint import Checkpoint
from remora.training.class_weights import class_weights
from remora.training.finish import (
    TrainResult,
    add_rivals,
    conclude,
    held_out_rows,
    report_peak,
    tables_to_measure_on,
    write_pages,
)
from remora.training.loop import fit
from remora.training.progress import Progress
from remora.training.session import ModelLoader, Session, open_session
from remora.training.trainable import load_trainable
from remora.tree import scoring


def train(config: TrainConfig, *, reporter: Reporter | None = None) -> TrainResult:
    """Train as the settings say, measure the result, and leave everything in a run directory.

    Raises:
        RemoraError: The settings, the data, the model or the disk; see `remora.errors`.
        SystemExit: In other processes than the first, where several train together.
    """
    if config.devices not in {1, launch.world_size()}:
        raise ConfigError(
            f"devices is {config.devices} and there are {launch.world_size()} processes; use the "
            "command line, which starts them, or leave it out under torchrun"
        )
    stop = Stop(config.max_seconds)
    with stop.listening():
        return train_until(config, stop, reporter or Reporter())


def train_until(
    config: TrainConfig,
    stop: Stop,
    reporter: Reporter,
    *,
    load_rows: Callable[[TrainConfig], Dataset] = load_data,
    load_model: ModelLoader = load_trainable,
    concluded: Callable[[TrainResult], None] = lambda result: None,
) -> TrainResult:
    """Train as `train` does, as a part of something larger that listens to requests to stop.

    Args:
        config: The settings.
        stop: Whether to stop.
        reporter: Told how it goes.
        load_rows: Returns the rows.
        load_model: Returns the model, made trainable.
        concluded: Called once the results are written, before the run counts as finished.
    """
    with contextlib.ExitStack() as stack:
        group = stop.group = stack.enter_context(join())
        reporter = reporter if group.is_first else Reporter()
        # Rows, the same in every process
        with group.together():
            tracking.check(config.trackers)
            encoder = rivals.find_encoder(config)
            dataset = load_rows(config)
            config = _introduce(config, dataset, reporter)
        sha256 = dataset.summary.sha256
        group.refuse_differences({"data": sha256, **resume.fixed(config), "model": config.model})
        # A run directory to resume in, or a new one
        directory, resumed = resume.find(config, sha256, group, stack, reporter.say)
        session = stack.enter_context(
            open_session(
                config,
                dataset,
                resumed=resumed,
                needs_disk=directory is None,
                load=load_model,
                group=group,
                stop=stop,
                reporter=reporter,
            )
        )
        directory = _prepare_directory(session, directory, stack)
        trackers = stack.enter_context(tracking.open_trackers(session, directory))
        _, held_out = held_out_rows(dataset)
        chosen = rivals.choose(session, held_out, encoder)
        if config.baselines != ("none",):
            session.reporter.say(chosen.line(len(dataset.train), len(held_out)))
        # Train and score
        with stop.deferred():
            progress = _fit(session, directory, resumed, trackers)
            began = time.perf_counter()
            scorer = session.scorer(tolerance=config.tolerance)
            tables = tables_to_measure_on(dataset).items()
            scores = with_thresholds(
                {n: scoring.score_rows(scorer, t, n, reporter, stop, group) for n, t in tables}
            )
            progress.test_seconds = time.perf_counter() - began
        stop.check()
        # Measure and write
        result = None
        if group.is_first:
            result = conclude(session, directory, progress, scores, chosen.svm)
            trackers.log(result.tracked(), progress.step)
        group.share(None)  # the others wait here, where a signal ends them at once
        with stop.deferred():
            base = rivals.of_base(session, chosen, held_out, directory)
        stop.check()
        if result is not None:
            answers = rivals.answers(session, chosen, base, held_out)
            if answers:
                result = add_rivals(session, result, scores, answers)
            write_pages(directory, session.reporter.say)
            concluded(result)
            resume.finish(directory)
    if result is None:
        raise SystemExit(0)  # the first process has all results
    return result


def _introduce(config: TrainConfig, dataset: Dataset, reporter: Reporter) -> TrainConfig:
    """Refuse rows that cannot be measured on, and broken class weights; tell of the rows.

    Returns:
        The settings, with what follows from whether rows have several labels.
    """
    config = settled(config, is_multi_label=dataset.multi_label)
    tables_to_measure_on(dataset)
    class_weights(config.class_weights, dataset)
    for line in dataset.summary.lines():
        reporter.say(line)
    return config


def _prepare_directory(
    session: Session, directory: Path | None, stack: contextlib.ExitStack
) -> Path:
    """Return the run directory, made and held by the first process, with the run's settings."""
    config, group, sha256 = session.config, session.group, session.card.base_sha256
    with group.together():
        if directory:
            resume.refuse_other_base(directory, sha256)
        elif group.is_first:
            directory = run_directory.create(config.output, config.name, config.data, config.model)
            stack.enter_context(resume.hold(directory))
        if directory and group.is_first:
            session.reporter.say(f"run directory: {directory}")
            environment = run_directory.environment(session.device) | {"base_sha256": sha256}
            _write_settings(directory, environment, session.dataset, session.plan, config)
    return Path(group.share(str(directory)))


def _fit(
    session: Session,
    directory: Path,
    resumed: Checkpoint | None,
    trackers: tracking.Trackers,
) -> Progress:
    """Train, with the first process writing metrics, checkpoints and the best weights."""
    config, group = session.config, session.group

    def save() -> None:
        weights = sharding.weights(session.model, group) if config.method == "full" else None
        if group.is_first:
            if not directory.is_dir():
                raise ResourceError(f"the run directory {directory} is gone; train again")
            path = directory / metadata.FOLDERS[config.method]
            saved.save(session.model, session.prompt, session.card, path, weights)

    with tracking.metrics_log(directory, session, resumed, trackers) as log:
        progress = fit(
            session,
            log=log,
            save=save,
            checkpoints=directory / resume.CHECKPOINTS,
            resumed=resumed,
            num_scored=session.plan.num_scored_rows,
        )
    peak = max(progress.peak_bytes, memory.peak_bytes(session.device))
    progress.peak_bytes = max(group.gather(peak))
    if group.is_first:
        planned = replace(session.plan, **progress.expected)
        report_peak(directory, planned, progress.peak_bytes, session.reporter)
    return progress


def _write_settings(
    directory: Path,
    environment: dict[str, Any],
    dataset: Dataset,
    planned: plan.Plan,
    config: TrainConfig,
) -> None:
    """Write everything needed to repeat the run, and its plan."""
    files.write_json(directory / "environment.json", environment)
    files.write_json(directory / "data.json", dataset.summary.to_dict())
    files.write_json(directory / "plan.json", planned.to_dict())
    if dataset.corrections:
        sheet, path = dataset.corrections.sheet, directory / CORRECTIONS
        files.write_csv(path, sheet.columns, sheet.rows())
        config = replace(config, corrections=str(path))
    files.write_text(directory / "config.toml", config.to_toml())

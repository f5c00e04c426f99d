"""A training run: everything around the loop, in its order."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from remora.config import TrainConfig
from remora.data.dataset import Dataset, load_data
from remora.data.prompt import Prompt
from remora.errors import ConfigError
from remora.models import adapter_card, loading, lora, saved
from remora.runtime import launch, memory, run_directory, sharding
from remora.runtime.process_group import join
from remora.runtime.reporter import Reporter
from remora.runtime.stop import Stop
from remora.training import resume, tracking
from remora.training.finish import TrainResult, conclude, tell_peak
from remora.training.loop import fit
from remora.training.setup import (
    accelerator_for,
    choose_arithmetic,
    introduce,
    load_trainable,
    plan_run,
    refuse_full_disk,
    short_rows,
    tables_to_measure_on,
    write_settings,
)
from remora.tree import scoring
from remora.tree.check import check_tree
from remora.tree.scoring import Scorer


def train(config: TrainConfig, *, reporter: Reporter | None = None) -> TrainResult:
    """Train as the settings say, measure what was trained, and leave everything in a run directory.

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


def train_until(  # noqa: PLR0912, PLR0915 - what a run does, in its order
    config: TrainConfig,
    stop: Stop,
    reporter: Reporter,
    *,
    load: Callable[[TrainConfig], Dataset] = load_data,
    prepare: Callable[..., tuple[Any, Prompt, adapter_card.AdapterCard, Path]] = load_trainable,
    concluded: Callable[[TrainResult], None] = lambda result: None,
) -> TrainResult:
    """Train as `train` does, as a part of something larger that listens to requests to stop.

    Args:
        config: The settings.
        stop: Whether to stop.
        reporter: Told how it goes.
        load: Gives the rows.
        prepare: Gives what trains.
        concluded: Called once the results are written, before the run counts as finished.
    """
    with contextlib.ExitStack() as stack:
        group = stop.group = stack.enter_context(join())
        reporter = reporter if group.is_first else Reporter()
        with group.together():
            tracking.check(config.trackers)
            dataset = load(config)
            measured_on, held_out = next(iter(tables_to_measure_on(dataset).items()))
            for line in dataset.summary.lines():
                reporter.say(line)
            device, precision = choose_arithmetic(config, group.size, reporter)
        sha256 = dataset.summary.sha256
        group.refuse_differences({"data": sha256, **resume.fixed(config), "model": config.model})
        directory, resumed = resume.find(config, sha256, group, stack, reporter.say)
        with group.together():
            planned, heaviest = plan_run(
                resume.as_before(config, resumed),
                dataset,
                precision,
                device,
                reporter,
                num_processes=group.size,
            )
            if not directory:
                refuse_full_disk(planned, config)
            stack.enter_context(torch.random.fork_rng())
            torch.manual_seed(config.seed)
            where = torch.device("cpu") if planned.shard else device
            if planned.shard:
                memory.map_arrays(device)
            adapted, prompt, card, folder = prepare(config, dataset.labels, precision, where)
            parameters = lora.count_parameters(adapted)
            for line in introduce(config, dataset, prompt, adapted, parameters):
                reporter.say(line)
            accelerator = stack.enter_context(accelerator_for(precision, device))
        group.refuse_differences({"base model": card.base_sha256, "shard": planned.shard})
        if planned.shard:
            sharding.apply(adapted, device, group)
        with group.together():
            with accelerator.autocast():
                check_tree(adapted, short_rows(dataset.train, prompt))
            if planned.shard:
                adapted.reset_iter_state()  # of a pass in blocks that the model may have refused
            if directory:
                resume.refuse_other_base(directory, card.base_sha256)
            elif group.is_first:
                directory = run_directory.create(
                    config.output, config.name, config.data, config.model
                )
                stack.enter_context(resume.hold(directory))
            if directory and group.is_first:
                reporter.say(f"run directory: {directory}")
                environment = run_directory.environment(device) | {"base_sha256": card.base_sha256}
                write_settings(directory, environment, dataset, planned, config)
        directory = Path(group.share(str(directory)))
        loading.set_checkpointing(adapted, planned.checkpointing)
        if not group.is_first:
            torch.manual_seed(config.seed + group.rank)  # for dropout of its own

        def save() -> None:
            weights = sharding.weights(adapted, group) if config.method == "full" else None
            if group.is_first:
                path = directory / adapter_card.FOLDERS[config.method]
                saved.save(adapted, prompt, card, path, weights)

        with stop.deferred():
            with contextlib.ExitStack() as logging:
                log = None
                if group.is_first:
                    log = logging.enter_context(
                        tracking.metrics_log(directory, config, resumed, accelerator)
                    )
                fitted = fit(
                    adapted,
                    prompt,
                    dataset,
                    planned.applied_to(config),
                    accelerator=accelerator,
                    precision=precision,
                    heaviest=heaviest,
                    graphs=planned.memory.graphs > 0,
                    log=log,
                    save=save,
                    checkpoints=directory / resume.CHECKPOINTS,
                    resumed=resumed,
                    stop=stop,
                    group=group,
                    reporter=reporter,
                )
            most = max(group.gather(max(fitted.peak_bytes, memory.peak_bytes(device))))
            fitted.peak_bytes = most
            if group.is_first:
                tell_peak(directory, planned, most, reporter)
            scorer = Scorer(
                adapted,
                prompt,
                max_tokens=planned.micro_batch_tokens,
                autocast=precision.autocast,
                limit_bytes=heaviest.limit_bytes,
            )
            scores = {
                name: scoring.score_rows(scorer, table, name, reporter, stop, group)
                for name, table in tables_to_measure_on(dataset).items()
            }
        stop.check()
        result = None
        if group.is_first:
            result = conclude(
                config,
                dataset,
                held_out,
                measured_on,
                scores,
                fitted,
                parameters,
                directory,
                folder,
                reporter,
            )
            concluded(result)
            resume.finish(directory)
    if result is None:
        raise SystemExit(0)  # the first process has all results
    return result

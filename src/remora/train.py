"""The training loop: tree, forward, loss, backward, clip, step, log, evaluate, save."""

from __future__ import annotations

import contextlib
import itertools
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from remora import (
    checkpoint,
    data,
    launch,
    lora,
    memory,
    model,
    plan,
    quantize,
    resume,
    run,
    score,
    tracking,
    tree,
)
from remora.checkpoint import Checkpoint
from remora.conclude import TrainResult, conclude
from remora.config import Method, TrainConfig
from remora.data import Dataset, Table
from remora.device import Precision, choose_device, choose_precision, hardware_here
from remora.errors import ConfigError, DataError, DivergedError, ResourceError, Stopped
from remora.micro_batches import MicroBatches
from remora.progress import Progress, Reporter, Step, Validation, spoken_bytes, spoken_seconds
from remora.prompt import Prompt, TokenSequence
from remora.ranks import Ranks, join
from remora.score import Scorer
from remora.stop import Stop

MAX_SKIPPED = 5
"""Steps in a row without a finite loss and gradient after which a run ends."""


def fit(  # noqa: PLR0912, PLR0915 - the loop, to be read top to bottom
    adapted: Any,
    prompt: Prompt,
    dataset: Dataset,
    config: TrainConfig,
    *,
    accelerator: Any,
    precision: Precision,
    heaviest: plan.Heaviest | None = None,
    log: Callable[[dict[str, Any]], None] | None = None,
    save: Callable[[], Any] | None = None,
    checkpoints: Path | None = None,
    resumed: Checkpoint | None = None,
    stop: Stop | None = None,
    ranks: Ranks | None = None,
    reporter: Reporter | None = None,
) -> Progress:
    """Train an adapter or a whole model; it ends up with the weights that validated best.

    Args:
        adapted: PEFT's model, or a plain one; its trainable parameters are in float32.
        prompt: How messages are asked and labels are answered.
        dataset: Rows to train and to validate on; without validation rows the last weights stay.
        config: The settings.
        accelerator: accelerate's Accelerator for the device and the precision.
        precision: What is computed in.
        heaviest: The batch that needs most memory, which is tried before the first step, so that
            what cannot fit fails in seconds.
        log: Called with each record as a dict.
        save: Called when the weights have become better than before.
        checkpoints: Folder to save the state in, now and then, on request and at the end.
        resumed: What to go on from; the run ends with the bits it would have had undisturbed.
        stop: Asked after each step whether to save and stop.
        ranks: The processes that train together, each in such a call; the first one saves.
        reporter: Told how it goes.

    Raises:
        DivergedError: If the loss or a gradient is not finite for several steps in a row.
        ResourceError: If the memory does not suffice for a single row, or the disk fails.
        Stopped: If that was asked for; the state is saved.
    """
    reporter, stop, ranks = reporter or Reporter(), stop or Stop(), ranks or Ranks()
    named = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    parameters = list(named.values())
    optimizer, scheduler, num_steps = _optimizer(named, adapted, dataset, config, accelerator)
    steps_per_epoch = math.ceil(len(dataset.train) / config.batch_size)
    eval_steps = config.eval_steps or steps_per_epoch
    best_weights: list[Tensor] | None = None
    progress = Progress(micro_batch_tokens=config.max_tokens)
    scaler, device = accelerator.scaler, accelerator.device
    if resumed:
        progress = Progress.restored(resumed.state["progress"])
        best_weights = checkpoint.restore(
            resumed, named, optimizer, scheduler, scaler, device, ranks
        )
        reporter.say(f"going on after step {progress.step:,} of {num_steps:,}")
    micro_batches = MicroBatches(
        adapted, progress.micro_batch_tokens, accelerator, heaviest, ranks, reporter
    )
    if heaviest and progress.step < num_steps:
        seconds_per_token = micro_batches.try_heaviest()
        left = heaviest.run_tokens * (num_steps - progress.step) / num_steps
        reporter.say(_expected_time(seconds_per_token * left, num_steps - progress.step))
    began, saved = time.perf_counter() - progress.seconds, time.monotonic()
    saved_name = resumed.name if resumed else ""

    def save_checkpoint() -> None:
        nonlocal saved, saved_name
        if checkpoints and progress.name != saved_name:
            progress.micro_batch_tokens = micro_batches.max_tokens
            progress.seconds = time.perf_counter() - began
            tensors, state = checkpoint.capture(
                named, best_weights, optimizer, scheduler, scaler, device, ranks
            )
            state |= {"progress": asdict(progress), "checkpointing": config.checkpointing}
            if ranks.is_first:
                checkpoint.save(checkpoints, Checkpoint(progress.name, tensors, state))
            saved_name = progress.name
        saved = time.monotonic()

    batches = data.batches(len(dataset.train), config.batch_size, num_steps, config.seed)
    batches = itertools.islice(batches, progress.step, None)
    try:
        while True:
            due = progress.step % eval_steps == 0 or progress.step == num_steps
            if due and progress.evaluated < progress.step and len(dataset.validation):
                scorer = Scorer(
                    adapted, prompt, max_tokens=config.max_tokens, autocast=precision.autocast
                )
                accuracy, log_loss = _validate(scorer, dataset.validation, reporter, stop, ranks)
                better = math.isfinite(log_loss) and (
                    progress.best is None or (accuracy, -log_loss) > progress.best
                )
                progress.without_better = 0 if better else progress.without_better + 1
                if better:
                    progress.best, progress.best_step = (accuracy, -log_loss), progress.step
                    best_weights = _copied(parameters, best_weights)
                    if save and ranks.is_first:
                        save()
                validation = Validation(
                    step=progress.step, accuracy=accuracy, log_loss=log_loss, best=better
                )
                reporter.validated(validation)
                if log:
                    log(validation.to_dict())
                progress.evaluated = progress.step
            if config.patience and progress.without_better >= config.patience:
                reporter.say(
                    f"stopped early: nothing better in {progress.without_better} evaluations"
                )
                break
            if progress.step == num_steps:
                break

            chosen = next(batches)
            texts, labels = dataset.train.texts, dataset.train.labels
            batch = prompt.rows([texts[i] for i in chosen], [labels[i] for i in chosen])
            step_began = time.perf_counter()
            adapted.train()
            own_loss, num_supervised = micro_batches.add_gradients(batch)
            loss = ranks.total(own_loss)
            ranks.sum_gradients(parameters)
            grad_norm = float(accelerator.clip_grad_norm_(parameters, config.max_grad_norm))
            learning_rate = scheduler.get_last_lr()[0]
            finite = math.isfinite(loss) and (scaler or math.isfinite(grad_norm))
            if finite or scaler:  # a loss scaler skips the step by itself, and has to be told
                optimizer.step()
            progress.skipped = 0 if finite else progress.skipped + 1
            with warnings.catch_warnings():  # of a first step that was not taken
                warnings.filterwarnings("ignore", "Detected call of `lr_scheduler", UserWarning)
                scheduler.step()
            optimizer.zero_grad()
            progress.step += 1
            progress.speed.add(len(batch), num_supervised, time.perf_counter() - step_began)
            peak = memory.peak_bytes(device)
            if best_weights is None:
                progress.step_peak_bytes = peak
            step = Step(
                step=progress.step,
                num_steps=num_steps,
                epoch=progress.step / steps_per_epoch,
                loss=loss,
                grad_norm=grad_norm,
                learning_rate=learning_rate,
                examples_per_second=progress.speed.examples_per_second,
                supervised_tokens_per_second=progress.speed.supervised_tokens_per_second,
                peak_memory_bytes=peak,
            )
            reporter.stepped(step)
            if log:
                log(asdict(step))
            _refuse_divergence(step, progress.skipped, scaler, reporter)
            stop.check()
            if ranks.any(time.monotonic() - saved >= 60 * config.checkpoint_minutes):
                save_checkpoint()
    except Stopped:
        save_checkpoint()
        raise
    save_checkpoint()
    if best_weights is None:
        progress.best_step = progress.step
        if save and ranks.is_first:
            save()
    else:
        with torch.no_grad():
            for parameter, weight in zip(parameters, best_weights, strict=True):
                parameter.copy_(weight)
    progress.seconds = time.perf_counter() - began
    return progress


@torch.no_grad()
def _copied(parameters: Sequence[Tensor], before: list[Tensor] | None) -> list[Tensor]:
    """Return a copy of the weights, in the place of an earlier one so that there is only one."""
    if before is None:
        return [p.detach().clone() for p in parameters]
    for kept, parameter in zip(before, parameters, strict=True):
        kept.copy_(parameter)
    return before


def _expected_time(seconds: float, num_steps: int) -> str:
    return (
        f"about {spoken_seconds(seconds)} for {num_steps:,} steps, estimated from the largest "
        "micro-batch, which was computed once to see that it fits"
    )


def _optimizer(
    named: Mapping[str, Tensor],
    adapted: Any,
    dataset: Dataset,
    config: TrainConfig,
    accelerator: Any,
) -> tuple[Any, Any, int]:
    """Return the optimizer, the schedule of its learning rate, and the number of steps."""
    from transformers import get_scheduler

    num_steps = config.num_steps(len(dataset.train))
    width = tree.text_config(adapted).hidden_size
    rate = config.learning_rate or default_learning_rate(width, config.method)
    groups: list[dict[str, Any]] = [{"params": list(named.values())}]
    if config.loraplus_lr_ratio is not None:  # https://arxiv.org/abs/2402.12354; as in PEFT
        is_faster = {name: "lora_B" in name or p.dim() == 1 for name, p in named.items()}
        groups = [
            {"params": [p for n, p in named.items() if not is_faster[n]]},
            {
                "params": [p for n, p in named.items() if is_faster[n]],
                "lr": rate * config.loraplus_lr_ratio,
            },
        ]
    optimizer = torch.optim.AdamW(groups, lr=rate, weight_decay=config.weight_decay)
    scheduler = get_scheduler(
        config.schedule,
        optimizer,
        num_warmup_steps=math.ceil(config.warmup_fraction * num_steps),
        num_training_steps=num_steps,
    )
    return accelerator.prepare_optimizer(optimizer), scheduler, num_steps


def default_learning_rate(width: int, method: Method) -> float:
    """Return the peak learning rate for a model of a hidden size; docs/log.md says why.

    From a width of 1536 on 2e-4 for an adapter and 2e-5 for all weights, as in the recipes in use;
    more for narrower models, down to a width of 192.
    """
    narrower = min(8.0, max(1.0, 1536 / width))
    if method == "full":
        return 2e-5 * narrower**2
    return 2e-4 * math.pow(narrower, 5 / 3)


def _refuse_divergence(step: Step, skipped: int, scaler: Any, reporter: Reporter) -> None:
    """Tell of a step that was not taken, and end a run in which that goes on.

    Raises:
        DivergedError: After so many in a row, or where the loss scale has collapsed.
    """
    remedy = "lower --learning-rate, or use --precision float32"
    if skipped:
        name, value = (
            ("loss", step.loss) if not math.isfinite(step.loss) else ("gradient", step.grad_norm)
        )
        if skipped == 1:
            reporter.say(f"the {name} is {value} at step {step.step:,}; this step is not taken")
        if skipped >= MAX_SKIPPED:
            raise DivergedError(
                f"the {name} is {value}, and has not been finite since step "
                f"{step.step - skipped + 1:,}; {remedy}"
            )
    if scaler and scaler.get_scale() < 1:
        raise DivergedError(
            f"the loss scale of float16 has fallen to {scaler.get_scale():g} by step "
            f"{step.step:,}, gradients keep overflowing; {remedy}"
        )


def _validate(
    scorer: Scorer, table: Table, reporter: Reporter, stop: Stop, ranks: Ranks
) -> tuple[float, float]:
    """Return accuracy and mean log-loss, in nats, on a table."""
    scored = score.score_rows(scorer, table, "validation", reporter, stop, ranks)
    return float(scored.correct.mean()), scored.log_loss


@contextlib.contextmanager
def accelerator_for(precision: Precision, device: torch.device) -> Iterator[Any]:
    """Give accelerate's Accelerator, and leave the process free for another with other settings."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    accelerator = Accelerator(mixed_precision=precision.mixed_precision, cpu=device.type == "cpu")
    try:
        yield accelerator
    finally:
        for tracker in accelerator.trackers:
            tracker.finish()
        AcceleratorState._reset_state(reset_partial_state=True)


def prepare(
    config: TrainConfig, labels: Sequence[str], precision: Precision, device: torch.device
) -> tuple[Any, Prompt, run.AdapterCard, Path]:
    """Load the base model and make it trainable: with a new adapter, or in all its weights.

    Returns:
        What trains, the prompt, the card that goes with it, and the base's folder.

    Raises:
        ModelError: If the model cannot be used for this.
    """
    folder = model.find(config.model)
    prompt = plan.load_prompt(config, labels, folder)
    base = run.load_base(folder, config.method, precision.base, device)
    adapted = lora.adapt(base, config).to(device)
    card = run.AdapterCard(
        base_model=str(folder) if Path(config.model).expanduser().is_dir() else config.model,
        base_sha256=model.weights_sha256(folder),
        labels=tuple(labels),
        instruction=config.instruction,
        list_labels=config.list_labels,
        label_texts=prompt.label_texts,
        max_length=prompt.max_length,
        method=config.method,
    )
    return adapted, prompt, card, folder


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


def train_until(  # noqa: PLR0915 - what a run does, in its order
    config: TrainConfig,
    stop: Stop,
    reporter: Reporter,
    *,
    load: Callable[[TrainConfig], Dataset] = data.load,
    prepare: Callable[..., tuple[Any, Prompt, run.AdapterCard, Path]] = prepare,
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
        ranks = stop.ranks = stack.enter_context(join())
        reporter = reporter if ranks.is_first else Reporter()
        with ranks.together():
            tracking.check(config.trackers)
            dataset = load(config)
            measured_on, held_out = next(iter(_measured(dataset).items()))
            for line in dataset.summary.lines():
                reporter.say(line)
            device = choose_device(config.device)
            if config.method == "qlora":
                quantize.require(device)
            full = config.method == "full"
            precision = choose_precision(device, config.precision, trains_base=full)
            reporter.say(f"computing on {_spoken_devices(device, ranks)}: {precision}")
        sha256 = dataset.summary.sha256
        ranks.refuse_differences({"data": sha256, **resume.fixed(config), "model": config.model})
        directory, resumed = resume.find(config, sha256, ranks, stack, reporter.say)
        with ranks.together():
            planned, heaviest = _plan(
                resume.as_before(config, resumed), dataset, precision, device, reporter
            )
            if not (directory or planned.fits_disk):
                raise ResourceError(
                    f"the run takes {spoken_bytes(planned.disk_bytes)} of disk and there are "
                    f"{spoken_bytes(planned.free_disk_bytes)} for {config.output}; free "
                    "space, or choose another folder with --output"
                )
            stack.enter_context(torch.random.fork_rng())
            torch.manual_seed(config.seed)
            adapted, prompt, card, folder = prepare(config, dataset.labels, precision, device)
            parameters = lora.count_parameters(adapted)
            for line in _introduce(config, dataset, prompt, adapted, parameters):
                reporter.say(line)
            accelerator = stack.enter_context(accelerator_for(precision, device))
            with accelerator.autocast():
                tree.check(adapted, short_rows(dataset.train, prompt))
            if directory:
                resume.refuse_other_base(directory, card.base_sha256)
            elif ranks.is_first:
                directory = run.create(config.output, config.name, config.data, config.model)
                stack.enter_context(resume.hold(directory))
            if directory and ranks.is_first:
                reporter.say(f"run directory: {directory}")
                environment = run.environment(device) | {"base_sha256": card.base_sha256}
                _write_settings(directory, environment, dataset, planned, config)
        ranks.refuse_differences({"base model": card.base_sha256})
        directory = Path(ranks.share(str(directory)))
        model.set_checkpointing(adapted, planned.checkpointing)
        if not ranks.is_first:
            torch.manual_seed(config.seed + ranks.rank)  # for dropout of its own
        with stop.deferred():
            with contextlib.ExitStack() as logging:
                log = None
                if ranks.is_first:
                    log = logging.enter_context(
                        tracking.metrics_log(directory, config, resumed, accelerator)
                    )
                fitted = fit(
                    adapted,
                    prompt,
                    dataset,
                    _as_planned(config, planned),
                    accelerator=accelerator,
                    precision=precision,
                    heaviest=heaviest,
                    log=log,
                    save=lambda: run.save(
                        adapted, prompt, card, directory / run.FOLDERS[config.method]
                    ),
                    checkpoints=directory / resume.CHECKPOINTS,
                    resumed=resumed,
                    stop=stop,
                    ranks=ranks,
                    reporter=reporter,
                )
            if ranks.is_first:
                _tell_peak(directory, planned, fitted.step_peak_bytes, reporter)
            scorer = Scorer(
                adapted, prompt, max_tokens=config.max_tokens, autocast=precision.autocast
            )
            scores = {
                name: score.score_rows(scorer, table, name, reporter, stop, ranks)
                for name, table in _measured(dataset).items()
            }
        stop.check()
        result = None
        if ranks.is_first:
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


def _spoken_devices(device: torch.device, ranks: Ranks) -> str:
    return device.type if ranks.size == 1 else f"{ranks.size} times {device.type}"


def _write_settings(
    directory: Path,
    environment: dict[str, Any],
    dataset: Dataset,
    planned: plan.Plan,
    config: TrainConfig,
) -> None:
    run.write_json(directory / "environment.json", environment)
    run.write_json(directory / "data.json", dataset.summary.to_dict())
    run.write_json(directory / "plan.json", planned.to_dict())
    run.write_text(directory / "config.toml", config.to_toml())


def _measured(dataset: Dataset) -> dict[str, Table]:
    """Return the tables to measure on by split, the one that counts first."""
    tables = {"test": dataset.test, "validation": dataset.validation}
    found = {name: table for name, table in tables.items() if table is not None and len(table)}
    if not found:
        raise DataError(
            "there are no rows to measure on; give --test, or a --test-fraction above 0"
        )
    return found


def _as_planned(config: TrainConfig, planned: plan.Plan) -> TrainConfig:
    return replace(
        config,
        micro_batch_tokens=planned.micro_batch_tokens,
        checkpointing="on" if planned.checkpointing else "off",
    )


def _tell_peak(directory: Path, planned: plan.Plan, measured: int, reporter: Reporter) -> None:
    """Say and keep how the plan compares with what was measured."""
    reporter.say(
        f"memory at the peak of training: {spoken_bytes(measured)} measured, "
        f"{spoken_bytes(planned.allocated_bytes)} planned"
    )
    run.write_json(directory / "plan.json", planned.to_dict() | {"measured_peak_bytes": measured})


def _plan(
    config: TrainConfig,
    dataset: Dataset,
    precision: Precision,
    device: torch.device,
    reporter: Reporter,
) -> tuple[plan.Plan, plan.Heaviest]:
    """Plan the run before any weights are fetched, and refuse it if it cannot fit.

    Raises:
        ResourceError: If nothing that the settings allow fits.
    """
    folder = model.find(config.model, weights=False)
    prompt = plan.load_prompt(config, dataset.labels, folder)
    planner = plan.Planner(config, dataset, prompt, folder, precision, hardware_here(device))
    planned = planner.make()
    needed = spoken_bytes(planned.peak_bytes)
    if not planned.fits:
        assert planned.available_bytes is not None
        raise ResourceError(
            f"training needs {needed} of memory and there are "
            f"{spoken_bytes(planned.available_bytes)}; what would fit, the cheapest first: "
            f"{', or '.join(planned.alternatives)}"
        )
    reporter.say(
        f"planned: {needed} of memory at the peak, at most {planned.micro_batch_tokens:,} tokens "
        f"at once, checkpointing {'on' if planned.checkpointing else 'off'} ({planned.why})"
    )
    return planned, planner.heaviest(planned)


def _introduce(
    config: TrainConfig,
    dataset: Dataset,
    prompt: Prompt,
    adapted: Any,
    parameters: lora.ParameterCount,
) -> Iterator[str]:
    """Say what will be trained on what, each derived setting with where it comes from."""
    layers = ", ".join(f"{name} {count:,}" for name, count in parameters.modules.items())
    where = "all weights" if config.method == "full" else f"r={config.rank}: {layers}"
    if config.method == "qlora":
        where += "; the base model is in 4 bits"
    yield (
        f"training {parameters.trainable:,} of {parameters.total:,} parameters "
        f"({parameters.share:.2%}), {where}"
    )
    width = tree.text_config(adapted).hidden_size
    if config.learning_rate is None:
        rate = default_learning_rate(width, config.method)
        yield f"learning rate {rate:.1e}, chosen for a model {width} wide"
    if prompt.label_texts.keys() - config.label_texts.keys():
        label, text = next(iter(prompt.label_texts.items()))
        yield (
            "this tokenizer cannot write all labels as they are; "
            f"they are written with spaces, {label} as {text!r}"
        )
    for what, table in (("training", dataset.train), ("test", dataset.test)):
        if table is not None and (cut := prompt.count_cut(table.texts)):
            yield (
                f"{cut:,} of {len(table):,} {what} messages are too long for "
                f"{prompt.max_length} tokens and are cut at their end"
            )


def short_rows(table: Table, prompt: Prompt, count: int = 4) -> list[TokenSequence]:
    """Return the rows with the shortest messages among the first ones, to check a model with."""
    first = sorted(range(min(len(table), 256)), key=lambda i: len(table.texts[i]))[:count]
    return prompt.rows([table.texts[i] for i in first], [table.labels[i] for i in first])

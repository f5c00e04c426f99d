"""The training loop: tree, forward, loss, backward, clip, step, log, evaluate, save."""

from __future__ import annotations

import itertools
import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from remora.config import TrainConfig
from remora.data import splits
from remora.data.dataset import Dataset
from remora.data.prompt import Prompt
from remora.data.table import Table
from remora.errors import DivergedError, Stopped
from remora.formatting import spoken_seconds
from remora.planning import plan
from remora.runtime import memory, sharding
from remora.runtime.device import Precision
from remora.runtime.process_group import ProcessGroup
from remora.runtime.reporter import Reporter, Step, Validation
from remora.runtime.stop import Stop
from remora.training import checkpoint
from remora.training.checkpoint import Checkpoint
from remora.training.micro_batches import MicroBatches
from remora.training.optimizer import create_optimizer
from remora.training.progress import Progress
from remora.tree import scoring
from remora.tree.scoring import Scorer

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
    graphs: bool = False,
    log: Callable[[dict[str, Any]], None] | None = None,
    save: Callable[[], Any] | None = None,
    checkpoints: Path | None = None,
    resumed: Checkpoint | None = None,
    stop: Stop | None = None,
    group: ProcessGroup | None = None,
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
        graphs: Whether to record micro-batches as CUDA graphs.
        log: Called with each record as a dict.
        save: Called when the weights have become better than before, in all processes.
        checkpoints: Folder to save the state in, now and then, on request and at the end.
        resumed: What to go on from; the run ends with the bits it would have had undisturbed.
        stop: Asked after each step whether to save and stop.
        group: The processes that train together, each in such a call; the first one saves.
        reporter: Told how it goes.

    Raises:
        DivergedError: If the loss or a gradient is not finite for several steps in a row.
        ResourceError: If the memory does not suffice for a single row, or the disk fails.
        Stopped: If that was asked for; the state is saved.
    """
    reporter, stop, group = reporter or Reporter(), stop or Stop(), group or ProcessGroup()
    named = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    parameters = list(named.values())
    optimizer, scheduler, num_steps = create_optimizer(named, adapted, dataset, config, accelerator)
    steps_per_epoch = math.ceil(len(dataset.train) / config.batch_size)
    eval_steps = config.eval_steps or steps_per_epoch
    best_weights: list[Tensor] | None = None
    progress = Progress(micro_batch_tokens=config.max_tokens)
    scaler, device = accelerator.scaler, accelerator.device
    if resumed:
        progress = Progress.restored(resumed.state["progress"])
        best_weights = checkpoint.restore(
            resumed, named, optimizer, scheduler, scaler, device, group
        )
        reporter.say(f"going on after step {progress.step:,} of {num_steps:,}")
    micro_batches = MicroBatches(
        adapted,
        progress.micro_batch_tokens,
        accelerator,
        heaviest,
        group,
        reporter,
        graphs=graphs,
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
                named, best_weights, optimizer, scheduler, scaler, device, group
            )
            state |= {"progress": asdict(progress)}
            state |= {"checkpointing": config.checkpointing, "shard": config.shard}
            checkpoint.save(checkpoints, Checkpoint(progress.name, tensors, state), group)
            saved_name = progress.name
        saved = time.monotonic()

    batches = splits.batches(len(dataset.train), config.batch_size, num_steps, config.seed)
    batches = itertools.islice(batches, progress.step, None)
    try:
        while True:
            due = progress.step % eval_steps == 0 or progress.step == num_steps
            if due and progress.evaluated < progress.step and len(dataset.validation):
                scorer = Scorer(
                    adapted,
                    prompt,
                    max_tokens=config.max_tokens,
                    autocast=precision.autocast,
                    limit_bytes=heaviest.limit_bytes if heaviest else None,
                )
                accuracy, log_loss = _validate(scorer, dataset.validation, reporter, stop, group)
                better = math.isfinite(log_loss) and (
                    progress.best is None or (accuracy, -log_loss) > progress.best
                )
                progress.without_better = 0 if better else progress.without_better + 1
                if better:
                    progress.best, progress.best_step = (accuracy, -log_loss), progress.step
                    best_weights = _copied(parameters, best_weights)
                    if save:
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
            own_seconds = time.perf_counter() - step_began
            loss = group.total(own_loss)
            group.sum_gradients([p for p in parameters if not sharding.is_sharded(p)])
            norm = accelerator.clip_grad_norm_(parameters, config.max_grad_norm)
            grad_norm = float(sharding.whole(norm))
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
            seconds = time.perf_counter() - step_began
            progress.speed.add(len(batch), num_supervised, seconds, own_seconds)
            peak = memory.peak_bytes(device)
            progress.peak_bytes = max(progress.peak_bytes, peak)
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
            if group.any(time.monotonic() - saved >= 60 * config.checkpoint_minutes):
                save_checkpoint()
    except Stopped:
        save_checkpoint()
        raise
    save_checkpoint()
    if best_weights is None:
        progress.best_step = progress.step
        if save:
            save()
    else:
        with torch.no_grad():
            for parameter, weight in zip(parameters, best_weights, strict=True):
                parameter.copy_(weight)
    progress.seconds = time.perf_counter() - began
    if group.size > 1 and not sharding.has_shards(adapted):
        # One process would compute all parts, one after the other.
        in_turn = group.total(progress.speed.own_seconds)
        progress.speed_up = in_turn / progress.speed.seconds if in_turn else None
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
        "micro-batch, which was computed first, to see that it fits"
    )


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
    scorer: Scorer, table: Table, reporter: Reporter, stop: Stop, group: ProcessGroup
) -> tuple[float, float]:
    """Return accuracy and mean log-loss, in nats, on a table."""
    scored = scoring.score_rows(scorer, table, "validation", reporter, stop, group)
    return float(scored.correct.mean()), scored.log_loss

"""The training loop: step, evaluate, save."""

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

from remora.data import splits
from remora.errors import DivergedError, Stopped
from remora.evaluation.metrics import measure
from remora.evaluation.multi_label import at_best_threshold, f1_scores
from remora.evaluation.predictions import ScoredSets
from remora.planning.plan import Duration, Rates
from remora.runtime import memory, sharding, threads
from remora.runtime.reporter import Reporter, Step, Validation
from remora.training import checkpoint
from remora.training.checkpoint import Checkpoint
from remora.training.class_weights import class_weights
from remora.training.micro_batches import MicroBatches
from remora.training.optimizer import create_optimizer
from remora.training.progress import Progress
from remora.training.session import Session
from remora.tree import scoring

MAX_SKIPPED = 5
"""Steps in a row without a finite loss and gradient after which a run ends."""

LATE_SECONDS = 60.0
"""The time left is told again if the end moves by this, and by a quarter of what is left."""

Log = Callable[[dict[str, Any]], None]


def fit(
    session: Session,
    *,
    log: Log = lambda record: None,
    save: Callable[[], object] = lambda: None,
    checkpoints: Path | None = None,
    resumed: Checkpoint | None = None,
    num_scored: int = 0,
) -> Progress:
    """Train the session's model; it ends up with the weights that validated best.

    Without validation rows the last weights stay. The heaviest micro-batch is computed before the
    first step, so that a run that cannot fit fails in seconds.

    Args:
        session: The model, its rows and settings. Its processes call this together.
        log: Called with each step and evaluation as a dict.
        save: Called in all processes when the weights are better than before, and at the end of
            a run that was resumed or has no best weights.
        checkpoints: Folder to save the state in: periodically, when stopped, and at the end.
        resumed: The checkpoint to resume from; the run ends with the bits of an uninterrupted one.
        num_scored: Rows that are scored afterwards, for the time that is told.

    Raises:
        DivergedError: If the loss or a gradient is not finite for several steps in a row.
        ResourceError: If memory does not suffice for a single row, or the disk fails.
        Stopped: If the run was asked to stop; the state is saved.
    """
    config, group = session.settings, session.group
    state = _State(session, checkpoints, resumed, num_scored)
    progress, num_steps = state.progress, state.num_steps
    eval_steps = config.steps_between_evaluations(len(session.dataset.train))
    state.begin()
    batches = splits.batches(len(session.dataset.train), config.batch_size, num_steps, config.seed)
    batches = itertools.islice(batches, progress.step, None)
    try:
        while True:
            # Evaluate
            due = progress.step % eval_steps == 0 or progress.step == num_steps
            if due and progress.evaluated < progress.step and len(session.dataset.validation):
                validation = _evaluate(session, state)
                if validation.best:
                    save()
                session.reporter.validated(validation)
                state.tell_time_left()
                log(validation.to_dict())
                progress.evaluated = progress.step
            if config.patience and progress.without_better >= config.patience:
                session.reporter.say(
                    f"early stopping: no better in {progress.without_better} evaluations"
                )
                break
            if progress.step == num_steps:
                break

            # Step
            step = _step(session, state, next(batches))
            session.reporter.stepped(step)
            log(asdict(step))
            _refuse_divergence(step, progress.skipped, state.scaler, session.reporter)

            # Save
            session.stop.check()
            if group.any(time.monotonic() - state.saved >= 60 * config.checkpoint_minutes):
                state.save()
    except Stopped:
        state.save()
        raise
    state.save()
    if state.best_weights is None:
        progress.best_step = progress.step
    state.finish()
    # What a resumed run finds on disk may be of a later step, which is no longer the best
    if state.best_weights is None or resumed is not None:
        save()
    return progress


class _State:
    """Everything that changes while a session trains, and its way to a checkpoint and back."""

    def __init__(
        self,
        session: Session,
        checkpoints: Path | None,
        resumed: Checkpoint | None,
        num_scored: int,
    ) -> None:
        config, dataset = session.settings, session.dataset
        self._session, self._config, self._checkpoints = session, config, checkpoints
        self._num_scored = num_scored
        num_eval_rows = config.num_eval_rows(len(dataset.train), len(dataset.validation))
        self.weights = class_weights(config.class_weights, dataset)
        self.eval_rows = splits.sample(dataset.validation, num_eval_rows, config.seed)
        accelerator = session.accelerator
        self.named = {n: p for n, p in session.model.named_parameters() if p.requires_grad}
        self.parameters = list(self.named.values())
        self.optimizer, self.scheduler, self.num_steps = create_optimizer(
            self.named, session.model, dataset, config, accelerator
        )
        self.steps_per_epoch = math.ceil(len(dataset.train) / config.batch_size)
        self.scaler, self.device = accelerator.scaler, accelerator.device
        self.best_weights: list[Tensor] | None = None
        self.progress = Progress(micro_batch_tokens=config.max_tokens)
        self.eval_seconds = 0.0  # of the last evaluation
        self._saved_name = ""
        if resumed:
            self.progress = Progress.restored(resumed.state["progress"])
            self.best_weights = checkpoint.restore(resumed, *self._parts())
            self._saved_name = resumed.name
            session.reporter.say(
                f"resuming after step {self.progress.step:,} of {self.num_steps:,}"
            )
        self._measured = self.progress.speed.examples, self.progress.speed.seconds
        self._told_end: float | None = None  # when the run ends, as was said
        self.micro_batches = MicroBatches(
            session.model,
            self.progress.micro_batch_tokens,
            accelerator,
            session.heaviest,
            session.group,
            session.reporter,
            graphs=session.plan.memory.graphs > 0,
        )

    def _parts(self) -> tuple[Any, ...]:
        """Return what a checkpoint is captured from, and restored to."""
        scheduler, scaler = self.scheduler, self.scaler
        return self.named, self.optimizer, scheduler, scaler, self.device, self._session.group

    def begin(self) -> None:
        """Try the heaviest micro-batch, say how long the run will take, and start the clock."""
        num_left = self.num_steps - self.progress.step
        if num_left > 0:
            self.rates = self.micro_batches.try_heaviest()
            expected, source = self.time_left(), "estimated from the largest micro-batch"
            self._session.reporter.say(
                f"about {expected} for {num_left:,} steps, {source}, which was computed first to "
                "see that it fits"
            )
            if not self.progress.expected:
                self.progress.expected = expected.to_dict() | {"seconds_are": source}
        self._began = time.perf_counter() - self.progress.seconds
        self.saved = time.monotonic()

    def time_left(self) -> Duration:
        """Return the time of the steps and evaluations that are left, and of scoring after them."""
        return self._session.plan.duration(
            self.rates,
            num_processes=self._session.group.size,
            num_steps=self.num_steps - self.progress.step,
            num_scored=self._num_scored,
        )

    def tell_time_left(self) -> None:
        """After an evaluation, say how long the rest takes at the rate since the one before.

        The first time, and again when the end is no longer near what was said: other work on the
        machine has begun or ended.
        """
        if self.progress.step == self.num_steps:
            return
        planned, size, speed = self._session.plan, self._session.group.size, self.progress.speed
        examples, seconds = speed.examples - self._measured[0], speed.seconds - self._measured[1]
        self._measured = speed.examples, speed.seconds
        tokens_per_second = examples / seconds * planned.tree_tokens / size if seconds else 0.0
        scoring = self.eval_seconds * size / (len(self.eval_rows) * planned.eval_tokens)
        self.rates = Rates(
            1 / tokens_per_second if tokens_per_second else self.rates.training, scoring
        )
        left = self.time_left()
        ends = time.perf_counter() + left.total
        if self._told_end is None or abs(ends - self._told_end) > max(LATE_SECONDS, left.total / 4):
            self._told_end = ends
            self._session.reporter.say(f"about {left} left")

    def save(self) -> None:
        """Save a checkpoint, unless this very state is saved."""
        progress = self.progress
        if self._checkpoints and progress.name != self._saved_name:
            progress.micro_batch_tokens = self.micro_batches.max_tokens
            progress.seconds = time.perf_counter() - self._began
            tensors, state = checkpoint.capture(self.best_weights, *self._parts())
            state |= {"progress": asdict(progress)}
            state |= {"checkpointing": self._config.checkpointing, "shard": self._config.shard}
            state |= {"prompt": self._session.prompt.rendered._asdict()}
            state |= {"layout": self._config.layout}
            saved = Checkpoint(progress.name, tensors, state)
            checkpoint.save(self._checkpoints, saved, self._session.group)
            self._saved_name = progress.name
        self.saved = time.monotonic()

    @torch.no_grad()
    def keep_best(self) -> None:
        """Copy the weights, over an earlier copy so that there is only one."""
        if self.best_weights is None:
            self.best_weights = [p.detach().clone() for p in self.parameters]
            return
        for kept, parameter in zip(self.best_weights, self.parameters, strict=True):
            kept.copy_(parameter)

    @torch.no_grad()
    def finish(self) -> None:
        """Give the model its best weights, and take the time."""
        if self.best_weights is not None:
            for parameter, weight in zip(self.parameters, self.best_weights, strict=True):
                parameter.copy_(weight)
        progress, group = self.progress, self._session.group
        progress.seconds = time.perf_counter() - self._began
        if group.size > 1 and not sharding.has_shards(self._session.model):
            # One process would compute all parts, one after the other.
            in_turn = group.total(progress.speed.own_seconds)
            progress.speed_up = in_turn / progress.speed.seconds if in_turn else None


def _evaluate(session: Session, state: _State) -> Validation:
    """Score the validation rows, and keep the weights if they are the best so far."""
    progress, rows, metric = state.progress, state.eval_rows, session.config.metric
    told = ("validation", session.reporter, session.stop, session.group)
    began, micro_f1, macro_f1 = time.perf_counter(), None, None
    try:
        if session.dataset.multi_label:
            sets = scoring.score_rows(session.scorer(), rows, *told)
            assert isinstance(sets, ScoredSets)
            sets = at_best_threshold(sets)
            accuracy, loss = float(sets.correct.mean()), sets.log_loss
            micro_f1, macro_f1 = f1_scores(sets)
        else:
            accuracy, loss = scoring.evaluate_rows(session.scorer(), rows, *told)
        if metric == "macro_f1" and macro_f1 is None:  # which needs the label that each row gets
            scored = scoring.score_rows(session.scorer(tolerance=1.0), rows, *told)
            predicted = [session.prompt.labels[i] for i in scored.probabilities.argmax(1)]
            macro_f1 = measure(session.prompt.labels, rows.labels, predicted).macro_f1
    finally:
        state.eval_seconds = time.perf_counter() - began
        progress.validation_seconds += state.eval_seconds
    chosen = {"macro_f1": macro_f1, "micro_f1": micro_f1}.get(metric or "accuracy")
    quality = (accuracy if chosen is None else chosen, -loss)
    if metric == "log_loss":
        quality = (-loss, accuracy)
    better = math.isfinite(loss) and (progress.best is None or quality > progress.best)
    progress.without_better = 0 if better else progress.without_better + 1
    if better:
        progress.best, progress.best_step = quality, progress.step
        state.keep_best()
    return Validation(
        step=progress.step,
        accuracy=accuracy,
        loss=loss,
        rows=len(rows),
        best=better,
        macro_f1=macro_f1,
        micro_f1=micro_f1,
    )


def _step(session: Session, state: _State, chosen: Sequence[int]) -> Step:
    """Take one optimizer step on some training rows: forward, backward, clip, step."""
    progress, group, accelerator = state.progress, session.group, session.accelerator
    if told := threads.adapt(state.device):
        session.reporter.say(told)
    texts, labels = session.dataset.train.texts, session.dataset.train.labels
    rows = session.prompt.rows_by_message([texts[i] for i in chosen], [labels[i] for i in chosen])
    weights = [state.weights[labels[i]] if state.weights else 1.0 for i in chosen]
    batch = [
        row._replace(weight=weight * row.weight)
        for windows, weight in zip(rows, weights, strict=True)
        for row in windows
    ]
    # Gradients, summed over micro-batches and processes
    began = time.perf_counter()
    session.model.train()
    own_loss, num_supervised = state.micro_batches.add_gradients(batch)
    own_seconds = time.perf_counter() - began
    loss = group.total(own_loss)
    group.sum_gradients([p for p in state.parameters if not sharding.is_sharded(p)])
    norm = accelerator.clip_grad_norm_(state.parameters, session.config.max_grad_norm)
    grad_norm = float(sharding.whole(norm))
    # Weights
    learning_rate = state.scheduler.get_last_lr()[0]
    finite = math.isfinite(loss) and (state.scaler or math.isfinite(grad_norm))
    if finite or state.scaler:  # a loss scaler skips the step by itself, and has to be told
        state.optimizer.step()
    progress.skipped = 0 if finite else progress.skipped + 1
    with warnings.catch_warnings():  # of a first step that was skipped
        warnings.filterwarnings("ignore", "Detected call of `lr_scheduler", UserWarning)
        state.scheduler.step()
    state.optimizer.zero_grad()
    # Figures
    progress.step += 1
    progress.speed.add(len(chosen), num_supervised, time.perf_counter() - began, own_seconds)
    peak = memory.peak_bytes(state.device)
    progress.peak_bytes = max(progress.peak_bytes, peak)
    return Step(
        step=progress.step,
        num_steps=state.num_steps,
        epoch=progress.step / state.steps_per_epoch,
        loss=loss,
        grad_norm=grad_norm,
        learning_rate=learning_rate,
        examples_per_second=progress.speed.examples_per_second,
        supervised_tokens_per_second=progress.speed.supervised_tokens_per_second,
        peak_memory_bytes=peak,
    )


def _refuse_divergence(step: Step, skipped: int, scaler: Any, reporter: Reporter) -> None:
    """Report a skipped step, and end a run that keeps skipping them.

    Raises:
        DivergedError: After `MAX_SKIPPED` in a row, or where the loss scale has collapsed.
    """
    remedy = "lower --learning-rate, or use --precision float32"
    if skipped:
        name, value = (
            ("loss", step.loss) if not math.isfinite(step.loss) else ("gradient", step.grad_norm)
        )
        if skipped == 1:
            reporter.say(f"the {name} is {value} at step {step.step:,}; skipping this step")
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

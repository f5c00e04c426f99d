"""The training loop: tree, forward, loss, backward, clip, step, log, evaluate, save."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from remora import calibration, data, evaluate, lora, memory, model, plan, report, run, tree
from remora.calibration import Reliability, Scored
from remora.config import TrainConfig
from remora.data import Dataset, Table
from remora.errors import ConfigError, DataError, DivergedError, ResourceError
from remora.micro_batches import MicroBatches
from remora.progress import Reporter, Speed, Step, Validation
from remora.prompt import Prompt, TokenSequence
from remora.score import Scorer


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a run has shown."""

    directory: Path
    measured_on: str  # "test" or "validation"
    metrics: evaluate.Metrics
    reliability: Reliability
    baseline: evaluate.Baseline
    p_value: float  # exact McNemar test of the model against the baseline
    parameters: lora.ParameterCount
    adapter_bytes: int
    base_bytes: int
    num_steps: int
    best_step: int
    examples_per_second: float
    supervised_tokens_per_second: float
    train_seconds: float
    peak_memory_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as JSON holds them."""
        return {
            **{k: v for k, v in vars(self).items() if isinstance(v, int | float | str)},
            "directory": str(self.directory),
            "metrics": self.metrics.to_dict(),
            "reliability": self.reliability.to_dict(),
            "baseline": {
                "description": self.baseline.description,
                "num_train_rows": self.baseline.num_train_rows,
                "seconds": self.baseline.seconds,
                "metrics": self.baseline.metrics.to_dict(),
            },
            "parameters": asdict(self.parameters),
        }


@dataclass(frozen=True, kw_only=True)
class Fit:
    """What the loop returns: its adapter is the best one, and is in the model."""

    num_steps: int
    best_step: int
    speed: Speed
    seconds: float
    step_peak_bytes: int  # most memory used up to the first evaluation


def fit(  # noqa: PLR0912, PLR0915 - the loop, to be read top to bottom
    adapted: Any,
    prompt: Prompt,
    dataset: Dataset,
    config: TrainConfig,
    *,
    accelerator: Any,
    precision: plan.Precision,
    heaviest: plan.Heaviest | None = None,
    log: Callable[[dict[str, Any]], None] | None = None,
    save: Callable[[], Any] | None = None,
    reporter: Reporter | None = None,
) -> Fit:
    """Train the adapter of a model; it ends up with the weights that validated best.

    Args:
        adapted: PEFT's model, its trainable parameters in float32.
        prompt: How messages are asked and labels are answered.
        dataset: Rows to train and to validate on; without validation rows the last weights stay.
        config: The settings.
        accelerator: accelerate's Accelerator for the device and the precision.
        precision: What is computed in.
        heaviest: The batch that needs most memory, which is tried before the first step, so that
            what cannot fit fails in seconds.
        log: Called with each record as a dict.
        save: Called when the adapter has become better than before.
        reporter: Told how it goes.

    Raises:
        DivergedError: If the loss or a gradient is not finite.
        ResourceError: If the memory does not suffice for a single row.
    """
    reporter = reporter or Reporter()
    parameters = [p for p in adapted.parameters() if p.requires_grad]
    optimizer, scheduler, num_steps = _optimizer(parameters, adapted, dataset, config, accelerator)
    steps_per_epoch = math.ceil(len(dataset.train) / config.batch_size)
    best, best_step, without_better = (-1.0, -math.inf), 0, 0
    best_weights: list[Tensor] | None = None
    micro_batches = MicroBatches(adapted, config.max_tokens, accelerator, heaviest, reporter)
    if heaviest:
        seconds_per_token = micro_batches.try_heaviest()
        reporter.say(_expected_time(seconds_per_token * heaviest.run_tokens, num_steps))
    speed, began = Speed(), time.perf_counter()
    done, step_peak_bytes = 0, 0
    for chosen in data.batches(len(dataset.train), config.batch_size, num_steps, config.seed):
        texts, labels = dataset.train.texts, dataset.train.labels
        batch = prompt.rows([texts[i] for i in chosen], [labels[i] for i in chosen])
        step_began = time.perf_counter()
        adapted.train()
        loss, num_supervised = micro_batches.add_gradients(batch)
        grad_norm = float(accelerator.clip_grad_norm_(parameters, config.max_grad_norm))
        _refuse_non_finite(done + 1, loss, grad_norm, scaled=accelerator.scaler is not None)
        learning_rate = scheduler.get_last_lr()[0]
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        done += 1
        speed.add(len(batch), num_supervised, time.perf_counter() - step_began)
        peak = memory.peak_bytes(accelerator.device)
        if best_weights is None:
            step_peak_bytes = peak
        step = Step(
            step=done,
            num_steps=num_steps,
            epoch=done / steps_per_epoch,
            loss=loss,
            grad_norm=grad_norm,
            learning_rate=learning_rate,
            examples_per_second=speed.examples_per_second,
            supervised_tokens_per_second=speed.supervised_tokens_per_second,
            peak_memory_bytes=peak,
        )
        reporter.stepped(step)
        if log:
            log(asdict(step))

        every = config.eval_steps or steps_per_epoch
        if len(dataset.validation) and (done % every == 0 or done == num_steps):
            scorer = Scorer(
                adapted,
                prompt,
                max_tokens=config.max_tokens,
                autocast=precision.autocast,
            )
            accuracy, log_loss = _validate(scorer, dataset.validation, reporter)
            better = (accuracy, -log_loss) > best
            without_better = 0 if better else without_better + 1
            if better:
                best, best_step = (accuracy, -log_loss), done
                best_weights = [p.detach().clone() for p in parameters]
                if save:
                    save()
            validation = Validation(step=done, accuracy=accuracy, log_loss=log_loss, best=better)
            reporter.validated(validation)
            if log:
                log(
                    {
                        f"validation_{k}" if k != "step" else k: v
                        for k, v in asdict(validation).items()
                    }
                )
            if config.patience and without_better >= config.patience:
                reporter.say(f"stopped early: no better adapter in {without_better} evaluations")
                break
    if best_weights is None:
        best_step = done
        if save:
            save()
    else:
        with torch.no_grad():
            for parameter, weight in zip(parameters, best_weights, strict=True):
                parameter.copy_(weight)
    return Fit(
        num_steps=done,
        best_step=best_step,
        speed=speed,
        seconds=time.perf_counter() - began,
        step_peak_bytes=step_peak_bytes,
    )


def _expected_time(seconds: float, num_steps: int) -> str:
    return (
        f"about {plan.spoken_seconds(seconds)} for {num_steps:,} steps, estimated from the largest "
        "micro-batch, which was computed once to see that it fits"
    )


def _optimizer(
    parameters: Sequence[Tensor],
    adapted: Any,
    dataset: Dataset,
    config: TrainConfig,
    accelerator: Any,
) -> tuple[Any, Any, int]:
    """Return the optimizer, the schedule of its learning rate, and the number of steps."""
    from transformers import get_scheduler

    num_steps = config.num_steps(len(dataset.train))
    width = tree.text_config(adapted).hidden_size
    optimizer = torch.optim.AdamW(
        list(parameters),
        lr=config.learning_rate or default_learning_rate(width),
        weight_decay=config.weight_decay,
    )
    scheduler = get_scheduler(
        config.schedule,
        optimizer,
        num_warmup_steps=math.ceil(config.warmup_fraction * num_steps),
        num_training_steps=num_steps,
    )
    return accelerator.prepare_optimizer(optimizer), scheduler, num_steps


def default_learning_rate(width: int) -> float:
    """Return the peak learning rate for an adapter on a model of a hidden size.

    2e-4 from a width of 1536 on, as in the LoRA recipes in use; more for narrower models.
    """
    return 2e-4 * max(1.0, 1536 / width)


def _refuse_non_finite(step: int, loss: float, grad_norm: float, *, scaled: bool) -> None:
    """Stop before a step that would ruin the adapter; the loss scaler mends overflow by itself."""
    if math.isfinite(loss) and (scaled or math.isfinite(grad_norm)):
        return
    what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient is {grad_norm}"
    raise DivergedError(f"{what} at step {step}; lower --learning-rate, or use --precision float32")


def _validate(scorer: Scorer, table: Table, reporter: Reporter) -> tuple[float, float]:
    """Return accuracy and mean log-loss, in nats, on a table."""
    scored = score_rows(scorer, table, "validation", reporter)
    return float(scored.correct.mean()), scored.log_loss


def score_rows(scorer: Scorer, table: Table, what: str, reporter: Reporter) -> Scored:
    """Return the probabilities of a table's rows beside their labels."""
    place = {label: index for index, label in enumerate(scorer.prompt.labels)}
    return Scored(
        probabilities=score_table(scorer, table.texts, what, reporter),
        true=np.array([place[label] for label in table.labels], dtype=np.int64),
    )


def score_table(
    scorer: Scorer, texts: Sequence[str], what: str, reporter: Reporter
) -> NDArray[np.float64]:
    """Return probabilities [texts, labels] and report the progress."""
    parts = []
    done = 0
    for batch, probabilities in scorer.stream(texts):
        parts.append(probabilities)
        done += len(batch)
        reporter.scoring(what, done, len(texts))
    return np.concatenate(parts)


@contextlib.contextmanager
def accelerator_for(precision: plan.Precision, device: torch.device) -> Iterator[Any]:
    """Give accelerate's Accelerator, and leave the process free for another with other settings."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    accelerator = Accelerator(mixed_precision=precision.mixed_precision, cpu=device.type == "cpu")
    try:
        yield accelerator
    finally:
        accelerator.end_training()
        AcceleratorState._reset_state(reset_partial_state=True)


def prepare(
    config: TrainConfig, labels: Sequence[str], precision: plan.Precision, device: torch.device
) -> tuple[Any, Prompt, run.AdapterCard, Path]:
    """Load the base model and add a new adapter.

    Returns:
        PEFT's model, the prompt, the card that goes with the adapter, and the base's folder.

    Raises:
        ModelError: If the model cannot be used for this.
    """
    folder = model.find(config.model)
    prompt = plan.load_prompt(config, labels, folder)
    base = model.load(folder, precision.base)
    adapted = lora.add_adapter(
        base,
        rank=config.rank,
        alpha=config.alpha,
        dropout=config.dropout,
        modules=config.target_modules,
    ).to(device)
    card = run.AdapterCard(
        base_model=str(folder) if Path(config.model).expanduser().is_dir() else config.model,
        base_sha256=model.weights_sha256(folder),
        labels=tuple(labels),
        instruction=config.instruction,
        list_labels=config.list_labels,
        label_texts=prompt.label_texts,
        max_length=prompt.max_length,
    )
    return adapted, prompt, card, folder


def train(config: TrainConfig, *, reporter: Reporter | None = None) -> TrainResult:
    """Train an adapter as the settings say, measure it, and leave everything in a run directory.

    Raises:
        RemoraError: The settings, the data, the model or the disk; see `remora.errors`.
    """
    reporter = reporter or Reporter()
    if config.method == "full":
        raise ConfigError("full fine-tuning can be planned, but not trained yet; use --method lora")
    _check_trackers(config.trackers)
    dataset = data.load(config)
    held_out, measured_on = dataset.test, "test"
    if held_out is None or not len(held_out):
        held_out, measured_on = dataset.validation, "validation"
    if not len(held_out):
        raise DataError(
            "there are no rows to measure on; give --test, or a --test-fraction above 0"
        )
    for line in dataset.summary.lines():
        reporter.say(line)
    device = plan.choose_device(config.device)
    precision = plan.choose_precision(device, config.precision)
    reporter.say(f"computing on {device.type}: {precision}")
    planned, heaviest = _plan(config, dataset, precision, device, reporter)

    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        adapted, prompt, card, folder = prepare(config, dataset.labels, precision, device)
        parameters = lora.count_parameters(adapted)
        for line in _introduce(config, dataset, prompt, adapted, parameters):
            reporter.say(line)
        with accelerator_for(precision, device) as accelerator:
            with accelerator.autocast():
                tree.check(adapted, short_rows(dataset.train, prompt))
            directory = run.create(config.output, config.name, config.data, config.model)
            reporter.say(f"run directory: {directory}")
            run.write_text(directory / "config.toml", config.to_toml())
            run.write_json(directory / "environment.json", run.environment(device))
            run.write_json(directory / "data.json", dataset.summary.to_dict())
            run.write_json(directory / "plan.json", planned.to_dict())
            model.set_checkpointing(adapted, planned.checkpointing)
            with _metrics_log(directory, config, accelerator) as log:
                fitted = fit(
                    adapted,
                    prompt,
                    dataset,
                    replace(config, micro_batch_tokens=planned.micro_batch_tokens),
                    accelerator=accelerator,
                    precision=precision,
                    heaviest=heaviest,
                    log=log,
                    save=lambda: run.save_adapter(adapted, card, directory / "adapter"),
                    reporter=reporter,
                )
            scorer = Scorer(
                adapted,
                prompt,
                max_tokens=config.max_tokens,
                autocast=precision.autocast,
            )
            measured = fitted.step_peak_bytes
            reporter.say(
                f"memory at the peak of training: {plan.spoken_bytes(measured)} measured, "
                f"{plan.spoken_bytes(planned.allocated_bytes)} planned"
            )
            run.write_json(
                directory / "plan.json", planned.to_dict() | {"measured_peak_bytes": measured}
            )
            scores = {measured_on: score_rows(scorer, held_out, measured_on, reporter)}
            if measured_on == "test" and len(dataset.validation):
                scores["validation"] = score_rows(
                    scorer, dataset.validation, "validation", reporter
                )
    return _conclude(
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


def _plan(
    config: TrainConfig,
    dataset: Dataset,
    precision: plan.Precision,
    device: torch.device,
    reporter: Reporter,
) -> tuple[plan.Plan, plan.Heaviest]:
    """Plan the run before any weights are fetched, and refuse it if it cannot fit.

    Raises:
        ResourceError: If nothing that the settings allow fits.
    """
    folder = model.find(config.model, weights=False)
    prompt = plan.load_prompt(config, dataset.labels, folder)
    planner = plan.Planner(config, dataset, prompt, folder, precision, plan.hardware_here(device))
    planned = planner.make()
    needed = plan.spoken_bytes(planned.peak_bytes)
    if not planned.fits:
        assert planned.available_bytes is not None
        raise ResourceError(
            f"training needs {needed} of memory and there are "
            f"{plan.spoken_bytes(planned.available_bytes)}; what would fit, the cheapest first: "
            f"{', or '.join(planned.alternatives)}"
        )
    reporter.say(
        f"planned: {needed} of memory at the peak, at most {planned.micro_batch_tokens:,} tokens "
        f"at once, checkpointing {'on' if planned.checkpointing else 'off'} ({planned.why})"
    )
    return planned, planner.heaviest(planned)


def _check_trackers(names: Sequence[str]) -> None:
    """Refuse trackers that accelerate does not know, or would leave out because of a package."""
    if not names:
        return
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    known, available = set(LOGGER_TYPE_TO_CLASS), {str(t) for t in get_available_trackers()}
    for name in names:
        if name not in known:
            choices = ", ".join(sorted(known))
            raise ConfigError(f"there is no tracker {name!r}; choose from {choices}")
        if name not in available:
            raise ConfigError(f"the tracker {name} is not installed; install its package first")


def _introduce(
    config: TrainConfig,
    dataset: Dataset,
    prompt: Prompt,
    adapted: Any,
    parameters: lora.ParameterCount,
) -> Iterator[str]:
    """Say what will be trained on what, each derived setting with where it comes from."""
    layers = ", ".join(f"{name} {count:,}" for name, count in parameters.modules.items())
    yield (
        f"training {parameters.trainable:,} of {parameters.total:,} parameters "
        f"({parameters.share:.2%}), r={config.rank}: {layers}"
    )
    width = tree.text_config(adapted).hidden_size
    if config.learning_rate is None:
        rate = default_learning_rate(width)
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


@contextlib.contextmanager
def _metrics_log(
    directory: Path, config: TrainConfig, accelerator: Any
) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Give a function that appends a record to metrics.jsonl and to the trackers asked for."""
    if config.trackers:
        from accelerate.tracking import filter_trackers

        accelerator.project_configuration.set_directories(str(directory))
        accelerator.log_with = filter_trackers(list(config.trackers), str(directory))
        accelerator.init_trackers(directory.name)
    with (
        run.disk_errors(directory),
        (directory / "metrics.jsonl").open("a", encoding="utf-8", buffering=1) as file,
    ):

        def log(record: dict[str, Any]) -> None:
            file.write(json.dumps(record) + "\n")
            if config.trackers:
                accelerator.log(record, step=record["step"])

        yield log


def _conclude(
    config: TrainConfig,
    dataset: Dataset,
    held_out: Table,
    measured_on: str,
    scores: Mapping[str, Scored],
    fitted: Fit,
    parameters: lora.ParameterCount,
    directory: Path,
    folder: Path,
    reporter: Reporter,
) -> TrainResult:
    """Measure against the baseline and write down what was found."""
    probabilities = scores[measured_on].probabilities
    predicted = [dataset.labels[i] for i in probabilities.argmax(1)]
    baseline = evaluate.baseline(
        dataset.train.texts,
        dataset.train.labels,
        held_out.texts,
        held_out.labels,
        dataset.labels,
        seed=config.seed,
    )
    weights = directory / "adapter" / "adapter_model.safetensors"
    result = TrainResult(
        directory=directory,
        measured_on=measured_on,
        metrics=evaluate.measure(dataset.labels, held_out.labels, predicted, probabilities),
        reliability=calibration.assess(
            scores[measured_on], scores.get("validation") if measured_on == "test" else None
        ),
        baseline=baseline,
        p_value=evaluate.mcnemar(held_out.labels, predicted, baseline.predictions),
        parameters=parameters,
        adapter_bytes=weights.stat().st_size,
        base_bytes=sum(path.stat().st_size for path in folder.glob("*.safetensors")),
        num_steps=fitted.num_steps,
        best_step=fitted.best_step,
        examples_per_second=fitted.speed.examples_per_second,
        supervised_tokens_per_second=fitted.speed.supervised_tokens_per_second,
        train_seconds=fitted.seconds,
        peak_memory_bytes=memory.peak_bytes(plan.choose_device(config.device)),
    )
    run.write_predictions(
        directory / "predictions.csv",
        held_out.texts,
        held_out.labels,
        predicted,
        probabilities.max(1).tolist(),
        baseline.predictions,
    )
    run.write_probabilities(directory / run.PROBABILITIES, dataset.labels, scores)
    run.write_json(directory / "evaluation.json", result.to_dict())
    report.conclude(directory, reporter.say)
    return result

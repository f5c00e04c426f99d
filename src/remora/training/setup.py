"""What a run needs before its first step: a plan that fits, what trains, and what is told of it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from remora.config import TrainConfig
from remora.data.dataset import Dataset
from remora.data.prompt import Prompt, TokenSequence
from remora.data.table import Table
from remora.errors import DataError, ResourceError
from remora.formatting import spoken_bytes
from remora.models import adapter_card, hub, loading, lora, quantize
from remora.models.loading import load_prompt
from remora.planning import plan
from remora.planning.planner import Planner
from remora.runtime import files, memory
from remora.runtime.device import Precision, choose_device, choose_precision, hardware_here
from remora.runtime.reporter import Reporter
from remora.training.optimizer import default_learning_rate
from remora.tree.forward import text_config


def tables_to_measure_on(dataset: Dataset) -> dict[str, Table]:
    """Return the tables to measure on by split, the one that counts first."""
    tables = {"test": dataset.test, "validation": dataset.validation}
    found = {name: table for name, table in tables.items() if table is not None and len(table)}
    if not found:
        raise DataError(
            "there are no rows to measure on; give --test, or a --test-fraction above 0"
        )
    return found


def choose_arithmetic(
    config: TrainConfig, num_devices: int, reporter: Reporter
) -> tuple[torch.device, Precision]:
    """Return what a run computes on and in, and say so.

    Raises:
        ConfigError: If it is not there, or cannot do what is asked for.
    """
    device = choose_device(config.device)
    memory.begin(device)
    if config.method == "qlora":
        quantize.require(device)
    full = config.method == "full"
    precision = choose_precision(device, config.precision, trains_base=full)
    name = device.type if num_devices == 1 else f"{num_devices} times {device.type}"
    reporter.say(f"computing on {name}: {precision}")
    return device, precision


def plan_run(
    config: TrainConfig,
    dataset: Dataset,
    precision: Precision,
    device: torch.device,
    reporter: Reporter,
    *,
    num_processes: int = 1,
) -> tuple[plan.Plan, plan.Heaviest]:
    """Plan the run before any weights are fetched, and refuse it if it cannot fit.

    Raises:
        ResourceError: If nothing that the settings allow fits.
    """
    folder = hub.find(config.model, weights=False)
    prompt = load_prompt(config, dataset.labels, folder)
    planner = Planner(
        config,
        dataset,
        prompt,
        folder,
        precision,
        hardware_here(device),
        num_processes=num_processes,
    )
    planned = planner.make()
    needed = spoken_bytes(planned.peak_bytes)
    each = "" if num_processes == 1 else f" in each of {num_processes} processes"
    if not planned.fits:
        assert planned.available_bytes is not None
        raise ResourceError(
            f"training needs {needed} of memory{each} and there are "
            f"{spoken_bytes(planned.available_bytes)}; what would fit, the cheapest first: "
            f"{', or '.join(planned.alternatives)}"
        )
    reporter.say(
        f"planned: {needed} of memory at the peak{each}, at most {planned.micro_batch_tokens:,} "
        f"tokens at once, checkpointing {'on' if planned.checkpointing else 'off'} ({planned.why})"
    )
    return planned, planner.heaviest(planned)


def refuse_full_disk(planned: plan.Plan, config: TrainConfig) -> None:
    """Refuse a run directory that there is no room for.

    Raises:
        ResourceError: If the plan says so.
    """
    if not planned.fits_disk:
        raise ResourceError(
            f"the run takes {spoken_bytes(planned.disk_bytes)} of disk and there are "
            f"{spoken_bytes(planned.free_disk_bytes)} for {config.output}; free "
            "space, or choose another folder with --output"
        )


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


def load_trainable(
    config: TrainConfig, labels: Sequence[str], precision: Precision, device: torch.device
) -> tuple[Any, Prompt, adapter_card.AdapterCard, Path]:
    """Load the base model and make it trainable: with a new adapter, or in all its weights.

    Returns:
        What trains, the prompt, the card that goes with it, and the base's folder.

    Raises:
        ModelError: If the model cannot be used for this.
    """
    folder = hub.find(config.model)
    prompt = load_prompt(config, labels, folder)
    base = loading.load_base(folder, config.method, precision.base, device)
    adapted = lora.adapt(base, config).to(device)
    card = adapter_card.AdapterCard(
        base_model=str(folder) if Path(config.model).expanduser().is_dir() else config.model,
        base_sha256=files.weights_sha256(folder),
        labels=tuple(labels),
        instruction=config.instruction,
        list_labels=config.list_labels,
        label_texts=prompt.label_texts,
        max_length=prompt.max_length,
        method=config.method,
    )
    return adapted, prompt, card, folder


def short_rows(table: Table, prompt: Prompt, count: int = 4) -> list[TokenSequence]:
    """Return the rows with the shortest messages among the first ones, to check a model with."""
    first = sorted(range(min(len(table), 256)), key=lambda i: len(table.texts[i]))[:count]
    return prompt.rows([table.texts[i] for i in first], [table.labels[i] for i in first])


def introduce(
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
    width = text_config(adapted).hidden_size
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


def write_settings(
    directory: Path,
    environment: dict[str, Any],
    dataset: Dataset,
    planned: plan.Plan,
    config: TrainConfig,
) -> None:
    """Write what it takes to repeat the run, and its plan."""
    files.write_json(directory / "environment.json", environment)
    files.write_json(directory / "data.json", dataset.summary.to_dict())
    files.write_json(directory / "plan.json", planned.to_dict())
    files.write_text(directory / "config.toml", config.to_toml())

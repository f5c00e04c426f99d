"""A training session: rows, plan, model, arithmetic and processes, assembled in one place.

`train`, `TextClassifier`, the sizes of a learning curve and the folds of a diagnosis all open one.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from remora.config import TrainConfig
from remora.config.several_labels import settled
from remora.data.dataset import Dataset
from remora.data.prompt import Prompt, Rendered
from remora.models import lora
from remora.models.metadata import AdapterCard
from remora.models.saved import Trained
from remora.planning.plan import Heaviest, Plan
from remora.runtime import memory, sharding
from remora.runtime.device import Precision
from remora.runtime.process_group import ProcessGroup
from remora.runtime.reporter import Reporter
from remora.runtime.stop import Stop
from remora.training import feasibility, layout, resume, trainable
from remora.training.checkpoint import Checkpoint
from remora.tree import layouts
from remora.tree.features import Extractor
from remora.tree.scoring import Scorer

ModelLoader = Callable[..., tuple[Any, Prompt, AdapterCard, Path]]
"""Takes settings, labels, precision and device, as `trainable.load_trainable` does."""


@dataclass(frozen=True, kw_only=True)
class Session:
    """A model on its device, ready to train on its rows."""

    config: TrainConfig  # as the user gave it
    dataset: Dataset
    device: torch.device
    precision: Precision
    plan: Plan
    heaviest: Heaviest  # the batch that needs most memory
    model: Any  # PEFT's, or a plain one where all weights train
    prompt: Prompt
    card: AdapterCard
    base_folder: Path
    parameters: lora.ParameterCount
    accelerator: Any  # accelerate's
    group: ProcessGroup
    stop: Stop
    reporter: Reporter

    @property
    def trained(self) -> Trained:
        """The model as one that has been trained, which needs no session."""
        return Trained(
            model=self.model,
            prompt=self.prompt,
            card=self.card,
            precision=self.precision,
            device=self.device,
        )

    @property
    def settings(self) -> TrainConfig:
        """The settings with the micro-batch, checkpointing and sharding that the plan chose."""
        return self.plan.applied_to(self.config)

    def scorer(self, *, tolerance: float = 1e-2) -> Scorer:
        """Return a scorer of the model as it is now, within the planned memory."""
        return self.trained.scorer(
            max_tokens=self.plan.micro_batch_tokens,
            tolerance=tolerance,
            limit_bytes=self.heaviest.limit_bytes,
        )

    def extractor(self) -> Extractor:
        """Return an extractor of the model's features as it is now, within the planned memory."""
        full = self.config.method == "full"  # the others are stored in the arithmetic's precision
        return Extractor(
            self.model,
            self.prompt,
            max_tokens=self.plan.micro_batch_tokens,
            autocast=self.precision.autocast if full else None,
            limit_bytes=self.heaviest.limit_bytes,
        )


def _where_to_load(planned: Plan, device: torch.device) -> torch.device:
    """Return the device to load weights on: those that are sharded are put there in parts."""
    if not planned.shard:
        return device
    memory.map_arrays(device)
    return torch.device("cpu")


def _as_rendered_before(
    prompt: Prompt, card: AdapterCard, resumed: Checkpoint | None, reporter: Reporter
) -> tuple[Prompt, AdapterCard]:
    """Return the prompt that a resumed run has been trained with, and the card with it."""
    rendered = resumed.state.get("prompt") if resumed else None
    if rendered is None:
        return prompt, card
    prompt = prompt.pinned(Rendered(**rendered))
    if prompt.changed:
        reporter.say(prompt.changed)
    return prompt, replace(card, rendered=rendered)


@contextlib.contextmanager
def open_session(
    config: TrainConfig,
    dataset: Dataset,
    *,
    resumed: Checkpoint | None = None,
    needs_disk: bool = False,
    load: ModelLoader = trainable.load_trainable,
    group: ProcessGroup | None = None,
    stop: Stop | None = None,
    reporter: Reporter | None = None,
) -> Iterator[Session]:
    """Plan, load and check everything that training needs; all processes call it together.

    The caller's random state is restored when the session ends.

    Args:
        config: The settings.
        dataset: The rows.
        resumed: The checkpoint to resume from, whose plan stays.
        needs_disk: Whether to refuse a run that the disk has no room for.
        load: Loads the model and makes it trainable.
        group: The processes that train together.
        stop: Asked whether to stop.
        reporter: Told each choice and its reason.

    Raises:
        ConfigError: If the device is missing, or the processes differ.
        ResourceError: If memory or disk do not suffice.
        ModelError: If the model cannot be used, or does not follow the layout that is asked for.
    """
    group, stop, reporter = group or ProcessGroup(), stop or Stop(), reporter or Reporter()
    config = settled(config, is_multi_label=dataset.multi_label)
    with contextlib.ExitStack() as stack:
        with group.together():
            device, precision = feasibility.choose_arithmetic(config, group.size, reporter)
            before = resume.as_before(config, resumed)
            plan = functools.partial(feasibility.plan_run, num_processes=group.size)
            settings = dataset, precision, device, reporter
            planned, heaviest = plan(before, *settings)
            if needs_disk:
                feasibility.refuse_full_disk(planned, config)
            stack.enter_context(torch.random.fork_rng())
            torch.manual_seed(config.seed)
            on = _where_to_load(planned, device)
            model, prompt, card, folder = load(config, dataset.labels, precision, on)
            prompt, card = _as_rendered_before(prompt, card, resumed, reporter)
            parameters = lora.count_parameters(model)
            for line in trainable.introduce(config, dataset, prompt, model, parameters, card):
                reporter.say(line)
            accelerator = stack.enter_context(trainable.accelerator_for(precision, device))
        group.refuse_differences({"base model": card.base_sha256, "shard": planned.shard})
        if planned.shard:
            sharding.apply(model, device, group)
        layouts.assign(model, planned.layout)
        largest, asked = (heaviest.rows, planned.micro_batch_tokens), config.layout
        layout.settle(model, prompt, dataset.train, largest, asked, accelerator, group, reporter)
        with group.together():
            if planned.layout != layouts.of(model):
                again = replace(before, layout="rows", shard="on" if planned.shard else "off")
                planned, heaviest = plan(again, *settings)
            trainable.set_up_layers(model, planned)
        if not group.is_first:
            torch.manual_seed(config.seed + group.rank)  # for dropout of its own
        yield Session(
            config=config,
            dataset=dataset,
            device=device,
            precision=precision,
            plan=planned,
            heaviest=heaviest,
            model=model,
            prompt=prompt,
            card=replace(_with_columns(card, dataset), layout=planned.layout),
            base_folder=folder,
            parameters=parameters,
            accelerator=accelerator,
            group=group,
            stop=stop,
            reporter=reporter,
        )


def _with_columns(card: AdapterCard, dataset: Dataset) -> AdapterCard:
    """Return the card with the columns of the training table, which predictions look for."""
    summary = dataset.summary
    return replace(card, text_columns=summary.text_columns, label_column=summary.label_column)

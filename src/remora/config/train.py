"""The settings of `remora train`, which many others build on."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from cyclopts import Parameter

from remora.config.checks import DeviceName, Method, PrecisionName, is_from, is_plain_name
from remora.errors import ConfigError

DEFAULT_MICRO_BATCH_TOKENS = 2048
"""Larger micro-batches of a token tree are hardly faster, and need more memory."""


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of `remora train`."""

    data: str = field(kw_only=False)
    """A CSV, TSV, JSONL or Parquet file, a folder with train, validation and test files, or a data
    set on the Hugging Face hub as hf:owner/name."""

    model: str
    """Base model: a folder, or the id of one on the Hugging Face hub."""

    name: str | None = None
    """Name of the run; by default made from the data's and the model's names."""

    output: Path = Path("runs")
    """Folder that run directories are made in."""

    validation: str | None = None
    """Table of validation rows; by default split off the training rows."""

    test: str | None = None
    """Table of test rows; by default split off the training rows."""

    text_column: str | None = None
    """Column with the messages; by default found by its name."""

    label_column: str | None = None
    """Column with the labels; by default found by its name."""

    validation_fraction: float = 0.1
    """Share of the training rows set aside to choose the best weights by, 2,000 rows at most."""

    test_fraction: float = 0.1
    """Share of the training rows set aside for the final figures where no test rows are given,
    10,000 rows at most."""

    rows_per_class: int | None = None
    """Train on so many rows of each class, drawn by the seed, or on all that it has; by default on
    all of each class."""

    learning_curve: str | None = None
    """Train once for each of these numbers of rows per class, such as 5,10,20,50,all, to see
    whether more rows would help."""

    instruction: str = "Classify the message."
    """What the model is told before each message."""

    list_labels: bool = False
    """List all labels in the prompt: helps with few examples per label, costs a longer prefix."""

    label_texts: dict[str, str] = field(default_factory=dict)
    """What the model writes for a label, where that is not the label itself."""

    max_length: int | None = None
    """Longest sequence in tokens, longer messages are cut; by default the model's context."""

    method: Method = "lora"
    """What trains: a LoRA adapter, with qlora one on a base model in 4 bits, or with full every
    weight of the model."""

    rank: int = 16
    """Rank r of the adapter's matrices."""

    alpha: float = 32.0
    """The adapter's update is scaled by alpha / rank."""

    dropout: float = 0.05
    """Dropout on the adapter's inputs while training."""

    use_rslora: bool = False
    """Scale the adapter's update by alpha / sqrt(rank) instead (rsLoRA), for high ranks."""

    use_dora: bool = False
    """Train the length of each row of the adapted weights apart from its direction (DoRA); slower,
    and not on a base in 4 bits."""

    init_lora_weights: Literal["default", "gaussian"] = "default"
    """How the adapter's A begins: as in PEFT (Kaiming), or gaussian. B begins at zero."""

    loraplus_lr_ratio: float | None = None
    """Learning rate of the adapter's B as a multiple of that of A, such as 16 (LoRA+)."""

    target_modules: tuple[str, ...] = ()
    """Linear layers that get an adapter; by default q, k, v, o, gate, up and down, or for other
    architectures every linear layer but the head."""

    learning_rate: float | None = None
    """Peak learning rate of AdamW; by default chosen from the method and the model's width."""

    epochs: float = 3.0
    """Passes over the training rows."""

    max_steps: int | None = None
    """Stop after this many optimizer steps, whatever `epochs` says."""

    batch_size: int = 32
    """Rows that one optimizer step averages over, however they are cut into micro-batches."""

    micro_batch_tokens: int | None = None
    """Most tokens computed at once; limits memory, changes no result. By default 2048, or fewer
    where the memory does not suffice."""

    checkpointing: Literal["auto", "on", "off"] = "auto"
    """Compute each layer again in the backward pass instead of keeping what it needs: saves memory,
    costs time. By default only where the memory does not suffice without."""

    schedule: Literal["linear", "cosine", "constant"] = "cosine"
    """How the learning rate falls after the warm-up."""

    warmup_fraction: float = 0.05
    """Share of the steps over which the learning rate rises."""

    weight_decay: float = 0.0
    """AdamW's weight decay on what trains."""

    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm."""

    eval_steps: int | None = None
    """Steps between evaluations on the validation rows; by default once an epoch."""

    patience: int = 3
    """Stop after this many evaluations in a row without a better one; 0 never stops early."""

    precision: PrecisionName = "auto"
    """Arithmetic of the forward and backward pass; what trains is float32 in any case."""

    device: DeviceName = "auto"
    """Where to compute."""

    devices: int = 1
    """Train on so many devices of this machine, one process each."""

    shard: Literal["auto", "on", "off"] = "auto"
    """Shard the weights (FSDP): each of several processes holds a part of them, and gathers a layer
    to compute it. By default where all weights train, or a base does not fit on one device."""

    seed: int = 0
    """Seed of the splits, the order of rows, the adapter's start and the dropout."""

    trackers: tuple[str, ...] = ()
    """Experiment trackers that accelerate knows, such as tensorboard or wandb."""

    checkpoint_minutes: float = 10.0
    """Time between checkpoints, from which the same command goes on after a crash; 0 saves one
    after every step."""

    max_time: str | None = None
    """Save and stop after this time, such as 11h30m or 45m; the same command goes on."""

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            ConfigError: Naming everything that is wrong.
        """
        problems = [
            f"{name} is {getattr(self, name)}; give {wanted}"
            for name, wanted, good in (
                ("rank", "a whole number from 1", self.rank >= 1),
                ("alpha", "a number above 0", 0 < self.alpha < float("inf")),
                ("dropout", "a number from 0 to below 1", 0 <= self.dropout < 1),
                (
                    "learning_rate",
                    "a number above 0 and at most 1",
                    self.learning_rate is None or 0 < self.learning_rate <= 1,
                ),
                ("epochs", "a number above 0", 0 < self.epochs < float("inf")),
                (
                    "loraplus_lr_ratio",
                    "a number above 0 and at most 1000",
                    self.loraplus_lr_ratio is None or 0 < self.loraplus_lr_ratio <= 1000,
                ),
                (
                    "init_lora_weights",
                    "default or gaussian; those that change the base model are not there",
                    self.init_lora_weights in {"default", "gaussian"},
                ),
                ("max_steps", "a whole number from 1", is_from(1, self.max_steps)),
                ("max_length", "a whole number from 1", is_from(1, self.max_length)),
                ("eval_steps", "a whole number from 1", is_from(1, self.eval_steps)),
                ("batch_size", "a whole number from 1", self.batch_size >= 1),
                (
                    "micro_batch_tokens",
                    "a whole number from 1",
                    is_from(1, self.micro_batch_tokens),
                ),
                ("warmup_fraction", "a number from 0 to 1", 0 <= self.warmup_fraction <= 1),
                ("weight_decay", "a number from 0", 0 <= self.weight_decay < float("inf")),
                ("max_grad_norm", "a number above 0", self.max_grad_norm > 0),
                ("devices", "a whole number from 1", self.devices >= 1),
                ("patience", "a whole number from 0", self.patience >= 0),
                ("seed", "a whole number from 0", self.seed >= 0),
                ("validation_fraction", "from 0 to below 1", 0 <= self.validation_fraction < 1),
                ("test_fraction", "from 0 to below 1", 0 <= self.test_fraction < 1),
                (
                    "checkpoint_minutes",
                    "a number from 0",
                    0 <= self.checkpoint_minutes < float("inf"),
                ),
                (
                    "max_time",
                    "a time such as 11h30m, 45m or 90s",
                    self.max_time is None or self.max_seconds is not None,
                ),
                ("name", "a name without slashes", is_plain_name(self.name)),
                ("rows_per_class", "a whole number from 1", is_from(1, self.rows_per_class)),
                (
                    "learning_curve",
                    "two or more whole numbers that increase, such as 5,10,20,50,all",
                    self.learning_curve is None or bool(self.curve_sizes),
                ),
            )
            if not good
        ]
        if self.use_dora and self.method == "qlora":
            problems.append("use_dora is not for a base in 4 bits; use --method lora")
        if self.method == "qlora" and self.shard == "on":
            problems.append(
                "shard is on and method is qlora, whose 4-bit weights are not sharded; "
                "leave it out, or use --method lora"
            )
        if self.method == "full" and self.lora_variant:
            problems.append(
                f"{self.lora_variant} is of an adapter and method is full; use --method lora"
            )
        if self.learning_curve is not None:
            if self.rows_per_class is not None:
                problems.append("rows_per_class and learning_curve are given; give one of them")
            if self.devices > 1:
                problems.append("a learning curve is trained on one device; leave out devices")
        if problems:
            raise ConfigError("; ".join(problems))

    @property
    def curve_sizes(self) -> tuple[int | None, ...]:
        """The rows per class that `learning_curve` asks for, None for all; () if they are wrong."""
        words = (self.learning_curve or "").replace(" ", "").split(",")
        numbers = words[:-1] if words[-1] == "all" else words
        if len(words) < 2 or not all(re.fullmatch(r"0*[1-9]\d{0,8}", each) for each in numbers):
            return ()
        sizes = [int(each) for each in numbers]
        if sizes != sorted(set(sizes)):
            return ()
        return (*sizes, *([None] if words[-1] == "all" else []))

    @property
    def num_per_class(self) -> int | None:
        """Rows of each class to train on, None for all: with a learning curve its last size."""
        return self.curve_sizes[-1] if self.learning_curve else self.rows_per_class

    @property
    def lora_variant(self) -> str | None:
        """The name of a setting that makes the adapter another than plain LoRA, if there is one."""
        names = ("use_rslora", "use_dora", "init_lora_weights", "loraplus_lr_ratio")
        plain = {entry.name: entry.default for entry in dataclasses.fields(self)}
        return next((name for name in names if getattr(self, name) != plain[name]), None)

    @property
    def max_tokens(self) -> int:
        """Most tokens computed at once where nobody has looked at the memory."""
        return self.micro_batch_tokens or DEFAULT_MICRO_BATCH_TOKENS

    @property
    def max_seconds(self) -> float | None:
        """What `max_time` says, in seconds; None where nothing is, or no time."""
        found = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", self.max_time or "")
        if not found or not any(found.groups()):
            return None
        hours, minutes, seconds = (int(part or 0) for part in found.groups())
        return 3600.0 * hours + 60.0 * minutes + seconds

    def num_steps(self, num_rows: int) -> int:
        """Return how many optimizer steps training on so many rows takes."""
        steps_per_epoch = math.ceil(num_rows / self.batch_size)
        return self.max_steps or max(1, math.ceil(self.epochs * steps_per_epoch))

    def to_toml(self) -> str:
        """Return the settings as a TOML file that `--config` takes; settings of None left out."""
        import tomli_w

        settings: dict[str, Any] = {}
        for entry in dataclasses.fields(self):
            value = getattr(self, entry.name)
            if value is None or value == {}:
                continue
            if isinstance(value, Path):
                value = str(value)
            settings[entry.name] = list(value) if isinstance(value, tuple) else value
        return str(tomli_w.dumps(settings))

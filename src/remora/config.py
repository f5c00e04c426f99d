"""The settings of each verb: the one place where a default and its help text stand.

The command line's flags and the keys of a TOML file are generated from these fields.
"""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from cyclopts import Parameter

from remora.errors import ConfigError

Precision = Literal["auto", "float32", "bfloat16", "float16"]
Device = Literal["auto", "cpu", "cuda", "mps"]
Method = Literal["lora", "qlora", "full"]

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

    precision: Precision = "auto"
    """Arithmetic of the forward and backward pass; what trains is float32 in any case."""

    device: Device = "auto"
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
                ("max_steps", "a whole number from 1", _from(1, self.max_steps)),
                ("max_length", "a whole number from 1", _from(1, self.max_length)),
                ("eval_steps", "a whole number from 1", _from(1, self.eval_steps)),
                ("batch_size", "a whole number from 1", self.batch_size >= 1),
                ("micro_batch_tokens", "a whole number from 1", _from(1, self.micro_batch_tokens)),
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
                ("name", "a name without slashes", _is_plain_name(self.name)),
                ("rows_per_class", "a whole number from 1", _from(1, self.rows_per_class)),
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


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class PlanConfig(TrainConfig):
    """Settings of `remora plan`: those of `remora train`, and the machine to plan for."""

    device: Literal[
        "auto",
        "cpu",
        "cuda",
        "mps",
        "p100",
        "v100",
        "t4",
        "rtx3090",
        "a10",
        "a100",
        "rtx4090",
        "l4",
        "l40s",
        "h100",
        "h200",
    ] = "auto"  # type: ignore[assignment]
    """Where to compute: here, or on one of these devices that need not be here."""

    device_memory: str | None = None
    """Memory of the device to plan for, such as 16GB; by default what is there."""

    json: bool = False
    """Write the plan as JSON to standard output."""

    def __post_init__(self) -> None:
        """Check every value; raises ConfigError."""
        super().__post_init__()
        self.memory_bytes()

    def memory_bytes(self) -> int | None:
        """Return the memory to plan for in bytes, None where it was not given.

        Raises:
            ConfigError: If it is no amount of memory.
        """
        return _bytes("device_memory", self.device_memory, "16GB or 15.5GiB")


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """Settings of `remora predict`."""

    adapter: Path = field(kw_only=False)
    """A run directory, the folder of an adapter or of a whole model, or an adapter's id on the
    Hugging Face hub."""

    source: str = field(kw_only=False, default="-")
    """Messages: a CSV, TSV, JSONL, Parquet or text file, or - for lines on standard input."""

    text_column: str | None = None
    """Column with the messages; by default found by its name."""

    input_format: Literal["text", "csv", "tsv", "jsonl"] | None = None
    """Format of standard input; by default one message a line."""

    top_k: int = 1
    """How many labels to give for each message, the likeliest first."""

    model: str | None = None
    """Base model, where it no longer is where the adapter was trained."""

    tolerance: float = 0.01
    """Most probability that the labels not looked at may hold together. 1 only makes sure of the
    likeliest label: that is faster, and the probabilities are rough."""

    micro_batch_tokens: int = 2048
    """Most tokens computed at once; limits memory, changes no result."""

    precision: Precision = "auto"
    """Arithmetic of the forward pass."""

    device: Device = "auto"
    """Where to compute."""

    json: bool = False
    """Write JSON lines instead of CSV."""

    def __post_init__(self) -> None:
        """Check every value; raises ConfigError."""
        if self.top_k < 1:
            raise ConfigError(f"top_k is {self.top_k}; give a whole number from 1")
        if not 0 <= self.tolerance <= 1:
            raise ConfigError(f"tolerance is {self.tolerance}; give a number from 0 to 1")
        if self.micro_batch_tokens < 1:
            raise ConfigError(
                f"micro_batch_tokens is {self.micro_batch_tokens}; give a whole number from 1"
            )


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Settings of `remora eval`."""

    adapter: Path = field(kw_only=False)
    """A run directory, the folder of an adapter or of a whole model, or an adapter's id on the
    Hugging Face hub."""

    data: str = field(kw_only=False)
    """Table of texts and labels to measure on."""

    text_column: str | None = None
    """Column with the messages; by default found by its name."""

    label_column: str | None = None
    """Column with the labels; by default found by its name."""

    model: str | None = None
    """Base model, where it no longer is where the adapter was trained."""

    predictions: Path | None = None
    """Write each row's label, prediction and probability to this CSV file."""

    abstain_at_accuracy: float | None = None
    """Find the confidence from which on the answers are right this often, such as 0.98; messages
    below it are for a person. It is chosen on the run's validation rows."""

    out_of_scope: str | None = None
    """Table of messages that no label fits, to measure how well the confidence tells them."""

    micro_batch_tokens: int = 2048
    """Most tokens computed at once; limits memory, changes no result."""

    precision: Precision = "auto"
    """Arithmetic of the forward pass."""

    device: Device = "auto"
    """Where to compute."""

    json: bool = False
    """Write the figures as JSON to standard output."""

    def __post_init__(self) -> None:
        """Check every value; raises ConfigError."""
        wanted, problems = self.abstain_at_accuracy, []
        if wanted is not None and not 0 < wanted <= 1:
            problems.append(
                f"abstain_at_accuracy is {wanted}; give a share above 0, 1 at most, such as 0.98"
            )
        if self.micro_batch_tokens < 1:
            problems.append(
                f"micro_batch_tokens is {self.micro_batch_tokens}; give a whole number from 1"
            )
        if problems:
            raise ConfigError("; ".join(problems))


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Settings of `remora compare`."""

    runs: tuple[Path, ...] = field(kw_only=False)
    """Run directories that were measured on the same rows."""

    bar: float | None = None
    """Accuracy that suffices, such as 0.93: names the smallest run that clears it."""

    volume: int | None = None
    """Number of messages to say for what the difference comes to."""

    cost_per_error: float | None = None
    """What one wrong answer costs, in any currency; with `volume` it gives the difference a
    worth."""

    report: Path | None = None
    """Write the comparison to this HTML file too, which fetches nothing."""

    json: bool = False
    """Write the figures as JSON to standard output."""

    def __post_init__(self) -> None:
        """Check every value; raises ConfigError."""
        problems = [
            f"{name} is {getattr(self, name)}; give {wanted}"
            for name, wanted, good in (
                ("bar", "a share above 0, 1 at most", self.bar is None or 0 < self.bar <= 1),
                ("volume", "a whole number from 1", _from(1, self.volume)),
                (
                    "cost_per_error",
                    "a number from 0",
                    self.cost_per_error is None or 0 <= self.cost_per_error < float("inf"),
                ),
            )
            if not good
        ]
        if not self.runs:
            problems.append("no run is given; give one or more run directories")
        if self.cost_per_error is not None and self.volume is None:
            problems.append("cost_per_error is given without volume; give both")
        if problems:
            raise ConfigError("; ".join(problems))


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class DiagnoseConfig:
    """Settings of `remora diagnose`."""

    run: Path = field(kw_only=False)
    """Directory of a finished run."""

    method: Literal["fast", "frozen", "tfidf", "adapters"] = "fast"
    """Who judges rows that it was not trained on: regressions on frozen features of the base
    model and on TF-IDF (fast), on either of them, or new adapters, which takes as long as training
    once for each fold; stopped, the same command goes on."""

    folds: int | None = None
    """In how many parts the rows are cut; each is judged by what was trained on the others. By
    default 10 for regressions on up to 5,000 rows, else 5."""

    apply: Path | None = None
    """A relabel.csv with decisions: write the training table with them, and diagnose nothing."""

    output: Path | None = None
    """Where to write the table that `apply` makes; by default cleaned.csv in the run directory."""

    model: str | None = None
    """Base model, where it no longer is where the run found it."""

    json: bool = False
    """Write the figures as JSON to standard output."""

    def __post_init__(self) -> None:
        """Check every value; raises ConfigError."""
        if self.folds is not None and self.folds < 2:
            raise ConfigError(f"folds is {self.folds}; give a whole number from 2")
        if self.output is not None and self.apply is None:
            raise ConfigError("output is given without apply; give both")


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Settings of `remora report`."""

    run: Path = field(kw_only=False)
    """Directory of a finished run."""

    output: Path | None = None
    """File to write; by default report.html in the run directory."""


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Settings of `remora export`."""

    run: Path = field(kw_only=False)
    """Directory of a finished run."""

    merge: bool = False
    """Write base model and adapter as one model folder."""

    compress: bool = False
    """Write a smaller adapter: each layer's update cut to the rank that it deserves."""

    output: Path | None = None
    """Folder to write; by default merged or compressed in the run directory."""

    dtype: Literal["float32", "bfloat16", "float16", "float8"] | None = None
    """What weights are stored in; by default what the base model is stored in when merging, float8
    when compressing."""

    budget: str | None = None
    """Most bytes that the compressed adapter's files may take together, such as 3MB."""

    ratio: float | None = None
    """Make the compressed adapter at least so many times smaller than the base model's weights."""

    distill: bool = False
    """Let an adapter that was cut learn again from the whole one and the training rows. That takes
    up to 2,000 steps for each size that cutting alone costs too much."""

    tolerance: float = 0.5
    """Where neither budget nor ratio is given: how many points of accuracy on the validation rows
    the compressed adapter may lose, up to the next whole row."""

    model: str | None = None
    """Base model, where it no longer is where the adapter was trained."""

    micro_batch_tokens: int = 2048
    """Most tokens computed at once; limits memory, changes no result."""

    device: Device = "auto"
    """Where to compute."""

    json: bool = False
    """Write the figures as JSON to standard output."""

    def __post_init__(self) -> None:
        """Check every value; raises ConfigError."""
        problems = []
        if self.merge == self.compress:
            given = "both are" if self.merge else "neither is"
            problems.append(f"of merge and compress {given} given; give one of them")
        if self.merge and (self.budget is not None or self.ratio is not None):
            problems.append("budget and ratio are for compressing; give them with compress only")
        if self.merge and self.distill:
            problems.append("distill is for compressing; give it with compress only")
        if self.merge and self.dtype == "float8":
            problems.append("dtype float8 is for compressing; merge in 16 or 32 bits")
        if self.budget is not None and self.ratio is not None:
            problems.append("budget and ratio are both given; give one of them")
        problems += [
            f"{name} is {getattr(self, name)}; give {wanted}"
            for name, wanted, good in (
                ("ratio", "a number above 0", self.ratio is None or 0 < self.ratio < float("inf")),
                ("tolerance", "a number of points from 0 to 100", 0 <= self.tolerance <= 100),
                ("micro_batch_tokens", "a whole number from 1", self.micro_batch_tokens >= 1),
            )
            if not good
        ]
        if problems:
            raise ConfigError("; ".join(problems))
        self.budget_bytes()

    def budget_bytes(self) -> int | None:
        """Return the budget in bytes, None where it was not given; raises ConfigError."""
        return _bytes("budget", self.budget, "3MB or 500kB")


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class PushConfig:
    """Settings of `remora push`."""

    run: Path = field(kw_only=False)
    """Directory of a finished run."""

    repo_id: str = field(kw_only=False)
    """Repository on the Hugging Face hub, as owner/name; it is made if there is none."""

    public: bool = False
    """Let everybody read it; by default it is private."""

    json: bool = False
    """Write what was published as JSON to standard output."""

    def __post_init__(self) -> None:
        """Check every value; raises ConfigError."""
        if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", self.repo_id):
            raise ConfigError(f"repo_id is {self.repo_id!r}; give it as owner/name")


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Settings of `remora serve`."""

    adapters: tuple[str, ...] = field(kw_only=False)
    """Run directories, adapters' folders or ids on the Hugging Face hub, of one base model, or one
    whole model. Each is named by its run, or as NAME=FOLDER."""

    host: str = "127.0.0.1"
    """Address to listen on. Any but a loopback address needs a token, in the environment variable
    REMORA_TOKEN or in `token_file`."""

    port: int = 8000
    """Port to listen on; 0 takes a free one."""

    token_file: Path | None = None
    """File with the token that clients must show."""

    max_body: str = "1MB"
    """Most bytes of a request's body."""

    max_text_length: int = 20_000
    """Most characters of a text."""

    max_texts: int = 256
    """Most texts in a request."""

    max_queue: int = 1024
    """Most texts that wait; a request for which there is no room is told to come again."""

    timeout_seconds: float = 30.0
    """Longest time to an answer; after it a request is told to come again."""

    read_seconds: float = 4.0
    """Longest time for a request's headers, and again for its body; as long may a connection be
    idle."""

    model: str | None = None
    """Base model, where it no longer is where the adapters were trained."""

    tolerance: float = 0.01
    """Most probability that the labels not looked at may hold together. 1 only makes sure of the
    likeliest label: that is faster, and the probabilities are rough."""

    micro_batch_tokens: int = 2048
    """Most tokens computed at once; limits memory, changes no result."""

    precision: Precision = "auto"
    """Arithmetic of the forward pass."""

    device: Device = "auto"
    """Where to compute."""

    def __post_init__(self) -> None:
        """Check every value; raises ConfigError."""
        problems = [
            f"{name} is {getattr(self, name)}; give {wanted}"
            for name, wanted, good in (
                ("port", "a whole number from 0 to 65535", 0 <= self.port <= 65_535),
                ("max_text_length", "a whole number from 1", self.max_text_length >= 1),
                ("max_texts", "a whole number from 1", self.max_texts >= 1),
                ("max_queue", "at least max_texts", self.max_queue >= self.max_texts),
                ("timeout_seconds", "a number above 0", 0 < self.timeout_seconds < math.inf),
                ("tolerance", "a number from 0 to 1", 0 <= self.tolerance <= 1),
                ("read_seconds", "a number above 0", 0 < self.read_seconds < math.inf),
                ("micro_batch_tokens", "a whole number from 1", self.micro_batch_tokens >= 1),
            )
            if not good
        ]
        if not self.adapters:
            problems.append("no adapter is given; give one or more run directories")
        if problems:
            raise ConfigError("; ".join(problems))
        self.body_bytes()
        self.folders()

    def body_bytes(self) -> int:
        """Return the most bytes of a request's body; raises ConfigError."""
        return _bytes("max_body", self.max_body, "1MB or 500kB") or 0

    def folders(self) -> dict[str, Path]:
        """Return the folder of each adapter's name; raises ConfigError."""
        folders: dict[str, Path] = {}
        for given in self.adapters:
            name, is_named, folder = given.partition("=")
            if not is_named or "/" in name:  # a folder's name may have an equals sign
                path, folder = Path(given).absolute(), given
                name = path.parent.name if path.name in {"adapter", "model"} else path.name
            if not re.fullmatch(r"[\w.-]+", name):
                raise ConfigError(
                    f"an adapter is named {name!r}; name it with letters, digits, dots, hyphens "
                    f"and underscores, as in my-name={folder}"
                )
            if name in folders:
                raise ConfigError(
                    f"two adapters are named {name}; name one otherwise, as in other={folder}"
                )
            folders[name] = Path(folder)
        return folders


def _bytes(name: str, amount: str | None, examples: str) -> int | None:
    """Return an amount of memory in bytes; raises ConfigError if it is none."""
    if amount is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT])(i?)B?", amount.strip(), re.I)
    if not found or not float(found[1]):
        raise ConfigError(f"{name} is {amount!r}; give an amount such as {examples}")
    power = "KMGT".index(found[2].upper()) + 1
    return int(float(found[1]) * (1024 if found[3] else 1000) ** power)


def _from(least: int, value: int | None) -> bool:
    return value is None or value >= least


def _is_plain_name(name: str | None) -> bool:
    return name is None or (Path(name).name == name and name not in {"", ".", ".."})

"""The settings of `remora train`."""

# Annotations are not postponed here: cyclopts would look up those that PlanConfig inherits in the
# module of PlanConfig.

import dataclasses
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from remora.config import several_labels
from remora.config.checks import (
    DEFAULT_MICRO_BATCH_TOKENS,
    Answer,
    ClassWeights,
    Count,
    CountOrZero,
    CurveSizes,
    DeviceName,
    Duration,
    Fraction,
    GradientNorm,
    Initialization,
    LearningRate,
    LearningRateRatio,
    Method,
    ModuleNames,
    Names,
    OneOrMore,
    PlainName,
    Positive,
    PositiveOrZero,
    PrecisionName,
    SelectionMetric,
    Separator,
    Share,
    TableFormat,
    check,
    convert,
    curve_sizes,
    to_seconds,
    unwritable,
)
from remora.config.help_pages import grouped
from remora.config.schedule import (
    EVAL_SHARE,
    LEAST_EPOCHS,
    LEAST_EVAL_ROWS,
    LEAST_STEPS,
    MOST_CLASSES_RATE,
    MOST_EPOCHS,
    WARM_RATE,
    WARM_SHARE,
    default_learning_rate,
)

if TYPE_CHECKING:
    from typing_extensions import Self

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

CORRECTIONS = "corrections.csv"
"""The file of a run with the decisions that its training rows were corrected by."""

RunToBeginFrom = Annotated[str | None, Parameter(name=("--from", "--start-from"))]

BASELINES = ("svm", "zero-shot", "probe", "embeddings")


@grouped(
    data="Data",
    model="Model",
    answer="Prompt",
    epochs="Training",
    metric="Measuring",
    device="Speed and memory",
    output="Output",
)
@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of `remora train`."""

    data: str = field(kw_only=False)
    """A table (CSV, TSV, JSON, JSON lines, Parquet, Excel; compressed or not), - for standard
    input, a folder with train, validation and test files or of save_to_disk, or a dataset on the
    Hugging Face Hub as hf:owner/name."""

    validation: str | None = None
    """Table of validation rows; by default split off from the training rows."""

    test: str | None = None
    """Table of test rows; by default split off from the training rows."""

    corrections: str | None = None
    """A relabel.csv with decisions: training rows are relabelled or deleted by them, once the other
    rows are held out. Rows to validate and test on stay as they are."""

    text_column: OneOrMore | None = None
    """Column of the messages; by default found by its name. Give several to have the model read
    each under its name."""

    label_column: str | None = None
    """Column of the labels; by default found by its name."""

    multi_label: Literal["auto", "on", "off"] = "auto"
    """Whether a row may have several labels, or none: a head then scores each label by itself.
    auto: where labels are lists, such as ["a", "b"] or "['a', 'b']", and not all of one label."""

    split_labels_at: str | None = None
    """Text between the labels of a row that has several in one cell, such as '|' or ', '."""

    label_columns: Names = ()
    """Columns of 0 and 1, one for each label, separated by commas, in place of a label column."""

    rows_per_class: Count | None = None
    """Training rows per class, sampled by the seed; classes with fewer keep all of theirs. By
    default all rows."""

    input_format: TableFormat | None = None
    """Format of the tables, if their names do not tell."""

    columns: Names = ()
    """Names for the columns of a table without a header, separated by commas."""

    strict: bool = False
    """Refuse rows with a blank text or label, instead of skipping them."""

    merge_labels: bool = False
    """Make labels that differ only in case, spaces or Unicode form one label, the most frequent."""

    rename_labels: dict[str, str] = field(default_factory=dict)
    """Name to read in place of a label, such as '{"late": "delivery", "lost": "delivery"}': labels
    that get the same name are merged."""

    label_separator: Separator | None = None
    """What stands between the parts of labels that form a hierarchy, such as ' > ' in card >
    arrival: they are also measured at each level."""

    validation_fraction: Fraction = 0.1
    """Share of the training rows held out to select the best checkpoint, at most 2,000 rows; unused
    if validation rows are given."""

    test_fraction: Fraction = 0.1
    """Share of the training rows held out for the final test, at most 10,000 rows; unused if test
    rows are given."""

    model: str
    """Base model: a folder, a GGUF file, or its id on the Hugging Face Hub."""

    start_from: RunToBeginFrom = None
    """Run to begin with: its adapter, on the same base model, learns on. Labels that the table has
    in common with it keep their answers, and new ones join. By default a third of the epochs and
    half of the learning rate."""

    method: Method = "lora"
    """Fine-tuning method: a LoRA adapter (lora), a LoRA adapter on a base quantized to 4 bits
    (qlora), or all weights of the model (full)."""

    rank: Count = 16
    """Rank r of the adapter's matrices."""

    alpha: Positive = 32.0
    """The adapter's update is scaled by alpha / rank."""

    dropout: Fraction = 0.05
    """Dropout on the adapter's inputs while training."""

    target_modules: ModuleNames = ()
    """Linear layers to adapt, several separated by commas; by default q, k, v, o, gate, up and
    down, or every linear layer but the head and routers in other architectures. Experts of a
    mixture are adapted if they are named, such as experts.down_proj, and without dropout."""

    use_rslora: bool = False
    """Scale the adapter's update by alpha / sqrt(rank) instead (rsLoRA), for high ranks."""

    use_dora: bool = False
    """Train the magnitude of each row of the adapted weights apart from its direction (DoRA);
    slower, and not on a 4-bit base."""

    init_lora_weights: Initialization = "default"
    """Initialization of the adapter's A: as in PEFT (Kaiming), or gaussian. B starts at zero."""

    loraplus_lr_ratio: LearningRateRatio | None = None
    """Learning rate of the adapter's B as a multiple of that of A, such as 16 (LoRA+)."""

    answer: Answer | None = None
    """What answers a message: the model writes the label (words), or a linear head at the last
    token of the prompt scores the labels (classes), as in transformers' and PEFT's sequence
    classification. By default words, and classes where rows have several labels."""

    instruction: str = "Classify the message."
    """Instruction in the prompt before each message."""

    list_labels: bool = False
    """List all labels in the prompt: helps with few examples per label, costs a longer prefix."""

    label_texts: dict[str, str] = field(default_factory=dict)
    """Text that the model writes for a label, if other than the label itself."""

    max_length: Count | None = None
    """Longest sequence in tokens; longer messages are cut by `truncate`. By default the model's
    context."""

    truncate: Literal["head", "tail", "both", "windows"] = "head"
    """The part of a longer message that is kept: its head, its tail, or half from each end. Or all
    of it, in windows that overlap: each is answered, and the answers are averaged."""

    epochs: Positive | None = None
    """Passes over the training rows; by default 3, and with few rows as many as make 250 steps, up
    to 20."""

    learning_rate: LearningRate | None = None
    """Peak learning rate of AdamW; by default chosen from method, answer and the model's width."""

    batch_size: Count = 32
    """Rows averaged over in one optimizer step, however they are split into micro-batches."""

    max_steps: Count | None = None
    """Stop after this many optimizer steps, whatever `epochs` says."""

    schedule: Literal["linear", "cosine", "constant"] = "cosine"
    """Decay of the learning rate after warm-up."""

    warmup_fraction: Share = 0.05
    """Share of the steps over which the learning rate warms up."""

    weight_decay: PositiveOrZero = 0.0
    """AdamW's weight decay on the trainable parameters."""

    max_grad_norm: GradientNorm = 1.0
    """Gradients are clipped to this norm."""

    class_weights: ClassWeights | None = None
    """Weight of each class in the loss: balanced, for the same total weight of every class, or a
    table with the columns label and weight. By default all rows count the same."""

    seed: CountOrZero = 0
    """Seed of the splits, the order of rows, the adapter's initialization and the dropout."""

    metric: SelectionMetric | None = None
    """Metric on the validation rows that selects the best checkpoint: by default accuracy, and
    micro_f1 where rows have several labels. macro_f1, for classes of very different size, takes
    about twice the time where rows have one label."""

    patience: CountOrZero = 3
    """Early stopping: stop after this many evaluations in a row without improvement; 0 turns it
    off."""

    eval_steps: Count | None = None
    """Steps between evaluations on the validation rows; by default once per epoch."""

    eval_rows: Count | None = None
    """Validation rows in each evaluation, a stratified sample. By default all, or as many as keep
    evaluations within a quarter of the training's time; the final weights are measured on all."""

    baselines: Names = ("auto",)
    """What to measure beside the trained model, on the same rows: svm (TF-IDF and a linear SVM),
    zero-shot (the base model before training), probe (logistic regression on the base model's
    frozen features), embeddings (logistic regression on sentence embeddings; needs
    remora[embeddings]), or none. Several are separated by commas. auto takes svm, and zero-shot
    and probe as far as they take at most a tenth of the run's time."""

    embedding_model: str = "sentence-transformers/all-MiniLM-L6-v2"
    """Sentence encoder of the baseline embeddings: a folder, or its id on the Hugging Face Hub."""

    tolerance: Share = 0.01
    """Maximum total probability left on unexplored labels when the weights that were chosen are
    scored on test and validation rows. Accuracy is exact with any, but for near ties of messages
    in several windows, which get at most 0.01; 1 is fastest, with rough log-loss and
    calibration."""

    learning_curve: CurveSizes | None = None
    """Train once for each of these numbers of rows per class, such as 5,10,20,50,all, to see
    whether more rows would help."""

    device: DeviceName = "auto"
    """Device to compute on."""

    devices: Count = 1
    """Number of devices of this machine to train on, one process each."""

    precision: PrecisionName = "auto"
    """Arithmetic of the forward and backward pass; trainable parameters are always float32."""

    micro_batch_tokens: Count | None = None
    """Most tokens computed at once; limits memory, changes no result. By default 2048 (padded rows
    on a CPU: 512), or fewer if memory does not suffice."""

    checkpointing: Literal["auto", "on", "off"] = "auto"
    """Recompute each layer's activations in the backward pass instead of keeping them: saves
    memory, costs time. By default only if memory does not suffice without."""

    layout: Literal["auto", "tree", "rows"] = "auto"
    """How a batch is computed: what rows share once, as a token tree (tree), or each row by itself,
    padded (rows), where a model's layers carry a state along the row. Both are exact. By default
    the tree if the model follows it, which is checked."""

    shard: Literal["auto", "on", "off"] = "auto"
    """Shard the weights (FSDP): each process holds a part of them and gathers one layer at a time.
    By default with full fine-tuning, or if the base does not fit on one device."""

    output: Path = Path("runs")
    """Folder to create run directories in."""

    name: PlainName | None = None
    """Name of the run; by default made from the names of the data and the model."""

    max_time: Duration | None = None
    """Save and stop after this time, such as 11h30m or 45m; the same command resumes."""

    checkpoint_minutes: PositiveOrZero = 10.0
    """Minutes between checkpoints, from which the same command resumes after a crash; 0 saves after
    every step."""

    trackers: OneOrMore = ()
    """Experiment trackers supported by accelerate, such as tensorboard or wandb."""

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            ConfigError: Naming everything that is wrong.
        """
        convert(self)
        unknown = [each for each in self.baselines if each not in {*BASELINES, "auto", "none"}]
        check(
            self,
            *unwritable(self),
            (
                bool(unknown) or not self.baselines,
                f"baselines has {', '.join(map(repr, unknown)) or 'no name'}; give some of "
                f"{', '.join(BASELINES)}, or auto, or none",
            ),
            (
                "none" in self.baselines and len(self.baselines) > 1,
                "baselines has none beside others; leave out none, or the others",
            ),
            (
                self.learning_curve is not None and not {"svm", "auto"} & {*self.baselines},
                "a learning curve shows the svm beside each size; leave out baselines, or add svm",
            ),
            (
                self.answer == "classes" and bool(self.label_texts),
                "label_texts are what the model writes, and answer is classes, which writes "
                "nothing; leave out label_texts, or use --answer words",
            ),
            (
                self.answer == "classes" and "zero-shot" in self.baselines,
                "baselines has zero-shot and answer is classes, whose head answers nothing before "
                "it is trained; leave it out, or use --answer words",
            ),
            *several_labels.conflicts(self),
            (
                self.use_dora and self.method == "qlora",
                "use_dora does not work on a 4-bit base; use --method lora",
            ),
            (
                self.method == "qlora" and self.shard == "on",
                "shard is on and method is qlora, whose 4-bit weights cannot be sharded; "
                "leave it out, or use --method lora",
            ),
            (
                self.method == "full" and self.lora_variant is not None,
                f"{self.lora_variant} needs an adapter and method is full; use --method lora",
            ),
            (
                self.learning_curve is not None and self.rows_per_class is not None,
                "rows_per_class and learning_curve are both given; give one of them",
            ),
            (
                self.start_from is not None and self.learning_curve is not None,
                "a learning curve trains each size anew; leave out --from",
            ),
            (
                self.start_from is not None and self.method == "full",
                f"--from takes an adapter and method is full; give --model {self.start_from}/model "
                "to begin with that run's weights",
            ),
            (
                self.learning_curve is not None and self.devices > 1,
                "a learning curve is trained on one device; leave out devices",
            ),
            (
                self.devices > 1 and self.data in {"-", "/dev/stdin"},
                "data is standard input, which one process only can read; save it to a file, or "
                "leave out devices",
            ),
        )

    @property
    def curve_sizes(self) -> tuple[int | None, ...]:
        """The rows per class of `learning_curve`, None for all; () without one."""
        return curve_sizes(self.learning_curve or "")

    @property
    def num_per_class(self) -> int | None:
        """Training rows per class, None for all; with a learning curve, its last size."""
        return self.curve_sizes[-1] if self.learning_curve else self.rows_per_class

    @property
    def lora_variant(self) -> str | None:
        """The first setting that changes plain LoRA, None if there is none."""
        names = ("use_rslora", "use_dora", "init_lora_weights", "loraplus_lr_ratio")
        plain = {entry.name: entry.default for entry in dataclasses.fields(self)}
        return next((name for name in names if getattr(self, name) != plain[name]), None)

    @property
    def max_tokens(self) -> int:
        """Most tokens computed at once, before memory is considered."""
        return self.micro_batch_tokens or DEFAULT_MICRO_BATCH_TOKENS

    @property
    def max_seconds(self) -> float | None:
        """`max_time` in seconds; None without a limit."""
        return to_seconds(self.max_time or "")

    @property
    def learns_a_head(self) -> bool:
        """Whether a linear head of one label a row and an adapter learn together."""
        return self.answer == "classes" and self.multi_label != "on" and self.method != "full"

    def rate(self, width: int) -> float:
        """Return the peak learning rate for a model of a hidden size."""
        default = default_learning_rate(width, self.method)
        if self.learns_a_head:
            default = min(default, MOST_CLASSES_RATE)
        return self.learning_rate or default * (WARM_RATE if self.start_from else 1)

    def num_steps(self, num_rows: int) -> int:
        """Return the number of optimizer steps to train on `num_rows` rows."""
        steps_per_epoch = math.ceil(num_rows / self.batch_size)
        default = min(MOST_EPOCHS, max(LEAST_EPOCHS, LEAST_STEPS / steps_per_epoch))
        epochs = self.epochs or default * (WARM_SHARE if self.start_from else 1)
        return self.max_steps or max(1, math.ceil(epochs * steps_per_epoch))

    def steps_between_evaluations(self, num_rows: int) -> int:
        """Return the number of optimizer steps after which the validation rows are scored."""
        return self.eval_steps or math.ceil(num_rows / self.batch_size)

    def num_eval_rows(self, num_rows: int, num_validation: int) -> int:
        """Return how many of `num_validation` rows are scored in each evaluation.

        Counted in rows rather than measured in seconds, so that a run that is repeated or resumed
        chooses its weights by the same rows.
        """
        steps = min(self.steps_between_evaluations(num_rows), self.num_steps(num_rows))
        trained = steps * num_rows // math.ceil(num_rows / self.batch_size)
        most = max(LEAST_EVAL_ROWS, int(EVAL_SHARE * trained))
        return min(self.eval_rows or most, num_validation)

    @classmethod
    def taken_from(cls, settings: "TrainConfig", **changes: Any) -> "Self":
        """Return the settings of a run among those of another verb, with some changed."""
        names = TrainConfig.__dataclass_fields__
        return cls(**{**{name: getattr(settings, name) for name in names}, **changes})

    @classmethod
    def from_toml(cls, text: str, directory: Path) -> "TrainConfig":
        """Return the settings that `to_toml` wrote.

        Args:
            text: The settings.
            directory: The run's, which keeps its corrections wherever it was moved to.

        Raises:
            ConfigError: If a value is wrong.
            KeyError, TypeError, ValueError: If it is no such text.
        """
        settings = tomllib.loads(text)
        if "corrections" in settings:
            settings["corrections"] = str(directory / CORRECTIONS)
        return cls(settings.pop("data"), **settings)

    def to_toml(self) -> str:
        """Return the settings as TOML for `--config`, without those that are None."""
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

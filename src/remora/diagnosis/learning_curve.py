"""A learning curve: one run for each number of rows per class, and whether more would help."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from remora.config import TrainConfig
from remora.config.several_labels import settled
from remora.data.dataset import Dataset, corrections_of, limited_and_corrected, load_whole
from remora.diagnosis.curve_answer import LearningCurve, Size, answer, followed
from remora.diagnosis.extrapolation import extrapolate
from remora.errors import ConfigError, ResourceError
from remora.evaluation import results
from remora.evaluation.results import Results
from remora.evaluation.significance import difference_interval, mcnemar
from remora.report import pages
from remora.runtime import files, launch, run_directory
from remora.runtime.reporter import Reporter, SayOnce
from remora.runtime.stop import Stop
from remora.training import resume
from remora.training.finish import TrainResult
from remora.training.run import train_until
from remora.training.trainable import load_trainable

FILE = "learning_curve.json"
FOLDER = "learning_curve"
OF_SETS = (
    "accuracy is the share of rows with all labels right, and the class of a row is the rarest of "
    "its labels"
)
"""What is told where rows have several labels."""


def learn(
    config: TrainConfig, *, reporter: Reporter | None = None
) -> tuple[TrainResult, LearningCurve]:
    """Train once for each size that the settings ask for, and compare.

    The run of the last size is an ordinary run directory. It holds the runs of the others, and
    learning_curve.json. Sizes that are finished are not trained again.

    Raises:
        RemoraError: As `training.train` does.
        ConfigError: If a size is larger than the data, or several processes train.
    """
    if launch.world_size() > 1:
        raise ConfigError("a learning curve is trained in one process; start only one")
    stop = Stop(config.max_seconds)
    with stop.listening():
        return _learn(config, stop, SayOnce(reporter or Reporter()))


def _learn(
    config: TrainConfig, stop: Stop, reporter: Reporter
) -> tuple[TrainResult, LearningCurve]:
    shared = _Shared(config)
    config = settled(config, is_multi_label=shared.whole.multi_label)
    refuse_sizes(config, shared.whole)
    directory = _directory(config, shared.load_rows(config), reporter.say)
    *smaller, last = config.curve_sizes
    runs = [directory / FOLDER / f"{size}-per-class" for size in smaller]
    num_rows = len(shared.load_rows(config).train)
    for number, (size, path) in enumerate(zip(smaller, runs, strict=True), 1):
        told = f"size {number} of {len(config.curve_sizes)}, {size:,} rows per class"
        if resume.is_finished(path):
            reporter.say(f"{told}: finished already")
            continue
        reporter.say(told)
        train_until(
            _settings(config, size, path, num_rows),
            stop,
            reporter,
            load_rows=shared.load_rows,
            load_model=shared.load_model,
        )
    curves: list[LearningCurve] = []

    def concluded(result: TrainResult) -> None:
        runs.append(result.directory)
        curves.append(_measure(config, shared, [results.read(path) for path in runs]))
        files.write_json(result.directory / FILE, curves[0].to_dict())
        pages.refresh(result.directory, reporter.say)

    spoken = "all rows" if last is None else f"{last:,} rows per class"
    reporter.say(f"size {len(config.curve_sizes)} of {len(config.curve_sizes)}, {spoken}")
    result = train_until(
        config,
        stop,
        reporter,
        load_rows=shared.load_rows,
        load_model=shared.load_model,
        concluded=concluded,
    )
    return result, curves[0]


class _Shared:
    """The rows and the base model, loaded once; each size starts as if it were alone."""

    def __init__(self, config: TrainConfig) -> None:
        self.whole = load_whole(config)
        self._corrections = corrections_of(self.whole, config)
        self._loaded: tuple[Any, Any, Any, Any] | None = None

    def load_rows(self, config: TrainConfig) -> Dataset:
        return limited_and_corrected(self.whole, self._corrections, config)

    def load_model(
        self, config: TrainConfig, labels: Sequence[str], precision: Any, device: torch.device
    ) -> tuple[Any, Any, Any, Any]:
        if self._loaded is None or config.method == "full":  # there the base itself is trained
            self._loaded = None  # never two of them in memory
            self._loaded = load_trainable(config, labels, precision, device)
            self._start = [p.detach().clone() for p in self._trainable() if config.method != "full"]
            self._random = torch.get_rng_state()
            return self._loaded
        with torch.no_grad():
            for parameter, start in zip(self._trainable(), self._start, strict=True):
                parameter.copy_(start)
        torch.set_rng_state(self._random)
        return self._loaded

    def _trainable(self) -> list[torch.nn.Parameter]:
        assert self._loaded is not None
        return [p for p in self._loaded[0].parameters() if p.requires_grad]


def _settings(config: TrainConfig, size: int | None, path: Path, num_rows: int) -> TrainConfig:
    """Return the settings of a size: as many steps and evaluations as the last one takes.

    With equal epochs instead, smaller sizes would be undertrained, and the curve would show that.
    docs/log.md has the comparison.
    """
    return replace(
        config,
        output=path.parent,
        name=path.name,
        learning_curve=None,
        baselines=("svm",),
        rows_per_class=size,
        max_steps=config.num_steps(num_rows),
        eval_steps=config.eval_steps or math.ceil(num_rows / config.batch_size),
    )


def refuse_sizes(config: TrainConfig, whole: Dataset) -> None:
    """Refuse sizes that no class has.

    Raises:
        ConfigError: Naming the first of them.
    """
    most = max(Counter(whole.train.strata).values())
    for size in config.curve_sizes:
        if size is not None and (size > most or (size == most and None in config.curve_sizes)):
            raise ConfigError(
                f"learning_curve has the size {size:,} and no class has "
                f"{'more than' if size > most else 'more rows than'} {most:,} training rows; "
                "give smaller numbers, or all"
            )


def _directory(config: TrainConfig, dataset: Dataset, say: Callable[[str], None]) -> Path:
    """Return the directory of the unfinished curve that these settings resume, or a new one.

    It holds the settings from the start, so it is found again whatever size it stopped at.
    """
    directory = resume.unfinished(config, dataset.summary.sha256, say)
    if directory is None:
        directory = run_directory.create(config.output, config.name, config.data, config.model)
    files.write_json(directory / "data.json", dataset.summary.to_dict())
    files.write_text(directory / "config.toml", config.to_toml())
    return directory


def _measure(config: TrainConfig, shared: _Shared, runs: Sequence[Results]) -> LearningCurve:
    counts = Counter(shared.whole.train.strata)
    sizes = []
    for per_class, each in zip(config.curve_sizes, runs, strict=True):
        metrics = each.figures["metrics"]
        if each.figures["baseline"] is None:
            raise ResourceError(
                f"the SVM of {each.directory} was left out, and a learning curve compares with it; "
                "free memory, remove that folder, and run the same command again"
            )
        theirs = each.figures["baseline"]["metrics"]
        taken = shared.load_rows(replace(config, learning_curve=None, rows_per_class=per_class))
        sizes.append(
            Size(
                per_class=per_class,
                num_rows=len(taken.train),
                num_short=sum(count < (per_class or 0) for count in counts.values()),
                run="." if each is runs[-1] else f"{FOLDER}/{each.directory.name}",
                accuracy=metrics["accuracy"],
                accuracy_interval=tuple(metrics["accuracy_interval"]),
                macro_f1=metrics["macro_f1"],
                baseline_accuracy=theirs["accuracy"],
                baseline_interval=tuple(theirs["accuracy_interval"]),
                p_value=each.figures["p_value"],
                num_steps=each.figures["num_steps"],
                train_seconds=each.figures["train_seconds"],
            )
        )
    true = np.array(runs[-1].true)
    wrong = np.array([np.array(each.predicted) != true for each in runs])  # [sizes, rows]
    last = runs[-1]
    more = int((wrong[-2] & ~wrong[-1]).sum())
    fewer = int((wrong[-1] & ~wrong[-2]).sum())
    gain_interval = difference_interval(more, fewer, len(true))
    rise = mcnemar(last.true, last.predicted, runs[0].predicted)
    extrapolation, caution = followed(
        sizes[-1], *extrapolate([size.num_rows for size in sizes], wrong, rise)
    )
    if shared.whole.multi_label:
        caution = f"{caution}; {OF_SETS}"
    alike = None
    if last.baseline is not None and wrong[-1].any():
        same = np.array(last.predicted) == np.array(last.baseline)
        alike = float(same[wrong[-1]].mean())
    return LearningCurve(
        measured_on=last.figures["measured_on"],
        num_measured=len(true),
        sizes=tuple(sizes),
        gain=(more - fewer) / len(true),
        gain_interval=gain_interval,
        extrapolation=extrapolation,
        caution=caution,
        answer=answer(sizes, (more - fewer) / len(true), gain_interval, extrapolation, alike),
    )

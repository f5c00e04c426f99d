"""Settings searched by Optuna on the validation rows; the test rows are measured once, at the end.

Trials are sessions as `train` opens them, one after the other. Each is sampled from the finished
ones alone, with a seed of its own, so a search that was killed goes on as if nothing had happened.
"""

from __future__ import annotations

import itertools
import json
import random
import re
import shutil
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

from remora.config import TrainConfig, TuneConfig
from remora.config.checks import Answer
from remora.config.several_labels import settled
from remora.data.dataset import Dataset, load_data
from remora.errors import ConfigError, DivergedError, ResourceError
from remora.evaluation import results
from remora.formatting import first_line
from remora.models import class_head, hub, loading
from remora.runtime import files, run_directory
from remora.runtime.reporter import Reporter, SayOnce, Validation
from remora.runtime.stop import Stop
from remora.training import checkpoint, resume
from remora.training.loop import fit
from remora.training.run import train_until
from remora.training.session import open_session

RANKS = (4, 8, 16, 32, 64)
RATES = 1 / 4, 4.0
EPOCHS = 1 / 2, 2.0
"""Least and most of what is searched, as multiples of the given setting."""

FIRST_PRUNED = 4
"""Trials that run to their end before others are compared with them."""

SPARED = 250
"""Thousandths of a trial's steps in which it is not compared yet."""

LOWER_IS_BETTER = ("log_loss",)
"""Metrics whose best value is the least."""

JOURNAL, FILE, TRIAL, BEST = "journal.log", "trials.json", "trial", "best"


@dataclass(frozen=True, kw_only=True)
class TrialResult:
    """One trial: what was tried, and how it validated."""

    settings: dict[str, Any]
    validation: float | None  # the best evaluation, by the metric; None if there was none
    evaluations: int
    seconds: float
    ended: str  # "" at its end, or why it ended early


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """All trials, and the run with the best settings, measured on the test rows."""

    directory: str
    metric: str
    trials: tuple[TrialResult, ...]
    best: int  # index of the trial
    run: str  # directory
    figures: dict[str, Any] = field(repr=False)  # in its evaluation.json

    def to_dict(self) -> dict[str, Any]:
        """Return the trials, and the figures of the run, as JSON holds them."""
        return asdict(self)


def tune(config: TuneConfig, *, reporter: Reporter | None = None) -> Tuned:
    """Search settings on the validation rows, and train with the best; the same call resumes.

    Raises:
        RemoraError: The settings, the data, the model or the machine; see `remora.errors`.
    """
    refuse_missing_library()
    reporter, stop = SayOnce(reporter or Reporter()), Stop(config.max_seconds)
    with stop.listening():
        return _Tuning(config, stop, reporter).run()


def refuse_missing_library() -> None:
    """Refuse a search without Optuna.

    Raises:
        ConfigError: If it is not installed.
    """
    try:
        import optuna  # noqa: F401
    except ImportError:
        raise ConfigError(
            "tune searches with Optuna, which is not installed; pip install 'remora[tune]'"
        ) from None


class _Tuning:
    """A search in its directory, where an earlier call may have begun it."""

    def __init__(self, config: TuneConfig, stop: Stop, reporter: Reporter) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.stop, self.reporter = stop, reporter
        self.dataset: Dataset = load_data(TrainConfig.taken_from(config))
        self.config = settled(config, is_multi_label=self.dataset.multi_label)
        self.plain = TrainConfig.taken_from(self.config)
        if not len(self.dataset.validation):
            raise ConfigError("there are no validation rows to compare trials on; give more rows")
        data = f"{run_directory.slug(config.data)}-{run_directory.slug(config.model)}"
        self.directory = config.output / (config.name or f"{data}-tuning")
        self.directory.mkdir(parents=True, exist_ok=True)
        self.space = self._space()
        self.study = self._open_study()

    def run(self) -> Tuned:
        """Make the trials that are missing, then the run with the best settings."""
        import optuna

        states = optuna.trial.TrialState
        done = states.COMPLETE, states.PRUNED
        begun, told = self._first_trials(), self._lost_evaluations()
        while (number := len(self.study.get_trials(states=done))) < self.config.trials:
            if number < len(begun):
                self.study.enqueue_trial(begun[number])
            self.study.sampler = optuna.samplers.TPESampler(seed=1000 * self.config.seed + number)
            trial = self._ask(number, self.study.get_trials(states=done))
            if trial is None:
                self.reporter.say(f"all {number} settings to search have been tried")
                break
            self._try(trial, number, told)
            told = {}
        trials = self.study.get_trials(states=done)
        complete = [each for each in trials if each.state == states.COMPLETE]
        best = max(complete, key=lambda each: each.value, default=None)
        if best is None:
            raise DivergedError(
                "no trial came to its end; lower --learning-rate, or see trials.json"
            )
        metric = self.config.metric or "accuracy"
        found = tuple(_result(each, self._told(each.params), metric) for each in trials)
        values = ", ".join(f"{k} {v}" for k, v in self._told(best.params).items())
        self.reporter.say(f"training with the best of {len(trials)} trials: {values}")
        run = self._train_best(best.params)
        tuned = Tuned(
            directory=str(self.directory),
            metric=metric,
            trials=found,
            best=trials.index(best),
            run=str(run),
            figures=results.read(run).figures,
        )
        files.write_json(self.directory / FILE, tuned.to_dict())
        return tuned

    # What is searched

    def _space(self) -> dict[str, Any]:
        """Return Optuna's distribution of each searched setting.

        Raises:
            ConfigError: If there is nothing to search.
            ModelError: If answers are searched, and no head can score classes of this model.
        """
        from optuna.distributions import CategoricalDistribution, FloatDistribution

        rate, epochs = self._rate(self.config), self._epochs()
        ranks = sorted({*RANKS, self.config.rank})
        low, high = (rate * factor for factor in RATES)
        fewest, most = (epochs * factor for factor in EPOCHS)
        space = {
            "learning_rate": FloatDistribution(low, min(high, 1.0), log=True),
            "rank": CategoricalDistribution(ranks),
            "epochs": FloatDistribution(fewest, most, log=True),
            "label_texts": CategoricalDistribution(["labels", "words"]),
            "list_labels": CategoricalDistribution([False, True]),
            "answer": CategoricalDistribution(["words", "classes"]),
        }
        if "answer" in self.config.search:
            class_head.describe(self._base(), self.dataset.labels)
        if reason := self._why_texts_stay():
            del space["label_texts"]
            if list(self.config.search) == ["label_texts"]:
                raise ConfigError(
                    f"there are no label_texts to search: {reason}; give --search learning_rate"
                )
            if "label_texts" in self.config.search:
                self.reporter.say(f"label_texts are not searched: {reason}")
        return {name: space[name] for name in self.config.search if name in space}

    def _why_texts_stay(self) -> str:
        """Return why what is written for a label cannot be searched, "" if it can."""
        if self.config.start_from:
            return "the run to start from keeps its texts"
        if self.config.label_texts:
            return "they are given"
        if "answer" not in self.config.search and self.config.answer != "words":
            return "a head scores the labels, and none is written"
        return "" if self._words() else "the labels are words already, or two would be the same"

    def _first_trials(self) -> list[dict[str, Any]]:
        """Return what is tried first: the settings as given, then the same with the other answer.

        Each has its own default learning rate.
        """
        first = [self._given(self.config)]
        if "answer" in self.space:
            answer: Answer = "words" if self.config.answer == "classes" else "classes"
            first.append(self._given(replace(self.config, answer=answer)))
        return first

    def _given(self, config: TuneConfig) -> dict[str, Any]:
        """Return the value that settings have for each of those that are searched."""
        given = {
            "learning_rate": self._rate(config),
            "rank": config.rank,
            "epochs": self._epochs(),
            "label_texts": "labels",
            "list_labels": config.list_labels,
            "answer": config.answer or "words",
        }
        return {name: given[name] for name in self.space}

    def _rate(self, config: TuneConfig) -> float:
        return config.rate(self._base().get_text_config().hidden_size)

    def _base(self) -> Any:
        """Return the configuration of the base model."""
        return loading.load_config(hub.find(self.config.model, weights=False))

    def _epochs(self) -> float:
        rows = len(self.dataset.train)
        return self.plain.num_steps(rows) / -(-rows // self.config.batch_size)

    def _words(self) -> dict[str, str]:
        """Return labels such as card_arrival or cardArrival as words, where that is different."""
        parted = {
            label: " ".join(re.sub(r"(?<=[a-z])(?=[A-Z])|[\W_]+", " ", label).split()).lower()
            for label in self.dataset.labels
        }
        if len(set(parted.values())) < len(parted) or not all(parted.values()):
            return {}
        return {label: text for label, text in parted.items() if text != label}

    def _settings(self, params: Mapping[str, Any]) -> TrainConfig:
        """Return the settings of a trial."""
        values = dict(params)
        if "rank" in values:
            values["alpha"] = self.config.alpha * values["rank"] / self.config.rank
        if values.pop("label_texts", "labels") == "words" and values.get("answer") != "classes":
            values["label_texts"] = self._words()
        return replace(self.plain, **values)

    def _told(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Return the settings of a trial as they are shown: three digits, in the given order."""
        return {
            name: float(f"{params[name]:.3g}") if isinstance(params[name], float) else params[name]
            for name in self.config.search
            if name in params
        }

    # Trials

    def _ask(self, number: int, earlier: Sequence[Any]) -> Any:
        """Return a trial whose settings no earlier one had, None if there is none left."""
        import optuna

        tried = [self._settings(each.params) for each in earlier]
        trial = self.study.ask(self.space)
        grids = [each.choices for each in self.space.values() if hasattr(each, "choices")]
        if len(grids) < len(self.space) or self._settings(trial.params) not in tried:
            return trial
        self.study.tell(trial, state=optuna.trial.TrialState.FAIL)
        combined = (dict(zip(self.space, values, strict=True)) for values in product(*grids))
        left = [params for params in combined if self._settings(params) not in tried]
        if not left:
            return None
        choice = random.Random(f"{self.config.seed} {number}").choice(left)
        self.study.enqueue_trial(choice)
        return self.study.ask(self.space)

    def _open_study(self) -> Any:
        """Return the study, begun by an earlier call or new.

        Raises:
            ConfigError: If the earlier one searched with other settings or rows.
        """
        import optuna
        from optuna.storages.journal import JournalFileBackend

        storage = optuna.storages.JournalStorage(JournalFileBackend(str(self.directory / JOURNAL)))
        study = optuna.create_study(
            study_name="tune",
            storage=storage,
            direction="maximize",
            load_if_exists=True,
            pruner=_pruner(),
        )
        wanted = {
            "data": self.dataset.summary.sha256,
            "search": list(self.space),
            **{name: str(value) for name, value in resume.fixed(self.plain).items()},
        }
        begun = study.user_attrs.get("settings")
        if begun is None:
            study.set_user_attr("settings", wanted)
        elif different := [name for name in wanted if begun.get(name) != wanted[name]]:
            raise ConfigError(
                f"{self.directory} holds trials with other settings or data "
                f"({', '.join(different)}); give another --name, or remove it"
            )
        return study

    def _lost_evaluations(self) -> dict[int, float]:
        """Close the trial that an earlier call was stopped in; return its evaluations."""
        import optuna

        states, told = optuna.trial.TrialState, {}
        for each in self.study.get_trials(states=(states.RUNNING,)):
            told = dict(each.intermediate_values)
            self.study.tell(each.number, state=states.FAIL)
        return told

    def _try(self, trial: Any, number: int, told: Mapping[int, float]) -> None:
        """Train with the settings of a trial, from its checkpoint if it was stopped."""
        import optuna

        shown = ", ".join(f"{k} {v}" for k, v in self._told(trial.params).items())
        self.reporter.say(f"trial {number + 1} of {self.config.trials}: {shown}")
        place = self.directory / TRIAL
        settings, began = self._settings(trial.params), time.monotonic()
        self._refuse_other_trial(place, trial.params)
        resumed = checkpoint.newest(place / resume.CHECKPOINTS, self.reporter.say)
        num_steps = settings.num_steps(len(self.dataset.train))
        reporter = _Pruning(self.reporter, trial, settings.metric or "accuracy", num_steps)
        if resumed:
            done = _share(resumed.state["progress"]["step"], num_steps)
            for share in (each for each in told if each <= done):
                trial.report(told[share], share)
        ended, best = "", None  # the value of its best evaluation
        try:
            with (
                open_session(
                    settings, self.dataset, resumed=resumed, stop=self.stop, reporter=reporter
                ) as session,
                self.stop.deferred(),
            ):
                progress = fit(
                    session, checkpoints=place / resume.CHECKPOINTS, resumed=resumed, num_scored=0
                )
                best = None if progress.best is None else progress.best[0]
        except optuna.TrialPruned:
            ended = "no better than the median of earlier trials"
        except (DivergedError, ResourceError) as error:
            ended = first_line(error)
        trial.set_user_attr("seconds", time.monotonic() - began)
        trial.set_user_attr("ended", ended)
        if best is None:
            self.study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        else:
            self.study.tell(trial, best)
        shutil.rmtree(place, ignore_errors=True)
        shown = ended or (f"{best:.4f}" if best is not None else "no finite loss")
        self.reporter.say(f"trial {number + 1}: {shown}")

    def _refuse_other_trial(self, place: Path, params: Mapping[str, Any]) -> None:
        """Remove checkpoints of a trial with other settings; there are none but by other hands."""
        key, text = place / "settings.json", json.dumps(params)
        if not key.is_file() or key.read_text(encoding="utf-8") != text:
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir()
            files.write_text(key, text)

    def _train_best(self, params: Mapping[str, Any]) -> Path:
        """Train with the best settings as `train` does, unless that is done."""
        path = self.directory / BEST
        settings = replace(self._settings(params), output=self.directory, name=BEST, max_time=None)
        if (path / "config.toml").is_file():
            if any(resume.differences(path, settings, self.dataset.summary.sha256)):
                if resume.is_finished(path):  # of fewer trials; it may hold decisions and exports
                    names = (self.directory / f"{BEST}-{number}" for number in itertools.count(1))
                    kept = next(each for each in names if not each.exists())
                    path.rename(kept)
                    self.reporter.say(f"the best run of fewer trials is kept as {kept}")
                else:
                    with resume.hold(path):  # refuses a run that another process trains
                        pass
                    shutil.rmtree(path)
            elif resume.is_finished(path):
                return path
        train_until(settings, self.stop, self.reporter, load_rows=lambda _: self.dataset)
        return path


class _Pruning(SayOnce):
    """Passes a trial's evaluations to Optuna too, which may end it."""

    def __init__(self, reporter: Reporter, trial: Any, metric: str, num_steps: int) -> None:
        super().__init__(reporter)
        self._trial, self._metric, self._num_steps = trial, metric, num_steps

    def validated(self, validation: Validation) -> None:
        import optuna

        super().validated(validation)
        values = {
            "accuracy": validation.accuracy,
            "micro_f1": (
                validation.accuracy  # the same where each row has one label
                if validation.micro_f1 is None
                else validation.micro_f1
            ),
            "macro_f1": validation.macro_f1,
            "log_loss": -validation.loss,  # Optuna maximizes
        }
        self._trial.report(values[self._metric], _share(validation.step, self._num_steps))
        if self._trial.should_prune():
            raise optuna.TrialPruned


def _share(step: int, num_steps: int) -> int:
    """Return the thousandths of a trial's steps that are done.

    Evaluations are known to Optuna by these: at the same step a longer trial still has a higher
    learning rate, which keeps it behind a shorter one that it may overtake.
    """
    return 1000 * step // num_steps


def _pruner() -> Any:
    """Return a pruner as Optuna's MedianPruner, which knows evaluations at the same step only."""
    import optuna

    class Pruner(optuna.pruners.BasePruner):
        def prune(self, study: Any, trial: Any) -> bool:
            complete = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
            return _is_behind(trial.intermediate_values, [t.intermediate_values for t in complete])

    return Pruner()


def _is_behind(own: Mapping[int, float], others: Sequence[Mapping[int, float]]) -> bool:
    """Whether a trial's best evaluation is below the median of the others' until then.

    Args:
        own: Its evaluations by the thousandths of its steps.
        others: Those of trials that came to their end.
    """
    done = max(own)
    if done < SPARED or len(others) < FIRST_PRUNED:
        return False
    until = [[value for share, value in each.items() if share <= done] for each in others]
    best = [max(each) for each in until if each]
    return bool(best) and max(own.values()) < statistics.median(best)


def _result(trial: Any, settings: dict[str, Any], metric: str) -> TrialResult:
    values = list(trial.intermediate_values.values())
    ended = str(trial.user_attrs.get("ended", ""))
    best = max(values, default=None)
    return TrialResult(
        settings=settings,
        validation=-best if best is not None and metric in LOWER_IS_BETTER else best,
        evaluations=len(values),
        seconds=round(float(trial.user_attrs.get("seconds", 0.0)), 1),
        ended=ended,
    )

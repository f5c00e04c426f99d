"""The smallest model that suffices: cheap baselines first, then models from cheap to dear.

Every run is one of `remora train`. A model that takes long is first trained on a part of the rows,
as the one before it was: what it gains there is the most that it can be expected to gain with all.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from remora.config import ChooseConfig, CompareConfig, PlanConfig, TrainConfig
from remora.config.several_labels import settled
from remora.data.dataset import load_data
from remora.errors import ConfigError, DivergedError, ModelError, ResourceError
from remora.evaluation import results, rivals
from remora.evaluation.compare import Comparison, compare_runs
from remora.evaluation.contenders import contender
from remora.evaluation.multi_label import micro_f1_difference
from remora.evaluation.results import Results
from remora.evaluation.run_commands import command
from remora.evaluation.significance import difference_interval
from remora.formatting import spoken_bytes, spoken_seconds, spoken_time
from remora.planning.plan import Plan
from remora.planning.planner import make_plan
from remora.report import pages
from remora.runtime import files, run_directory
from remora.runtime.reporter import Reporter
from remora.runtime.stop import Stop
from remora.training import finish, resume
from remora.training.run import train_until

PILOT_SHARE = 1 / 10
"""Share of the rows of a middling class that pilots are trained on."""

LEAST_PILOT_ROWS = 5
PILOT_STEPS = 1 / 3
"""Most steps of a pilot, as a share of the whole run's; otherwise it saves too little."""

PAGE, FILE = "choice.html", "choice.json"


@dataclass(frozen=True, kw_only=True)
class Option:
    """A baseline or a model: what it costs, and what it reached."""

    name: str
    is_model: bool
    seconds: float | None  # to train and measure; planned, where it was not trained
    peak_bytes: int | None = None
    num_bytes: int | None = None  # of the weights needed to predict
    accuracy: float | None = None
    accuracy_interval: tuple[float, float] | None = None
    micro_f1: float | None = None  # where rows have several labels; it clears the bar there
    micro_f1_interval: tuple[float, float] | None = None
    left_out: str = ""  # why it was not trained
    run: str | None = None  # its directory

    @property
    def reached(self) -> float | None:
        """The accuracy, or micro-F1 where rows have several labels; None if it was not measured."""
        return self.accuracy if self.micro_f1 is None else self.micro_f1

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95% interval of what it reached."""
        return self.accuracy_interval if self.micro_f1 is None else self.micro_f1_interval

    def clears(self, bar: float) -> bool:
        """Whether it reaches the bar with 95 % confidence."""
        return self.interval is not None and self.interval[0] >= bar


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The options from cheap to dear, the one to take, and why."""

    bar: float
    num_rows: int
    options: tuple[Option, ...]
    chosen: str | None
    answer: str
    page: str | None = None
    runs: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the choice as JSON holds it."""
        return asdict(self)


def choose(config: ChooseConfig, *, reporter: Reporter | None = None) -> Choice:
    """Find the smallest model that clears the bar; the same call resumes.

    Raises:
        RemoraError: The settings, the data or a model; see `remora.errors`.
    """
    reporter, stop = reporter or Reporter(), Stop(config.max_seconds)
    with stop.listening():
        return _Search(config, stop, reporter).run()


@dataclass
class _Search:
    """One search: what is planned, and what was measured so far."""

    config: ChooseConfig
    stop: Stop
    reporter: Reporter
    options: dict[str, Option] = field(default_factory=dict)
    runs: dict[Path, Results] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.dataset = load_data(self.config.of(self.config.models[0]))
        self.config = settled(self.config, is_multi_label=self.dataset.multi_label)
        for line in self.dataset.summary.lines():
            self.reporter.say(line)
        _, self.held_out = finish.held_out_rows(self.dataset)
        settings = self.config
        names = run_directory.paths(settings.output, settings.name, settings.data, "choice")
        self.directory = next(names)
        self.names = _different_names(settings.models)
        self.plans = {model: self._plan(model) for model in self.config.models}

    def run(self) -> Choice:
        """Try the options from cheap to dear until one clears the bar."""
        baseline = self._baseline()
        if not baseline.clears(self.config.bar):
            ordered = sorted(self.plans, key=lambda model: _cost(self.plans[model]))
            before: Results | None = None
            for number, model in enumerate(ordered, 1):
                told = f"model {number} of {len(ordered)}, {model}"
                try:
                    reason = self._refuse(model, before, told)
                    before = before if reason else self._train(model, told)
                except (ModelError, ResourceError, DivergedError) as error:  # others may do
                    reason = str(error)
                if reason:
                    self._leave_out(model, reason)
                    self.reporter.say(f"{told}: left out, {reason}")
                    continue
                if any(option.clears(self.config.bar) for option in self.options.values()):
                    self._leave_the_rest(ordered[number:])
                    break
        else:
            self._leave_the_rest(list(self.plans))
        return self._conclude()

    # What each option is

    def _plan(self, model: str) -> Plan:
        """Return the plan of a run with a model; its weights are not loaded."""
        self.reporter.say(f"planning {model}")
        return make_plan(PlanConfig.taken_from(self.config, model=model))

    def _baseline(self) -> Option:
        """Train and measure the SVM, which needs no model."""
        found = finish.train_svm(self.dataset, self.held_out, self.config.seed)
        option = Option(
            name=found.description,
            is_model=False,
            seconds=found.seconds,
            num_bytes=0,
            **_measured(vars(found.metrics)),
        )
        self.options[option.name] = option
        self.reporter.say(f"{option.name}: {_spoken(option)}")
        return option

    def _refuse(self, model: str, before: Results | None, told: str) -> str:
        """Return why a model is not worth its training, or ""; it is if it is trained already."""
        if resume.is_finished(self._path(model)):
            self._note_pilots(model, before)
            return ""
        plan = self.plans[model]
        if not plan.fits:
            return (
                f"it needs {spoken_bytes(plan.peak_bytes)} of memory and "
                f"{spoken_bytes(plan.available_bytes or 0)} are free; "
                + (plan.alternatives[0] if plan.alternatives else "nothing smaller fits")
            )
        budget, seconds = self.config.budget_seconds, self._expected_seconds(model)
        if budget is not None and seconds is not None and self._spent + seconds > budget:
            left = spoken_seconds(max(0.0, budget - self._spent))
            return (
                f"it would take {spoken_seconds(seconds)}, and of the budget of "
                f"{spoken_seconds(budget)} {left} are left"
            )
        if before is None or not self._pays(model):
            return ""
        return self._expect_too_little(model, before, told)

    def _expect_too_little(self, model: str, before: Results, told: str) -> str:
        """Train a model and the one before on a part of the rows; return why it cannot suffice."""
        size = self._pilot_size()
        pair = [
            self._run(each, size, f"{told}: {size} rows per class first, {each}")
            for each in (self._model_of(before), model)
        ]
        most, gain = expected_at_most(before, *pair)
        if most >= self.config.bar:
            return ""
        return (
            f"with {size} rows per class it is {100 * gain:+.1f} points beside "
            f"{self._model_of(before)}, so at most {most:.1%} can be expected of it with all rows"
        )

    def _note_pilots(self, model: str, before: Results | None) -> None:
        """Note the pilots that a model was trained after, whose time is spent."""
        names = [model] if before is None else [self._model_of(before), model]
        for path in (self._path(name, self._pilot_size()) for name in names):
            if resume.is_finished(path):
                self.runs[path] = results.read(path)

    def _pilot_size(self) -> int:
        counts = sorted(Counter(self.dataset.train.strata).values())
        return max(LEAST_PILOT_ROWS, round(PILOT_SHARE * counts[len(counts) // 2]))

    def _pays(self, model: str) -> bool:
        """Whether a pilot takes so few steps that it is worth its time."""
        size = self._pilot_size()
        counts = Counter(self.dataset.train.strata).values()
        pilot = self.config.of(model).num_steps(sum(min(size, count) for count in counts))
        return pilot <= PILOT_STEPS * self.plans[model].num_steps

    # Time

    @property
    def _spent(self) -> float:
        """Seconds of all runs so far, those of earlier calls too."""
        return sum(rivals.seconds_of(run.figures) for run in self.runs.values())

    def _expected_seconds(self, model: str) -> float | None:
        """Return the planned time of a model, corrected by what plans were off so far."""
        planned = self.plans[model].estimated
        if planned is None:
            return None
        finished = [
            (option.seconds, self.plans[name].estimated)
            for name, option in self.options.items()
            if option.run and option.seconds
        ]
        off = [real / plan.total for real, plan in finished if plan is not None and plan.total]
        return planned.total * (sum(off) / len(off) if off else 1.0)

    # Runs

    def _train(self, model: str, told: str) -> Results:
        """Train a model on all rows, and note it and the baselines that were measured beside."""
        seconds = self._expected_seconds(model)
        about = "" if seconds is None else f", about {spoken_seconds(seconds)}"
        run = self._run(model, None, f"{told}{about}")
        measured = contender(model, run.figures)
        self.options[model] = Option(
            name=model,
            is_model=True,
            seconds=rivals.seconds_of(run.figures),
            peak_bytes=measured.peak_memory_bytes,
            num_bytes=measured.num_bytes,
            **_measured(run.figures["metrics"]),
            run=str(run.directory),
        )
        for each in rivals.of_figures(run.figures):
            if each.num_rows == each.num_all_rows and each.description not in self.options:
                self.options[each.description] = Option(
                    name=each.description,
                    is_model=False,
                    seconds=each.seconds,
                    num_bytes=each.num_bytes,
                    **_measured(vars(each)),
                )
        self.reporter.say(f"{model}: {_spoken(self.options[model])}")
        return run

    def _path(self, model: str, per_class: int | None = None) -> Path:
        """Return the directory of a model's run, with all rows or a part of them."""
        return self.directory / (
            self.names[model] + (f"-{per_class}-per-class" if per_class else "")
        )

    def _run(self, model: str, per_class: int | None, told: str) -> Results:
        """Return a run that is finished, or train it."""
        path = self._path(model, per_class)
        settings = self.config.of(
            model,
            output=path.parent,
            name=path.name,
            max_time=None,
            rows_per_class=per_class or self.config.rows_per_class,
            **({"baselines": ("none",)} if per_class else {}),
        )
        if resume.is_finished(path):
            self._refuse_other_run(path, settings)
            self.reporter.say(f"{told}: finished already")
        else:
            self.reporter.say(told)
            train_until(settings, self.stop, self.reporter)
        self.runs[path] = results.read(path)
        return self.runs[path]

    def _refuse_other_run(self, path: Path, settings: TrainConfig) -> None:
        sha256 = load_data(settings).summary.sha256 if settings.rows_per_class else ""
        settings_, data = resume.differences(path, settings, sha256 or self.dataset.summary.sha256)
        if different := settings_ + data:
            raise ConfigError(
                f"{path} was trained with other settings or data ({'; '.join(different)}); give "
                "another --name, or remove it"
            )

    def _model_of(self, run: Results) -> str:
        return next(name for name, each in self.options.items() if each.run == str(run.directory))

    # The end

    def _leave_out(self, model: str, reason: str) -> None:
        planned = self.plans[model]
        seconds = self._expected_seconds(model)
        self.options[model] = Option(
            name=model,
            is_model=True,
            seconds=seconds,
            peak_bytes=planned.peak_bytes,
            left_out=reason,
        )

    def _leave_the_rest(self, models: Sequence[str]) -> None:
        """Leave out dearer models, but for those that an earlier call trained."""
        for model in models:
            if resume.is_finished(self._path(model)):
                with contextlib.suppress(ConfigError):  # of a run with other settings
                    self._train(model, model)
            if model not in self.options:
                self._leave_out(model, "a cheaper one suffices")

    def _conclude(self) -> Choice:
        """Name the option to take, and write what was found."""
        options = sorted(self.options.values(), key=_by_cost)
        chosen = next((each for each in options if each.clears(self.config.bar)), None)
        whole = [Path(each.run) for each in options if each.run]
        page = self.directory / PAGE if whole else None
        self.directory.mkdir(parents=True, exist_ok=True)
        if page:
            pages.write_comparison(page, self._compare(whole), whole)
        else:
            (self.directory / PAGE).unlink(missing_ok=True)  # of runs that are gone
        choice = Choice(
            bar=self.config.bar,
            num_rows=len(self.held_out),
            options=tuple(options),
            chosen=chosen.name if chosen else None,
            answer=answer(options, chosen, self.config.bar),
            page=str(page) if page else None,
            runs=tuple(map(str, whole)),
        )
        files.write_json(self.directory / FILE, choice.to_dict())
        return choice

    def _compare(self, runs: Sequence[Path]) -> Comparison:
        return compare_runs(CompareConfig(tuple(runs), bar=self.config.bar))


def _measured(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return what an option reached, of the metrics of a run or a baseline, with its intervals."""
    names = ("accuracy", "micro_f1") if metrics.get("micro_f1") is not None else ("accuracy",)
    reached = {name: metrics[name] for name in names}
    return reached | {f"{name}_interval": tuple(metrics[f"{name}_interval"]) for name in names}


def expected_at_most(before: Results, small: Results, large: Results) -> tuple[float, float]:
    """Return the most that a larger model can be expected to reach with all rows.

    Models grow alike with the rows: the lead of one over the other is largest where rows are few.
    So the upper end of the lead's 95% interval on a part of the rows, added to what the smaller one
    reaches with all of them, is seldom exceeded.

    Args:
        before: The smaller model, trained on all rows.
        small: The same, trained on a part of them.
        large: The larger one, trained on the same part.

    Returns:
        That accuracy, or micro-F1 where rows have several labels, and the lead on the part.
    """
    if before.multi_label:
        lead, (_, high) = micro_f1_difference(
            small.labels, small.true, large.predicted, small.predicted
        )
        reached = float(before.figures["metrics"]["micro_f1"])
    else:
        pairs = list(zip(small.true, small.predicted, large.predicted, strict=True))
        only_large = sum(big == true != other for true, other, big in pairs)
        only_small = sum(other == true != big for true, other, big in pairs)
        lead = (only_large - only_small) / len(pairs)
        high = difference_interval(only_large, only_small, len(pairs))[1]
        reached = float(before.figures["metrics"]["accuracy"])
    return min(1.0, reached + max(0.0, high)), lead


def answer(options: Sequence[Option], chosen: Option | None, bar: float) -> str:
    """Return the sentence that says which option to take, and because of what."""
    measured = [each for each in options if each.reached is not None]
    if chosen:
        because = f"{_spoken(chosen)} clears {bar:.1%}"
        if not chosen.is_model:
            took = "" if chosen.seconds is None else f" in {spoken_time(chosen.seconds)}"
            return f"Take {chosen.name}: {because}{took}; no model needs to be trained."
        cheaper = measured[: measured.index(chosen)]
        if not cheaper:
            return f"Take {chosen.name}: {because}, and it is the cheapest."
        best = max(cheaper, key=lambda each: each.reached or 0.0)
        return (
            f"Take {chosen.name}: {because}; of what is cheaper, {best.name} comes closest with "
            f"{best.reached:.1%}."
        )
    best = max(measured, key=lambda each: each.reached or 0.0)
    if (best.reached or 0.0) >= bar:
        return (
            f"None clears {bar:.1%} with confidence: {best.name} comes closest with "
            f"{_spoken(best)}; more test rows would make the interval narrower."
        )
    see = ""
    if best.run:
        see = f" `{command('diagnose', best.run)}` says whether labels are to blame."
    return f"None clears {bar:.1%}: {best.name} comes closest with {_spoken(best)}.{see}"


def _spoken(option: Option) -> str:
    assert option.reached is not None
    assert option.interval is not None
    low, high = option.interval
    what = "" if option.micro_f1 is None else " micro-F1"
    return f"{option.reached:.1%}{what} (95% interval {low:.1%} to {high:.1%})"


def _different_names(models: Sequence[str]) -> dict[str, str]:
    """Return a name for each model's runs, different even where the last parts of paths are not."""
    names: dict[str, str] = {}
    for model in models:
        stem = run_directory.slug(model)
        numbered = (stem, *(f"{stem}-{number}" for number in range(2, len(models) + 1)))
        names[model] = next(name for name in numbered if name not in names.values())
    return names


def _cost(plan: Plan) -> tuple[float, int]:
    """Return what models are ordered by: the time of the run, else the number of parameters."""
    return (plan.estimated.total if plan.estimated else math.inf, plan.parameters)


def _by_cost(option: Option) -> tuple[bool, float]:
    return option.is_model, option.seconds if option.seconds is not None else math.inf

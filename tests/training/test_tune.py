"""`tune`: trials on the validation rows, the same after a kill, and one run at the end."""

from __future__ import annotations

import builtins
import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from conftest import call
from remora.config import TrainConfig, TuneConfig
from remora.data.dataset import load_data
from remora.display import choice_results
from remora.errors import ConfigError, Stopped
from remora.runtime.reporter import Reporter, Step, Validation
from remora.runtime.stop import Stop
from remora.training import tune


@pytest.fixture
def settings(config: TrainConfig) -> TuneConfig:
    values = {name: getattr(config, name) for name in TrainConfig.__dataclass_fields__}
    values |= {"patience": 0, "baselines": ("none",), "learning_rate": 1e-3, "eval_steps": 5}
    return TuneConfig(**values, trials=4, search=("learning_rate", "rank"))


class Killed(BaseException):
    """What ends a process at once."""


def shown(tuned: tune.Tuned) -> list[tuple]:
    """What must be the same however often the search was stopped."""
    return [(each.settings, each.validation, each.evaluations, each.ended) for each in tuned.trials]


def test_the_best_trial_becomes_a_run_and_a_killed_search_ends_the_same(
    settings: TuneConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # In one go
    whole = tune.tune(settings)
    first, *_ = whole.trials
    assert first.settings == {"learning_rate": 1e-3, "rank": 4}  # the given ones
    assert len(whole.trials) == 4
    complete = [each for each in whole.trials if not each.ended]
    best = whole.trials[whole.best]
    assert best.validation == max(each.validation for each in complete)
    assert best.validation >= first.validation
    run = tune.run_directory.read_settings(Path(whole.run))
    assert run.learning_rate == pytest.approx(best.settings["learning_rate"], rel=1e-2)
    assert (run.rank, run.alpha) == (best.settings["rank"], 32 / 4 * best.settings["rank"])
    assert whole.figures["measured_on"] == "test"
    assert json.loads((Path(whole.directory) / "trials.json").read_text())["best"] == whole.best
    # The same command again trains nothing
    monkeypatch.setattr(tune, "fit", None)
    assert shown(tune.tune(settings)) == shown(whole)
    monkeypatch.undo()
    # Stopped within the third trial, by what ends a process at once, after its first evaluation
    shutil.rmtree(settings.output)
    evaluations = []

    class Killer(Reporter):
        def validated(self, validation: Validation) -> None:
            evaluations.append(validation)
            if len(evaluations) == killed_at:
                raise Killed

    killed_at = sum(each.evaluations for each in whole.trials[:2]) + 2
    with pytest.raises(Killed):
        tune.tune(replace(settings, checkpoint_minutes=0), reporter=Killer())
    journal = (settings.output / "support-base-tuning" / tune.JOURNAL).read_text()
    assert all(isinstance(json.loads(line), dict) for line in journal.splitlines())  # no pickle
    again = tune.tune(settings)
    assert shown(again) == shown(whole)
    assert again.figures["metrics"] == whole.figures["metrics"]


def test_trials_are_compared_at_the_same_share_of_their_steps() -> None:
    others = [{200: 0.1 * i, 500: 0.2 * i, 1000: 0.3 * i} for i in range(1, 5)]
    assert not tune._is_behind({200: 0.0}, others)  # too early
    assert not tune._is_behind({600: 0.0}, others[:3])  # too few
    assert tune._is_behind({300: 0.2}, others)  # where the median is 0.25
    assert not tune._is_behind({300: 0.26}, others)
    assert tune._is_behind({300: 0.26, 500: 0.4}, others)  # 0.5
    assert not tune._is_behind({300: 0.6, 500: 0.4}, others)  # its best counts
    assert not tune._is_behind({300: 0.2}, [{400: 0.9}] * 4)  # not evaluated until then
    assert tune._share(49, 245) == 200


def test_labels_are_written_as_words_where_that_differs(config: TrainConfig) -> None:
    tuning = object.__new__(tune._Tuning)
    tuning.dataset = replace(load_data(config), labels=("card_arrival", "topUpFailed", "refund"))
    assert tuning._words() == {"card_arrival": "card arrival", "topUpFailed": "top up failed"}
    tuning.dataset = replace(tuning.dataset, labels=("a_b", "a b"))
    assert tuning._words() == {}


@pytest.mark.parametrize("answer", ["words", "classes"])
def test_what_is_written_is_searched_where_a_label_is_written(
    answer: Any, settings: TuneConfig, config: TrainConfig
) -> None:
    tuning = object.__new__(tune._Tuning)
    tuning.config = replace(settings, answer=answer, search=("rank", "label_texts"))
    tuning.plain = replace(config, answer=answer)
    tuning.dataset = replace(load_data(config), labels=("card_arrival", "refund"))
    said: list[str] = []
    tuning.reporter = SimpleNamespace(say=said.append)  # type: ignore[assignment]
    assert list(tuning._space()) == ["rank", "label_texts"][: 2 if answer == "words" else 1]
    if answer == "classes":
        assert said == [
            "label_texts are not searched: a head scores the labels, and none is written"
        ]
        tuning.config = replace(tuning.config, search=("label_texts",))
        with pytest.raises(ConfigError, match="there are no label_texts to search: a head scores"):
            tuning._space()


def test_both_answers_are_tried_first_at_their_own_learning_rate(settings: TuneConfig) -> None:
    searched = "learning_rate", "label_texts", "answer"
    both = replace(settings, search=searched, trials=2, max_steps=4, learning_rate=None)
    tuned = tune.tune(both)
    words, classes = (trial.settings for trial in tuned.trials)
    assert (words["answer"], classes["answer"]) == ("words", "classes")
    assert words["learning_rate"] > classes["learning_rate"] == pytest.approx(2e-3)
    card = json.loads((Path(tuned.run) / "adapter" / "remora.json").read_text(encoding="utf-8"))
    assert card.get("answer", "words") == tuned.trials[tuned.best].settings["answer"]
    classes_first = replace(both, answer="classes", name="other", trials=1)
    assert tune.tune(classes_first).trials[0].settings == classes


def test_a_search_of_answers_that_was_killed_ends_the_same(settings: TuneConfig) -> None:
    both = replace(settings, search=("learning_rate", "answer"), trials=3, max_steps=4)
    whole = tune.tune(both)

    class Killer(Reporter):
        num = 0

        def validated(self, validation: Validation) -> None:
            Killer.num += 1
            if Killer.num > whole.trials[0].evaluations:
                raise Killed

    other = replace(both, name="killed", checkpoint_minutes=0)
    with pytest.raises(Killed):
        tune.tune(other, reporter=Killer())
    assert shown(tune.tune(other)) == shown(whole)


def test_a_loss_is_no_negative_number(
    settings: TuneConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    tuned = tune.tune(replace(settings, metric="log_loss", trials=3, max_steps=4))
    losses = [each.validation for each in tuned.trials]
    assert all(loss is not None and loss > 0 for loss in losses)
    assert tuned.trials[tuned.best].validation == min(losses)
    choice_results.show_tuned(tuned)
    shown = [line for line in capsys.readouterr().out.splitlines() if "0 s" in line or " s" in line]
    ranked = [f"{loss:.4f}" for loss in sorted(losses)]
    places = ["\n".join(shown).index(each) for each in ranked]
    assert places == sorted(places)


def test_settings_are_tried_once(settings: TuneConfig) -> None:
    said: list[str] = []

    class Listener(Reporter):
        def say(self, text: str) -> None:
            said.append(text)

    finite = replace(settings, search=("answer", "list_labels"), trials=9, max_steps=1)
    tuned = tune.tune(finite, reporter=Listener())
    tried = [tuple(trial.settings.values()) for trial in tuned.trials]
    assert len(tried) == len(set(tried)) == 4
    assert "all 4 settings to search have been tried" in said
    assert shown(tune.tune(replace(finite, trials=3))) == shown(tuned)


def test_classes_write_no_label_texts(settings: TuneConfig, config: TrainConfig) -> None:
    tuning = object.__new__(tune._Tuning)
    tuning.config, tuning.plain = settings, config
    tuning.dataset = replace(load_data(config), labels=("card_arrival", "refund"))
    written = {"label_texts": "words"}
    assert tuning._settings(written).label_texts == {"card_arrival": "card arrival"}
    assert tuning._settings(written | {"answer": "words"}).label_texts
    assert not tuning._settings(written | {"answer": "classes"}).label_texts


def test_answers_of_several_labels_are_not_searched(settings: TuneConfig, tmp_path: Path) -> None:
    rows = [("a card is late", '["card", "late"]'), ("refund me please", '["refund"]')] * 20
    table = tmp_path / "sets.csv"
    with table.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    with pytest.raises(ConfigError, match="answered by classes only"):
        tune.tune(replace(settings, data=str(table), search=("answer",)))


def test_a_run_of_other_settings_makes_way_for_the_best(settings: TuneConfig) -> None:
    """A search that was stopped while it trained the best, and goes on with more trials."""

    class Stopping(Reporter):
        def __init__(self) -> None:
            self.lines: list[str] = []
            self.end = 3

        def say(self, line: str) -> None:
            self.lines.append(line)

        def stepped(self, step: Step) -> None:
            if step.step == self.end:
                raise Killed

    def tuning(**others: Any) -> tune._Tuning:
        short = replace(settings, max_steps=4, checkpoint_minutes=0, **others)
        return tune._Tuning(short, Stop(), reporter)

    few, more = ({"learning_rate": rate, "rank": 4} for rate in (1e-3, 2e-3))
    reporter = Stopping()
    for _ in range(2):
        with pytest.raises(Killed):
            tuning()._train_best(few)
        assert any(line.startswith("resuming after step") for line in reporter.lines) == (
            reporter.end == 4
        )
        reporter.end = 4  # the same settings go on where they were
    reporter.end = 0
    run = tuning()._train_best(more)
    assert tune.run_directory.read_settings(run).learning_rate == 2e-3
    assert tune.resume.is_finished(run)
    (run / "relabel.csv").write_text("decisions", encoding="utf-8")
    assert tuning()._train_best(few) == run
    assert (run.with_name("best-1") / "relabel.csv").read_text(encoding="utf-8") == "decisions"
    assert f"the best run of fewer trials is kept as {run}-1" in reporter.lines
    other = tuning(name="other")
    foreign = other.directory / tune.BEST / "thesis.txt"
    foreign.parent.mkdir()
    foreign.write_text("dear", encoding="utf-8")
    with pytest.raises(ConfigError, match="it holds other files"):
        other._train_best(more)
    assert foreign.read_text(encoding="utf-8") == "dear"


def test_what_a_run_writes_is_not_searched_again(settings: TuneConfig, config: TrainConfig) -> None:
    tuning = object.__new__(tune._Tuning)
    searched = {"search": ("epochs", "label_texts"), "answer": "words"}
    tuning.config = replace(settings, **searched)
    tuning.plain = config
    tuning.dataset = replace(load_data(config), labels=("card_arrival", "refund"))
    assert list(tuning._space()) == ["epochs", "label_texts"]
    tuning.config = replace(settings, **searched, start_from="run")
    tuning.reporter = Reporter()
    assert list(tuning._space()) == ["epochs"]


def test_a_search_with_other_settings_is_refused(settings: TuneConfig) -> None:
    short = replace(settings, trials=1, max_steps=1)
    tune.tune(short)
    with pytest.raises(ConfigError, match=r"holds trials with other settings or data \(dropout"):
        tune.tune(replace(short, dropout=0.0))


def test_it_stops_when_asked_and_says_how_it_resumes(settings: TuneConfig) -> None:
    with pytest.raises(Stopped, match="run the same command again"):
        tune.tune(replace(settings, max_time="0s"))


WRONG = [
    (["--search", "rang"], "search has 'rang'; give some of learning_rate, rank"),
    (["--search", "rank", "--method", "full"], "there is no rank to search"),
    (["--search", "answer", "--multi-label", "on"], "answered by classes only"),
    (["--search", "answer", "--baselines", "zero-shot"], "leave out one of them"),
    (["--search", "answer", "--metric", "log_loss"], "give --metric accuracy"),
    (["--trials", "0"], "trials is 0; give a whole number from 1"),
    (["--max-steps", "5"], "epochs cannot be searched"),
    (["--validation-fraction", "0"], "compares trials on validation rows"),
]


@pytest.mark.parametrize(("flags", "message"), WRONG)
def test_wrong_settings_are_one_line(flags, message, config: TrainConfig, capsys) -> None:
    assert call("tune", config.data, "--model", config.model, *flags) == 2
    assert message in capsys.readouterr().err


def test_without_optuna_it_says_what_to_install(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = builtins.__import__

    def without(name: str, *rest, **more):
        if name == "optuna":
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    assert call("tune", config.data, "--model", config.model) == 2
    assert "pip install 'remora[tune]'" in capsys.readouterr().err


def test_the_command_shows_the_trials(
    config: TrainConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model", config.model, "--output", config.output, "--device", "cpu", "--rank", "4"]
    flags += ["--precision", "float32", "--trials", "2", "--search", "learning_rate"]
    flags += ["--max-steps", "3", "--baselines", "none"]
    assert call("tune", config.data, *flags) == 0
    out = capsys.readouterr().out
    assert "1 (given)" in out
    assert "validation rows chose them" in out
    assert "\nwhat to do next\n1. " in out
    assert call("tune", config.data, *flags, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert len(told["trials"]) == 2
    assert told["next_steps"][0]["sentence"] in out

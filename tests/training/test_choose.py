"""`choose`: the smallest option that clears the bar, and what is not worth its training."""

from __future__ import annotations

import csv
import json
import os
import random
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import finished
from conftest import WAYS, WORDS, call
from remora.config import ChooseConfig, TrainConfig
from remora.data.dataset import load_data
from remora.errors import ConfigError, ResourceError, Stopped
from remora.planning.plan import Duration
from remora.training import choose, finish

LABELS = ("bill", "card", "loan")


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Texts that say nothing about their labels, so that no baseline clears a bar."""
    path, pick = tmp_path / "data.csv", random.Random(0)
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["text", "label"])
        for number in range(1500):
            rows.writerow([f"{pick.random():.9f} {number}", LABELS[number % 3]])
    return path


class Trained:
    """Stands for planning and training: each model's time, and accuracy with few rows and all."""

    def __init__(self, models: dict[str, tuple[float, float, float]]) -> None:
        self.models = models
        self.runs: list[str] = []
        self.fails: dict[str, Exception] = {}

    def plan(self, config: TrainConfig) -> SimpleNamespace:
        seconds = self.models[config.model][0]
        return SimpleNamespace(
            fits=seconds < 1e6,
            peak_bytes=2_000_000_000,
            available_bytes=1_000_000_000,
            alternatives=("use --method qlora",),
            estimated=Duration(training=seconds, validation=0.0, test=0.0),
            parameters=int(seconds),
            num_steps=10_000,
        )

    def train(self, config: TrainConfig, stop, reporter) -> None:
        del stop, reporter
        if error := self.fails.get(config.model):
            raise error
        assert config.name is not None
        self.runs.append(config.name)
        dataset = load_data(config)
        assert dataset.test is not None
        seconds, few, whole = self.models[config.model]
        truth = [LABELS.index(label) for label in dataset.test.labels]
        share = few if config.rows_per_class else whole
        right = np.arange(len(truth)) < round(share * len(truth))
        predicted = [t if ok else (t + 1) % 3 for t, ok in zip(truth, right, strict=True)]
        path = finished.write(
            config.output / config.name,
            labels=LABELS,
            texts=dataset.test.texts,
            true=truth,
            predicted=predicted,
            model=config.model,
        )
        figures = json.loads((path / "evaluation.json").read_text())
        figures |= {"train_seconds": seconds, "validation_seconds": 0.0, "test_seconds": 0.0}
        figures |= {"baseline": None, "rivals": [], "base_bytes": int(1e6 * seconds)}
        (path / "evaluation.json").write_text(json.dumps(figures))
        (path / "config.toml").write_text(config.to_toml())
        (path / "data.json").write_text(json.dumps(dataset.summary.to_dict()))


@pytest.fixture
def search(table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Return a function that chooses between constructed models, cheap to dear by their time."""

    def run(trained: Trained, bar: float, **settings) -> choose.Choice:
        monkeypatch.setattr(choose, "make_plan", trained.plan)
        monkeypatch.setattr(choose, "train_until", trained.train)
        models = tuple(reversed(trained.models))  # any order
        config = ChooseConfig(str(table), models=models, bar=bar, output=tmp_path / "runs")
        return choose.choose(replace(config, **settings))

    return run


def test_a_cheap_model_that_clears_ends_the_search(search) -> None:
    trained = Trained({"small": (60, 0.9, 0.97), "large": (600, 0.99, 0.99)})
    choice = search(trained, bar=0.9)
    assert choice.chosen == "small"
    assert trained.runs == ["small"]
    (left,) = (each for each in choice.options if each.left_out)
    assert (left.name, left.left_out) == ("large", "a cheaper one suffices")
    assert choice.answer.startswith("Take small: 97.3% (95% interval 93.3% to 99.0%) clears 90.0%")
    assert "TF-IDF + linear SVM comes closest" in choice.answer


def test_only_the_dear_model_clears(search, tmp_path: Path) -> None:
    trained = Trained({"small": (60, 0.5, 0.8), "large": (600, 0.7, 0.97)})
    choice = search(trained, bar=0.9)
    assert choice.chosen == "large"
    assert trained.runs == ["small", "small-40-per-class", "large-40-per-class", "large"]
    assert [each.name for each in choice.options] == ["TF-IDF + linear SVM", "small", "large"]
    page = tmp_path / "runs" / "data-choice" / "choice.html"
    assert choice.page == str(page)
    assert "is the smallest that reaches 90.0%" in page.read_text()
    stored = json.loads((page.parent / "choice.json").read_text())
    assert stored["chosen"] == "large"


def test_a_larger_model_that_gains_too_little_is_not_trained(search) -> None:
    trained = Trained({"small": (60, 0.5, 0.7), "large": (600, 0.52, 0.99)})
    choice = search(trained, bar=0.95)
    assert choice.chosen is None
    assert trained.runs == ["small", "small-40-per-class", "large-40-per-class"]
    (left,) = (each for each in choice.options if each.left_out)
    assert left.left_out.startswith("with 40 rows per class it is +2.0 points beside small")
    assert "can be expected of it with all rows" in left.left_out
    assert choice.answer.startswith("None clears 95.0%: small comes closest with 70.0%")
    assert "remora diagnose" in choice.answer


def test_a_bar_that_is_reached_by_chance_is_not_cleared(search) -> None:
    choice = search(Trained({"small": (60, 0.9, 0.92)}), bar=0.9)
    assert choice.chosen is None
    assert choice.answer.startswith("None clears 90.0% with confidence: small comes closest with")
    assert "more test rows" in choice.answer


def test_a_baseline_that_clears_needs_no_model(
    search, monkeypatch: pytest.MonkeyPatch, table: Path
) -> None:
    rows = load_data(TrainConfig(str(table), model="m"))
    told = [
        f"{text} {label}" for text, label in zip(rows.test.texts, rows.test.labels, strict=True)
    ]
    real = finish.train_baseline

    def easy(texts, labels, _, test_labels, *rest, **settings):
        trained = [f"{text} {label}" for text, label in zip(texts, labels, strict=True)]
        return real(trained, labels, told, test_labels, *rest, **settings)

    monkeypatch.setattr(finish, "train_baseline", easy)
    trained = Trained({"small": (60, 0.9, 0.97)})
    choice = search(trained, bar=0.9)
    assert choice.chosen == "TF-IDF + linear SVM"
    assert trained.runs == []
    assert choice.page is None
    assert choice.answer.endswith("no model needs to be trained.")


def test_the_budget_is_kept(search) -> None:
    trained = Trained({"small": (60, 0.5, 0.7), "large": (600, 0.9, 0.99)})
    choice = search(trained, bar=0.95, budget="5m")
    assert trained.runs == ["small"]
    (left,) = (each for each in choice.options if each.left_out)
    assert left.left_out == ("it would take 10 min, and of the budget of 5.0 min 4.0 min are left")


def test_a_model_that_is_trained_is_not_left_out(search) -> None:
    trained = Trained({"large": (600, 0.52, 0.99)})
    search(trained, bar=0.9)
    # Neither for a budget nor after a pilot: there is nothing to save any more
    both = Trained({"small": (60, 0.5, 0.7), "large": (600, 0.52, 0.99)})
    for budget in ("5m", None):
        choice = search(both, bar=0.9, budget=budget)
        assert (choice.chosen, both.runs) == ("large", ["small"])
    choice = search(both, bar=0.9, rows_per_class=300, name="anew", budget="5m")
    assert [each.name for each in choice.options if each.left_out] == ["large"]


def test_pilots_of_earlier_calls_count_in_the_budget(search) -> None:
    trained = Trained({"a": (60, 0.1, 0.7), "b": (100, 0.4, 0.7), "c": (400, 0.7, 0.97)})
    # Before c, 2 * (60 + 100) s are spent, of which half for pilots.
    for _ in range(2):
        choice = search(trained, bar=0.9, budget="11m40s")
        (left,) = (each for each in choice.options if each.left_out)
        assert left.name == "c"
        assert left.left_out.endswith(" 6.3 min are left")
        assert trained.runs == ["a", "a-40-per-class", "b-40-per-class", "b"]


def test_a_pilot_that_serves_two_comparisons_is_paid_once(search) -> None:
    models = {"a": (60, 0.1, 0.7), "b": (100, 0.4, 0.7), "c": (110, 0.7, 0.7), "d": (120, 1, 0.7)}
    trained = Trained(models)
    # Before d, 2 * (60 + 100 + 110) s are spent, and d takes 120 s; b's pilot has served twice.
    choice = search(trained, bar=0.9, budget="11m40s")
    assert [each.name for each in choice.options if each.left_out] == []
    assert trained.runs.count("b-40-per-class") == 1


def test_models_that_do_not_fit_or_fail_are_left_out(search) -> None:
    trained = Trained({"small": (60, 0.5, 0.7), "odd": (90, 0.5, 0.7), "huge": (2e6, 0.9, 0.99)})
    trained.fails["odd"] = ResourceError("out of memory; take a smaller model")
    choice = search(trained, bar=0.95)
    reasons = {each.name: each.left_out for each in choice.options}
    assert reasons["odd"] == "out of memory; take a smaller model"
    assert reasons["huge"] == (
        "it needs 2.00 GB of memory and 1.00 GB are free; use --method qlora"
    )


def test_it_resumes_and_trains_nothing_twice(search) -> None:
    trained = Trained({"small": (60, 0.5, 0.8), "large": (600, 0.7, 0.97)})
    trained.fails["large"] = Stopped("stopped (SIGTERM); run the same command again to resume")
    with pytest.raises(Stopped):
        search(trained, bar=0.9)
    trained.fails.clear()
    assert search(trained, bar=0.9).chosen == "large"
    assert trained.runs == ["small", "small-40-per-class", "large-40-per-class", "large"]
    again = search(trained, bar=0.9)
    assert (again.chosen, len(trained.runs)) == ("large", 4)
    with pytest.raises(ConfigError, match=r"other settings or data \(rank 16 there, 8 here\)"):
        search(trained, bar=0.9, rank=8)


def test_a_run_that_is_there_is_shown_whatever_the_bar(search, tmp_path: Path) -> None:
    trained = Trained({"small": (60, 0.5, 0.8), "large": (600, 0.7, 0.97)})
    assert search(trained, bar=0.9).chosen == "large"
    lower = search(trained, bar=0.6)
    assert (lower.chosen, len(trained.runs)) == ("small", 4)
    assert [(each.name, each.left_out) for each in lower.options[1:]] == [
        ("small", ""),
        ("large", ""),
    ]
    page = tmp_path / "runs" / "data-choice" / "choice.html"
    assert lower.page == str(page)
    assert "is the smallest that reaches 60.0%" in page.read_text()
    for run in ("small", "large"):
        shutil.rmtree(page.parent / run)
    assert search(trained, bar=0.01).page is None  # which the baseline clears
    assert not page.exists()


def test_two_models_of_one_name_have_two_runs() -> None:
    names = choose._different_names(["a/base", "b/base", "base-2"])
    assert len(set(names.values())) == 3


WRONG = [
    (["--models", "m", "--bar", "93"], "bar is 93.0; give a share"),
    (["--models", ",", "--bar", "0.9"], "models has no name"),
    (["--models", "m", "--bar", "0.9", "--model", "n"], "give --models A,B"),
    (["--models", "m", "--bar", "0.9", "--budget", "soon"], "budget is 'soon'; give a time"),
    (["--models", "m", "--bar", "0.9", "--learning-curve", "5,all"], "no learning curve"),
    (["--models", "m", "--bar", "0.9", "--test", "/dev/stdin"], "test is standard input or a pipe"),
]


@pytest.mark.parametrize(("flags", "message"), WRONG)
def test_wrong_settings_are_one_line(flags, message, table, capsys) -> None:
    assert call("choose", table, *flags) == 2
    assert message in capsys.readouterr().err


def test_rows_that_can_be_read_once_are_refused(tmp_path: Path, capsys) -> None:
    flags = ["--models", "m", "--bar", "0.9", "--input-format", "csv"]
    sources = ["-", "/dev/stdin"]
    if hasattr(os, "mkfifo"):
        os.mkfifo(pipe := tmp_path / "rows.csv")
        sources.append(str(pipe))
    for source in sources:
        assert call("choose", source, *flags) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert line == (
            "error: data is standard input or a pipe, and choose reads it once for every model; "
            "save it to a file"
        )


def test_the_command_trains_real_models(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "support.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["text", "label"])
        for number in range(6):
            for label, word in WORDS.items():
                rows.writerows([f"{way.format(word)} {number}", label] for way in WAYS)
    flags = ["--models", str(base), "--bar", "0.99", "--output", tmp_path / "runs"]
    flags += ["--max-steps", "3", "--device", "cpu", "--precision", "float32"]
    assert call("choose", path, *flags) == 0
    shown = capsys.readouterr().out
    assert "TF-IDF + linear SVM" in shown
    assert "None clears 99.0%" in shown  # 9 rows cannot show that
    assert (tmp_path / "runs" / "support-choice" / "choice.html").is_file()
    assert call("choose", path, *flags, "--json") == 0
    assert json.loads(capsys.readouterr().out)["chosen"] is None


SETS = {"card": "my card {}", "refund": "a refund {}", "top up": "my top up {}"}


def test_several_labels_are_measured_by_micro_f1(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, pick = tmp_path / "sets.csv", random.Random(0)
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["text", "label"])
        for number in range(200):
            given = pick.sample(list(SETS), pick.choice([1, 2]))
            texts = (SETS[label].format(pick.randrange(99)) for label in given)
            noise = pick.choice([*SETS, None, None, None])  # so that no baseline is perfect
            rows.writerow(
                [
                    f"{number} " + " and ".join(texts),
                    json.dumps(given + [noise] * (noise not in (*given, None))),
                ]
            )
    flags = ["--models", str(base), "--output", tmp_path / "runs", "--bar", "0.99"]
    flags += ["--max-steps", "3", "--device", "cpu", "--precision", "float32"]
    assert call("choose", path, *flags) == 0
    shown = capsys.readouterr()
    assert "micro-F1" in shown.out
    assert "% micro-F1 (95% interval" in shown.err
    assert "None clears 99.0%" in shown.out
    assert call("choose", path, *flags, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    svm, model = told["options"]
    assert model["run"] is not None
    figures = json.loads((Path(model["run"]) / "evaluation.json").read_text(encoding="utf-8"))
    assert model["micro_f1"] == figures["metrics"]["micro_f1"] != model["accuracy"]
    assert model["micro_f1_interval"] == figures["metrics"]["micro_f1_interval"]
    assert svm["micro_f1"] == figures["baseline"]["metrics"]["micro_f1"] > svm["accuracy"]
    # Between the two figures of the baseline: it is micro-F1 that the bar is for
    low = svm["micro_f1_interval"][0]
    assert svm["accuracy_interval"][0] < low
    assert call("choose", path, *flags[:-8], "--bar", str(low - 0.001), "--json") == 0
    assert json.loads(capsys.readouterr().out)["chosen"] == svm["name"]


def test_what_a_larger_model_gains_on_sets_is_micro_f1() -> None:
    true = ['["a", "b"]', '["a"]', '["b"]', "[]"] * 50
    right, half = list(true), ['["a"]', '["a"]', '["b"]', '["b"]'] * 50

    def run(predicted: list[str]) -> SimpleNamespace:
        return SimpleNamespace(
            multi_label=True,
            labels=("a", "b"),
            true=true,
            predicted=predicted,
            figures={"metrics": {"micro_f1": 0.6, "accuracy": 0.5}},
        )

    most, lead = choose.expected_at_most(run(half), run(half), run(right))
    assert lead == pytest.approx(1 - 2 * 3 / (4 + 4))  # of 4 labels a block 3 are hit by 4 given
    assert 0.6 + lead < most < 0.95
    most, lead = choose.expected_at_most(run(half), run(half), run(half))
    assert (most, lead) == (0.6, 0.0)

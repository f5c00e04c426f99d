"""A learning curve through the whole path: what is shared, what goes on, what is said."""

from __future__ import annotations

import csv
import json
import os
import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conftest import WAYS, WORDS, call
from remora.config import DiagnoseConfig, RetrainConfig, TrainConfig
from remora.data.dataset import limit_rows, load_data
from remora.diagnosis import diagnose, learning_curve
from remora.diagnosis.curve_answer import Size, answer, followed
from remora.diagnosis.extrapolation import Extrapolation
from remora.errors import ConfigError, ResourceError, Stopped
from remora.evaluation import results
from remora.models import loading
from remora.report import pages
from remora.runtime.reporter import Reporter, Step
from remora.training import finish, retrain
from remora.training.run import train

ADAPTER = "adapter/adapter_model.safetensors"


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "support.csv"
    rows = [
        f'"{way.format(word)} {i}",{label}\n'
        for label, word in WORDS.items()
        for i in range(4 if label == "refund" else 8)
        for way in WAYS
    ]
    path.write_text("text,label\n" + "".join(rows), encoding="utf-8")
    return path


@pytest.fixture
def config(base: Path, table: Path, tmp_path: Path) -> TrainConfig:
    """Four steps of each size, dropout, and a class with half the rows of the others."""
    return TrainConfig(
        str(table),
        model=str(base),
        output=tmp_path / "runs",
        learning_curve="4,20,all",
        learning_rate=1e-2,
        epochs=1,
        batch_size=20,
        precision="float32",
        device="cpu",
        rank=4,
        dropout=0.2,
        max_steps=4,
        eval_steps=2,
    )


class Teller(Reporter):
    """Remembers what was said, and sends this process a signal at some step of some size."""

    def __init__(self, *, stop_at: tuple[int, int] | None = None) -> None:
        self.lines: list[str] = []
        self.steps: list[int] = []
        self.stop_at = stop_at

    def say(self, line: str) -> None:
        self.lines.append(line)

    def stepped(self, step: Step) -> None:
        self.steps.append(step.step)
        if self.stop_at == (self.steps.count(1), step.step):
            os.kill(os.getpid(), signal.SIGINT)


def contents(directory: Path) -> dict[str, bytes]:
    """All of a curve that must not depend on interruptions."""
    found = {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.name in {"adapter_model.safetensors", "predictions.csv"}
    }
    curve = json.loads((directory / learning_curve.FILE).read_text())
    for size in curve["sizes"]:
        del size["train_seconds"]
    return found | {learning_curve.FILE: json.dumps(curve).encode()}


def test_rows_of_a_smaller_size_are_among_those_of_a_larger(config: TrainConfig) -> None:
    whole = load_data(replace(config, learning_curve=None))
    small, large = (limit_rows(whole, count, seed=0) for count in (4, 20))
    assert Counter(small.train.labels) == dict.fromkeys(WORDS, 4)
    counts = Counter(whole.train.labels)
    assert 4 < counts["refund"] < 20
    assert Counter(large.train.labels) == {name: min(20, n) for name, n in counts.items()}
    assert set(small.train.texts) < set(large.train.texts) < set(whole.train.texts)
    assert (small.test, small.validation) == (whole.test, whole.validation)
    assert small.summary.num_train == 12
    assert len({d.summary.sha256 for d in (small, large, whole)}) == 3
    assert limit_rows(whole, 4, seed=1).train != small.train
    assert load_data(replace(config, learning_curve=None, rows_per_class=4)) == small


def test_each_size_is_the_run_that_it_would_be_alone(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, load, teller = [], loading.load, Teller()

    def counted(*given: Any, **more: Any) -> Any:
        loaded.append(given)
        return load(*given, **more)

    monkeypatch.setattr(loading, "load", counted)
    result, curve = learning_curve.learn(config, reporter=teller)
    assert len(loaded) == 1
    assert len(teller.lines) == len(set(teller.lines))
    assert [size.run for size in curve.sizes] == [
        "learning_curve/4-per-class",
        "learning_curve/20-per-class",
        ".",
    ]
    assert [size.num_short for size in curve.sizes] == [0, 1, 0]
    assert [size.num_steps for size in curve.sizes] == [4, 4, 4]
    alone = replace(config, learning_curve=None, output=tmp_path / "alone")
    for path, settings in (
        (result.directory / "learning_curve/4-per-class", replace(alone, rows_per_class=4)),
        (result.directory / "learning_curve/20-per-class", replace(alone, rows_per_class=20)),
        (result.directory, alone),
    ):
        same = train(settings).directory
        assert (path / ADAPTER).read_bytes() == (same / ADAPTER).read_bytes()
        assert results.read(path).predicted == results.read(same).predicted
        assert results.read(path).baseline == results.read(same).baseline
    found = json.loads((result.directory / learning_curve.FILE).read_text())
    assert found == json.loads(json.dumps(curve.to_dict()))
    page = pages.page(result.directory)
    assert curve.answer in page
    assert "Accuracy by training rows" in page
    assert 'id="learning"' not in pages.page(result.directory / "learning_curve/4-per-class")


def test_all_sizes_take_the_steps_and_evaluations_of_the_last(config: TrainConfig) -> None:
    by_epochs = replace(
        config, learning_curve="4,all", max_steps=None, eval_steps=None, epochs=2, patience=0
    )
    result, curve = learning_curve.learn(by_epochs)
    assert [size.num_steps for size in curve.sizes] == [8, 8]  # 2 epochs of 80 rows, 20 a step
    logs = [
        [
            record["step"]
            for record in map(json.loads, path.read_text().splitlines())
            if "validation_accuracy" in record
        ]
        for path in result.directory.rglob("metrics.jsonl")
    ]
    assert logs == [[4, 8], [4, 8]]


def test_corrections_are_of_the_rows_that_a_size_takes(config: TrainConfig, tmp_path: Path) -> None:
    """As `load_data` makes them, so that each run of a curve is found unchanged."""
    rows, labels = load_data(replace(config, learning_curve=None)).train, list(WORDS)

    def decide(name: str, step: int) -> Path:
        with (sheet := tmp_path / name).open("w", encoding="utf-8", newline="") as file:
            written = csv.writer(file)
            written.writerow(["row", "text", "label", "decision"])
            given = list(zip(rows.places, rows.texts, rows.labels, strict=True))[::step]
            for row, text, label in given:
                to = "delete" if row % 3 else labels[labels.index(label) - 1]
                written.writerow([row + 1, text, label, to])
        return sheet

    curve = replace(config, learning_curve="4,8", corrections=str(decide("few.csv", 2)))
    result, found = learning_curve.learn(curve)
    for per_class, size in zip((4, 8), found.sizes, strict=True):
        path = result.directory / size.run
        alone = replace(curve, learning_curve=None, rows_per_class=per_class)
        trained = load_data(alone).train
        assert diagnose.load(DiagnoseConfig(path))[1].train == trained
        assert size.num_rows == len(trained) < 3 * per_class
        wanted = RetrainConfig(path, corrections=decide("all.csv", 1))
        again, _ = retrain._corrected(wanted, tmp_path, Reporter())
        assert again.rows_per_class == per_class


def test_a_size_whose_svm_was_left_out_is_named(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(*args: object) -> None:
        raise MemoryError

    monkeypatch.setattr(finish, "train_svm", exhausted)
    with pytest.raises(ResourceError, match=r"the SVM of .*4-per-class was left out"):
        learning_curve.learn(config)


def test_diagnose_judges_the_whole_table_of_a_size(config: TrainConfig, tmp_path: Path) -> None:
    """Row numbers in relabel.csv are those of the table, whatever part of it was trained on."""
    small = replace(config, learning_curve=None, rows_per_class=4)
    summary = load_data(small).summary
    (tmp_path / "config.toml").write_text(small.to_toml(), encoding="utf-8")
    (tmp_path / "data.json").write_text(json.dumps(summary.to_dict()), encoding="utf-8")
    _, dataset, whole = diagnose.load(DiagnoseConfig(tmp_path))
    assert len(dataset.train) == summary.num_train == 12
    assert len(whole.train) == 100


def test_the_base_of_full_fine_tuning_is_fresh_for_each_size(
    config: TrainConfig, tmp_path: Path
) -> None:
    full = replace(config, method="full", learning_curve="4,all", learning_rate=1e-3)
    result, _ = learning_curve.learn(full)
    alone = train(replace(full, learning_curve=None, output=tmp_path / "alone"))
    weights = "model/model.safetensors"
    assert (result.directory / weights).read_bytes() == (alone.directory / weights).read_bytes()


@pytest.mark.parametrize(
    "stop_at",
    [
        pytest.param((1, 2), marks=pytest.mark.durability),
        (2, 3),
        pytest.param((3, 1), marks=pytest.mark.durability),
    ],
)
def test_a_stopped_curve_goes_on_where_it_stopped(
    config: TrainConfig, tmp_path: Path, stop_at: tuple[int, int]
) -> None:
    undisturbed, _ = learning_curve.learn(replace(config, output=tmp_path / "undisturbed"))
    with pytest.raises(Stopped, match="run the same command again"):
        learning_curve.learn(config, reporter=Teller(stop_at=stop_at))
    teller = Teller()
    result, _ = learning_curve.learn(config, reporter=teller)
    assert len(list(config.output.iterdir())) == 1
    size, step = stop_at
    assert teller.steps == [*range(step + 1, 5), *([1, 2, 3, 4] * (3 - size))]
    assert sum(line.endswith("finished already") for line in teller.lines) == size - 1
    assert contents(result.directory) == contents(undisturbed.directory)


def test_the_same_command_after_the_end_begins_another_curve(config: TrainConfig) -> None:
    first, _ = learning_curve.learn(replace(config, learning_curve="4,all"))
    second, _ = learning_curve.learn(replace(config, learning_curve="4,all"))
    assert first.directory != second.directory
    with pytest.raises(ConfigError, match="exists already; give another --name"):
        learning_curve.learn(replace(config, name=first.directory.name))


def test_other_sizes_do_not_go_on_with_a_curve(config: TrainConfig) -> None:
    named = replace(config, name="mine")
    with pytest.raises(Stopped):
        learning_curve.learn(named, reporter=Teller(stop_at=(2, 1)))
    with pytest.raises(ConfigError, match="learning_curve 4,20,all there, 4,all here"):
        learning_curve.learn(replace(named, learning_curve="4,all"))
    with pytest.raises(ConfigError, match="learning_curve 4,20,all there, None here"):
        train(replace(named, learning_curve=None))


@pytest.mark.parametrize(
    "sizes", ["", "5", "all", "5,5", "10,5", "0,5", "5,all,10", "5,ten", "-5,5", "5,,9", "5.5,9"]
)
def test_sizes_that_are_none_are_refused(sizes: str) -> None:
    with pytest.raises(ConfigError, match=r"learning_curve is .*; give two or more whole numbers"):
        TrainConfig("data.csv", model="base", learning_curve=sizes)


def test_sizes_are_read() -> None:
    assert TrainConfig("d", model="b", learning_curve="5, 10,all").curve_sizes == (5, 10, None)
    assert TrainConfig("d", model="b", learning_curve="5,10").num_per_class == 10
    with pytest.raises(ConfigError, match="rows_per_class and learning_curve are both"):
        TrainConfig("d", model="b", learning_curve="5,10", rows_per_class=3)
    with pytest.raises(ConfigError, match="trained on one device"):
        TrainConfig("d", model="b", learning_curve="5,10", devices=2)


@pytest.mark.parametrize("sizes", ["4,41", "4,41,all", "4,32,all"])
def test_sizes_larger_than_the_data_are_refused(config: TrainConfig, sizes: str) -> None:
    with pytest.raises(ConfigError, match=r"no class has more .*than 32 training rows; give smal"):
        learning_curve.learn(replace(config, learning_curve=sizes))
    assert not config.output.exists()


def test_a_curve_may_end_before_all_rows(config: TrainConfig, capsys) -> None:
    arguments = [config.data, "--model", config.model, "--output", str(config.output)]
    arguments += ["--learning-curve", "4,8", "--max-steps", "1", "--device", "cpu"]
    assert call("train", *arguments, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [size["num_rows"] for size in found["learning_curve"]["sizes"]] == [12, 24]
    assert json.loads((Path(found["directory"]) / "data.json").read_text())["num_train"] == 24
    assert call("train", *arguments) == 0
    shown = capsys.readouterr().out
    assert "2 sizes are too few to extrapolate" in shown
    assert shown.split("what to do next")[0].rstrip().endswith(".")


def sizes_of(*accuracies: float, baseline: float = 0.1) -> list[Size]:
    """Sizes that double, with these accuracies."""
    return [
        Size(
            per_class=2**i,
            num_rows=100 * 2**i,
            num_short=0,
            run=".",
            accuracy=accuracy,
            accuracy_interval=(accuracy - 0.02, accuracy + 0.02),
            macro_f1=accuracy,
            baseline_accuracy=baseline,
            baseline_interval=(0.0, 1.0),
            p_value=0.001,
            num_steps=1,
            train_seconds=1.0,
        )
        for i, accuracy in enumerate(accuracies)
    ]


def test_the_answer_turns_on_the_last_step_and_on_who_errs_alike() -> None:
    rising = sizes_of(0.5, 0.6)
    said = answer(rising, 0.1, (0.06, 0.14), None, 0.9)
    assert said.startswith(
        "Label more rows: from 100 to 200 rows, accuracy changed by +10.0 points"
    )
    assert "(95% interval +6.0 to +14.0)." in said
    further = Extrapolation(
        floor=0.1,
        scale=0.3,
        exponent=0.5,
        num_rows=400,
        accuracy=0.68,
        accuracy_interval=(0.65, 0.71),
        foretold=0.61,
    )
    assert "400 rows should give about 68%" in answer(rising, 0.1, (0.06, 0.14), further, 0.9)
    also = "A bigger model may help too: with 1 per class"
    alike = [replace(size, p_value=0.2) for size in rising]
    behind = [replace(rising[0], baseline_accuracy=0.7), rising[1]]
    assert also not in said
    assert also in answer(alike, 0.1, (0.06, 0.14), None, 0.9)
    assert also in answer(behind, 0.1, (0.06, 0.14), None, 0.9)
    worse = [replace(size, baseline_accuracy=0.7) for size in rising]
    said = answer(worse, 0.1, (0.06, 0.14), None, 0.9)
    assert said.startswith("Train longer, or use a bigger model: with 2 per class this one has")
    assert "60.0% accuracy and the baseline 70.0%" in said
    assert followed(rising[-1], further, "with care") == (further, "with care")
    found, caution = followed(worse[-1], further, "with care")
    assert found is None
    assert caution.startswith("no extrapolation: the last size is worse than the baseline")
    assert followed(worse[-1], None, "too few") == (None, "too few")
    flat = sizes_of(0.8, 0.801)
    assert answer(flat, 0.001, (-0.004, 0.006), None, 0.6).startswith("Clean the labels")
    assert answer(flat, 0.001, (-0.004, 0.006), None, 0.4).startswith("Use a bigger model")
    assert answer(flat, 0.001, (-0.02, 0.02), None, 0.6).startswith("Inconclusive")

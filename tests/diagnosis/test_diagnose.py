"""Why a run errs: planted errors are found, and decisions come back into the table."""

from __future__ import annotations

import csv
import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import WORDS, write_rows
from remora.cli import main
from remora.config import DiagnoseConfig, TrainConfig
from remora.data import sources
from remora.data.dataset import dataset_from_lists, load_data, load_dataset
from remora.data.table import Table, read_table
from remora.diagnosis import (
    diagnose,
    duplicates,
    label_noise,
    out_of_sample,
    rare_tokens,
    suspect_list,
)
from remora.diagnosis.regressions import pool
from remora.errors import ConfigError, DataError, Stopped
from remora.evaluation.predictions import read_predictions, write_predictions
from remora.models import metadata
from remora.runtime import files, run_directory
from remora.runtime.device import choose_precision
from remora.runtime.reporter import Reporter, Step
from remora.training.run import train

NOUNS = {"card": "card arrival", "refund": "refund", "top up": "top up failed"}
ENDS = ("today", "please", "at once", "again", "now", "still", "soon", "at last")
WAYS = ("where is my {} {}", "the {} is late {}", "why no {} {}", "a {} I wait for {}")


def rows() -> Table:
    """96 rows, three of them with a planted wrong label: rows 5, 40 and 90, from 1."""
    texts = [way.format(noun, end) for way in WAYS for noun in NOUNS for end in ENDS]
    labels = [label for _ in WAYS for label in NOUNS.values() for _ in ENDS]
    for row, wrong in ((5, "refund"), (40, "top up failed"), (90, "card arrival")):
        assert labels[row - 1] != wrong
        labels[row - 1] = wrong
    texts[0] = "=card(1) where is my card"
    return Table(texts, labels)


def write_csv(path: Path, table: Table) -> Path:
    return write_rows(path, table.texts, table.labels)


@pytest.fixture
def finished(base: Path, tmp_path: Path) -> Path:
    """A run directory as train leaves it, but for its adapter."""
    table = rows()
    settings = TrainConfig(
        str(write_csv(tmp_path / "train.csv", table)),
        model=str(base),
        test=str(write_csv(tmp_path / "test.csv", Table(table.texts[1:41], table.labels[1:41]))),
        epochs=1,
        batch_size=4,
        learning_rate=1e-2,
        device="cpu",
        precision="float32",
    )
    path = tmp_path / "run"
    path.mkdir()
    dataset = load_dataset(settings.data, test=settings.test)
    files.write_text(path / "config.toml", settings.to_toml())
    files.write_json(path / "data.json", dataset.summary.to_dict())
    truth = dataset.test.labels
    write_predictions(path / "predictions.csv", dataset.test.texts, truth, truth, [0.9] * 40, truth)
    return path


def remora(*arguments: str | Path) -> int:
    """Run the command line in this process."""
    try:
        return main([*map(str, arguments)])
    except SystemExit as done:
        return int(done.code or 0)


@pytest.mark.parametrize("method", ["tfidf", "fast"])
def test_planted_errors_lead_the_list(finished: Path, method: str, capsys) -> None:
    assert remora("diagnose", finished, "--method", method) == 0
    with (finished / "relabel.csv").open(encoding="utf-8", newline="") as file:
        found = list(csv.DictReader(file))
    assert {row["row"] for row in found[:2]} < {"5", "40", "90"}
    assert all(row["suggested"] == rows().labels[int(row["row"]) - 2] for row in found[:2])
    assert all(row["decision"] == "" for row in found)
    shown = capsys.readouterr().out
    assert f"suspects   {len(found)} rows in" in shown
    assert ("frozen features" in shown) == (method == "fast")
    figures = json.loads((finished / "diagnosis.json").read_text())
    assert figures["out_of_sample_accuracy"] > 0.9
    _, dataset, _ = diagnose.load(DiagnoseConfig(finished))
    shared = len(set(dataset.test.texts) & set(dataset.train.texts))
    assert figures["num_test_exact"] == shared > 30  # test rows are copies of training rows


def test_the_ceiling_is_of_the_labels_that_accuracy_is_measured_by(
    base: Path, tmp_path: Path, monkeypatch
) -> None:
    table = rows()
    path = tmp_path / "run"
    settings = TrainConfig(
        str(write_csv(tmp_path / "train.csv", table)),
        model=str(base),
        test_fraction=0.3,
        validation_fraction=0.0,
        device="cpu",
        precision="float32",
    )
    given = load_data(settings).test
    assert given is not None
    first = given.places[0]
    wrong = next(label for label in NOUNS.values() if label != given.labels[0])
    path.mkdir()
    sheet = path / "corrections.csv"
    files.write_csv(
        sheet,
        ("row", "text", "label", "decision"),
        [(str(first + 1), given.texts[0], given.labels[0], wrong)],
    )
    corrected = replace(settings, corrections=str(sheet))
    dataset = load_data(corrected)
    test = dataset.test
    assert test is not None
    assert test.labels == given.labels  # measured by the labels as given
    files.write_text(path / "config.toml", corrected.to_toml())
    files.write_json(path / "data.json", dataset.summary.to_dict())
    write_predictions(
        path / "predictions.csv", test.texts, test.labels, test.labels, [0.9] * len(test), None
    )
    seen = []
    estimate = label_noise.estimate

    def recorded(probabilities, true, **more):
        seen.append(true.tolist())
        return estimate(probabilities, true, **more)

    monkeypatch.setattr(label_noise, "estimate", recorded)
    diagnose.diagnose_run(DiagnoseConfig(path, method="tfidf"))
    labels = sorted(NOUNS.values())
    assert seen[0] == [labels.index(label) for label in test.labels]


def test_rows_that_the_run_did_not_use_are_not_judged(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With 8 rows per class 24 of the 96 train; the others' features are not computed."""
    settings = replace(run_directory.read_settings(finished), test=None)
    settings = replace(settings, test_fraction=0.1, rows_per_class=8)
    dataset = load_data(settings)
    assert (len(dataset.train), len(dataset.validation), len(dataset.test)) == (24, 10, 10)
    files.write_text(finished / "config.toml", settings.to_toml())
    files.write_json(finished / "data.json", dataset.summary.to_dict())
    test = dataset.test
    own = test.labels
    write_predictions(finished / "predictions.csv", test.texts, own, own, [0.9] * 10, own)
    judged = []
    stock = out_of_sample.frozen_features
    monkeypatch.setattr(
        out_of_sample,
        "frozen_features",
        lambda texts, *rest: judged.extend(texts) or stock(texts, *rest),
    )
    diagnosis = diagnose.diagnose_run(DiagnoseConfig(finished, folds=4))
    used = [*dataset.train.texts, *dataset.validation.texts, *test.texts]
    assert sorted(judged) == sorted(used)
    assert diagnosis.num_rows == 44
    places = {*dataset.train.places, *dataset.validation.places, *test.places}
    assert {suspect.row - 1 for suspect in diagnosis.suspects} <= places
    table = rows()
    assert all(table.texts[each.row - 1] == each.text for each in diagnosis.suspects)


def judged(
    finished: Path, method: str, num_folds: int, folder: Path, reporter: Reporter | None = None
):
    """What 24 of the rows are judged, [24, 3]."""
    settings, _, everything = diagnose.load(DiagnoseConfig(finished))
    few = Table(everything.train.texts[::4], everything.train.labels[::4])
    return out_of_sample.judge(
        replace(everything, train=few),
        settings,
        method,
        num_folds,
        reporter or Reporter(),
        folder=folder,
    ).probabilities


@pytest.mark.parametrize("method", ["frozen", "adapters"])
def test_every_method_judges_each_row_out_of_sample(
    finished: Path, method: str, tmp_path: Path
) -> None:
    found = judged(finished, method, 2, tmp_path / "folds")
    assert found.shape == (24, 3)
    np.testing.assert_allclose(found.sum(1), 1)
    again = judged(finished, method, 3, tmp_path / "folds")
    assert not np.allclose(found, again)  # other folds, other judges


class Interrupting(Reporter):
    """Counts the steps, and has the process interrupted after one of them."""

    def __init__(self, after: int | None = None) -> None:
        self.num_steps, self._after = 0, after

    def stepped(self, step: Step) -> None:
        self.num_steps += 1
        if self.num_steps == self._after:
            signal.raise_signal(signal.SIGINT)


def test_adapters_that_were_stopped_go_on(finished: Path, tmp_path: Path) -> None:
    whole = Interrupting()
    undisturbed = judged(finished, "adapters", 2, tmp_path / "whole", whole)
    assert whole.num_steps == 6  # 3 batches in each of 2 folds
    folder = tmp_path / "folds"
    with pytest.raises(Stopped, match=r"stopped \(SIGINT\); run the same command again to resume"):
        judged(finished, "adapters", 2, folder, Interrupting(after=5))
    rest = Interrupting()
    np.testing.assert_array_equal(judged(finished, "adapters", 2, folder, rest), undisturbed)
    assert rest.num_steps == 1
    nothing = Interrupting()
    judged(finished, "adapters", 2, folder, nothing)
    assert nothing.num_steps == 0
    other = Interrupting()
    judged(finished, "adapters", 3, folder, other)
    assert other.num_steps == 12  # nothing of other folds is taken: 4 batches in each of 3


def test_a_stop_ends_with_one_line(finished: Path, monkeypatch, capsys) -> None:
    fold = out_of_sample._fold

    def stopped(*arguments: object) -> None:
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(out_of_sample, "_fold", stopped)
    arguments = ("diagnose", finished, "--method", "adapters", "--folds", "2")
    assert remora(*arguments) == 75
    assert capsys.readouterr().err.splitlines()[-1] == (
        "error: stopped (SIGTERM); run the same command again to resume"
    )
    assert not (finished / "diagnosis.json").exists()
    assert (finished / "folds").is_dir()
    monkeypatch.setattr(out_of_sample, "_fold", fold)
    assert remora(*arguments) == 0
    assert not (finished / "folds").exists()


def test_no_row_is_judged_by_what_saw_its_label() -> None:
    """A label that one row has alone is unknown to its judge, however clear the text."""
    table = Table([f"{'ab'[i % 2]} word" for i in range(20)] + ["unique"], ["a", "b"] * 10 + ["c"])
    dataset = dataset_from_lists(table.texts, table.labels, validation_fraction=0.0, seed=0)
    found = out_of_sample.judge(dataset, TrainConfig("", model=""), "tfidf", 3, Reporter())
    assert found.probabilities[-1].argmax() != 2


def test_the_rows_that_regressions_have_judged_are_counted() -> None:
    counted = []

    class Counting(Reporter):
        def scoring(self, what: str, done: int, total: int) -> None:
            counted.append((what, done, total))

    table = Table([f"{'ab'[i % 2]} word" for i in range(20)], ["a", "b"] * 10)
    dataset = dataset_from_lists(table.texts, table.labels, validation_fraction=0.0, seed=0)
    out_of_sample.judge(dataset, TrainConfig("", model=""), "tfidf", 4, Counting())
    steps = [5, 5, 5, 5, 10, 10, 5, 5, 5, 5]  # ridge regressions, those by half, logistic ones
    expected = [("regressions", sum(steps[: i + 1]), 60) for i in range(len(steps))]
    assert counted == expected


def test_the_pool_gives_a_judge_that_knows_nothing_no_weight() -> None:
    generator = np.random.default_rng(0)
    true = generator.integers(0, 3, 300)
    good = np.full((300, 3), 0.1) + 0.7 * np.eye(3)[true]
    good[:60] = good[:60][:, [1, 2, 0]]  # right on 240 of 300 rows, as sure as it says
    noise = generator.dirichlet([1, 1, 1], 300)
    found = pool([np.log(good), np.log(noise)], true)
    assert (found.argmax(1) == true).mean() == pytest.approx(0.8)
    np.testing.assert_allclose(found.max(1).mean(), 0.8, atol=0.01)
    alone = pool([np.log(noise)], true)
    assert alone.max() < 0.5  # told as the guess that it is


def test_rare_words_of_one_label() -> None:
    texts = ["my card regards bob"] * 6 + ["my card"] * 300 + ["a refund regards"] * 300
    rows = Table(texts, ["card"] * 306 + ["refund"] * 300)
    assert rare_tokens.tied(rows) == (
        rare_tokens.TiedToken(token="bob", label="card", num_rows=6, share=6 / 306),
    )


CARDS = ("I would like to know where my card is", "i would like to know where my card is!")


def test_near_texts_are_found_in_any_block() -> None:
    texts = [*CARDS, "a refund", "top up", "where is it"]
    for block in (2, 512):
        neighbours, near = duplicates.nearest(texts, 2, block)
        assert near == [(0, 1)]
        assert neighbours[:2, 0].tolist() == [1, 0]
        assert neighbours.shape == (5, 2)


def decide(finished: Path, decisions: dict[int, str], **changed: str) -> Path:
    table = rows()
    path = finished / "decisions.csv"
    records = [
        [
            str(row),
            files.escape_formula(table.texts[row - 1]),
            table.labels[row - 1],
            *[""] * 5,
            answer,
        ]
        for row, answer in decisions.items()
    ]
    files.write_csv(path, suspect_list.COLUMNS, records)
    return path


def test_decisions_come_back_into_a_cleaned_table(finished: Path, tmp_path: Path, capsys) -> None:
    path = decide(
        finished, {90: "refund", 5: "card arrival", 1: "delete", 2: "", 3: "card arrival"}
    )
    assert remora("diagnose", finished, "--apply", path) == 0
    assert "2 rows corrected, 1 deleted in" in capsys.readouterr().out
    cleaned = read_table(finished / "cleaned.csv")
    table = rows()
    assert cleaned.texts == table.texts[1:]
    assert cleaned.labels[88] == "refund"
    assert cleaned.labels[3] == "card arrival"
    assert sum(a != b for a, b in zip(cleaned.labels, table.labels[1:], strict=True)) == 2
    elsewhere = tmp_path / "elsewhere.csv"
    assert (
        remora(
            "diagnose", finished, "--apply", decide(finished, {1: "refund"}), "--output", elsewhere
        )
        == 0
    )
    assert read_table(elsewhere).texts[0].startswith("=card")  # not escaped: it is trained on


def test_counts_of_corrections_as_json(finished: Path, capsys) -> None:
    path = decide(finished, {90: "refund", 1: "delete", 2: "delete"})
    assert remora("diagnose", finished, "--apply", path, "--json") == 0
    assert json.loads(capsys.readouterr().out) == {
        "output": str(finished / "cleaned.csv"),
        "num_corrected": 1,
        "num_deleted": 2,
    }


@pytest.mark.parametrize("name", ["x.parquet", "x.jsonl", "x.xlsx", "x.tsv", "x", "no/x.csv", "."])
def test_a_cleaned_table_that_cannot_be_written_is_refused_first(
    finished: Path, tmp_path: Path, monkeypatch, capsys, name: str
) -> None:
    told = {"no/x.csv": "there is no folder no; make it", ".": "is a folder; give a file"}
    path = decide(finished, {5: "refund"})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(diagnose, "load", lambda config: pytest.fail("it was begun"))
    code = 5 if name == "no/x.csv" else 2
    assert remora("diagnose", finished, "--apply", path, "--output", name) == code
    wanted = told.get(name, f"{name} is written as CSV; end its name with .csv")
    assert wanted in capsys.readouterr().err
    assert not (tmp_path / name).is_file()


@pytest.mark.parametrize(
    ("decisions", "told"),
    [
        ({5: "refnd"}, "line 2 has the decision 'refnd', which is no label; did you mean 'refund'"),
        (dict.fromkeys(range(1, 97), "delete"), "deletes every row"),
    ],
)
def test_bad_decisions_are_refused(finished: Path, decisions: dict[int, str], told: str) -> None:
    config = DiagnoseConfig(finished, apply=decide(finished, decisions))
    with pytest.raises(DataError, match=told):
        diagnose.apply_corrections(config)
    assert not (finished / "cleaned.csv").exists()


def test_decisions_for_other_rows_are_refused(finished: Path) -> None:
    path = decide(finished, {5: "refund"})
    text = path.read_text()
    for old, new, told in (
        ("5,", "6,", "line 2 no longer matches row 6 of the data"),
        ("5,", "97,", "line 2 is for row '97', which is not in the data; use"),
        ("decision", "choice", "has no column decision"),
        (",refund\n", "\n", "line 2 has too few or too many fields"),
    ):
        path.write_text(text.replace(old, new, 1))
        with pytest.raises(DataError, match=told):
            diagnose.apply_corrections(DiagnoseConfig(finished, apply=path))


def test_a_table_that_has_changed_is_refused(finished: Path, capsys) -> None:
    table = rows()
    write_csv(finished.parent / "train.csv", Table(table.texts[1:], table.labels[1:]))
    assert remora("diagnose", finished) == 3
    assert "have changed since" in capsys.readouterr().err
    (finished / "predictions.csv").unlink()
    with pytest.raises(
        DataError, match=r"no predictions.csv; give the directory of a finished run"
    ):
        diagnose.diagnose_run(DiagnoseConfig(finished))
    assert not (finished / "relabel.csv").exists()


def test_the_base_model_may_have_moved(finished: Path) -> None:
    settings, _, _ = diagnose.load(DiagnoseConfig(finished, model="elsewhere"))
    assert settings.model == "elsewhere"
    assert diagnose.load(DiagnoseConfig(finished))[0].model != "elsewhere"


def test_figures_as_json(finished: Path, capsys) -> None:
    assert remora("diagnose", finished, "--method", "tfidf", "--json") == 0
    assert json.loads(capsys.readouterr().out)["num_rows"] == 96


def test_wrong_settings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="folds is 1; give"):
        DiagnoseConfig(tmp_path, folds=1)
    with pytest.raises(ConfigError, match="output is given without apply"):
        DiagnoseConfig(tmp_path, output=tmp_path / "x.csv")
    with pytest.raises(DataError, match=r"has no config.toml; give the directory of a finished"):
        diagnose.load(DiagnoseConfig(tmp_path))


def test_a_samples_wrong_labels_are_known() -> None:
    wrong = sources.planted_errors("sample:support")
    rows = load_dataset("sample:support", validation_fraction=0.0).train
    assert len(wrong) == 69
    assert all(rows.labels[row - 1] != true for row, true in wrong.items())
    assert rows.texts[next(iter(wrong)) - 1].startswith("what's the cheapest way of getting rid")
    assert sources.planted_errors("data.csv") == {}


def test_how_many_planted_errors_were_found() -> None:
    def suspect(row: int, suggested: str) -> suspect_list.Suspect:
        return suspect_list.Suspect(
            row=row,
            text="",
            label="a",
            suggested=suggested,
            p_wrong=0.5,
            p_label=0.1,
            p_suggested=0.9,
            neighbours=0,
        )

    rows = Table([""] * 9, ["a"] * 9)
    wrong = {3: "b", 7: "c", 9: "b", 10: "b"}  # the last is in a row that the run did not use
    found = diagnose._planted(wrong, rows, [suspect(7, "c"), suspect(4, "b"), suspect(3, "c")])
    assert found == diagnose.Planted(num_wrong=3, num_listed=3, num_found=2, num_suggested=1)
    assert (found.precision, found.recall) == (2 / 3, 2 / 3)
    assert diagnose._planted({}, rows, [suspect(7, "c")]) is None


def test_held_out_rows_that_begin_like_formulas_are_found_again(tmp_path: Path) -> None:
    texts, labels = ["=1+1", "'=1+1", "plain", "-2"], ["a", "b", "a", "b"]
    write_predictions(tmp_path / "predictions.csv", texts[:2], labels[:2], ["a", "a"], [0.9, 0.8])
    run = read_predictions(tmp_path / "predictions.csv", ["a", "b"])
    table, places = diagnose._with_held_out(Table(texts, labels), run)
    assert (table.texts, table.labels) == (texts, labels)
    assert places.tolist() == [0, 1]


def test_folds_ask_as_the_run_did(base: Path, table: Path, tmp_path: Path) -> None:
    """A template that was edited since, or holds today's date, renders something else now."""
    copy = shutil.copytree(base, tmp_path / "base")
    config = TrainConfig(str(table), model=str(copy), output=tmp_path / "runs", device="cpu")
    config = replace(config, max_steps=1, baselines=("none",), precision="float32")
    run = train(config).directory
    template = copy / "chat_template.jinja"
    template.write_text("Today is Monday. " + template.read_text())
    precision = choose_precision(torch.device("cpu"), "float32")
    arguments = (config, tuple(WORDS), precision, torch.device("cpu"))
    _, prompt, card, _ = out_of_sample._load_as_trained(run, *arguments)
    trained = metadata.read_card(run / "adapter").rendered
    assert "Monday" not in prompt.head
    assert prompt.head == trained["head"] == card.rendered["head"]
    assert "Monday" in out_of_sample.load_trainable(*arguments)[1].head

"""Several labels a row: planted errors are found, and decisions on sets come back as sets."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from conftest import call
from remora.config import DiagnoseConfig, TrainConfig
from remora.data.corrections import known_labels, read_choice
from remora.data.dataset import load_data
from remora.data.label_sets import LabelForm, labels_in, set_text
from remora.data.table import Table
from remora.diagnosis import diagnose, label_noise, several_labels
from remora.diagnosis.label_noise import SetNoise
from remora.diagnosis.regressions import MOST_LOG_ODDS, logistic_of_each, pool_each
from remora.errors import DataError
from remora.evaluation.multi_label import measure_sets
from remora.evaluation.predictions import write_predictions
from remora.runtime import files

NOUNS = {"card": "card", "refund": "refund", "top up": "top up"}
WAYS = ("where is my {}", "the {} is late", "why no {}", "a {} I wait for")
ENDS = ("today", "please", "at once", "again", "now", "still", "soon", "at last")
WRONG = {  # row, from 1: its labels in the table
    3: ["card", "refund"],  # one too many
    20: ["card", "top up"],
    80: ["refund", "top up"],
    40: [],  # one too few
    110: ["refund"],
    150: ["top up"],
    60: ["top up"],  # one for another
    125: ["refund", "top up"],
}
FORMS: dict[str, dict[str, Any]] = {
    "lists": {},
    "text": {"split_labels_at": "|"},
    "columns": {"label_columns": ("card", "refund", "top up")},
}


def right_rows() -> list[tuple[str, list[str]]]:
    """96 messages on one thing, 96 on two and 8 on none, with the labels that are right."""
    ways = [f"{way} {end}" for way in WAYS for end in ENDS]
    rows = [(way.format(noun), [label]) for label, noun in NOUNS.items() for way in ways]
    for one, other in (("card", "refund"), ("refund", "top up"), ("card", "top up")):
        rows += [
            (f"{way.format(one)}, {ways[-i].format(other)}", [one, other])
            for i, way in enumerate(ways)
        ]
    return [*rows, *((f"hello there number {i}", []) for i in range(8))]


def given_rows() -> list[tuple[str, list[str]]]:
    """The same with eight planted errors."""
    return [(text, WRONG.get(row, labels)) for row, (text, labels) in enumerate(right_rows(), 1)]


def write_table(path: Path, rows: list[tuple[str, list[str]]], form: str) -> Path:
    header, cells = ["text", "labels"], [[json.dumps(labels)] for _, labels in rows]
    if form == "text":
        cells = [["|".join(labels)] for _, labels in rows]
    if form == "columns":
        header = ["text", *NOUNS]
        cells = [[str(int(label in labels)) for label in NOUNS] for _, labels in rows]
    with path.open("w", encoding="utf-8", newline="") as file:
        lines = [[text, *own] for (text, _), own in zip(rows, cells, strict=True)]
        csv.writer(file).writerows([header, *lines])
    return path


def write_run(folder: Path, form: str, **more: Any) -> Path:
    """Write a run directory as train leaves it, but for its adapter."""
    folder.mkdir(exist_ok=True)
    table = write_table(folder / "train.csv", given_rows(), form)
    test = write_table(folder / "test.csv", right_rows()[::3], form)
    settings = TrainConfig(
        str(table),
        test=str(test),
        **{"model": "nano", "answer": "classes", "multi_label": "on", **FORMS[form], **more},
    )
    run = folder / "run"
    run.mkdir()
    dataset = load_data(settings)
    assert dataset.test is not None
    truth = dataset.test.labels
    files.write_text(run / "config.toml", settings.to_toml())
    files.write_json(run / "data.json", dataset.summary.to_dict())
    metrics = measure_sets(dataset.labels, truth, truth).to_dict()
    figures = {"measured_on": "test", "metrics": metrics, "method": "lora"}
    files.write_json(run / "evaluation.json", figures)
    write_predictions(run / "predictions.csv", dataset.test.texts, truth, truth, [0.9] * len(truth))
    return run


def listed(run: Path) -> dict[int, dict[str, str]]:
    with (run / "relabel.csv").open(encoding="utf-8", newline="") as file:
        return {int(record["row"]): record for record in csv.DictReader(file)}


def decide(run: Path, decisions: dict[int, str]) -> Path:
    path, records = run / "relabel.csv", listed(run)
    for row, decision in decisions.items():
        records[row]["decision"] = decision
    files.write_csv(
        path, next(iter(records.values())), (each.values() for each in records.values())
    )
    return path


def in_a_cell(labels: list[str], form: str) -> str:
    """Return a set of labels as relabel.csv has it."""
    return "|".join(labels) if labels and form == "text" else json.dumps(labels)


@pytest.mark.parametrize("form", FORMS)
def test_planted_errors_are_listed_and_corrected_in_the_form_of_the_table(
    form: str, tmp_path: Path, capsys: Any
) -> None:
    run = write_run(tmp_path, form)
    assert call("diagnose", run, "--method", "tfidf") == 0
    shown = capsys.readouterr().out
    found, right = listed(run), dict(enumerate((each for _, each in right_rows()), 1))
    assert len(found) >= 6
    assert {*found} <= {*WRONG}
    for row in (40, 80, 110):  # one label too few, or too many
        assert found[row]["label"] == in_a_cell(WRONG[row], form)
        assert found[row]["suggested"] == in_a_cell(right[row], form)
    assert f"suspects   {len(found)} rows in" in shown
    assert "not judged with several labels a row: pairs of labels" in shown
    assert re.search(r"refund +95 +1 +3\n", shown), shown
    figures = json.loads((run / "diagnosis.json").read_text(encoding="utf-8"))
    assert (figures["multi_label"], figures["suspects"]) == (True, len(found))
    assert figures["out_of_sample_micro_f1"] > 0.95
    doubts = {each["label"]: (each["num_wrong"], each["num_missing"]) for each in figures["labels"]}
    assert doubts["refund"] == (1, 3)

    # What is decided is written in the form of the table, and not listed again
    path = decide(run, {row: in_a_cell(right[row], form) for row in found})
    cleaned = tmp_path / "cleaned.csv"
    assert call("diagnose", run, "--apply", path, "--output", cleaned) == 0
    assert capsys.readouterr().out.startswith(f"{len(found)} rows corrected, 0 deleted")
    more = {"multi_label": "on", **FORMS[form], "test_fraction": 0.0, "validation_fraction": 0.0}
    rows = load_data(TrainConfig(str(cleaned), model="nano", **more)).train
    assert [list(labels_in(each)) for each in rows.labels] == [
        right[row] if row in found else labels for row, (_, labels) in enumerate(given_rows(), 1)
    ]
    assert call("diagnose", run, "--method", "tfidf", "--json") == 0
    again = json.loads(capsys.readouterr().out)
    assert again["num_decided"] == len(found)
    assert again["suspects"] == len(listed(run)) - len(found)


def test_the_base_model_judges_too(base: Path, tmp_path: Path) -> None:
    run = write_run(tmp_path, "lists", model=str(base), device="cpu", precision="float32")
    found = diagnose.diagnose_run(DiagnoseConfig(run, folds=4))
    assert isinstance(found, several_labels.SetDiagnosis)
    assert "frozen features" in found.method
    assert {each.row for each in found.suspects} >= {40, 80, 110}


def synthetic(share: float, seed: int = 0) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return probabilities and sets of 3,000 rows, of which a share has one label flipped."""
    rng = np.random.default_rng(seed)
    right = (rng.random((3_000, 12)) < 0.12).astype(np.int64)
    odds = rng.normal(np.where(right == 1, 2.0, -4.0), 1.5)
    given = right.copy()
    rows = rng.choice(len(right), round(share * len(right)), replace=False)
    given[rows, rng.integers(0, 12, len(rows))] ^= 1
    return 1 / (1 + np.exp(-odds)), given


def test_how_many_labels_are_wrong_and_missing_is_estimated() -> None:
    probabilities, given = synthetic(0.1)
    _, right = synthetic(0)
    found = label_noise.estimate_sets(probabilities, given)
    wrong, missing = (given > right).sum() / given.sum(), (given < right).sum()
    assert wrong <= found.rate <= 1.5 * wrong  # one standard error is added
    assert found.interval[0] <= 1.1 * wrong
    assert found.missing_interval[0] <= missing <= found.missing_interval[1]
    is_wrong, sure = given != right, found.p_wrong >= 0.5
    assert is_wrong[sure].mean() > 0.75
    assert sure[is_wrong].mean() > 0.85


def test_without_errors_few_labels_are_doubted() -> None:
    probabilities, given = synthetic(0, seed=1)
    found = label_noise.estimate_sets(probabilities, given)
    assert found.rate < 0.02
    assert found.num_missing < 0.02 * given.sum()
    assert (found.p_wrong >= 0.5).any(1).mean() < 0.01
    for same in (np.ones_like(given), np.zeros_like(given)):  # nothing to compare with
        assert not label_noise.estimate_sets(probabilities, same).p_wrong.any()


def test_judges_do_not_see_the_rows_that_they_judge() -> None:
    """Scores of a label do not change with the labels of the rows that are scored."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(60, 5)).astype(np.float32)
    given = (features[:, :2] + rng.normal(size=(60, 2)) > 0).astype(np.int64)
    given = np.hstack([given, np.zeros((60, 1), np.int64)])  # and a label that no row has
    folds = [(np.arange(30, 60), np.arange(30)), (np.arange(30), np.arange(30, 60))]
    found = logistic_of_each(features, given, folds)
    other = given.copy()
    other[:30] = 1 - other[:30]
    np.testing.assert_array_equal(logistic_of_each(features, other, folds)[:30], found[:30])
    assert (found[:, 2] == -MOST_LOG_ODDS).all()
    pooled = pool_each([found], given)
    assert pooled.mean() == pytest.approx(given.mean(), abs=0.01)  # calibrated


def test_evidence_beyond_the_probability_lists_labels_too() -> None:
    given = np.array([[1, 0], [1, 1], [0, 0]])
    noise = SetNoise(
        np.array([[0.1, 0.4], [0.1, 0.2], [0.0, 0.1]]), 0.0, (0.0, 0.0), 0.0, (0.0, 0.0)
    )
    sure = np.array([[0.9, 0.1], [0.9, 0.9], [0.1, 0.95]])

    def doubted(judges: tuple[NDArray[np.float64], ...], pairs: list[tuple[int, int]]) -> list[Any]:
        found = several_labels.list_labels(sure, judges, given, noise, pairs)
        return np.argwhere(found).tolist()

    assert doubted((sure, sure), []) == [[2, 1]]  # which every judge would give
    assert doubted((sure, 1 - sure), []) == []
    assert doubted((sure, 1 - sure), [(0, 1)]) == [[0, 1]]  # where near-duplicates differ


@pytest.mark.parametrize(
    ("decision", "form", "wanted"),
    [
        ('["b", "a"]', LabelForm("on"), ["a", "b"]),
        ("['a']", LabelForm("on"), ["a"]),
        ("a", LabelForm("on"), ["a"]),
        ("[]", LabelForm("on"), []),
        ("b | a", LabelForm("on", "|"), ["a", "b"]),
        ("[]", LabelForm("on", "|"), []),
        ("'=c|a", LabelForm("on", "|"), ["=c", "a"]),  # escaped for spreadsheets
        ("=c|a", LabelForm("on", "|"), ["=c", "a"]),
        ("Delete", LabelForm("on", "|"), None),
    ],
)
def test_a_decision_is_a_set_as_a_person_writes_it(
    decision: str, form: LabelForm, wanted: list[str] | None
) -> None:
    table = Table(["x", "y"], [set_text("ab"), set_text(["=c"])], multi_label=True, form=form)
    found = read_choice(decision, table, known_labels(table))
    assert found == (None if wanted is None else set_text(wanted))


@pytest.mark.parametrize(
    ("decision", "message"),
    [
        (
            "a|x",
            r"the decision 'a\|x', which has 'x', which is no label; give labels, \[\] for none",
        ),
        ("card arival|a", r"which has 'card arival', .* did you mean 'card arrival'\?"),
        ("['a' 'b']", "a list without commas between its labels"),
    ],
)
def test_a_decision_that_is_no_set_of_labels_is_refused(decision: str, message: str) -> None:
    form = LabelForm("on", "|")
    sets = [set_text("ab"), set_text(["card arrival"])]
    table = Table(["x", "y"], sets, multi_label=True, form=form)
    with pytest.raises(DataError, match=message):
        read_choice(decision, table, known_labels(table))

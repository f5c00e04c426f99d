"""The loop: train, diagnose, review, retrain, and what that changed on the same test rows."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest

import chromium
from conftest import WAYS, WORDS, call, write_rows, write_table
from remora.config import DiagnoseConfig
from remora.data import sources
from remora.data.dataset import load_data
from remora.data.table import Table, read_table
from remora.diagnosis import diagnose, suspect_list
from remora.evaluation import results
from remora.evaluation.significance import difference_interval, mcnemar
from remora.runtime import run_directory
from reviewing import decisions, reviewing, suspect

EXECUTABLE = chromium.find()
needs_browser = pytest.mark.skipif(
    EXECUTABLE is None, reason=f"needs a browser, one of {', '.join(chromium.NAMES)}"
)


class Reviewer:
    """Decides in a browser, by the right labels, with as few keys as the page needs."""

    def __init__(self, page: chromium.Page, truth: Mapping[int, str]) -> None:
        self._page, self._truth = page, truth
        self.num_rows = self.num_presses = 0

    def decide_all(self, url: str) -> None:
        """Decide on every row that the page shows by itself."""
        self._page.open(url)
        row = None
        while True:
            self._page.wait(
                f"!isBusy && (current ? current.row !== {json.dumps(row)}"
                " : !document.getElementById('ending').hidden)"
            )
            item = self._page.run("current && {...current}")
            if item is None:
                return
            row = item["row"]
            self._decide(item, self._truth.get(row, item["label"]))
            self.num_rows += 1

    def _decide(self, item: dict[str, str], right: str) -> None:
        others = self._page.run(
            "[...document.querySelectorAll('#others bdi')].map(e => e.textContent)"
        )
        keys = {item["label"]: "k", item["suggested"]: "a"}
        keys |= {label: str(place) for place, label in enumerate(others, 1) if label not in keys}
        if right in keys:
            self._press(keys[right])
            return
        self._press("o")
        for letter in right:
            self._page.type(letter)
            self.num_presses += 1
            if self._page.run("matches[0]") == right:
                break
        self._press("Enter")

    def _press(self, key: str) -> None:
        self._page.press(key)
        self.num_presses += 1


@pytest.fixture(scope="module")
def truth() -> dict[int, str]:
    """The right labels of the rows, from 1, whose labels are wrong in `noisy`."""
    labels = [label for _ in range(6) for label in WORDS for _ in WAYS]
    return {row: labels[row - 1] for row in range(1, 91, 5)}


@pytest.fixture(scope="module")
def trained(base: Path, truth: dict[int, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a table with wrong labels, some of them in its test rows, and a list of suspects."""
    folder = tmp_path_factory.mktemp("loop")
    table, names = read_table(write_table(folder / "right.csv")), list(WORDS)
    labels = [
        names[(names.index(label) + 1) % 3] if row in truth else label
        for row, label in enumerate(table.labels, 1)
    ]
    given = Table(table.texts, labels)
    write_rows(folder / "data.csv", given.texts, given.labels)
    settings = ["--model", base, "--output", folder / "runs", "--name", "noisy", "--device", "cpu"]
    settings += ["--learning-rate", "1e-2", "--epochs", "2", "--rank", "8", "--batch-size", "8"]
    settings += ["--precision", "float32", "--baselines", "svm"]
    assert call("train", folder / "data.csv", *settings) == 0
    run = folder / "runs" / "noisy"
    wrong = [suspect(given, row, right, 0.95) for row, right in truth.items()]
    right = [suspect(given, row, names[row % 3], 0.6) for row in (2, 28, 54)]
    suspect_list.write(run / "relabel.csv", [*wrong, *right])
    return run


@pytest.fixture
def noisy(trained: Path, tmp_path: Path) -> Path:
    """The run, of which nothing is decided yet."""
    return Path(shutil.copytree(trained, tmp_path / "runs" / "noisy"))


@needs_browser
def test_a_scripted_reviewer_makes_the_classifier_better(
    noisy: Path, truth: dict[int, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert EXECUTABLE is not None
    with reviewing(noisy) as review, chromium.Page(EXECUTABLE, tmp_path / "profile") as page:
        reviewer = Reviewer(page, truth)
        reviewer.decide_all(review.url)
    decided = {row: label for row, label in decisions(noisy).items() if label}
    assert len(decided) == reviewer.num_rows >= len(truth)
    assert reviewer.num_presses <= 1.5 * reviewer.num_rows
    assert {row: decided.get(row) for row in truth} == truth
    capsys.readouterr()
    assert call("retrain", noisy) == 0
    shown = capsys.readouterr().out
    new = noisy.with_name("noisy-cleaned")

    # The rows: as decided in training, as they were elsewhere
    before = load_data(run_directory.read_settings(noisy))
    settings = run_directory.read_settings(new)
    after = load_data(settings)
    assert settings.corrections == str(new / "corrections.csv")
    assert f"corrections = {json.dumps(settings.corrections)}" in (new / "config.toml").read_text()
    assert (after.validation, after.test) == (before.validation, before.test)
    assert after.train.texts == before.train.texts
    right = [truth.get(row + 1, old) for row, old in zip(*rows_of(before.train), strict=True)]
    assert after.train.labels == right

    # What it says: from the predictions of both, by labels as given and as decided
    old, found = results.read(noisy), results.read(new)
    corrected = [truth.get(row + 1, label) for row, label in zip(*rows_of(after.test), strict=True)]
    assert corrected != found.true  # the test rows had wrong labels too
    assert "relabelled too and 0 deleted" in shown
    for labels in (found.true, corrected):
        rows = list(zip(labels, old.predicted, found.predicted, strict=True))
        gained = sum(n == t != o for t, o, n in rows)
        lost = sum(o == t != n for t, o, n in rows)
        low, high = difference_interval(gained, lost, len(labels))
        p = mcnemar(labels, old.predicted, found.predicted)
        points = 100 * (gained - lost) / len(labels)
        assert f"change     {points:+.2f} points" in shown
        assert f"95% interval {100 * low:+.1f} to {100 * high:+.1f}, " in shown
        assert f"exact McNemar test p = {p:.2g}" in shown
    # A model this small learns by luck, the SVM of each run by its rows; by the right labels:
    before_svm, after_svm = (
        sum(a == b for a, b in zip(run.baseline or (), corrected, strict=True))
        for run in (old, found)
    )
    assert after_svm > before_svm
    assert f"after      {new}" in shown


def rows_of(table: Table) -> tuple[list[int], list[str]]:
    return list(table.places), table.labels


def test_decided_rows_are_not_listed_again(
    noisy: Path, truth: dict[int, str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither for the run that was reviewed, nor for the one that was trained on the decisions."""
    sheet = noisy / "relabel.csv"
    rows = list(truth)[:4]
    decide(sheet, {row: truth[row] for row in rows[:-1]} | {rows[-1]: "delete"})
    assert call("diagnose", noisy, "--method", "tfidf") == 0
    again = decisions(noisy)
    assert {row: label for row, label in again.items() if label} == {
        **{row: truth[row] for row in rows[:-1]},
        rows[-1]: "delete",
    }
    figures = json.loads((noisy / "diagnosis.json").read_text())
    assert figures["num_decided"] == len(rows)
    assert figures["suspects"] == len(again) - len(rows)
    assert f"{len(rows)} rows decided before are not among them" in capsys.readouterr().out

    assert call("retrain", noisy, "--name", "twice", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    new = noisy.with_name("twice")
    assert told["directory"] == told["change"]["after"] == str(new)
    assert told["change"]["figures"]["num_rows"] == told["metrics"]["num_rows"]
    assert call("diagnose", new, "--method", "tfidf") == 0
    after = decisions(new)
    assert {row for row, label in after.items() if label} == set(rows)
    open_rows = [row for row, label in after.items() if not label]
    settings, _, everything = diagnose.load(DiagnoseConfig(new))
    given = diagnose.rows_as_given(settings, everything)
    assert len(everything.train) == len(given) - 1  # one was deleted
    with (new / "relabel.csv").open(newline="") as file:  # by the numbers of the table
        for each in csv.DictReader(file):
            assert each["text"] == given.texts[int(each["row"]) - 1]
    assert not set(open_rows) & set(rows)
    own = {"name", "output", "corrections"}
    of_both = [vars(run_directory.read_settings(run)) for run in (noisy, new)]
    first, second = ({k: v for k, v in each.items() if k not in own} for each in of_both)
    assert first == second
    capsys.readouterr()
    assert call("retrain", new) == 3  # all of its decisions are in it already
    assert "holds no decision that changes a training row" in capsys.readouterr().err


def test_a_new_run_that_was_stopped_goes_on(
    noisy: Path, truth: dict[int, str], capsys: pytest.CaptureFixture[str]
) -> None:
    decide(noisy / "relabel.csv", truth)
    settings = (noisy / "config.toml").read_text()
    (noisy / "config.toml").write_text(settings + 'max_time = "0s"\n')
    assert call("retrain", noisy) == 75
    assert "run the same command again to resume" in capsys.readouterr().err
    (noisy / "config.toml").write_text(settings)
    assert call("retrain", noisy) == 0
    assert {path.name for path in noisy.parent.iterdir()} == {"noisy", "noisy-cleaned"}
    assert call("retrain", noisy) == 0
    assert (noisy.parent / "noisy-cleaned-2" / "evaluation.json").is_file()


def test_decisions_of_an_earlier_round_still_apply(
    noisy: Path, truth: dict[int, str], capsys: pytest.CaptureFixture[str]
) -> None:
    """New decisions undo none that the run was corrected by, unless they list the row."""
    trained = {row + 1 for row in load_data(run_directory.read_settings(noisy)).train.places}
    first, second, third = [row for row in truth if row in trained][:3]
    sheet = noisy / "relabel.csv"
    decide(sheet, {first: truth[first], second: "delete"})
    assert call("retrain", noisy, "--name", "one") == 0
    with sheet.open(newline="") as file:
        records = list(csv.DictReader(file, delimiter=";"))
    part = noisy / "part.csv"
    with part.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["row", "text", "label", "decision"], extrasaction="ignore")
        writer.writeheader()
        choices = {str(second): "", str(third): truth[third]}  # the second is taken back
        writer.writerows(
            each | {"decision": choices[each["row"]]} for each in records if each["row"] in choices
        )
    assert call("retrain", noisy.with_name("one"), "--corrections", part, "--name", "two") == 0
    said = capsys.readouterr().err
    assert "its decisions on rows that" in said
    new = noisy.with_name("two")
    assert {row: label for row, label in decisions(new, "corrections.csv").items() if label} == {
        first: truth[first],
        third: truth[third],
    }
    rows = load_data(run_directory.read_settings(new)).train
    labels = dict(zip(rows.places, rows.labels, strict=True))
    assert {row: labels[row - 1] for row in (first, third)} == {
        first: truth[first],
        third: truth[third],
    }
    assert second - 1 in labels


def decide(path: Path, choices: Mapping[int, str]) -> None:
    """Write decisions into a relabel.csv, as a person in a spreadsheet does."""
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        records = list(reader)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, reader.fieldnames or [], delimiter=";")
        writer.writeheader()
        for each in records:
            writer.writerow(each | {"decision": choices.get(int(each["row"]), "")})


@pytest.mark.durability
@needs_browser
def test_the_sample_by_its_truth_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`sample:support` with nano: what a review by the truth is worth, and its key presses."""
    assert EXECUTABLE is not None
    monkeypatch.chdir(tmp_path)
    assert call("train", "sample:support", "--model", "nano", "--name", "first") == 0
    assert call("diagnose", "runs/first") == 0
    truth = sources.planted_errors("sample:support")
    with reviewing(Path("runs/first")) as review, chromium.Page(EXECUTABLE, tmp_path / "p") as page:
        reviewer = Reviewer(page, truth)
        reviewer.decide_all(review.url)
        summary = review.queue.summary()
    assert reviewer.num_rows < 80  # under ten minutes at seven seconds a row
    assert reviewer.num_presses <= 1.5 * reviewer.num_rows
    assert summary.num_relabelled >= 40
    assert set(truth) >= {
        row for row, to in decisions(review.queue._run).items() if to == truth.get(row)
    }
    capsys.readouterr()
    assert call("retrain", "runs/first", "--json") == 0
    change = json.loads(capsys.readouterr().out)["change"]
    figures = change["figures"]
    assert figures["num_rows"] == 580
    assert figures["interval"][0] < figures["after"] - figures["before"] < figures["interval"][1]
    assert figures["interval"][1] > 0.02
    gained = {each["description"]: each["after"] - each["before"] for each in change["baselines"]}
    assert gained["TF-IDF + linear SVM"] > 0.005  # 1.6 points as measured
    assert gained["nano, linear probe"] > 0.01  # 3.4 points

"""Runs on rows with several labels, after their diagnosis: decided, trained again, begun with."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from test_multi_label_runs import LABELS, opened, rows, settings

from conftest import call
from remora.config import DiagnoseConfig
from remora.data.dataset import load_data
from remora.data.label_sets import labels_in
from remora.diagnosis import diagnose, out_of_sample, several_labels
from remora.errors import DataError
from remora.models import metadata
from remora.report import pages
from remora.review import Queue
from remora.runtime import files, run_directory
from remora.runtime.reporter import Reporter
from remora.training.run import train

MISSING = (20, 45)  # rows, from 1, that lack their first label in the table


@pytest.fixture(scope="module")
def place(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a table with errors that is diagnosed, its base and its table in one folder."""
    folder = tmp_path_factory.mktemp("several")
    shutil.copytree(base, folder / "base")
    given = [(text, labels[row in MISSING :]) for row, (text, labels) in enumerate(rows(), 1)]
    lines = [json.dumps({"text": text, "labels": labels}) for text, labels in given]
    (folder / "data.jsonl").write_text("\n".join(lines), encoding="utf-8")
    train(settings(folder, max_steps=40))
    assert call("diagnose", folder / "run", "--method", "tfidf") == 0
    return folder


@pytest.fixture
def run(place: Path, tmp_path: Path) -> Path:
    """A copy of the run."""
    return Path(shutil.copytree(place / "run", tmp_path / "run"))


def records(run: Path) -> dict[int, dict[str, str]]:
    with (run / "relabel.csv").open(encoding="utf-8", newline="") as file:
        return {int(record["row"]): record for record in csv.DictReader(file)}


def write(run: Path, found: dict[int, dict[str, str]]) -> None:
    lines = [*found.values()]
    files.write_csv(run / "relabel.csv", [*lines[0]], (each.values() for each in lines))


def test_the_report_shows_the_doubts_and_trusts_no_text(run: Path) -> None:
    found = records(run)
    assert {*MISSING} <= {*found}
    record = found[MISSING[0]] | {"text": "<script>alert(1)</script>", "suggested": "<b>"}
    write(run, {MISSING[0]: record})
    page = pages.page(run)
    section = page[page.index('<section id="diagnosis"') :]
    assert f"{len(found)} of {len(rows())} rows may have a wrong label, or lack one." in section
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in section
    assert "<bdi>&lt;b&gt;</bdi>" in section
    assert "Not judged with several labels a row" in section
    (run / "diagnosis.json").unlink()
    assert "<code>remora diagnose</code> finds labels that are probably wrong" in pages.page(run)


def test_a_run_is_trained_again_on_decided_sets(
    place: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = records(run)
    for row in MISSING:
        found[row]["decision"] = json.dumps(rows()[row - 1][1])
    write(run, found)
    assert call("retrain", run, "--name", "again") == 0
    shown = capsys.readouterr()
    assert f"corrections: {len(MISSING)} rows in training relabelled and 0 deleted" in shown.err
    assert "points of rows with all labels right, from" in shown.out
    assert "paired bootstrap)" in shown.out
    again = run_directory.read_settings(run.parent / "again")
    trained_on = load_data(again).train
    assert trained_on.multi_label
    labels = dict(zip(trained_on.places, trained_on.labels, strict=True))
    for row in MISSING:
        assert list(labels_in(labels[row - 1])) == rows()[row - 1][1]
    figures = json.loads((run.parent / "again" / "evaluation.json").read_text(encoding="utf-8"))
    assert "micro_f1" in figures["metrics"]


def test_a_page_of_decisions_takes_any_set(place: Path, run: Path) -> None:
    loaded, _, everything = diagnose.load(DiagnoseConfig(run))
    queue = Queue(run, diagnose.rows_as_given(loaded, everything))
    assert queue.multi_label
    row = MISSING[0]
    item = next(each for each in queue.items if each.row == row)
    assert item.suggested == json.dumps(rows()[row - 1][1])
    assert {item.label, item.suggested} <= {*queue.labels}
    queue.decide(row, f"['{LABELS[1]}', '{LABELS[0]}']")  # no row is listed with this set
    assert queue.decisions()[row] == {"label": json.dumps(LABELS[:2]), "delete": False}
    assert records(run)[row]["decision"] == json.dumps(LABELS[:2])
    queue.decide(row, "[]")
    assert queue.summary().num_relabelled == 1
    near = [each["label"] for each in queue.details(row)["neighbours"]]
    assert all(each.startswith("[") for each in near)
    queue.decide(row, item.label)
    assert queue.summary().num_kept == 1
    queue.decide(row, None, delete=True)
    assert queue.decisions()[row] == {"label": None, "delete": True}
    with pytest.raises(DataError, match="there is the decision 'what', which is no label"):
        queue.decide(row, "what")
    with pytest.raises(DataError, match="delete is no label of this table"):
        queue.decide(row, "delete")


def test_training_begins_with_a_run_of_several_labels(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = [{"text": f"{text} new", "labels": [*labels, "new"]} for text, labels in rows()]
    table = tmp_path / "more.jsonl"
    table.write_text("\n".join(map(json.dumps, more)), encoding="utf-8")
    flags = ("--model", place / "base", "--device", "cpu", "--precision", "float32")
    flags += ("--output", tmp_path, "--name", "begun", "--from", place / "run")
    flags += ("--learning-rate", "1e-6", "--max-steps", "1", "--micro-batch-tokens", "512")
    assert call("train", table, *flags) == 0
    assert "3 labels are known, 1 join" in capsys.readouterr().err
    texts = [text for text, _ in rows()[::9]]
    before, after = (
        opened(path).scorer().probabilities(texts) for path in (place / "run", tmp_path / "begun")
    )
    assert metadata.parse_card(tmp_path / "begun" / "adapter").labels == (
        *LABELS[:1],
        "new",
        *LABELS[1:],
    )
    known = [i for i, each in enumerate(sorted([*LABELS, "new"])) if each != "new"]
    np.testing.assert_allclose(after[:, known], before, atol=1e-3)  # one step of 1e-6 away


def test_adapters_judge_sets(place: Path, run: Path) -> None:
    loaded, _, everything = diagnose.load(DiagnoseConfig(run))
    folder = run / out_of_sample.FOLDS
    pooled, judges = out_of_sample.judge_sets(
        everything, loaded, "adapters", 2, Reporter(), folder=folder
    )
    assert pooled.shape == judges[1].shape == (len(rows()), len(LABELS))
    given = np.array([[label in labels for label in LABELS] for _, labels in rows()])
    assert ((judges[1] >= 0.5) == given).mean() > 0.8  # of adapters; half are given
    assert (folder / "fold-2").is_dir()
    found = diagnose.diagnose_run(DiagnoseConfig(run, method="adapters", folds=2))
    assert isinstance(found, several_labels.SetDiagnosis)
    assert not folder.exists()


def test_a_learning_curve_counts_rows_by_their_rarest_label(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    how = (
        "--model",
        place / "base",
        "--device",
        "cpu",
        "--precision",
        "float32",
        "--name",
        "curve",
    )
    how += ("--output", tmp_path, "--micro-batch-tokens", "512", "--max-steps", "4")
    assert call("train", place / "data.jsonl", *how, "--learning-curve", "8,all") == 0
    assert "the class of a row is the rarest of its labels" in " ".join(
        capsys.readouterr().out.split()
    )
    run = tmp_path / "curve"
    curve = json.loads((run / "learning_curve.json").read_text(encoding="utf-8"))
    part, whole = (
        load_data(run_directory.read_settings(path)).train
        for path in (run / "learning_curve" / "8-per-class", run)
    )
    assert [each["num_rows"] for each in curve["sizes"]] == [len(part), len(whole)]
    assert len(part) == 8 * len({*whole.strata}) < len(whole)
    assert [each["accuracy"] for each in curve["sizes"]] == [
        json.loads((path / "evaluation.json").read_text(encoding="utf-8"))["metrics"]["accuracy"]
        for path in (run / "learning_curve" / "8-per-class", run)
    ]
    assert '<section id="learning"' in pages.page(run)
    assert call("train", place / "data.jsonl", *how, "--learning-curve", "80,all") == 2
    assert "learning_curve has the size 80" in capsys.readouterr().err

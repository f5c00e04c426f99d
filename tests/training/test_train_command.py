"""The whole path from a table to a measured adapter, through the real command line."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from conftest import WORDS, call
from remora.evaluation.predictions import PROBABILITIES, read_probabilities


def remora(*arguments: str | Path, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "remora", *map(str, arguments)]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, check=False)


@pytest.fixture
def remora_here(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """Run the command line in this process, which has torch imported, and return its output."""

    def run_here(*arguments: str | Path, stdin: str = "") -> str:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
            code = call(*arguments)
        shown = capsys.readouterr()
        assert code == 0, shown.err
        return shown.out

    return run_here


@pytest.fixture(scope="module")
def finished(base: Path, table: Path, tmp_path_factory: pytest.TempPathFactory):
    output = tmp_path_factory.mktemp("cli")
    settings = ["--learning-rate", "1e-2", "--epochs", "8", "--rank", "8", "--batch-size", "8"]
    settings += ["--device", "cpu", "--seed", "1"]
    done = remora(
        "train", table, "--model", base, "--output", output, *settings, "--precision", "float32"
    )
    assert done.returncode == 0, done.stderr
    (directory,) = output.iterdir()
    return done, directory


def test_train_learns_and_shows_what_a_user_wants_to_know(finished) -> None:
    done, directory = finished
    result = json.loads((directory / "evaluation.json").read_text())
    assert result["metrics"]["accuracy"] == 1.0
    for wanted in ("accuracy   100.00%", "95% interval", "TF-IDF + linear SVM", "macro-F1"):
        assert wanted in done.stdout
    assert re.search(
        r"time +training \d+ s, validation \d+ s \(\d+%\), scoring held-out rows \d+ s \(\d+%\)\n",
        done.stdout,
    )
    for wanted in ("examples/s", "supervised tokens/s", "peak memory", "adapter    "):
        assert wanted in done.stdout
    *_, command = done.stdout.splitlines()
    assert "\nwhat to do next\n1. " in done.stdout
    assert command.startswith("    remora ")
    assert str(directory) in command
    assert "it/s" not in done.stdout + done.stderr
    assert "Warning" not in done.stderr
    assert "Traceback" not in done.stderr


def test_the_run_directory_holds_what_it_takes_to_repeat_the_run(finished) -> None:
    _, directory = finished
    names = {str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file()}
    assert names == {
        "config.toml",
        "environment.json",
        "data.json",
        "plan.json",
        "metrics.jsonl",
        "evaluation.json",
        "predictions.csv",
        "probabilities.safetensors",
        "features.safetensors",
        "neighbours.json",
        "README.md",
        "report.html",
        "adapter/adapter_model.safetensors",
        "adapter/adapter_config.json",
        "adapter/remora.json",
    }
    records = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    steps = [r for r in records if "loss" in r]
    assert [r["step"] for r in steps] == list(range(1, len(steps) + 1))
    assert steps[-1]["loss"] < 0.75 * steps[0]["loss"]  # which was that of labels at random
    assert steps[-1]["examples_per_second"] > 0
    rows = list(csv.DictReader(io.StringIO((directory / "predictions.csv").read_text("utf-8"))))
    assert {row["predicted"] for row in rows} == set(WORDS)
    assert set(json.loads((directory / "data.json").read_text())["labels"]) == set(WORDS)
    assert all(0 < float(row["probability"]) <= 1 for row in rows)
    kept = read_probabilities(directory / PROBABILITIES, sorted(WORDS), "test")
    np.testing.assert_allclose(kept.confidence, [float(r["probability"]) for r in rows], atol=1e-6)
    assert [sorted(WORDS)[i] for i in kept.true] == [row["label"] for row in rows]
    assert {row["baseline"] for row in rows} <= set(WORDS)


def test_the_same_settings_give_the_same_adapter_again(
    finished, remora_here, tmp_path: Path
) -> None:
    """In this process, which has computed other things before."""
    _, directory = finished
    remora_here("train", "--config", directory / "config.toml", "--output", tmp_path)
    (other,) = tmp_path.iterdir()
    name = "adapter/adapter_model.safetensors"
    assert (directory / name).read_bytes() == (other / name).read_bytes()


def test_predict_streams_labels_in_order(finished, remora_here) -> None:
    _, directory = finished
    done = remora("predict", directory, "--device", "cpu", stdin="my card\nmy refund\n")
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader(done.stdout.splitlines()))
    assert [row["text"] for row in rows] == ["my card", "my refund"]
    assert [row["label"] for row in rows] == ["card arrival", "refund"]
    shown = remora_here("predict", directory, "--json", "--top-k", "2", stdin="top up please\n")
    (line,) = shown.splitlines()
    ranked = json.loads(line)["labels"]
    assert ranked[0]["label"] == "top up failed"
    assert ranked[0]["probability"] >= ranked[1]["probability"]


def test_eval_measures_what_train_measured(
    finished, remora_here, table: Path, tmp_path: Path
) -> None:
    _, directory = finished
    kept = tmp_path / "kept.csv"
    shown = remora_here("eval", directory, table, "--json", "--predictions", kept)
    assert json.loads(shown)["accuracy"] > 0.95
    assert len(kept.read_text(encoding="utf-8").splitlines()) == 91


def test_eval_chooses_its_threshold_on_validation_rows(
    finished, remora_here, table: Path, tmp_path: Path
) -> None:
    _, directory = finished
    shown = remora_here("eval", directory, table, "--abstain-at-accuracy", "0.9")
    assert re.search(r"abstain    threshold 0\.\d+ for 90.0% accuracy, chosen on 9", shown)
    assert re.search(r"at temperature \d+\.\d\d, fitted on 9 validation rows", shown)
    (tmp_path / "oos.csv").write_text("text\nWhat a fine day\nbla bla\n", encoding="utf-8")
    only = tmp_path / "adapter"
    shutil.copytree(directory / "adapter", only)
    shown = remora_here(
        *("eval", only, table, "--json", "--abstain-at-accuracy", "0.9"),
        *("--out-of-scope", tmp_path / "oos.csv"),
    )
    found = json.loads(shown)["reliability"]
    assert found["abstention"]["chosen_on"] == "the measured rows"
    assert found["temperature"] is None
    assert found["out_of_scope"]["num_rows"] == 2
    assert 0 < found["out_of_scope"]["auroc"] < 1


def test_the_plan_is_kept_beside_what_was_measured(finished) -> None:
    done, directory = finished
    kept = json.loads((directory / "plan.json").read_text())
    assert kept["peak_bytes"] == sum(kept["memory"].values())
    assert kept["measured_peak_bytes"] > 0
    assert "peak memory of training: " in done.stderr


@pytest.mark.parametrize("form", ["one", "columns"])
def test_eval_names_labels_as_training_did(
    form: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The test table has the names that the training table had, which the run has merged."""
    path, sets = tmp_path / "data.csv", [["late"], ["lost"], ["refund"]] * 8
    header, cells, flags = ["text", "label"], [[each[0]] for each in sets], []
    if form == "columns":
        names = ["late", "lost", "refund"]
        header, flags = ["text", *names], ["--label-columns", ",".join(names)]
        cells = [[str(int(name in each)) for name in names] for each in sets]
    lines = [[f"my {sets[i][0]} thing {i}", *cell] for i, cell in enumerate(cells)]
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *lines])
    names_of_run = json.dumps({"late": "delivery", "lost": "delivery"})
    flags += ["--rename-labels", names_of_run, "--output", str(tmp_path / "runs"), "--name", "a"]
    flags += ["--max-steps", "1", "--baselines", "none", "--device", "cpu"]
    assert call("train", path, "--model", base, *flags) == 0
    run, out = tmp_path / "runs" / "a", tmp_path / "predictions.csv"
    for folder in (run, run / "adapter"):
        capsys.readouterr()
        assert call("eval", folder, path, "--device", "cpu", "--json", "--predictions", out) == 0
        assert json.loads(capsys.readouterr().out)["num_rows"] == 24
        with out.open(encoding="utf-8", newline="") as file:
            true = {row["label"] for row in csv.DictReader(file)}
        assert true == ({"delivery", "refund"} if form == "one" else {'["delivery"]', '["refund"]'})

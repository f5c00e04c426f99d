"""Experiment trackers: settings, every record and the results; one that fails ends no training."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from accelerate.tracking import TensorBoardTracker

from conftest import call

tensorboard = pytest.importorskip("tensorboardX")  # which accelerate takes without tensorboard

SHORT = ("--max-steps", "3", "--baselines", "svm", "--device", "cpu", "--name", "run")


def train(base: Path, table: Path, output: Path, *trackers: str) -> int:
    flags = [each for name in trackers for each in ("--trackers", name)]
    return call("train", table, "--model", base, "--output", output, *SHORT, *flags)


def figures(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "evaluation.json").read_text(encoding="utf-8"))["metrics"])


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Read the steps and values that the events of a folder hold, by their names."""
    from tensorboardX.proto.event_pb2 import Event

    (path,) = folder.glob("events.out.tfevents*")
    data, found = path.read_bytes(), dict[str, list[tuple[int, float]]]()
    while data:  # records of TensorFlow: length, its checksum, content, its checksum
        (length,) = struct.unpack("<Q", data[:8])
        event = Event.FromString(data[12 : 12 + length])
        for value in event.summary.value:
            found.setdefault(value.tag, []).append((event.step, value.simple_value))
        data = data[16 + length :]
    return found


def test_a_tracker_gets_settings_records_and_results(
    base: Path, table: Path, tmp_path: Path
) -> None:
    assert train(base, table, tmp_path, "tensorboard") == 0
    run = tmp_path / "run"
    found = scalars(run / "run")
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [record for record in map(json.loads, lines) if "loss" in record]
    losses = [value for _, value in found["loss"]]
    assert losses == pytest.approx([record["loss"] for record in steps], rel=1e-6)
    assert [step for step, _ in found["validation_accuracy"]] == [3]
    assert found["test_accuracy"] == [(3, pytest.approx(figures(run)["accuracy"]))]
    assert "svm_accuracy" in found
    (settings,) = (run / "run").glob("*/hparams.yml")
    kept = settings.read_text(encoding="utf-8")
    for wanted in ("max_steps: 3\n", "rank: 16\n", "learning_rate: 0.00", "num_labels: 3\n"):
        assert wanted in kept


def test_a_tracker_that_does_not_start_is_one_line(
    base: Path,
    table: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise RuntimeError("No API key.\nLog in")

    monkeypatch.setattr(tensorboard, "SummaryWriter", refuse)
    assert train(base, table, tmp_path, "tensorboard") == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "error: the tracker tensorboard does not start (No API key. Log in); mend that, or leave "
        "it out of --trackers"
    )
    assert train(base, table, tmp_path) == 0  # in the same run
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize(
    ("kind", "method"),
    [(tensorboard.SummaryWriter, "add_scalar"), (TensorBoardTracker, "finish")],
)
def test_one_that_fails_is_left_out_and_training_goes_on(
    kind: type,
    method: str,
    base: Path,
    table: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise ConnectionError("the server is gone")  # an OSError, and none of the run's disk

    monkeypatch.setattr(kind, method, fail)
    assert train(base, table, tmp_path, "tensorboard") == 0
    said = "the tracker tensorboard failed and gets no more (the server is gone)"
    assert capsys.readouterr().err.count(said) == 1
    lines = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 4
    assert figures(tmp_path / "run")["num_rows"]


@pytest.mark.filterwarnings("ignore")  # its own
def test_runs_of_mlflow_are_in_one_experiment_each_by_its_name(
    base: Path, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'runs.db'}")
    for output in ("a", "b"):  # two in one process, as in a notebook
        assert train(base, table, tmp_path / output, "mlflow") == 0
    (experiment,) = {each.name for each in mlflow.search_experiments()} - {"Default"}
    assert experiment == "remora"
    runs = mlflow.search_runs(experiment_names=[experiment], output_format="list")
    assert [each.info.run_name for each in runs] == ["run", "run"]
    assert {each.info.status for each in runs} == {"FINISHED"}
    accuracy = figures(tmp_path / "a" / "run")["accuracy"]
    assert runs[0].data.metrics["test_accuracy"] == pytest.approx(accuracy)
    assert runs[0].data.params["max_steps"] == "3"


@pytest.mark.filterwarnings("ignore")  # its own
def test_runs_of_wandb_are_in_one_project_each_by_its_name(
    base: Path, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    begun: list[dict[str, Any]] = []
    init = wandb.init

    def watched(**how: Any) -> Any:
        begun.append(how)
        return init(**how)

    monkeypatch.setattr(wandb, "init", watched)
    assert train(base, table, tmp_path, "wandb") == 0
    assert begun == [{"project": "remora", "name": "run"}]
    assert wandb.run is None  # it is closed
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))

"""A hybrid model, and a mixture of experts: trained, killed, resumed, served and exported.

The hybrid, which is computed by rows, goes through the rest as well.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import WAYS, WORDS, call, write_table
from hybrids import save_base
from remora.config import PlanConfig, TrainConfig
from remora.models.saved import open_trained
from remora.planning.planner import make_plan
from remora.runtime.device import choose_precision
from remora.runtime.reporter import Reporter, Step
from remora.serving.engine import Engine
from remora.training.run import train
from remora.tree import layouts
from stock import exhaustive

LAYOUTS = {"lfm2": "rows", "qwen3_moe": "tree"}
NUM_STEPS = {"lfm2": 12, "qwen3_moe": 40}
HYBRID = pytest.mark.parametrize("place", ["lfm2"], indirect=True)

MESSAGES = [way.format(word) for way in WAYS[:3] for word in WORDS.values()]


def settings(place: Path, **more: Any) -> TrainConfig:
    return TrainConfig(
        str(place / "data.csv"),
        **{
            "model": str(place / "base"),
            "output": place,
            "name": "run",
            "learning_rate": 1e-2,
            "max_steps": NUM_STEPS[place.name],
            "batch_size": 8,
            "micro_batch_tokens": 128,
            "rank": 8,
            "precision": "float32",
            "device": "cpu",
            **more,
        },
    )


@pytest.fixture(scope="module", params=list(LAYOUTS))
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a model of a kind, its base and its table in one folder."""
    folder = tmp_path_factory.mktemp("place") / request.param
    save_base(request.param, folder / "base")
    write_table(folder / "data.csv", repeats=4)
    train(settings(folder, baselines=("auto",) if request.param == "lfm2" else ("none",)))
    return folder


def adapter_hash(run: Path) -> str:
    content = (run / "adapter" / "adapter_model.safetensors").read_bytes()
    return hashlib.sha256(content).hexdigest()


def test_the_run_says_and_keeps_its_layout(place: Path) -> None:
    layout = LAYOUTS[place.name]
    card = json.loads((place / "run" / "adapter" / "remora.json").read_text())
    assert card.get("layout", "tree") == layout
    assert json.loads((place / "run" / "plan.json").read_text())["layout"] == layout
    trained = open_trained(place / "run", device="cpu", precision="float32")
    assert layouts.of(trained.model) == layout


def test_its_probabilities_are_those_of_the_stock_model(place: Path) -> None:
    trained = open_trained(place / "run", device="cpu", precision="float32")
    inner = trained.model.double().get_base_model()
    if inner._can_set_experts_implementation():
        inner.set_experts_implementation("eager")  # the others compute no float64
    found = trained.scorer(tolerance=0).probabilities(MESSAGES)
    np.testing.assert_allclose(
        found, exhaustive(trained.model, trained.prompt, MESSAGES), atol=1e-6
    )


class Killer(Reporter):
    """Kills this process after a step, as the system does when memory is out."""

    def stepped(self, step: Step) -> None:
        if step.step == 5:
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_killed_run_resumes_to_the_same_bits(place: Path, tmp_path: Path) -> None:
    config = settings(place, output=tmp_path, checkpoint_minutes=0, baselines=("none",))
    child = os.fork()
    if child == 0:
        try:
            train(config, reporter=Killer())
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL
    (directory,) = tmp_path.iterdir()
    assert not (directory / "adapter").exists()
    (kept,) = (directory / "checkpoints").iterdir()
    assert kept.name in {"step-00000004", "step-00000005"}
    assert adapter_hash(train(config).directory) == adapter_hash(place / "run")


def test_predict_and_the_service_answer_alike(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(MESSAGES) + "\n")
    assert call("predict", place / "run", texts, "--json", "--device", "cpu") == 0
    predicted = [
        json.loads(line)["labels"][0]["label"] for line in capsys.readouterr().out.splitlines()
    ]
    service = Engine(
        {"run": place / "run"},
        base=None,
        precision=choose_precision(torch.device("cpu"), "float32"),
        device=torch.device("cpu"),
        micro_batch_tokens=2048,
        tolerance=0.01,
        max_queue=1024,
    )
    try:
        answers = service.classify("run", MESSAGES).result(timeout=60)
    finally:
        service.stop()
    assert [answers.labels[i] for i in answers.probabilities.argmax(1)] == predicted


def test_it_is_merged_with_parity_and_the_merged_model_has_its_layout(
    place: Path, tmp_path: Path
) -> None:
    merged = tmp_path / "merged"
    run = place / "run"
    assert call("export", run, "--merge", "--dtype", "float32", "--output", merged) == 0
    whole = open_trained(merged, device="cpu", precision="float32")
    assert layouts.of(whole.model) == LAYOUTS[place.name]
    trained = open_trained(run, device="cpu", precision="float32")
    np.testing.assert_allclose(
        whole.scorer(tolerance=0).probabilities(MESSAGES),
        trained.scorer(tolerance=0).probabilities(MESSAGES),
        atol=1e-4,
    )


def test_it_is_compressed_with_distillation(place: Path, tmp_path: Path) -> None:
    assert call("export", place / "run", "--compress", "--distill", "--output", tmp_path / "s") == 0
    small = open_trained(tmp_path / "s", device="cpu", precision="float32")
    assert small.card.layout == LAYOUTS[place.name]
    whole = open_trained(place / "run", device="cpu", precision="float32")
    found, wanted = (each.scorer().probabilities(MESSAGES) for each in (small, whole))
    assert (found.argmax(1) == wanted.argmax(1)).mean() >= 0.75


@HYBRID
def test_it_is_diagnosed(place: Path, tmp_path: Path) -> None:
    run = shutil.copytree(place / "run", tmp_path / "run")
    assert call("diagnose", run, "--folds", 2) == 0
    assert list(csv.DictReader(io.StringIO((run / "relabel.csv").read_text()))) is not None


@HYBRID
@pytest.mark.parametrize("checkpointing", ["on", "off"])
def test_its_plan_counts_the_padded_micro_batches(place: Path, checkpointing: str) -> None:
    wanted = settings(place, checkpointing=checkpointing)
    plan = make_plan(PlanConfig(**vars(wanted)))
    assert plan.layout == "rows"
    assert plan.fits
    assert plan.largest_micro_batch <= 128
    assert plan.tree_tokens <= plan.padded_tokens
    assert plan.memory.saved_activations > 0


@HYBRID
def test_rows_are_computed_few_at_once_on_a_processor(place: Path) -> None:
    wanted = PlanConfig(**vars(settings(place, micro_batch_tokens=None)))
    made = make_plan(wanted)
    assert (made.micro_batch_tokens, made.checkpointing) == (512, False)
    assert made.why == "memory suffices without checkpointing"
    assert make_plan(replace(wanted, device="t4", precision="auto")).micro_batch_tokens == 2048
    assert make_plan(replace(wanted, micro_batch_tokens=1024)).micro_batch_tokens == 1024


@HYBRID
def test_a_tree_is_refused_before_the_weights_are_read(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, model = place / "data.csv", place / "base"
    arguments = ("train", data, "--model", model, "--output", tmp_path / "runs", "--device", "cpu")
    assert call(*arguments, "--layout", "tree") == 4
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == (
        "error: this model cannot follow a token tree: it has conv layers, in which a row cannot "
        "branch; leave out --layout, or use --layout rows"
    )
    assert not (tmp_path / "runs").exists()

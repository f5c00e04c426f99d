"""What only a CUDA device can show; skipped where there is none."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from conftest import ARCHITECTURES, randomize_adapter, write_table
from interrupting import Interrupter, interrupted, keep_checkpoints, outcome  # noqa: F401
from remora.config import ExportConfig, TrainConfig
from remora.data.dataset import load_data
from remora.data.prompt import TokenSequence
from remora.export import export
from remora.models import metadata, quantize
from remora.models.saved import open_trained
from remora.runtime import memory
from remora.runtime.device import choose_precision
from remora.runtime.process_group import ProcessGroup
from remora.runtime.reporter import Reporter
from remora.training.micro_batches import MicroBatches
from remora.training.run import train
from remora.training.trainable import accelerator_for, load_trainable
from remora.tree import attention, cuda_graphs, forward, packing, scoring
from remora.tree.cuda_graphs import Graphs
from remora.tree.forward import answer_logits
from remora.tree.loss import loss_sum
from training.test_full import measured
from training.test_train_command import remora
from tree.test_packing import BATCHES, adapted, gradients, padded_loss, relative_error

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

CUDA = torch.device("cuda")
NANO = TrainConfig("sample:support", model="nano", device="cuda")


@pytest.fixture
def on_cuda(config: TrainConfig) -> TrainConfig:
    return replace(config, device="cuda")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.usefixtures("pairs")
def test_loss_and_every_gradient_equal_the_padded_computation(architecture: str) -> None:
    model = adapted(architecture)
    for name, rows in BATCHES.items():
        expected_loss = padded_loss(model.cpu(), rows)
        expected = gradients(model, expected_loss)
        model.to(CUDA)
        for max_tokens in (10_000, 25):
            trees = [packed.to(CUDA) for packed in packing.split(rows, max_tokens)]
            weight = sum(packed.num_supervised_tokens for packed in trees)
            losses = [loss_sum(answer_logits(model, t), t) for t in trees]
            loss = torch.stack(losses).sum() / weight
            found = {n: g.cpu() for n, g in gradients(model, loss).items()}
            assert float(loss.detach()) == pytest.approx(float(expected_loss.detach()), rel=1e-6), (
                name
            )
            assert relative_error(found, expected) < 1e-6, name


@pytest.mark.parametrize("precision", ["auto", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_it_learns_in_every_arithmetic(tmp_path: Path, precision: Any, method: Any) -> None:
    """Gradients of 16 bits cannot be unscaled; what trains is in 32, whatever is computed in."""
    if method == "qlora":
        pytest.importorskip("bitsandbytes")
    settings = replace(NANO, precision=precision, method=method, max_steps=100, output=tmp_path)
    result = train(settings)
    assert result.metrics.accuracy > 0.6
    assert all(math.isfinite(step["loss"]) for step in steps(result.directory))
    (weights,) = (result.directory / metadata.FOLDERS[method]).glob("*.safetensors")
    assert {tensor.dtype for tensor in load_file(weights).values()} == {torch.float32}


@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16"])
@pytest.mark.usefixtures("keep_checkpoints")
def test_a_run_stopped_after_a_step_ends_with_the_bits_of_one_that_was_not(
    on_cuda: TrainConfig, tmp_path: Path, precision: Any
) -> None:
    settings = replace(on_cuda, precision=precision)
    undisturbed = train(replace(settings, output=tmp_path / "undisturbed"))
    for step in (1, 6, 11):
        assert interrupted(settings, Interrupter(step=step))
    assert outcome(train(settings).directory) == outcome(undisturbed.directory)


@pytest.mark.usefixtures("keep_checkpoints")
def test_a_real_table_takes_the_same_steps_twice(tmp_path: Path) -> None:
    """Of rows so long that attention is computed in blocks."""
    settings = replace(NANO, max_steps=6, list_labels=True)
    found = [outcome(train(replace(settings, output=tmp_path / n)).directory) for n in "ab"]
    assert found[0] == found[1]


def test_where_memory_runs_out_the_effective_batch_stays(tmp_path: Path) -> None:
    settings = replace(
        NANO, precision="float32", max_steps=4, batch_size=256, micro_batch_tokens=8192,
        dropout=0.0, learning_rate=1e-4,
    )  # fmt: skip
    free = train(replace(settings, output=tmp_path / "free"))
    peak = steps(free.directory)[-1]["peak_memory_bytes"]
    memory.release(CUDA)
    total = torch.cuda.get_device_properties(CUDA).total_memory
    reporter = Interrupter()
    torch.cuda.set_per_process_memory_fraction(0.6 * peak / total)
    try:
        settings = replace(settings, output=tmp_path / "tight")
        tight = train(settings, reporter=reporter)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert sum("out of memory" in line for line in reporter.lines) == 1
    for one, other in zip(steps(free.directory), steps(tight.directory), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)
    assert steps(tight.directory)[-1]["peak_memory_bytes"] < 0.6 * peak


def steps(directory: Path) -> list[dict[str, Any]]:
    lines = (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for line in lines if "loss" in (record := json.loads(line))]


@pytest.mark.parametrize("shape", [(64, 128), (48, 32), (10, 6), (5, 65)])
def test_weights_in_4_bits_are_those_of_a_processor(shape: tuple[int, int]) -> None:
    pytest.importorskip("bitsandbytes")
    found = []
    for device in (torch.device("cpu"), CUDA):
        torch.manual_seed(0)
        small = torch.nn.Module()
        small.layer = torch.nn.Linear(shape[1], shape[0], bias=False).to(device)
        small.get_output_embeddings = lambda: None
        quantize.quantize(small)
        found.append(quantize.weight(small.layer, torch.float32).cpu())
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-4)


@pytest.mark.usefixtures("keep_checkpoints")
def test_qlora_resumes_and_merges(on_cuda: TrainConfig, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    settings = replace(on_cuda, precision="auto", method="qlora")
    undisturbed = train(replace(settings, output=tmp_path / "undisturbed"))
    assert interrupted(settings, Interrupter(step=5))
    again = train(settings)
    assert outcome(again.directory) == outcome(undisturbed.directory)
    merging = ExportConfig(
        again.directory, merge=True, dtype="float32", device="cuda", output=tmp_path / "merged"
    )
    assert export.export_run(merging)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_what_cuda_answers_a_processor_answers(on_cuda: TrainConfig, method: Any) -> None:
    rate = 1e-2 if method == "lora" else 1e-3
    settings = replace(on_cuda, method=method, epochs=4, learning_rate=rate)
    directory = train(settings).directory
    before = measured(directory)
    texts = [text for text, _ in before]
    for device in ("cuda", "cpu"):
        scorer = open_trained(directory, precision="float32", device=device).scorer()
        found = scoring.score_table(scorer, texts, "test", Reporter())
        expected = [float(probability) for _, probability in before]
        np.testing.assert_allclose(found.max(1), expected, atol=1e-4)


def test_the_command_line(tmp_path: Path) -> None:
    table = write_table(tmp_path / "support.csv")
    output = tmp_path / "runs"
    done = remora("train", table, "--model", "nano", "--output", output, "--max-steps", 4)
    assert done.returncode == 0, done.stderr
    assert "computing on cuda" in done.stdout + done.stderr
    (directory,) = output.iterdir()
    planned = json.loads((directory / "plan.json").read_text(encoding="utf-8"))
    assert planned["device"] == torch.cuda.get_device_name(CUDA)
    for command in (
        ("predict", directory, "--device", "cuda"),
        ("eval", directory, table, "--device", "cuda"),
        ("plan", table, "--model", "nano"),
    ):
        stdin = "Where is my card?\n" if command[0] == "predict" else None
        done = remora(*command, stdin=stdin)
        assert done.returncode == 0, done.stderr
        assert "Warning" not in done.stderr


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_graphs_give_the_bits_of_the_kernels_alone(precision: Any, method: Any) -> None:
    """With dropout, over micro-batches of several shapes, each of them recorded."""
    settings = replace(NANO, method=method, dropout=0.1)
    rows = load_data(settings)
    found = []
    for graphs in (False, True):
        chosen = choose_precision(CUDA, precision)
        torch.manual_seed(0)
        model, prompt, _, _ = load_trainable(settings, rows.labels, chosen, CUDA)
        randomize_adapter(model)
        texts, labels = rows.train.texts, rows.train.labels
        with accelerator_for(chosen, CUDA) as accelerator:
            batches = MicroBatches(
                model, 500, accelerator, None, ProcessGroup(), Reporter(), graphs=graphs
            )
            if not graphs:  # the same, but nothing is ever recorded
                batches._graphs = Graphs(model, accelerator, Reporter().say)
                batches._graphs._records = False
            steps = []
            for start in (0, 40, 80, 0, 40, 80, 120):
                part = slice(start, start + 40)
                model.train().zero_grad()
                loss, _ = batches.add_gradients(prompt.rows(texts[part], labels[part]))
                gradients = [p.grad.clone() for p in model.parameters() if p.requires_grad]
                steps.append((loss, gradients))
            recorded = sum(s.graph is not None for s in batches._graphs._shapes.values())
            assert recorded >= 2 if graphs else recorded == 0
            found.append(steps)
    assert found[0][0][0] != found[0][3][0]  # as other elements are dropped
    for (loss, gradients), (other_loss, others) in zip(*found, strict=True):
        assert loss == other_loss
        assert all(map(torch.equal, gradients, others))


@contextlib.contextmanager
def compares_with_padded() -> Any:
    """Give a model and a way to check its graphs, in float64 and without dropout."""
    here, model = adapted("qwen2"), adapted("qwen2").to(CUDA)
    accelerator = SimpleNamespace(
        device=CUDA, autocast=contextlib.nullcontext, backward=torch.Tensor.backward
    )

    def check(graphs: Graphs, rows: list[TokenSequence]) -> None:
        expected_loss = padded_loss(here, rows)
        expected = gradients(here, expected_loss)
        packed = packing.build(rows)
        graphs.begin()
        loss = graphs.add_gradients(packed, packed.num_supervised_tokens)
        found = {n: p.grad.cpu() for n, p in model.named_parameters() if p.requires_grad}
        torch.testing.assert_close(float(loss), float(expected_loss), rtol=1e-6, atol=0)
        assert relative_error(found, expected) < 1e-6

    yield model, accelerator, check


def test_graphs_take_the_steps_of_the_padded_computation() -> None:
    with compares_with_padded() as (model, accelerator, check):
        graphs = Graphs(model, accelerator, pytest.fail)
        for _, rows in itertools.product(range(3), BATCHES.values()):
            check(graphs, rows)
        assert all(shape.graph for shape in graphs._shapes.values())


def test_graphs_of_more_shapes_than_are_kept_are_recorded_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cuda_graphs, "MAX_GRAPHS", 1)
    monkeypatch.setattr(packing, "_full_size", lambda size: size)
    with compares_with_padded() as (model, accelerator, check):
        graphs = Graphs(model, accelerator, pytest.fail)
        for _, rows in itertools.product(range(3), BATCHES.values()):
            check(graphs, rows)
            assert len(graphs._shapes) == 1
        assert all(shape.graph for shape in graphs._shapes.values())


@pytest.mark.parametrize("trouble", ["waits", "fails", "is large"])
def test_what_cannot_be_recorded_is_launched_kernel_by_kernel(
    trouble: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute = answer_logits

    def troubled(model: Any, packed: packing.TokenTree) -> torch.Tensor:
        logits = compute(model, packed)
        if trouble == "waits":
            float(logits[0, 0])
        elif trouble == "fails" and torch.cuda.is_current_stream_capturing():
            torch.cuda.current_stream().synchronize()
        return logits

    monkeypatch.setattr(forward, "answer_logits", troubled)
    if trouble == "is large":
        monkeypatch.setattr(attention, "GPU_PAIRS", 100)
    said: list[str] = []
    memory.release(CUDA)
    with compares_with_padded() as (model, accelerator, check):
        before = torch.cuda.memory_reserved()
        graphs = Graphs(model, accelerator, said.append)
        for _, rows in itertools.product(range(3), BATCHES.values()):
            check(graphs, rows)
        assert not any(shape.graph for shape in graphs._shapes.values())
        graphs.clear()
        model.zero_grad()
        memory.release(CUDA)
        assert torch.cuda.memory_reserved() - before < 100_000_000
    assert len(said) == (trouble != "is large")
    assert torch.rand(3, device=CUDA).max() < 1  # random numbers still come

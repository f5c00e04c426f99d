"""Processes with sharded weights train as one would, and none waits for another in vain."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import forked
from conftest import tiny_model
from remora.config import PlanConfig, TrainConfig
from remora.data.dataset import load_data
from remora.data.prompt import TokenSequence
from remora.errors import ConfigError, RemoraError, ResourceError
from remora.models import lora
from remora.planning import allocator, plan, planner
from remora.runtime import launch, memory, sharding
from remora.runtime.device import Precision
from remora.runtime.process_group import ProcessGroup, join
from remora.runtime.reporter import Reporter
from remora.training.checkpoint import random_state
from remora.training.micro_batches import MicroBatches
from remora.training.run import train
from remora.training.trainable import accelerator_for
from remora.tree import packing
from remora.tree.forward import answer_logits
from runtime.test_process_group import TIMED, begun, ended, lost, records

CPU = torch.device("cpu")


@pytest.fixture
def config(config: TrainConfig) -> TrainConfig:
    """The last step of an epoch has one row, fewer than there are processes."""
    settings = {"batch_size": 47, "micro_batch_tokens": 200, "epochs": 3, "eval_steps": 3}
    return replace(config, name="run", dropout=0.0, **settings)


def weights(config: TrainConfig) -> dict[str, torch.Tensor]:
    (path,) = (config.output / "run").glob("*/*model.safetensors")
    return load_file(path)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_two_processes_with_sharded_weights_take_the_steps_of_one(
    config: TrainConfig, tmp_path: Path, method: Any
) -> None:
    rate = 1e-3 if method == "full" else 1e-2
    config = replace(config, method=method, learning_rate=rate)
    assert len(load_data(config).train) % config.batch_size == 1
    train(config)
    shard_lora = "auto" if method == "full" else "on"
    together = replace(config, output=tmp_path / "two", devices=2, shard=shard_lora)
    code, said = ended(together)
    assert code == 0, "\n".join(said)
    assert sum("weights sharded over 2 processes" in line for line in said) == 1
    alone, several = records(config), records(together)
    assert len(alone) == len(several)
    for one, other in zip(alone, several, strict=True):
        assert one.keys() == other.keys()
        for name in one.keys() - TIMED:
            assert one[name] == pytest.approx(other[name], rel=1e-5), name
    expected, found = weights(config), weights(together)
    assert expected.keys() == found.keys()
    for name, weight in expected.items():
        assert torch.allclose(weight, found[name], atol=1e-5), name
    left = {path.name for path in (together.output / "run").iterdir()}
    assert left == {path.name for path in (config.output / "run").iterdir()}


@pytest.mark.durability
def test_a_stopped_run_with_sharded_weights_goes_on_to_the_same_bits(
    config: TrainConfig, tmp_path: Path
) -> None:
    config = replace(config, method="full", learning_rate=1e-3, devices=2)
    config = replace(config, epochs=6, eval_steps=2, dropout=0.2)
    undisturbed = replace(config, output=tmp_path / "undisturbed")
    code, said = ended(undisturbed)
    assert code == 0, "\n".join(said)
    with begun(config) as (parent, _):
        parent.send_signal(signal.SIGTERM)
        parent.communicate()
    assert parent.returncode == 75
    (saved,) = (config.output / "run" / "checkpoints").glob("*/tensors.safetensors")
    for name, weight in weights(undisturbed).items():  # whole, as those of an unsharded run
        for kind in ("weights", "best"):
            assert load_file(saved)[f"{kind}/{name}"].shape == weight.shape
    code, said = ended(config)
    assert code == 0, "\n".join(said)
    assert any("resuming after step" in line for line in said)
    assert sha256(config) == sha256(undisturbed)
    assert untimed(config) == untimed(undisturbed)


def sha256(config: TrainConfig) -> str:
    return hashlib.sha256((config.output / "run/model/model.safetensors").read_bytes()).hexdigest()


def untimed(config: TrainConfig) -> list[dict[str, Any]]:
    return [{k: v for k, v in record.items() if k not in TIMED} for record in records(config)]


def check() -> None:
    try:
        with join() as group:
            for each in (check_steps, check_memory, check_passes, check_exhausted):
                each(group)
    except RemoraError as error:
        sys.stdout.write(str(error))
        launch.leave(error.exit_code)


class Trained:
    """A small model whose weights are sharded, beside the same model whole."""

    def __init__(self, group: ProcessGroup, method: Any) -> None:
        settings = TrainConfig("t.csv", model="m", method=method, dropout=0.0, rank=4)
        self.whole, self.sharded = (
            lora.adapt(tiny_model("qwen2", torch.float32, scale=2), settings) for _ in range(2)
        )
        self.sharded.load_state_dict(self.whole.state_dict())
        sharding.apply(self.sharded, CPU, group)
        with torch.no_grad():  # as tree.check does before anything else
            self.sharded(input_ids=torch.zeros(1, 1, dtype=torch.int64))
        self.sharded.reset_iter_state()
        self.group = group

    def gradients(self, model: Any, rows: list[TokenSequence], group: ProcessGroup) -> Any:
        """Return what trains with its gradients of a batch, the loss and the micro-batches."""
        precision = Precision(compute=torch.float32, base=torch.float32, reason="")
        with accelerator_for(precision, CPU) as accelerator:
            heaviest = plan.Heaviest(rows=rows, bytes_per_token=1.0, limit_bytes=10**12)
            batches = MicroBatches(model, 40, accelerator, heaviest, group, Reporter())
            model.zero_grad()
            loss, _ = batches.add_gradients(rows)
        named = {n: p for n, p in model.named_parameters() if p.requires_grad}
        group.sum_gradients([p for p in named.values() if not sharding.is_sharded(p)])
        found = {n: sharding.whole(p.grad) for n, p in named.items()}
        return found, group.total(loss), batches

    def compare(self, rows: list[TokenSequence]) -> MicroBatches:
        expected, loss, _ = self.gradients(self.whole, rows, ProcessGroup())
        found, sharded_loss, batches = self.gradients(self.sharded, rows, self.group)
        assert abs(loss - sharded_loss) < 1e-6
        assert found.keys() == expected.keys()
        for name, gradient in found.items():
            # Against the tensor's largest gradient: small ones are sums that cancel.
            scale = float(expected[name].abs().max())
            assert float((gradient - expected[name]).abs().max()) <= 2e-6 * scale, name
        return batches


def some_rows(count: int) -> list[TokenSequence]:
    """Return rows of unequal lengths, whose halves make unequal numbers of micro-batches."""
    drawn = torch.Generator().manual_seed(0)
    sizes = [4 + (3 * i * i) % 23 for i in range(count)]
    return [
        TokenSequence(tuple(torch.randint(97, (n,), generator=drawn).tolist()), n - 2)
        for n in sizes
    ]


def check_steps(group: ProcessGroup) -> None:
    for method in ("full", "lora"):
        trained = Trained(group, method)
        held = [p for p in trained.sharded.parameters() if sharding.is_sharded(p)]
        own = sum(p.to_local().numel() for p in held)
        total = sum(p.numel() for p in held)
        assert 0.49 < own / total < 0.51
        if method == "lora":
            assert not any(p.requires_grad for p in held)
        trees = [packing.split(part, 40) for part in (some_rows(9)[:4], some_rows(9)[4:])]
        assert len(trees[0]) != len(trees[1])
        for count in (9, 2, 1):
            trained.compare(some_rows(count))


def check_memory(group: ProcessGroup) -> None:
    trained = Trained(group, "full")
    asked = []

    def refuse(device: torch.device, needed: int) -> None:
        asked.append(needed)
        if group.rank == 1 and needed > 20:
            raise torch.OutOfMemoryError("not enough memory")

    memory.refuse_to_exhaust = refuse
    before = random_state(CPU)
    batches = trained.gradients(trained.sharded, some_rows(9), group)[2]
    assert batches.max_tokens <= 26
    assert torch.equal(before[0], random_state(CPU)[0])
    assert len(set(group.gather(batches.max_tokens))) == 1
    memory.refuse_to_exhaust = lambda device, needed: None
    trained.compare(some_rows(9))


def check_passes(group: ProcessGroup) -> None:
    """Scoring: one process has nothing to compute, the other three passes."""
    trained = Trained(group, "full")
    ids = torch.arange(9)[None]
    trained.sharded.eval()
    with torch.inference_mode():
        expected = trained.whole.eval()(input_ids=ids).logits
        with sharding.in_step(trained.sharded, group):
            for _ in range(3 * group.rank):
                found = trained.sharded(input_ids=ids).logits
                assert torch.allclose(found, expected, atol=1e-5)
        with torch.no_grad():  # nothing that was gathered may be left from before
            for model in (trained.whole, trained.sharded):
                for parameter in model.parameters():
                    parameter.mul_(1.1)
        found = trained.sharded(input_ids=ids).logits
        assert torch.allclose(found, trained.whole(input_ids=ids).logits, atol=1e-5)
    assert len(set(group.gather("in step"))) == 1


def check_exhausted(group: ProcessGroup) -> None:
    trained = Trained(group, "full")

    def failing(model: Any, packed: packing.TokenTree) -> torch.Tensor:
        if group.rank == 1:
            raise torch.OutOfMemoryError("in the middle")
        return answer_logits(model, packed)

    from remora.training import micro_batches

    micro_batches.answer_logits = failing
    trained.gradients(trained.sharded, some_rows(9), group)


def test_steps_memory_and_passes_of_two_processes() -> None:
    """The last check ends them: the memory runs out in the second, in the middle of a step."""
    program = "from runtime import test_sharding; test_sharding.check()"
    (first, told), (second, other) = forked.together([program] * 2)
    assert (first, second) == (7, ResourceError.exit_code), told + other
    assert "--micro-batch-tokens 20" in other


@pytest.mark.durability
def test_a_lost_process_ends_one_that_waits_for_its_part(config: TrainConfig) -> None:
    lost(replace(config, method="full", devices=2, epochs=1_000), signal.SIGKILL, 1)


@pytest.fixture
def settings(base: Path, table: Path) -> dict[str, Any]:
    return {"data": str(table), "model": str(base), "device": "t4"}


def planned(settings: dict[str, Any], **more: Any) -> plan.Plan:
    return planner.make_plan(PlanConfig(**(settings | more)))


def test_all_weights_that_train_are_sharded_over_the_devices(settings: dict[str, Any]) -> None:
    alone, off = planned(settings, method="full"), planned(settings, method="full", shard="off")
    four = planned(settings, method="full", devices=4)
    assert not alone.shard
    assert not off.shard
    assert four.shard
    assert "weights sharded over 4 processes, as all of them train" in four.why
    for name in ("adapter", "best", "optimizer"):
        assert getattr(four.memory, name) == -(-getattr(alone.memory, name) // 4)
    assert four.memory.workspace > alone.memory.workspace
    assert planned(settings, method="full", devices=4, shard="off").memory == alone.memory
    here = planned(settings | {"device": "cpu"}, method="full", devices=4)
    assert here.memory.fragments == allocator.MAPPED_FRAGMENT_BYTES


def deep(settings: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """Return the settings with a base of more layers."""
    folder = tmp_path / "deep"
    shutil.copytree(settings["model"], folder, ignore=shutil.ignore_patterns("*.safetensors"))
    described = json.loads((folder / "config.json").read_text())
    described |= {"num_hidden_layers": 5, "layer_types": ["full_attention"] * 5}
    (folder / "config.json").write_text(json.dumps(described))
    few = {"micro_batch_tokens": 128, "checkpointing": "on", "rank": 1}
    return {**settings, "model": str(folder), **few}


def test_a_base_is_sharded_only_where_it_does_not_fit(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    settings = deep(settings, tmp_path)
    roomy, parts = planned(settings, devices=4), planned(settings, devices=4, shard="on")
    assert not roomy.shard
    assert parts.shard
    assert parts.memory.adapter == roomy.memory.adapter
    assert roomy.memory.base / 3.7 > parts.memory.base > roomy.memory.base / 4
    settings["device_memory"] = f"{(roomy.peak_bytes + parts.peak_bytes) / 2e6}MB"
    tight = planned(settings, devices=4)
    assert tight.shard
    assert "4 processes, as the base does not fit on one device" in tight.why


@pytest.mark.durability  # what would fit is searched twice
def test_what_fits_by_sharding_alone_is_proposed(settings: dict[str, Any], tmp_path: Path) -> None:
    settings = deep(settings, tmp_path)
    roomy, parts = planned(settings, devices=4), planned(settings, devices=4, shard="on")
    settings["device_memory"] = f"{(roomy.peak_bytes + parts.peak_bytes) / 2e6}MB"
    assert not planned(settings, devices=4, shard="off").fits
    alone = planned(settings)
    assert not alone.fits
    assert any(line.startswith("with --devices ") for line in alone.alternatives)


def test_bases_in_4_bits_are_not_sharded(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="4-bit weights cannot be sharded"):
        planned(settings, method="qlora", devices=4, shard="on")
    assert not planned(settings, method="qlora", devices=4, device_memory="1MB").shard

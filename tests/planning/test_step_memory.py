"""Counting without weights against torch's own hooks; runs that complete within a limit.

Also covers remora.planning.allocator.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch.utils._pytree import tree_leaves

from conftest import ARCHITECTURES, tiny_config, tiny_model
from remora.data.prompt import TokenSequence
from remora.models import loading, lora
from remora.planning import allocator, step_memory
from remora.tree import attention, packing
from remora.tree.forward import model_inputs
from remora.tree.loss import loss_sum
from tiny_architectures import tiny_config_of

ROWS = [
    TokenSequence([1, 5, 6, 7, *message, 9, 20 + i, 2], 5 + len(message))
    for i, message in enumerate(([30, 31], [30, 32, 33], [40], [41, 42, 43, 44]))
]


def skeleton(architecture: str, rank: int = 4) -> step_memory.Skeleton:
    empty = loading.load_empty(tiny_config(architecture), torch.float32)
    adapted = lora.add_adapter(empty, rank=rank, alpha=8, dropout=0.0)
    return step_memory.Skeleton(adapted, autocast=None, device="cpu")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_is_counted_is_what_autograd_saves(architecture: str) -> None:
    if architecture == "opt" and Version(transformers.__version__) < Version("5.23"):
        pytest.skip("transformers before 5.23 looks at a random number in OPT's forward pass")
    packed = packing.build(ROWS)
    adapted = lora.add_adapter(
        tiny_model(architecture, torch.float32), rank=4, alpha=8, dropout=0.0
    ).train()
    inputs = model_inputs(adapted, packed)
    given = tree_leaves([inputs, list(vars(packed).values())])
    tensors = [t for t in given if isinstance(t, torch.Tensor)]
    known = {
        t.untyped_storage().data_ptr()
        for t in [*adapted.parameters(), *adapted.buffers(), *tensors]
    }
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = adapted(**inputs).logits[0]
        loss = loss_sum(logits, packed)
    counted = skeleton(architecture).count(packed)
    assert loss.requires_grad
    found = counted.saved + counted.logits
    # At the peak, in the backward pass, what belongs to the logits is gone.
    total = sum(saved.values())
    assert 0.89 * total < found <= total


def test_arrays_that_glibc_maps_leave_no_fragments() -> None:
    small = skeleton("qwen2").count(packing.build(ROWS))
    assert small.heap == small.peak
    wide = loading.load_empty(tiny_config("qwen2", vocabulary=1 << 20), torch.float32)
    adapted = lora.add_adapter(wide, rank=4, alpha=8, dropout=0.0)
    counted = step_memory.Skeleton(adapted, autocast=None, device="cpu").count(packing.build(ROWS))
    assert counted.logits >= allocator.MAPPED_BYTES
    assert counted.heap <= counted.peak - counted.logits
    assert counted.mapped >= counted.logits
    assert counted.heap + counted.mapped >= counted.peak  # each at its own moment


@pytest.mark.parametrize(("device", "looks"), [("cpu", True), ("mps", True), ("cuda", False)])
def test_attention_is_counted_as_the_device_computes_it(
    device: str, looks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(attention, "_choose_blocks", lambda *_, **__: asked.append(1))
    empty = loading.load_empty(tiny_config("qwen2"), torch.float32)
    adapted = lora.add_adapter(empty, rank=4, alpha=8, dropout=0.0)
    step_memory.Skeleton(adapted, autocast=None, device=device).count(packing.build(ROWS))
    assert bool(asked) is looks


def test_scoring_needs_keys_values_and_logits() -> None:
    counted = skeleton("qwen2").count_scoring(200, 50)
    keys_and_values = 2 * 2 * 200 * 16 * 4  # two layers, two of [tokens, 16] in float32
    assert counted.logits == 50 * 97 * 4
    assert keys_and_values < counted.workspace < 6 * keys_and_values + 200**2 * 8
    assert counted.saved == counted.gradients == 0


LIMITED = """
import os, resource, sys
{before}
from remora.cli import main
sys.exit(main(sys.argv[1:]))
"""


def train_within(before: str, folder: Path) -> tuple[subprocess.CompletedProcess[str], Any]:
    """Train the model in the package in a process that limits itself first."""
    table = folder / "table.csv"
    rows = [f"where is parcel {i} of the order from day {i % 7},label {i % 8}" for i in range(96)]
    table.write_text("\n".join(["text,label", *rows]) + "\n")
    command = [sys.executable, "-c", LIMITED.format(before=before), "train", str(table)]
    flags = ["--model", "nano", "--max-steps", "1", "--batch-size", "76", "--instruction"]
    flags += ["Classify the message. " * 40, "--device", "cpu", "--name", "limited"]
    done = subprocess.run(
        [*command, *flags, "--output", str(folder)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    made = folder / "limited" / "plan.json"
    return done, json.loads(made.read_text()) if made.is_file() else None


@pytest.mark.durability
def test_a_run_in_a_control_group_completes_within_it(tmp_path: Path) -> None:
    group = Path("/sys/fs/cgroup/memory") / f"remora-test-{os.getpid()}"  # version 1
    try:
        group.mkdir()
    except OSError:
        pytest.skip("control groups cannot be made here")
    limit = 660_000_000
    try:
        (group / "memory.limit_in_bytes").write_text(str(limit))
        enter = f"open('{group}/cgroup.procs', 'w').write(str(os.getpid()))"
        done, made = train_within(enter, tmp_path)
        used = int((group / "memory.max_usage_in_bytes").read_text())
    finally:
        group.rmdir()
    assert done.returncode == 0, done.stderr
    assert "larger micro-batches do not fit" in done.stderr or made["checkpointing"]
    assert made["peak_bytes"] <= made["available_bytes"]
    assert used <= limit
    assert made["measured_peak_bytes"] <= 1.05 * made["peak_bytes"]


@pytest.mark.durability
def test_a_run_with_a_limit_on_its_address_space_completes_within_it(tmp_path: Path) -> None:
    limit = 1_650_000_000  # of which Python and its libraries have mapped 1 GB when it is planned
    before = f"resource.setrlimit(resource.RLIMIT_AS, ({limit}, {limit}))"
    done, made = train_within(before, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "larger micro-batches do not fit" in done.stderr or made["checkpointing"]
    assert made["peak_bytes"] <= made["available_bytes"]


def test_checkpointing_saves_memory_and_costs_operations() -> None:
    packed = packing.build(ROWS)
    counted = skeleton("qwen2")
    plain = counted.count(packed)
    again = counted.count(packed, checkpointing=True)
    assert again.saved < plain.saved / 2
    assert 1.2 < again.operations / plain.operations < 1.6


def test_operations_are_those_of_the_matrix_products() -> None:
    packed = packing.build(ROWS)
    n, p, h = packed.num_tokens, len(packed.predictors), 32
    # q and o [32, 32], k and v [32, 16], gate, up and down [32, 48]; the head [32, 97].
    # Of the last of two layers, all but k and v are at the predictors only.
    rest, keys_values = 2 * h * 32 + 3 * h * 48, 2 * h * 16
    forward = 2 * n * (rest + 2 * keys_values) + 2 * p * (rest + h * 97)
    backward = forward - 2 * n * (h * 32 + keys_values)  # none to the embeddings, which are frozen
    counted = skeleton("qwen2", rank=1).count(packed).operations
    assert forward + backward < counted < 2.8 * forward  # and attention, and the adapter


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_mixture_of_experts_is_counted_in_its_own_precision(dtype: torch.dtype) -> None:
    config = tiny_config_of("olmoe", 97)
    empty = lora.add_adapter(loading.load_empty(config, dtype), rank=4, alpha=8, dropout=0.0)
    counted = step_memory.Skeleton(empty, autocast=None, device="cpu").count(packing.build(ROWS))
    # The products of two of four experts, forward and backward: 4 layers, 3 matrices of 32 by 48.
    tokens = packing.build(ROWS).num_tokens
    assert counted.operations > 4 * 2 * 2 * tokens * 2 * 3 * 32 * 48
    wide = loading.load_empty(config, torch.float32)
    wide = lora.add_adapter(wide, rank=4, alpha=8, dropout=0.0)
    expected = step_memory.Skeleton(wide, autocast=None, device="cpu").count(packing.build(ROWS))
    assert counted.operations == expected.operations
    assert counted.saved < expected.saved or dtype is torch.float32


def test_a_model_without_blocks_is_counted_with_whole_masks_and_logs_nothing() -> None:
    config = tiny_config_of("stablelm", 97)
    empty = loading.load_empty(config, torch.float32)
    assert empty.config._attn_implementation == attention.NAME
    empty = lora.add_adapter(empty, rank=4, alpha=8, dropout=0.0)
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    log = logging.getLogger("torch._subclasses.fake_tensor")
    log.addHandler(handler)
    try:
        many = [TokenSequence([1, 5, a, *range(40, 50), 2], 13) for a in range(10, 90)]
        packed = packing.build(many)
        counted = step_memory.Skeleton(empty, autocast=None, device="cpu").count(packed)
    finally:
        log.removeHandler(handler)
    assert counted.saved > 0
    assert empty.config._attn_implementation == "sdpa"
    assert not records
    assert not log.disabled


def test_a_model_that_cannot_be_counted_says_so_in_an_error_of_its_own() -> None:
    config = tiny_config_of("dbrx", 97)
    empty = lora.add_adapter(loading.load_empty(config, torch.float32), rank=4, alpha=8, dropout=0)
    with pytest.raises(step_memory.NotCountableError, match="cannot be counted"):
        step_memory.Skeleton(empty, autocast=None, device="cpu").count(packing.build(ROWS))

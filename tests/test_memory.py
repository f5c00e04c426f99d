"""Counting without weights against torch's own hooks; how much memory a process may take."""

from __future__ import annotations

import pytest
import torch

from conftest import ARCHITECTURES, tiny_config, tiny_model
from remora import lora, memory, model, tree
from remora.prompt import TokenSequence

ROWS = [
    TokenSequence([1, 5, 6, 7, *message, 9, 20 + i, 2], 5 + len(message))
    for i, message in enumerate(([30, 31], [30, 32, 33], [40], [41, 42, 43, 44]))
]


def skeleton(architecture: str, rank: int = 4) -> memory.Skeleton:
    empty = model.load_empty(tiny_config(architecture), torch.float32)
    adapted = lora.add_adapter(empty, rank=rank, alpha=8, dropout=0.0)
    return memory.Skeleton(adapted, autocast=None, by_kernel=False)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_is_counted_is_what_autograd_saves(architecture: str) -> None:
    packed = tree.build(ROWS)
    adapted = lora.add_adapter(
        tiny_model(architecture, torch.float32), rank=4, alpha=8, dropout=0.0
    ).train()
    known = {t.untyped_storage().data_ptr() for t in [*adapted.parameters(), *adapted.buffers()]}
    inputs = tree.inputs(adapted, packed)
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = adapted(**inputs).logits[0]
        loss = tree.loss_sum(logits, packed)
    counted = skeleton(architecture).count(packed)
    mask_and_inputs = (
        sum(t.nbytes for t in inputs.values() if isinstance(t, torch.Tensor))
        + 4 * packed.num_tokens**2 * 3
    )
    assert loss.requires_grad
    found = counted.saved + counted.logits
    assert found == pytest.approx(sum(saved.values()), rel=0.15, abs=mask_and_inputs)


def test_checkpointing_saves_memory_and_costs_operations() -> None:
    packed = tree.build(ROWS)
    counted = skeleton("qwen2")
    plain = counted.count(packed)
    again = counted.count(packed, checkpointing=True)
    assert again.saved < plain.saved / 2
    assert 1.2 < again.operations / plain.operations < 1.6


def test_operations_are_those_of_the_matrix_products() -> None:
    packed = tree.build(ROWS)
    n, p, h = packed.num_tokens, len(packed.predictors), 32
    # q and o [32, 32], k and v [32, 16], gate, up and down [32, 48]; the head [32, 97].
    layers = 2 * (2 * h * 32 + 2 * h * 16 + 3 * h * 48)
    forward = 2 * n * layers + 2 * p * h * 97
    counted = skeleton("qwen2", rank=1).count(packed).operations
    assert 2 * forward < counted < 2.8 * forward  # and attention, and the adapter


def test_the_tightest_control_group_counts(monkeypatch, tmp_path) -> None:
    inner = tmp_path / "outer" / "inner"
    inner.mkdir(parents=True)
    (tmp_path / "outer" / "memory.max").write_text("1000000\n")
    (tmp_path / "outer" / "memory.current").write_text("600000\n")
    (tmp_path / "outer" / "memory.stat").write_text("anon 1\ninactive_file 100000\n")
    (inner / "memory.max").write_text("max\n")
    (inner / "memory.current").write_text("600000\n")
    real = memory._read
    monkeypatch.setattr(memory, "CONTROL_GROUPS", tmp_path)
    monkeypatch.setattr(
        memory,
        "_read",
        lambda path: "0::/outer/inner\n" if str(path) == "/proc/self/cgroup" else real(path),
    )
    assert memory._group_bytes() == 500_000
    assert memory.free_bytes(torch.device("cpu")) == 500_000


@pytest.mark.parametrize(
    ("error", "exhausted"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), True),
        (MemoryError(), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_errors_of_memory_are_told_from_others(error: Exception, exhausted: bool) -> None:
    assert memory.is_exhausted(error) is exhausted

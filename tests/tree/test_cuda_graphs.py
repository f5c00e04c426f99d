"""Which micro-batches are recorded; test_cuda.py has what only a device can show.

torch's recording is stood in for: it computes nothing that lasts, and a replay computes.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from remora.tree import attention, cuda_graphs, packing
from remora.tree.cuda_graphs import Graphs
from tree.test_packing import BATCHES, adapted, gradients, padded_loss, relative_error

ACCELERATOR: Any = SimpleNamespace(
    device=torch.device("cpu"), autocast=contextlib.nullcontext, backward=torch.Tensor.backward
)


class Device:
    """A device whose graphs are told here, and a model that is computed on it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.recorded = self.replayed = 0
        self.trouble: Exception | None = None
        self.waits = False
        self.is_watched: Any = 0
        self.said: list[str] = []
        self.model = adapted("qwen2")
        self.graphs = graphs = Graphs(self.model, ACCELERATOR, self.said.append)
        self.compute, self.computing = graphs._compute, None
        device = self

        class Graph:
            shape: Any = None

            def replay(self) -> None:
                device.replayed += 1
                device.compute(self.shape)

        monkeypatch.setattr(graphs, "_compute", self.watched)
        for name, value in {
            "graph": self.record,
            "CUDAGraph": Graph,
            "graph_pool_handle": object,
            "current_stream": lambda: SimpleNamespace(device_index=0),
            "set_stream": lambda _: None,
            "get_sync_debug_mode": lambda: self.is_watched,
            "set_sync_debug_mode": lambda mode: setattr(self, "is_watched", mode),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
            monkeypatch.setattr(torch._C, name, lambda *_: None, raising=False)

    def watched(self, shape: Any) -> None:
        self.computing = shape
        if self.waits and self.is_watched:
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        self.compute(shape)

    @contextlib.contextmanager
    def record(self, graph: Any, pool: Any) -> Iterator[None]:
        kept = [gradient.clone() for gradient in self.graphs._gradients]
        yield
        for gradient, before in zip(self.graphs._gradients, kept, strict=True):
            gradient.copy_(before)
        if self.trouble is not None:
            raise self.trouble
        self.recorded += 1
        graph.shape = self.computing

    def check(self, name: str) -> None:
        """Compare the loss and every gradient of a batch with the padded computation."""
        rows = BATCHES[name]
        expected_loss = padded_loss(self.model, rows)
        expected = gradients(self.model, expected_loss)
        packed = packing.build(rows)
        self.graphs.begin()
        loss = self.graphs.add_gradients(packed, packed.num_supervised_tokens)
        found = {n: p.grad for n, p in self.model.named_parameters() if p.requires_grad}
        assert float(loss) == pytest.approx(float(expected_loss.detach()), rel=1e-6)
        assert relative_error(found, expected) < 1e-6, name


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    monkeypatch.setattr(attention, "prefers_whole", lambda device, queries, keys: queries <= 64)
    return Device(monkeypatch)


NAME = next(iter(BATCHES))


def test_a_shape_is_recorded_when_it_comes_again(device: Device) -> None:
    for recorded, replayed in ((0, 0), (1, 1), (1, 2)):
        device.check(NAME)
        assert (device.recorded, device.replayed) == (recorded, replayed)
    device.graphs.clear()
    device.check(NAME)
    assert device.replayed == 2
    assert not device.said


def test_no_more_shapes_are_recorded_than_there_may_be(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_graphs, "MAX_GRAPHS", 1)
    monkeypatch.setattr(packing, "_full_size", lambda size: size)
    for _ in range(3):
        for name in BATCHES:
            device.check(name)
    assert len(device.graphs._shapes) > 1
    assert device.recorded == 1


@pytest.mark.parametrize("trouble", ["waits", "fails", "is large"])
def test_what_cannot_be_recorded_is_computed_all_the_same(
    trouble: str, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    device.waits = trouble == "waits"
    device.trouble = RuntimeError("not while recording") if trouble == "fails" else None
    if trouble == "is large":
        monkeypatch.setattr(attention, "prefers_whole", lambda *_: False)
    for _ in range(3):
        device.check(NAME)
    assert device.recorded == 0
    reason = {"waits": "it waits for the device", "fails": "not while recording"}.get(trouble)
    told = f"slower: CUDA graphs cannot record this model ({reason})"
    assert device.said == ([told] if reason else [])


def test_memory_that_runs_out_in_a_recording_is_told_as_such(device: Device) -> None:
    device.trouble = torch.OutOfMemoryError("CUDA out of memory")
    device.check(NAME)
    with pytest.raises(torch.OutOfMemoryError):
        device.check(NAME)
    assert not device.said

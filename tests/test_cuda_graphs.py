"""Which micro-batches are recorded; test_cuda.py has what only a device can show.

torch's recording is stood in for: it computes nothing that lasts, and a replay computes.
"""

from __future__ import annotations

import contextlib
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from remora import attention, cuda_graphs, tree
from remora.cuda_graphs import Graphs
from test_tree import BATCHES, adapted, gradients, padded_loss, relative_error

ACCELERATOR: Any = SimpleNamespace(
    device=torch.device("cpu"), autocast=contextlib.nullcontext, backward=torch.Tensor.backward
)


class Device:
    """A device whose graphs are told here."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0
        self.trouble: Exception | None = None
        self.waits = False
        self.is_watched: Any = 0
        self.computing: Any = None

    def install(self, graphs: Graphs, monkeypatch: pytest.MonkeyPatch) -> None:
        compute = graphs._compute

        def watched(shape: Any) -> None:
            self.computing = shape
            if self.waits and self.is_watched:
                warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
            compute(shape)

        @contextlib.contextmanager
        def record(graph: Any, pool: Any) -> Any:
            kept = [gradient.clone() for gradient in graphs._gradients]
            yield
            for gradient, before in zip(graphs._gradients, kept, strict=True):
                gradient.copy_(before)
            if self.trouble is not None:
                raise self.trouble
            self.recorded += 1
            graph.shape = self.computing

        device = self

        class Graph:
            shape: Any = None

            def replay(self) -> None:
                device.replayed += 1
                compute(self.shape)

        monkeypatch.setattr(graphs, "_compute", watched)
        for name, value in {
            "graph": record,
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


@pytest.fixture
def device(pairs: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(attention, "prefers_whole", lambda device, queries, keys: queries <= 64)
    return Device()


def check(graphs: Graphs, model: Any, name: str) -> None:
    rows = BATCHES[name]
    expected_loss = padded_loss(model, rows)
    expected = gradients(model, expected_loss)
    packed = tree.build(rows)
    graphs.begin()
    loss = graphs.add_gradients(packed, packed.num_supervised_tokens)
    found = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert float(loss) == pytest.approx(float(expected_loss.detach()), rel=1e-6)
    assert relative_error(found, expected) < 1e-6, name


def test_a_shape_is_recorded_when_it_comes_again(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted("qwen2")
    graphs = Graphs(model, ACCELERATOR, pytest.fail)
    device.install(graphs, monkeypatch)
    name = next(iter(BATCHES))
    for recorded, replayed in ((0, 0), (1, 1), (1, 2)):
        check(graphs, model, name)
        assert (device.recorded, device.replayed) == (recorded, replayed)
    graphs.clear()
    check(graphs, model, name)
    assert device.replayed == 2


def test_no_more_shapes_are_recorded_than_there_may_be(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_graphs, "MAX_GRAPHS", 1)
    monkeypatch.setattr(tree, "_full_size", lambda size: size)
    model = adapted("qwen2")
    graphs = Graphs(model, ACCELERATOR, pytest.fail)
    device.install(graphs, monkeypatch)
    for _ in range(3):
        for name in BATCHES:
            check(graphs, model, name)
    assert len(graphs._shapes) > 1
    assert device.recorded == 1


@pytest.mark.parametrize("trouble", ["waits", "fails", "is large"])
def test_what_cannot_be_recorded_is_computed_all_the_same(
    trouble: str, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    model = adapted("qwen2")
    graphs = Graphs(model, ACCELERATOR, said.append)
    device.install(graphs, monkeypatch)
    device.waits = trouble == "waits"
    device.trouble = RuntimeError("not while recording") if trouble == "fails" else None
    if trouble == "is large":
        monkeypatch.setattr(attention, "prefers_whole", lambda *_: False)
    for _ in range(3):
        check(graphs, model, next(iter(BATCHES)))
    assert device.recorded == 0
    reason = {"waits": "it waits for the device", "fails": "not while recording"}.get(trouble)
    told = f"this model's kernels are launched one by one, which takes longer: {reason}"
    assert said == ([told] if reason else [])


def test_memory_that_runs_out_in_a_recording_is_told_as_such(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted("qwen2")
    graphs = Graphs(model, ACCELERATOR, pytest.fail)
    device.install(graphs, monkeypatch)
    device.trouble = torch.OutOfMemoryError("CUDA out of memory")
    name = next(iter(BATCHES))
    check(graphs, model, name)
    with pytest.raises(torch.OutOfMemoryError):
        check(graphs, model, name)

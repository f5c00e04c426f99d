"""The precision decision, for devices that need not be here."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from remora import memory, plan
from remora.config import PlanConfig
from remora.errors import ConfigError

CUDA = torch.device("cuda")
CPU = torch.device("cpu")
WIDE, BRAIN, HALF = torch.float32, torch.bfloat16, torch.float16


def pretend_gpu(monkeypatch, name, capability):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _=None: name)
    # As a T4 does: it answers yes and emulates.
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)


@pytest.mark.parametrize(
    ("name", "capability", "dtype", "in_accelerate", "reason"),
    [
        ("Tesla P40", (6, 1), WIDE, "no", "no fast 16-bit"),
        ("Tesla V100", (7, 0), HALF, "fp16", "loss scaling"),
        ("Tesla T4", (7, 5), HALF, "fp16", "no native bfloat16; float16 with loss scaling"),
        ("A100", (8, 0), BRAIN, "bf16", "native bfloat16"),
        ("L4", (8, 9), BRAIN, "bf16", "native bfloat16"),
        ("H100", (9, 0), BRAIN, "bf16", "native bfloat16"),
        ("B200", (10, 0), BRAIN, "bf16", "native bfloat16"),
    ],
)
def test_a_gpu_computes_in_what_it_has_natively(
    monkeypatch, name, capability, dtype, in_accelerate, reason
):
    pretend_gpu(monkeypatch, name, capability)
    chosen = plan.choose_precision(CUDA, "auto")
    assert (chosen.compute, chosen.base) == (dtype, dtype)
    assert chosen.mixed_precision == in_accelerate
    assert chosen.autocast == (None if dtype is WIDE else dtype)
    assert chosen.reason.startswith(name)
    assert reason in chosen.reason
    told = f"{str(dtype)[6:]} arithmetic, float32 adapter ({name}"
    assert str(chosen).startswith(told)


@pytest.mark.parametrize(("native", "dtype"), [(True, BRAIN), (False, WIDE)])
def test_a_processor_computes_in_bfloat16_only_with_the_instructions(monkeypatch, native, dtype):
    monkeypatch.setattr(plan, "_processor_has_bfloat16", lambda: native)
    chosen = plan.choose_precision(CPU, "auto")
    assert (chosen.compute, chosen.base) == (dtype, dtype)
    assert chosen.autocast == (BRAIN if native else None)


@pytest.mark.parametrize(
    ("flags", "native"),
    [
        ("flags\t\t: fpu avx2 avx512f avx512_bf16", True),
        ("flags\t\t: fpu amx_bf16 amx_tile", True),
        ("Features\t: fp asimd bf16 i8mm", True),
        ("flags\t\t: fpu avx2 avx512f avx512_vnni", False),
        ("flags\t\t: fpu avx512_bf16x", False),
    ],
)
def test_the_processors_flags_are_read(monkeypatch, flags, native):
    text = f"processor\t: 0\nmodel name\t: a processor\n{flags}\n"
    monkeypatch.setattr(plan.Path, "read_text", lambda *_, **__: text)
    assert plan._processor_has_bfloat16() is native


def test_without_cpuinfo_nothing_is_assumed(monkeypatch):
    def missing(*_, **__):
        raise FileNotFoundError

    monkeypatch.setattr(plan.Path, "read_text", missing)
    assert not plan._processor_has_bfloat16()


def test_apple_gpus_compute_in_float32():
    assert plan.choose_precision(torch.device("mps"), "auto").compute is WIDE


def test_bfloat16_that_is_asked_for_and_emulated_is_said(monkeypatch):
    pretend_gpu(monkeypatch, "Tesla T4", (7, 5))
    asked = plan.choose_precision(CUDA, "bfloat16")
    assert (asked.compute, asked.base) == (BRAIN, BRAIN)
    assert "emulates" in asked.reason
    monkeypatch.setattr(plan, "_processor_has_bfloat16", lambda: False)
    assert "emulates" in plan.choose_precision(CPU, "bfloat16").reason


def test_what_is_asked_for_and_native_needs_no_warning(monkeypatch):
    pretend_gpu(monkeypatch, "A100", (8, 0))
    for asked in ("bfloat16", "float16", "float32"):
        chosen = plan.choose_precision(CUDA, asked)
        assert chosen.compute is getattr(torch, asked)
        assert chosen.reason == "asked for"


def test_float16_on_a_processor_is_refused():
    with pytest.raises(ConfigError, match="use --precision bfloat16 or float32"):
        plan.choose_precision(CPU, "float16")


@pytest.mark.parametrize(
    ("cuda", "mps", "best"),
    [(True, False, "cuda"), (False, True, "mps"), (False, False, "cpu"), (True, True, "cuda")],
)
def test_the_fastest_device_that_is_here_is_taken(monkeypatch, cuda, mps, best):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert plan.choose_device("auto").type == best
    assert plan.choose_device("cpu").type == "cpu"


@pytest.mark.parametrize("missing", ["cuda", "mps"])
def test_a_device_that_is_not_here_is_refused(monkeypatch, missing):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(
        ConfigError, match=f"there is no {missing} device here; choose from cpu, auto"
    ):
        plan.choose_device(missing)


def test_the_peak_of_memory_is_in_bytes():
    before = memory.peak_bytes(CPU)
    block = np.ones(256 << 20, dtype=np.uint8)
    after = memory.peak_bytes(CPU)
    assert block.nbytes <= after < 256 << 30
    assert after >= before > 16 << 20


TABLE = "text,label\n" + "".join(
    f"my card {i},card\nmy refund {i} is late,refund\n" for i in range(20)
)


@pytest.fixture
def weightless(base, tmp_path):
    """The base model's folder without its weights, and a table."""
    folder = tmp_path / "weightless"
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    (tmp_path / "table.csv").write_text(TABLE)
    return {"data": str(tmp_path / "table.csv"), "model": str(folder)}


def planned(weightless, **settings):
    return plan.plan(PlanConfig(weightless["data"], model=weightless["model"], **settings))


def test_a_plan_needs_no_weights_and_sums_up(weightless):
    made = planned(weightless, device="t4", rank=8)
    assert made.fits
    assert made.peak_bytes == sum(made.to_dict()["memory"].values())
    assert made.memory.adapter == made.adapter_bytes_32 == 4 * made.trainable
    assert made.memory.optimizer == 8 * made.trainable
    # Two layers of r * (in + out): q, o 64; k, v 48; gate, up, down 80.
    assert made.trainable == 2 * 8 * (2 * 64 + 2 * 48 + 3 * 80)
    assert made.precision.startswith("float16 arithmetic")
    assert "loss scaling" in made.precision
    assert made.tree_tokens < made.padded_tokens
    assert "published" in made.seconds_are


def test_what_trains_in_full_is_stored_in_float32(weightless):
    lora, full = (planned(weightless, device="t4", method=name) for name in ("lora", "full"))
    assert full.trainable == full.parameters == lora.parameters - lora.trainable
    assert full.memory.adapter == 4 * full.parameters
    assert "float32 weights" in full.precision


def test_the_copy_of_the_best_weights_and_the_checkpoints_are_counted(weightless):
    with_rows = planned(weightless, device="t4", method="full")
    without = planned(weightless, device="t4", method="full", validation_fraction=0.0)
    assert with_rows.memory.best == 4 * with_rows.parameters
    assert without.memory.best == 0
    assert with_rows.allocated_bytes == with_rows.peak_bytes - 600_000_000 - with_rows.memory.best
    assert with_rows.download_bytes == 4 * with_rows.parameters  # stored in float32
    assert with_rows.disk_bytes == 40 * with_rows.parameters


def test_the_disk_is_looked_at_where_the_run_will_be(weightless, tmp_path, monkeypatch):
    asked = []

    def usage(path):
        asked.append(Path(path))
        return SimpleNamespace(free=1_000)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    made = planned(weightless, device="t4", output=tmp_path / "not" / "there")
    assert asked[-1] == tmp_path
    assert made.free_disk_bytes == 1_000
    assert not made.fits_disk


def test_less_memory_gives_smaller_micro_batches_then_alternatives(weightless):
    roomy = planned(weightless, device="t4", batch_size=32)
    assert not roomy.checkpointing
    tight_bytes = roomy.peak_bytes - roomy.memory.saved_activations // 2
    tight = planned(weightless, device="t4", batch_size=32, device_memory=f"{tight_bytes / 1e6}MB")
    assert tight.fits
    assert tight.checkpointing or tight.largest_micro_batch < roomy.largest_micro_batch
    off = planned(weightless, device="t4", checkpointing="off", device_memory="601MB")
    on = planned(weightless, device="t4", checkpointing="on")
    assert on.checkpointing
    assert on.memory.saved_activations < roomy.memory.saved_activations
    none = planned(weightless, device="t4", device_memory="1MB")
    assert not none.fits
    assert "with --rank 4" not in " ".join(none.alternatives)
    assert none.alternatives[-1].startswith("a device with ")
    assert off.device == "Tesla T4"


@pytest.mark.parametrize("amount", ["16", "much", "0GB", "-1GB"])
def test_an_amount_of_memory_that_is_none_is_refused(amount):
    with pytest.raises(ConfigError, match=r"device_memory is .* give an amount such as 16GB"):
        PlanConfig("t.csv", model="m", device_memory=amount)


def test_amounts_of_memory_are_decimal_or_binary():
    for amount, wanted in (("16GB", 16 * 10**9), ("1.5 GiB", 3 << 29), ("900m", 900 * 10**6)):
        assert PlanConfig("t.csv", model="m", device_memory=amount).memory_bytes() == wanted


def test_the_verb_prints_json_on_standard_output_only(weightless, capsys, monkeypatch):
    from remora.cli import app, main

    monkeypatch.setattr(app, "config", ())
    arguments = ["plan", weightless["data"], "--model", weightless["model"], "--device", "cpu"]
    with pytest.raises(SystemExit, match=r"^0$"):
        main([*arguments, "--json"])
    told = json.loads(capsys.readouterr().out)
    assert told["fits"] is True
    assert told["seconds"] > 0
    with pytest.raises(SystemExit, match=r"^0$"):
        main([*arguments, "--checkpointing", "on"])
    assert "checkpointing on" in capsys.readouterr().out

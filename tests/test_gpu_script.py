"""The script for a GPU, on a CPU: what it keeps of parts that end, fail and are cut off."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu

    return gpu


def options_for(folder: Path, **changed: object) -> argparse.Namespace:
    settings = {"device": "cpu", "size": "tiny", "limit": 60.0, "again": False}
    return argparse.Namespace(output=folder / "gpu.json", **{**settings, **changed})


def script(*lines: str, then: str = "") -> tuple[str, ...]:
    """Return a command that prints lines, then does something else."""
    return (sys.executable, "-c", f"print({chr(10).join(lines)!r}, flush=True)\n{then}")


def test_every_part_leaves_what_it_said_and_only_what_is_missing_is_run_again(
    gpu: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rate = json.dumps({"examples_per_second": 710.4})
    test = "tests/test_cuda.py::test_one[a b]"
    slow = script(f"{test} PASSED [ 50%]", then="import time; time.sleep(60)")
    chosen = [
        gpu.Part("remora", 30, script("a warning", rate)),
        gpu.Part("tests", 1.0, slow),
        gpu.Part("liger", 30, script("ImportError: no liger_kernel", then="raise SystemExit(1)")),
    ]
    gpu.run(chosen, options_for(tmp_path))
    found = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    assert found["remora"]["values"] == [{"examples_per_second": 710.4}]
    assert found["tests"]["code"] is None
    assert found["tests"]["tests"] == {test: "PASSED"}
    assert found["liger"] | {"seconds": 0} == {"code": 1, "seconds": 0, "missing": "liger-kernel"}
    said = capsys.readouterr().out
    assert "exit code 0; 710.4 examples/s" in said
    assert "cut off; 1 passed" in said
    assert "liger-kernel is not installed" in said
    # Again: what is done is left alone, and so is the test that has passed.
    repeated = (sys.executable, "-c", "import sys; print('tests/x.py::two FAILED', sys.argv[1:])")
    chosen[1] = gpu.Part("tests", 30, repeated)
    gpu.run(chosen, options_for(tmp_path))
    said = capsys.readouterr().out
    assert "remora: done before" in said
    log = (tmp_path / "gpu" / "tests.log").read_text(encoding="utf-8")
    assert f"--deselect={test}" in log
    found = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    assert sorted(found["tests"]["tests"].values()) == ["FAILED", "PASSED"]


def test_no_part_is_started_when_the_time_is_over(
    gpu: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu.run([gpu.Part("profile", 30, script("{}"))], options_for(tmp_path, limit=0.0))
    assert "no time left; run the same command again" in capsys.readouterr().out
    assert not (tmp_path / "gpu.json").exists()


def test_all_parts_fit_their_commands(gpu: ModuleType) -> None:
    """The arms are those of speed.py, and no name occurs twice."""
    import speed

    for device in ("cuda", "cpu"):
        chosen = gpu.parts(argparse.Namespace(device=device, size="tiny"))
        assert len({part.name for part in chosen}) == len(chosen)
        arms = [p.command[p.command.index("--arm") + 1] for p in chosen if "--arm" in p.command]
        assert {"remora", "recipe", "trl-packed", "liger"} <= set(arms) <= set(speed.ARMS)


@pytest.mark.filterwarnings("ignore")  # as in the script; PEFT uses names of older releases
def test_a_step_is_profiled(gpu: ModuleType, tmp_path: Path) -> None:
    found = gpu.profile(options_for(tmp_path))
    products = [each for each in found["operations"] if "mm" in each["name"]]
    assert products
    assert 0 < found["device_seconds"] < 2 * found["step_seconds"]


@pytest.mark.durability
def test_the_arms_run_on_a_cpu(gpu: ModuleType, tmp_path: Path) -> None:
    options = options_for(tmp_path, limit=600.0)
    wanted = ("remora", "remora, labels listed", "recipe", "padded")
    gpu.run([part for part in gpu.parts(options) if part.name in wanted], options)
    found = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    losses = {name: found[name]["values"][-1]["losses"][0] for name in wanted}
    assert losses["remora"] == pytest.approx(losses["recipe"], rel=1e-3)
    assert losses["remora"] == pytest.approx(losses["padded"], rel=1e-3)

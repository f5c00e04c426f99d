"""Exports that fail end with one line, and leave every file and folder as it was."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import exporting
from exporting import refused, remora
from remora.config import ExportConfig
from remora.errors import ConfigError
from remora.tree import scoring

# PEFT still reads an attribute that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

original, place = exporting.original, exporting.place


def test_no_pickle_is_read(place: Path, monkeypatch, capsys) -> None:
    def fail(*args, **kwargs):
        raise AssertionError("pickle")

    monkeypatch.setattr(torch, "load", fail)
    assert remora("run", "--merge") == 0
    assert remora("run", "--compress", "--budget", "12kB") == 0
    capsys.readouterr()
    Path("run/adapter/adapter_model.safetensors").rename("run/adapter/adapter_model.bin")
    for what in (["--merge"], ["--compress", "--budget", "12kB"]):
        refused(place, capsys, 4, "has no adapter_model.safetensors", "run", *what, "--output", "x")


BAD = {
    "neither": (2, "nothing is to be written; give one of --merge, --compress, --gguf,", []),
    "both": (2, "merge and compress are given together; give", ["--merge", "--compress"]),
    "a budget to merge": (2, "budget and ratio need compress", ["--merge", "--budget", "3MB"]),
    "a merge that learns": (2, "distill needs compress", ["--merge", "--distill"]),
    "8 bits merged": (2, "dtype float8 needs compress", ["--merge", "--dtype", "float8"]),
    "two sizes": (2, "give one of them", ["--compress", "--budget", "3MB", "--ratio", "9"]),
    "no amount": (2, "give an amount such as", ["--compress", "--budget", "lots"]),
    "no ratio": (2, "ratio is 0.0; give", ["--compress", "--ratio", "0"]),
    "no tolerance": (2, "tolerance is -1.0; give", ["--compress", "--tolerance", "-1"]),
    "no tokens": (2, "micro_batch_tokens is 0", ["--merge", "--micro-batch-tokens", "0"]),
    "impossible budget": (2, "the budget is 1,000 bytes", ["--compress", "--budget", "1kB"]),
    "impossible ratio": (
        2,
        "the smallest part of the adapter takes",
        ["--compress", "--ratio", "1e6"],
    ),
    "output in use": (2, "exists already; give another --output", ["--merge", "--output", "base"]),
    "output is a file": (2, "exists already", ["--compress", "--output", "data.csv"]),
    "another base": (4, "was trained on other weights", ["--merge", "--model", "other"]),
    "another base, compressed": (
        4,
        "was trained on other weights",
        ["--compress", "--budget", "12kB", "--model", "other"],
    ),
    "no base": (4, "there is no folder ./none", ["--merge", "--model", "./none"]),
    "a run below a file": (5, "cannot write to", ["--merge", "--output", "data.csv/x"]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(name: str, place: Path, capsys) -> None:
    code, wanted, arguments = BAD[name]
    shutil.copytree("base", "other")
    weights = load_file("other/model.safetensors")
    weights["model.norm.weight"] *= 2
    save_file(weights, "other/model.safetensors", metadata={"format": "pt"})
    refused(place, capsys, code, wanted, "run", *arguments)


@pytest.mark.parametrize("what", ["--merge", "--compress"])
def test_what_is_no_run_is_refused(place: Path, capsys, what: str) -> None:
    refused(place, capsys, 3, "give the directory of a finished run", "base", what)
    shutil.rmtree("run/adapter")
    refused(place, capsys, 4, "is not an adapter of Remora", "run", what)


@pytest.mark.parametrize("what", [["--merge"], ["--compress", "--budget", "12kB"]])
def test_a_base_that_was_moved_is_given(place: Path, capsys, what: list[str]) -> None:
    Path("base").rename("moved")
    refused(place, capsys, 4, "which is not there; say where it is now with --model", "run", *what)
    assert remora("run", *what, "--model", "moved", "--output", "out") == 0


@pytest.mark.parametrize("what", [["--merge"], ["--compress", "--budget", "12kB"]])
def test_the_tokens_at_once_are_limited(place: Path, monkeypatch, what: list[str]) -> None:
    limits = set()
    stock = scoring.Scorer.__init__

    def note(scorer, *args, max_tokens, **kwargs):
        limits.add(max_tokens)
        stock(scorer, *args, max_tokens=max_tokens, **kwargs)

    monkeypatch.setattr(scoring.Scorer, "__init__", note)
    assert remora("run", *what, "--micro-batch-tokens", "77") == 0
    assert limits == {77}


def test_an_empty_folder_may_be_the_output(place: Path) -> None:
    Path("out").mkdir()
    assert remora("run", "--compress", "--budget", "12kB", "--output", "out") == 0
    assert Path("out/remora.json").is_file()


@pytest.mark.parametrize("what", ["--merge", "--compress"])
def test_a_full_disk_is_one_line_and_leaves_nothing(place: Path, capsys, what: str) -> None:
    resource = pytest.importorskip("resource", reason="needs a limit on the size of files")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    budget = ["--budget", "12kB"] if what == "--compress" else []
    resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, hard))
    try:
        refused(place, capsys, 5, f"/place/run/{what[2:]}", "run", what, *budget)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc/self/fd")
def test_files_are_on_the_disk_before_they_take_their_place(place: Path, monkeypatch) -> None:
    synced = []

    def note(handle: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        synced.append((path.name, Path("out").exists()))

    monkeypatch.setattr(os, "fsync", note)
    assert remora("run", "--compress", "--budget", "12kB", "--output", "out") == 0
    names = {"adapter_model.safetensors", "adapter_config.json", "remora.json", "out"}
    assert {name for name, there in synced if not there} == names
    assert synced[-1] == ("place", True)


def test_several_problems_are_told_at_once() -> None:
    both = r"ratio is -1; .*; nothing is to be written"
    with pytest.raises(ConfigError, match=both):
        ExportConfig(Path("run"), ratio=-1)

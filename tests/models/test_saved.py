"""Trained models come back the same, and broken ones are refused.

Also covers remora.models.metadata.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import randomize_adapter, tiny_model
from remora.errors import ConfigError, ModelError, ResourceError
from remora.evaluation.predictions import write_predictions
from remora.models import fused_lora, loading, lora, metadata, saved
from remora.runtime import files, run_directory
from remora.tree.scoring import Scorer

CPU = torch.device("cpu")
IDS = torch.tensor([[5, 6, 7, 8, 9]])


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tokenizer):
    """A saved adapter, its base and the logits it must give."""
    folder = tmp_path_factory.mktemp("trained")
    base = tiny_model("qwen2", torch.float32, vocabulary=len(tokenizer))
    base.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    adapted = lora.add_adapter(base, rank=4, alpha=10, dropout=0.05)
    randomize_adapter(adapted)
    card = metadata.AdapterCard(
        base_model=str(folder / "base"),
        base_sha256=files.weights_sha256(folder / "base"),
        labels=("card", "refund"),
        instruction="Sort this.",
        list_labels=True,
        label_texts={"refund": "Geld zurück"},
        max_length=99,
        truncate="both",
    )
    (folder / "run").mkdir()
    size = saved.save_adapter(adapted, card, folder / "run" / "adapter")
    logits = adapted.eval()(input_ids=IDS).logits.detach()
    return SimpleNamespace(
        folder=folder, run=folder / "run", card=card, adapted=adapted, logits=logits, size=size
    )


@pytest.fixture
def copy(trained, tmp_path):
    return shutil.copytree(trained.run, tmp_path / "run")


def load(path, base=None):
    return saved.load_adapter(path, base=base, dtype=torch.float32, device=CPU)


@pytest.mark.parametrize("inside", ["", "adapter"])
def test_an_adapter_comes_back_the_same(trained, inside):
    adapted, prompt, card = load(trained.run / inside)
    assert torch.equal(adapted(input_ids=IDS).logits, trained.logits)
    assert not adapted.training
    assert card == trained.card
    expected = trained.card.prompt(loading.load_tokenizer(trained.folder / "base"))
    assert prompt.rows(["why"], ["refund"]) == expected.rows(["why"], ["refund"])
    assert prompt.max_length == 99
    assert prompt.kept == "both"


def test_stock_peft_loads_the_same_folder(trained):
    base = loading.load(trained.folder / "base", torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        stock = peft.PeftModel.from_pretrained(base, trained.run / "adapter").eval()
    torch.testing.assert_close(stock(input_ids=IDS).logits, trained.logits, rtol=2e-5, atol=2e-5)
    fused_lora.make_fast(stock)
    assert torch.equal(stock(input_ids=IDS).logits, trained.logits)


def test_the_folder_holds_only_what_is_needed(trained):
    folder = trained.run / "adapter"
    names = {path.name for path in folder.iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "remora.json"}
    assert [path.name for path in trained.run.iterdir()] == ["adapter"]
    assert trained.size == (folder / "adapter_model.safetensors").stat().st_size
    assert {t.dtype for t in load_file(folder / "adapter_model.safetensors").values()} == {
        torch.float32
    }


def test_other_base_weights_are_refused(trained, tmp_path):
    other = shutil.copytree(trained.folder / "base", tmp_path / "other")
    assert torch.equal(load(trained.run, str(other))[0](input_ids=IDS).logits, trained.logits)
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"] *= 2
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"on other weights than those in .*; give its own"):
        load(trained.run, str(other))


@pytest.mark.parametrize(
    "name", ["remora.json", "adapter_config.json", "adapter_model.safetensors"]
)
def test_a_missing_file_is_named(copy, name):
    (copy / "adapter" / name).unlink()
    with pytest.raises(ModelError, match=f"not an adapter of Remora, it has no {name}; "):
        load(copy)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"schema": 1}', '{"schema": 1, "x": 2}', "\xff"]
)
def test_a_broken_card_is_refused(copy, text):
    (copy / "adapter" / "remora.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(
        ModelError, match=r"remora.json (is broken|cannot be read) \(.*\); restore it"
    ):
        load(copy)


def test_a_card_of_another_schema_is_refused(copy):
    path = copy / "adapter" / "remora.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema": 2}))
    with pytest.raises(ModelError, match="has schema 2, this version reads 1; use the version"):
        load(copy)


def test_broken_incomplete_and_foreign_weights_are_refused(copy):
    path = copy / "adapter" / "adapter_model.safetensors"
    weights = load_file(path)
    name = sorted(weights)[0]
    save_file({n: t for n, t in weights.items() if n != name}, path)
    with pytest.raises(ModelError, match=f"lacks {name}, .*; train it again or restore it"):
        load(copy)
    foreign = name.replace("layers.0", "layers.9")
    save_file({**weights, foreign: weights[name].clone()}, path)
    with pytest.raises(ModelError, match=f"has {foreign}, .*; train it again or restore it"):
        load(copy)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ModelError, match=r"cannot be loaded \(.*\); restore it"):
        load(copy)


def test_a_second_save_replaces_the_first(trained, copy):
    marker = copy / "adapter" / "old"
    marker.touch()
    saved.save_adapter(trained.adapted, trained.card, copy / "adapter")
    assert not marker.exists()
    assert [path.name for path in copy.iterdir()] == ["adapter"]


def test_a_full_disk_is_one_line_and_keeps_the_old_adapter(trained, copy):
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = {p.name: p.read_bytes() for p in (copy / "adapter").iterdir()}
    resource.setrlimit(resource.RLIMIT_FSIZE, (8000, hard))
    try:
        with pytest.raises(ResourceError, match=r"cannot write to .*File too large.*; free space"):
            saved.save_adapter(trained.adapted, trained.card, copy / "adapter")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {p.name: p.read_bytes() for p in (copy / "adapter").iterdir()} == before
    assert [path.name for path in copy.iterdir()] == ["adapter"]


def test_what_is_no_saved_classifier_is_not_replaced(trained, tmp_path, monkeypatch) -> None:
    project = tmp_path / "project"
    (project / "sub").mkdir(parents=True)
    (project / "thesis.txt").write_text("a year of work")
    for end in ("tmp", "old"):  # names that others use too
        (tmp_path / f"new.{end}").mkdir()
        (tmp_path / f"new.{end}" / "kept").touch()
    (tmp_path / "file.txt").write_text("kept")

    def save(path: Path) -> None:
        saved.save_adapter(trained.adapted, trained.card, path)

    with pytest.raises(ConfigError, match="holds 'sub', and no saved classifier; give another"):
        save(project)
    with pytest.raises(ConfigError, match=r"file.txt is a file; give the path of a folder"):
        save(tmp_path / "file.txt")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"\. is the current folder; give a path below it"):
        save(Path("."))
    (tmp_path / "new").mkdir()  # an empty folder may be filled
    save(tmp_path / "new")
    save(tmp_path / "new")
    assert (tmp_path / "new" / "remora.json").is_file()
    assert (tmp_path / "new.tmp" / "kept").exists()
    assert (tmp_path / "new.old" / "kept").exists()
    assert (project / "thesis.txt").read_text() == "a year of work"
    assert (tmp_path / "file.txt").read_text() == "kept"


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such permissions")
def test_others_may_read_what_is_saved(trained, tmp_path) -> None:
    mask = os.umask(0o022)
    try:
        saved.save_adapter(trained.adapted, trained.card, tmp_path / "adapter")
        files.write_arrays(tmp_path / "a.safetensors", {"x": np.zeros(1)}, {})
        os.umask(0o077)
        files.write_arrays(tmp_path / "b.safetensors", {"x": np.zeros(1)}, {})
    finally:
        os.umask(mask)
    saved_files = [*(tmp_path / "adapter").iterdir(), tmp_path / "a.safetensors"]
    assert {path.stat().st_mode & 0o777 for path in saved_files} == {0o644}
    assert (tmp_path / "b.safetensors").stat().st_mode & 0o777 == 0o600


def test_a_folder_that_cannot_be_written_is_one_line(trained, tmp_path):
    (tmp_path / "file").touch()
    below = tmp_path / "file" / "x"
    for call in (
        lambda: run_directory.create(below, None, "d", "m"),
        lambda: run_directory.create(tmp_path / "file", "x", "d", "m"),
        lambda: files.write_json(below, {}),
        lambda: write_predictions(below, [], [], [], []),
        lambda: saved.save_adapter(trained.adapted, trained.card, below),
    ):
        with pytest.raises(ResourceError, match=r"cannot write to .*--output"):
            call()


def test_open_trained_gives_all_that_scoring_needs(trained):
    opened = saved.open_trained(trained.run, device="cpu", precision="float32")
    assert opened.card == trained.card
    assert (opened.device, opened.precision.compute) == (CPU, torch.float32)
    assert torch.equal(opened.model(input_ids=IDS).logits, trained.logits)
    scorer = opened.scorer(max_tokens=512, tolerance=0, limit_bytes=7)
    assert (scorer.max_tokens, scorer.tolerance, scorer.limit_bytes) == (512, 0, 7)
    assert scorer.autocast is None
    by_hand = Scorer(*load(trained.run)[:2], tolerance=0)
    assert np.array_equal(scorer.probabilities(["why"]), by_hand.probabilities(["why"]))


def test_open_trained_computes_in_the_precision_that_was_asked_for(trained):
    opened = saved.open_trained(str(trained.run), device="cpu", precision="bfloat16")
    assert opened.scorer().autocast is torch.bfloat16
    assert next(opened.model.get_base_model().parameters()).dtype is torch.bfloat16


def test_open_trained_takes_another_folder_for_the_base(trained, tmp_path):
    moved = shutil.copytree(trained.folder / "base", tmp_path / "moved")
    opened = saved.open_trained(trained.run, base=str(moved), device="cpu", precision="float32")
    assert torch.equal(opened.model(input_ids=IDS).logits, trained.logits)
    with pytest.raises(ModelError, match=r"give the folder of a Hugging Face model"):
        saved.open_trained(trained.run, base=str(tmp_path / "gone"), device="cpu")

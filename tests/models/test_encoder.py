"""Sentence encoders: what is loaded, and what is refused before anything is."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import encoders
from remora.errors import ConfigError, ModelError
from remora.models import encoder

installed = importlib.util.find_spec("sentence_transformers") is not None
needs_library = pytest.mark.skipif(not installed, reason="needs sentence-transformers")


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks of files need no library."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return encoders.write(tmp_path / "encoder")


@needs_library
def test_embeddings_are_the_normalized_means_of_the_transformer(folder: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    texts = ["where is my card", "é"]
    model = encoder.load(encoder.find(str(folder)), torch.device("cpu"))
    found = encoder.embed(model, texts)
    tokenizer, stock = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
    for text, row in zip(texts, found, strict=True):
        with torch.no_grad():
            mean = stock(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0)
        np.testing.assert_allclose(row, mean / mean.norm(), atol=1e-5)
    assert found.dtype == np.float32


def test_without_the_library_it_says_what_to_install(folder: Path, monkeypatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'remora\[embeddings\]'"):
        encoder.find(str(folder))


@pytest.mark.usefixtures("pretended")
def test_the_folder_itself_is_fine(folder: Path) -> None:
    assert encoder.find(str(folder)) == folder


def module(**changes: Any) -> list[dict[str, Any]]:
    return [{**encoders.MODULES[0], **changes}, *encoders.MODULES[1:]]


@pytest.mark.usefixtures("pretended")
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("modules.json", "{", "cannot be read"),
        ("modules.json", '{"type": 1}', "cannot be read"),
        ("modules.json", "[1]", "cannot be read"),
        ("modules.json", json.dumps(module(type="os.Transformer")), "has the module 'os.Trans"),
        (
            "modules.json",
            json.dumps(module(type="sentence_transformers.models.WordEmbeddings")),
            "WordEmbeddings' in '', which is not loaded here",
        ),
        ("modules.json", json.dumps(module(path="..")), "which is not loaded here"),
        ("modules.json", json.dumps(module(path="/tmp")), "which is not loaded here"),
        (
            "modules.json",
            json.dumps([encoders.MODULES[0], {**encoders.MODULES[1], "path": ".."}]),
            "in '..', which is not loaded here",
        ),
        ("config.json", "[]", "not a JSON object"),
        ("config.json", '{"model_type": "bert", "num_hidden_layers": 9999}', "more than 1,000"),
        ("config.json", '{"model_type": "bert", "hidden_size": 12000}', "hold"),
        ("config.json", '{"model_type": "bert", "hidden_size": 7}', "of no encoder"),
    ],
)
def test_what_is_not_loaded_is_refused(folder: Path, name: str, content: str, message: str) -> None:
    (folder / name).write_text(content)
    with pytest.raises(ModelError, match=message):
        encoder.find(str(folder))


@pytest.mark.usefixtures("pretended")
def test_pickled_weights_and_missing_files_are_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="pickled weights are never read"):
        encoder.find(str(folder))
    (folder / "modules.json").unlink()
    with pytest.raises(ModelError, match=r"no modules\.json; give another"):
        encoder.find(str(folder))
    with pytest.raises(ModelError, match=r"there is no folder .*; give --embedding-model"):
        encoder.find(str(tmp_path / "missing"))


@pytest.mark.usefixtures("pretended")
def test_a_hub_id_is_fetched_without_other_formats(folder: Path, monkeypatch) -> None:
    from remora.models import hub

    asked = []

    def fetch(name: str, patterns: Any, ignored: Any) -> Path:
        asked.append((name, ignored))
        return folder

    monkeypatch.setattr(hub, "fetch", fetch)
    assert encoder.find("owner/encoder") == folder
    assert asked == [("owner/encoder", encoder.OTHER_FORMATS)]

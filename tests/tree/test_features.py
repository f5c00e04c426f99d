"""Frozen features equal those of the stock model, row by row; and files of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import ARCHITECTURES, randomize_adapter, tiny_model
from remora.config import TrainConfig
from remora.data.prompt import Prompt
from remora.models import lora
from remora.tree import features

LABELS = ["card arrival", "refund"]
MESSAGES = [
    "where is my card",
    "my refund!",
    "top up failed, why?",
    "where is my card",
    "card",
    "é",
]


def stock(model, prompt: Prompt, messages: list[str]) -> np.ndarray:
    """Each message in a sequence of its own, through the stock model; [messages, 5, H]."""
    rows = []
    for stem in prompt.stems(messages):
        with torch.no_grad():
            states = model.eval()(torch.tensor([stem]), output_hidden_states=True).hidden_states
        own = slice(min(len(prompt.prefix), len(stem) - 1), None)
        means = [states[i][0, own].mean(0) for i in (0, len(states) // 2, -1)]
        rows.append(torch.stack([states[-1][0, -1], states[-2][0, -1], *means]))
    return torch.stack(rows).double().numpy()


def stems(prompt: Prompt, messages: list[str]) -> list[tuple[int, ...]]:
    return [tuple(stem) for stem in prompt.stems(messages)]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_they_equal_those_of_the_rows_one_by_one(architecture: str, tokenizer) -> None:
    model = tiny_model(architecture, torch.float64, scale=2, vocabulary=len(tokenizer))
    prompt = Prompt(tokenizer, LABELS, instruction="Sort this.", max_length=200)
    expected = stock(model, prompt, MESSAGES)
    for max_tokens in (4096, 12):
        found = features.Extractor(model, prompt, max_tokens=max_tokens).features(
            stems(prompt, MESSAGES)
        )
        assert found.dtype == np.float16
        np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-3)


def test_between_groups_threads_adapt_to_other_work(
    tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(features.threads, "adapt", asked.append)
    model = tiny_model("qwen2", torch.float32, vocabulary=len(tokenizer))
    prompt = Prompt(tokenizer, LABELS, instruction="Sort this.", max_length=200)
    features.Extractor(model, prompt, max_tokens=12).features(stems(prompt, MESSAGES))
    assert len(asked) > 1


def test_without_its_adapter_a_model_has_the_features_of_its_base(tokenizer) -> None:
    model = tiny_model("qwen2", torch.float32, scale=2, vocabulary=len(tokenizer))
    prompt = Prompt(tokenizer, LABELS, instruction="", max_length=200)
    expected = stock(model, prompt, MESSAGES)
    adapted = lora.adapt(model, TrainConfig("", model="", rank=4))
    randomize_adapter(adapted)
    extractor = features.Extractor(adapted, prompt)
    assert not np.allclose(extractor.features(stems(prompt, MESSAGES)), expected, atol=2e-3)
    with adapted.disable_adapter():
        found = features.Extractor(adapted, prompt).features(stems(prompt, MESSAGES))
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-3)


def test_states_beyond_16_bits_are_clipped_not_infinite(tokenizer) -> None:
    model = tiny_model("qwen2", torch.float32, scale=2, vocabulary=len(tokenizer))
    with torch.no_grad():
        model.model.norm.weight.mul_(1e8)
    prompt = Prompt(tokenizer, LABELS, instruction="", max_length=200)
    found = features.Extractor(model, prompt).features(stems(prompt, MESSAGES))
    assert np.isfinite(found).all()
    assert np.abs(found).max() == features.LARGEST


def test_no_stems_have_no_features(tokenizer) -> None:
    """A process may have no part of a small batch."""
    model = tiny_model("qwen2", torch.float32, vocabulary=len(tokenizer))
    prompt = Prompt(tokenizer, LABELS, instruction="", max_length=200)
    assert len(features.Extractor(model, prompt).features([])) == 0


KEY = features.key("0" * 64, "lora")


def test_a_file_gives_back_what_it_has(tmp_path: Path) -> None:
    path = tmp_path / features.FEATURES
    rows = [(1, 2, 3), (4,), (5, 6)]
    values = np.random.default_rng(0).normal(size=(3, 5, 4)).astype(np.float16)
    features.write(path, rows, values, KEY, 12.5)
    found = features.read(path, [(5, 6), (1, 2, 3), (7,), (5, 6)], KEY)
    assert found.seconds == 12.5
    assert found.features.keys() == {(5, 6), (1, 2, 3)}
    assert np.array_equal(found.features[5, 6], values[2])
    assert np.array_equal(found.features[1, 2, 3], values[0])


def test_a_file_of_another_base_or_a_broken_one_gives_nothing(tmp_path: Path) -> None:
    path = tmp_path / features.FEATURES
    assert features.read(path, [(1,)], KEY) == features.NONE
    features.write(path, [(1,)], np.ones((1, 5, 4), np.float16), KEY, 1.0)
    assert features.read(path, [(1,)], features.key("1" * 64, "lora")) == features.NONE
    assert features.read(path, [(1,)], features.key("0" * 64, "qlora")) == features.NONE
    assert features.read(path, [(1,)], features.key("0" * 64, "full")).features
    whole = path.read_bytes()
    for content in (b"", whole[:20], whole[:-3], b"{}" * 50):
        path.write_bytes(content)
        assert features.read(path, [(1,)], KEY) == features.NONE

"""A head over classes as an ONNX model, answered by ONNX Runtime; also covers onnx_client."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import WAYS, WORDS, write_table
from exporting import refused, remora
from remora.config import TrainConfig
from remora.export import onnx, onnx_client
from remora.models.saved import open_trained
from remora.training.run import train

MESSAGES = [way.format(word) for way in WAYS[:3] for word in WORDS.values()]


@pytest.fixture(scope="module")
def original(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run whose labels are classes, its base and its table in one folder."""
    folder = tmp_path_factory.mktemp("onnx")
    shutil.copytree(base, folder / "base")
    write_table(folder / "data.csv", repeats=4)
    train(settings(folder, learning_rate=1e-2, rank=16))
    sets = [(text, [label]) for text, label in zip(MESSAGES, WORDS, strict=False)]
    sets += [(f"{a}, {b}", [*x, *y]) for (a, x), (b, y) in itertools.combinations(sets, 2)]
    lines = (json.dumps({"text": text, "label": labels}) for text, labels in 4 * sets)
    (folder / "several.jsonl").write_text("\n".join(lines))
    train(settings(folder, name="full", data="several.jsonl", method="full", answer=None))
    return folder


def settings(place: Path, data: str = "data.csv", **more: Any) -> TrainConfig:
    return TrainConfig(
        str(place / data),
        **{
            "model": str(place / "base"),
            "output": place,
            "name": "run",
            "answer": "classes",
            "max_steps": 20,
            "patience": 0,
            "batch_size": 16,
            "micro_batch_tokens": 256,
            "precision": "float32",
            "device": "cpu",
            "baselines": ("none",),
            **more,
        },
    )


@pytest.fixture
def place(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy that a test may change; the paths in it lead there."""
    copied = shutil.copytree(original, tmp_path / "place")
    for path in [*copied.glob("*/config.toml"), *copied.glob("*/*/remora.json")]:
        path.write_text(path.read_text().replace(str(original), str(copied)))
    monkeypatch.chdir(copied)
    return copied


def predicted(run: str, messages: list[str]) -> np.ndarray:
    return open_trained(run, device="cpu", precision="float32").scorer().probabilities(messages)


def test_onnx_runtime_gives_the_same_probabilities(place: Path, capsys) -> None:
    assert remora("run", "--onnx", "--json") == 0
    captured = capsys.readouterr()
    assert "Loading" not in captured.err
    told = json.loads(captured.out)
    folder = Path("run/onnx")
    assert sorted(path.name for path in folder.iterdir()) == [
        *("classifier.json", "client.py", "model.onnx", "tokenizer.json")
    ]
    assert (told["directory"], told["num_flips"]) == (str(folder.absolute()), 0)
    assert told["largest_difference"] < 1e-4
    # Rows of unequal length, one longer than the context, one with a control token
    tokenizer = open_trained("run", device="cpu").prompt.tokenizer
    messages = [*MESSAGES, "", f"card {tokenizer.eos_token} refund", " spaces  "]
    wanted = predicted("run", messages)
    shutil.rmtree("base")
    client = onnx_client.Classifier(folder)
    assert client.labels == sorted(WORDS)
    np.testing.assert_allclose(client.probabilities(messages), wanted, atol=1e-5)
    np.testing.assert_allclose(client.probabilities(messages[:1]), wanted[:1], atol=1e-5)
    (ids,) = client.token_ids(["where is it " * 500])
    assert len(ids) == client.max_length
    (short,) = client.token_ids(["where"])
    assert ids[-2:] == short[-2:]

    # The client by itself, as a user runs it, from lines and from arguments; blank ones get none
    command = [sys.executable, "-I", str(folder / "client.py")]
    given = ["", *MESSAGES[:2], " ", *MESSAGES[2:], ""]
    for more, lines in (((), "".join(f"{each}\n" for each in given)), (given, None), ([""], None)):
        done = subprocess.run(
            [*command, *more], input=lines, capture_output=True, text=True, check=True
        )
        answers = [line.split("\t") for line in done.stdout.splitlines()]
        assert [answer != [""] for answer in answers] == [bool(x.strip()) for x in more or given]
        if more == [""]:
            continue
        answers = [answer for answer in answers if answer != [""]]
        best = wanted[: len(MESSAGES)]
        assert [label for label, _ in answers] == [client.labels[i] for i in best.argmax(1)]
        np.testing.assert_allclose([float(p) for _, p in answers], best.max(1), atol=1e-4)


def test_a_fully_trained_model_of_several_labels_a_row_is_exported_too(place: Path, capsys) -> None:
    assert remora("full", "--onnx") == 0
    assert "the same label on all" in capsys.readouterr().out
    client = onnx_client.Classifier("full/onnx")
    trained = open_trained("full", device="cpu", precision="float32")
    wanted = trained.scorer().probabilities(MESSAGES)
    np.testing.assert_allclose(client.probabilities(MESSAGES), wanted, atol=1e-5)
    assert tuple(client.thresholds) == trained.card.thresholds
    given = [{client.labels[i] for i in np.flatnonzero(row >= client.thresholds)} for row in wanted]
    assert [{label for label, _ in answer} for answer in client.answers(MESSAGES)] == given
    assert any(len(labels) != 1 for labels in given)


def wrong_token(self: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    hidden = self.body(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
    logits: torch.Tensor = self.score(hidden[:, 2])
    return logits


def test_what_answers_otherwise_is_not_written(place: Path, capsys, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(onnx.LastToken, "forward", wrong_token)
        refused(place, capsys, 4, "is not the same classifier", "run", "--onnx")
    with monkeypatch.context() as patch:
        patch.setattr(onnx, "_write_model", lambda *_: None)
        patch.setattr(onnx_client, "onnxruntime", Engine)
        patch.setattr(onnx_client.Classifier, "token_ids", lambda _, batch: [[5, 6]] * len(batch))
        refused(place, capsys, 4, "reads other tokens than the adapter was", "run", "--onnx")

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no operator\nfor this")

    monkeypatch.setattr(torch.onnx, "export", fail)
    refused(place, capsys, 4, "torch's exporter cannot write this model as ONNX", "run", "--onnx")


class Engine:
    """ONNX Runtime without a model."""

    SessionOptions = type("SessionOptions", (), {})

    def __init__(self, *_: object, **__: object) -> None:
        pass

    InferenceSession = type("InferenceSession", (), {"__init__": __init__})

    @staticmethod
    def get_available_providers() -> list[str]:
        return []


def test_what_cannot_be_written_is_refused(place: Path, capsys, monkeypatch) -> None:
    refused(place, capsys, 2, "is stored in float32", "run", "--onnx", "--dtype", "float16")
    refused(place, capsys, 4, "use --merge or --onnx", "run", "--gguf", "f16")
    card = Path("run/adapter/remora.json")
    told = json.loads(card.read_text())
    card.write_text(json.dumps({**told, "answer": "words"}))
    refused(place, capsys, 4, "--onnx is for a head over classes", "run", "--onnx")
    card.write_text(json.dumps(told))
    monkeypatch.setattr(onnx, "PACKAGES", ("onnx", "not_there"))
    refused(place, capsys, 2, "run pip install 'remora[onnx]'", "run", "--onnx")

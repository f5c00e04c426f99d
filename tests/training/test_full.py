"""Full fine-tuning: every weight trains, and a plain model folder is what is left."""

from __future__ import annotations

import csv
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from conftest import ARCHITECTURES, build_tokenizer, call, tiny_model
from remora import TextClassifier
from remora.config import TrainConfig
from remora.data.dataset import load_data
from remora.data.prompt import Prompt, TokenSequence
from remora.errors import ModelError, Stopped
from remora.models import lora, saved
from remora.models.saved import open_trained
from remora.runtime.reporter import Reporter, Validation
from remora.training import checkpoint, resume
from remora.training.run import train
from remora.tree import packing, scoring
from remora.tree.forward import answer_logits
from remora.tree.loss import loss_sum
from service import call as ask
from service import predicted, running

CPU = torch.device("cpu")


def settings(base: Path, table: Path, output: Path, **others: Any) -> TrainConfig:
    return TrainConfig(
        str(table),
        model=str(base),
        output=output,
        **{"method": "full", "learning_rate": 4e-3, "epochs": 10, "batch_size": 8, "patience": 0}
        | {"precision": "float32", "device": "cpu"}
        | others,
    )


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model whose embeddings are its head too."""
    folder = tmp_path_factory.mktemp("tied")
    tokenizer = build_tokenizer()
    model = tiny_model("gemma3", torch.float32, scale=2, vocabulary=len(tokenizer))
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trained(base: Path, table: Path, tmp_path_factory: pytest.TempPathFactory):
    return train(settings(base, table, tmp_path_factory.mktemp("runs")))


def stock(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    found, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return found.eval()


def probabilities(model: Any, prompt: Prompt, texts: list[str]) -> np.ndarray:
    """What a model of transformers gives each label, each sequence by itself."""
    logs = np.empty((len(texts), len(prompt.answers)))
    for i, stem in enumerate(prompt.stems(texts)):
        for j, answer in enumerate(prompt.answers):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([[*stem, *answer]])).logits[0]
            steps = logits[len(stem) - 1 : -1].double().log_softmax(-1)
            logs[i, j] = float(steps.gather(1, torch.tensor(answer)[:, None]).sum())
    exponents = np.exp(logs - logs.max(1, keepdims=True))
    return exponents / exponents.sum(1, keepdims=True)


def measured(directory: Path) -> list[tuple[str, str]]:
    """The test rows of a run and the probabilities that it measured."""
    lines = (directory / "predictions.csv").read_text("utf-8").splitlines()
    return [(row["text"], row["probability"]) for row in csv.DictReader(lines)]


def measured_again(directory: Path, precision: Any) -> list[tuple[str, str]]:
    """The same, computed by the model that lies in the run directory."""
    texts = [text for text, _ in measured(directory)]
    scorer = open_trained(directory, precision=precision, device="cpu").scorer()
    found = scoring.score_table(scorer, texts, "test", Reporter())
    return [(text, f"{p:.6f}") for text, p in zip(texts, found.max(1), strict=True)]


def test_every_weight_trains_and_the_run_holds_a_plain_model(trained, base: Path) -> None:
    before, after = stock(base), stock(trained.directory / "model")
    num_parameters = sum(p.numel() for p in before.parameters())
    assert trained.parameters.trainable == trained.parameters.total == num_parameters
    assert trained.parameters.share == 1
    assert all(
        not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True)
    )
    assert trained.metrics.accuracy == 1.0
    assert not (trained.directory / "adapter").exists()
    weights = trained.directory / "model" / "model.safetensors"
    assert trained.adapter_bytes == weights.stat().st_size


def test_stock_transformers_and_predict_give_the_same_probabilities(trained) -> None:
    model = open_trained(trained.directory, precision="float32", device="cpu")
    scorer = model.scorer(tolerance=0.0)
    texts = ["my card", "refund please", "the top up again"]
    expected = probabilities(stock(trained.directory / "model"), scorer.prompt, texts)
    np.testing.assert_allclose(scorer.probabilities(texts), expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_all_gradients_are_those_of_the_rows_one_by_one(architecture: str) -> None:
    rows = [
        TokenSequence([3, 4, 5, 6, *message, 7, *answer], 5 + len(message))
        for message, answer in (([11, 12, 13], [8, 2]), ([11, 14], [8, 9, 2]), ([15], [10, 2]))
    ]
    model = lora.adapt(
        tiny_model(architecture, torch.float32, scale=2), TrainConfig("", model="", method="full")
    )
    packed = packing.build(rows)
    loss_sum(answer_logits(model, packed), packed).backward()
    expected = tiny_model(architecture, torch.float32, scale=2)
    for row in rows:
        logits = expected(input_ids=torch.tensor([row.token_ids])).logits[
            0, row.answer_start - 1 : -1
        ]
        targets = torch.tensor(row.token_ids[row.answer_start :])
        torch.nn.functional.cross_entropy(logits, targets, reduction="sum").backward()
    for (name, ours), theirs in zip(model.named_parameters(), expected.parameters(), strict=True):
        if theirs.grad is None:
            assert ours.grad is None, name
            continue
        # A bias of the keys changes no attention: its gradient is 0 but for rounding.
        error = float((ours.grad - theirs.grad).norm())
        assert error < 1e-3 * float(theirs.grad.norm()) + 1e-5, name


def test_a_16_bit_base_trains_in_float32_and_is_measured_as_it_is_used(
    base: Path, table: Path, tmp_path: Path
) -> None:
    narrow = shutil.copytree(base, tmp_path / "narrow")
    stock(base).to(torch.bfloat16).save_pretrained(narrow)
    config = settings(narrow, table, tmp_path / "runs", precision="bfloat16", max_steps=3)
    directory = train(config).directory
    weights = load_file(directory / "model" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    # Not rounded on the way: no tensor is what 16 bits would have made of it.
    assert not any(torch.equal(w, w.bfloat16().float()) for w in weights.values())
    assert measured_again(directory, "bfloat16") == measured(directory)


def test_a_float32_base_is_not_rounded_where_16_bits_are_computed_in(
    base: Path, table: Path, tmp_path: Path
) -> None:
    config = settings(base, table, tmp_path, precision="bfloat16", learning_rate=1e-8, max_steps=1)
    after = load_file(train(config).directory / "model" / "model.safetensors")
    for name, weight in load_file(base / "model.safetensors").items():
        torch.testing.assert_close(after[name], weight, rtol=1e-6, atol=1e-7)


class Watcher(Reporter):
    def __init__(self) -> None:
        self.seen: list[Validation] = []

    def validated(self, validation: Validation) -> None:
        self.seen.append(validation)


def test_the_best_weights_are_kept_not_the_last(base: Path, table: Path, tmp_path: Path) -> None:
    watcher = Watcher()
    config = settings(base, table, tmp_path, eval_steps=1, learning_rate=0.02, max_steps=8)
    config = replace(config, schedule="constant")
    result = train(config, reporter=watcher)
    best = max(watcher.seen, key=lambda v: (v.accuracy, -v.loss))
    assert [v.best for v in watcher.seen].count(True) > 1  # kept more than once
    assert watcher.seen[-1] != best
    scorer = open_trained(result.directory, precision="float32", device="cpu").scorer()
    rows = load_data(config).validation
    found = scoring.evaluate_rows(scorer, rows, "validation", Reporter())
    assert found == pytest.approx((best.accuracy, best.loss), rel=1e-4)
    assert measured_again(result.directory, "float32") == measured(result.directory)


@pytest.mark.parametrize("num_stops", [1, 3])
def test_a_run_that_was_stopped_ends_with_the_same_bits(
    tied: Path, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_stops: int
) -> None:
    monkeypatch.setattr(resume, "finish", lambda directory: None)
    config = settings(tied, table, tmp_path / "runs", max_steps=5, eval_steps=2)
    config = replace(config, micro_batch_tokens=60)
    undisturbed = train(replace(config, output=tmp_path / "undisturbed")).directory
    for _ in range(num_stops):
        with pytest.raises(Stopped):
            train(replace(config, max_time="0s"))
    directory = train(config).directory
    for name in ("model/model.safetensors", f"checkpoints/*/{checkpoint.TENSORS}"):
        (ours,), (theirs,) = directory.glob(name), undisturbed.glob(name)
        assert ours.read_bytes() == theirs.read_bytes(), name
    names = load_file(ours).keys()
    assert "weights/model.embed_tokens.weight" in names
    assert "weights/lm_head.weight" not in names  # it is the embeddings


def test_tied_weights_count_once(tied: Path, table: Path, tmp_path: Path) -> None:
    result = train(settings(tied, table, tmp_path, max_steps=1))
    found = stock(result.directory / "model")
    assert found.get_input_embeddings().weight is found.get_output_embeddings().weight
    assert result.parameters.total == sum(p.numel() for p in found.parameters())


def test_the_classifier_comes_back_the_same(base: Path, tmp_path: Path) -> None:
    texts, labels = ["my card is late", "where is the refund"] * 8, ["card arrival", "refund"] * 8
    classifier = TextClassifier(
        str(base), method="full", learning_rate=5e-3, precision="float32", device="cpu", max_steps=4
    ).fit(texts, labels)
    classifier.save(tmp_path / "saved")
    loaded = TextClassifier.load(tmp_path / "saved", precision="float32", device="cpu")
    assert loaded.get_params()["method"] == "full"
    expected = classifier.predict_proba(texts[:2])
    np.testing.assert_array_equal(loaded.predict_proba(texts[:2]), expected)
    prompt = classifier.prompt_
    np.testing.assert_allclose(
        expected, probabilities(stock(tmp_path / "saved"), prompt, texts[:2]), atol=0.011
    )


def test_the_command_line_trains_measures_and_reports(
    base: Path, table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_it = ["train", table, "--model", base, "--output", tmp_path, "--device", "cpu"]
    assert call(*train_it, "--max-steps", "2", "--method", "full") == 0
    shown = capsys.readouterr()
    assert "(100.00%), all weights" in shown.err
    assert re.search("^model      .*; 100.00% of the parameters trained$", shown.out, re.M)
    (directory,) = tmp_path.iterdir()
    assert json.loads((directory / "evaluation.json").read_text())["method"] == "full"
    assert "<dt>model</dt>" in (directory / "report.html").read_text("utf-8")
    assert call("eval", directory, table, "--json") == 0
    assert json.loads(capsys.readouterr().out)["num_rows"] == 90


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["export", "{}", "--merge"], "has no adapter to merge or compress; use .*model, which"),
        (["export", "{}", "--compress"], "has no adapter to merge or compress; use .*model, which"),
        (["serve", "{}", "x={}", "--port", "0"], "shares no base with others; serve it by itself"),
        (["serve", "{}", "--port", "0", "--model", "nano"], "needs no base; leave out --model"),
        (["predict", "{}", "none.csv", "--model", "nano"], "needs no base; leave out --model"),
    ],
)
def test_what_needs_an_adapter_is_refused(
    trained, arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(*(a.format(trained.directory) for a in arguments)) == 4
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert re.search(told, line)


def test_it_is_served_as_it_predicts(trained) -> None:
    texts = [text for text, _ in measured(trained.directory)][:20]
    with running(trained.directory / "model") as service:
        answer = ask(service.url, "/v1/classify", {"texts": texts, "top_k": 3}).json
        refused = ask(service.url, f"/v1/adapters/{answer['adapter']}/reload", {})
    card = json.loads((trained.directory / "model" / "remora.json").read_text())
    assert answer["adapter"] == trained.directory.name
    assert answer["sha256"] == card["base_sha256"]
    wanted = predicted(trained.directory, texts, 3)
    for row, best in zip(answer["results"], wanted, strict=True):
        assert [found["label"] for found in row["labels"]] == [label for label, _ in best]
        assert [found["probability"] for found in row["labels"]] == pytest.approx(
            [probability for _, probability in best], abs=1e-4
        )
    assert refused.status == 409


def test_other_weights_and_unknown_methods_are_refused(trained, tmp_path: Path) -> None:
    copy = shutil.copytree(trained.directory, tmp_path / "run")
    card = copy / "model" / "remora.json"
    good = json.loads(card.read_text())
    card.write_text(json.dumps({**good, "method": "magic"}))
    with pytest.raises(ModelError, match="a value has the wrong type"):
        saved.load_adapter(copy, base=None, dtype=torch.float32, device=CPU)
    card.write_text(json.dumps({**good, "base_sha256": "0" * 64}))
    with pytest.raises(ModelError, match="have changed since they were written; restore them"):
        saved.load_adapter(copy, base=None, dtype=torch.float32, device=CPU)

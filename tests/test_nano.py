"""The base model in the package, here and in stock transformers and PEFT."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from remora import TextClassifier
from remora.data.dataset import load_dataset
from remora.data.prompt import Prompt
from remora.models import hub, loading

ALLOWED = {
    "README.md",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}


@pytest.fixture(scope="module")
def folder() -> Path:
    return hub.find("nano")


def test_it_is_small_and_holds_no_code_and_no_pickle(folder: Path) -> None:
    files = {path.name: path.stat().st_size for path in folder.iterdir()}
    assert set(files) == ALLOWED
    assert sum(files.values()) <= 12_000_000


def test_it_wins_over_a_folder_of_its_name(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nano").mkdir()
    (tmp_path / "nano" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert hub.find("nano") == folder
    assert hub.find("./nano") == tmp_path / "nano"


def test_stock_transformers_loads_it_and_it_writes(folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenizer = AutoTokenizer.from_pretrained(folder)
        stock, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert type(stock).__name__ == "Qwen2ForCausalLM"
    parameters = sum(p.numel() for p in stock.parameters())
    assert parameters == 5_510_400
    conversation = [{"role": "user", "content": "Classify the message.\n\nPlay some jazz."}]
    ids = tokenizer.apply_chat_template(
        conversation, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    written = stock.generate(**ids, max_new_tokens=24, do_sample=False)
    answer = written[0, ids["input_ids"].shape[1] :].tolist()
    assert answer[-1] == tokenizer.eos_token_id, "it ends its answer"
    assert 1 < len(answer) < 24


@pytest.mark.parametrize("text", ["Card 4021 was charged £9.99!", "ñandú — 東京", "a_b-c\tD\n  e"])
def test_every_text_comes_back_from_its_tokens(folder: Path, text: str) -> None:
    tokenizer = loading.load_tokenizer(folder)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == text
    digits = [
        token for token in tokenizer.convert_ids_to_tokens(ids) if any(map(str.isdigit, token))
    ]
    assert all(sum(map(str.isdigit, token)) == 1 for token in digits)


def test_its_prompt_is_in_the_form_of_qwen(folder: Path) -> None:
    tokenizer = loading.load_tokenizer(folder)
    prompt = Prompt(tokenizer, ["a", "b"], instruction="Sort this.", max_length=2048)
    (row,) = prompt.rows(["hello"], ["b"])
    assert tokenizer.decode(row.token_ids) == (
        "<|im_start|>user\nSort this.\n\nhello<|im_end|>\n<|im_start|>assistant\nb<|im_end|>"
    )


def test_its_adapter_gives_the_same_predictions_in_stock_peft(tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    dataset = load_dataset("sample:support", seed=0)
    texts, labels = dataset.train.texts[:96], dataset.train.labels[:96]
    classifier = TextClassifier("nano", precision="float32", device="cpu", max_steps=4)
    classifier.fit(texts, labels)
    classifier.save(tmp_path)
    few = dataset.validation.texts[:3]
    found = classifier.predict_proba(few)

    base = AutoModelForCausalLM.from_pretrained(hub.find("nano"), dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        stock = PeftModel.from_pretrained(base, tmp_path).eval()
    prompt = classifier.prompt_
    logs = np.empty_like(found)
    for i, stem in enumerate(prompt.stems(few)):
        for j, answer in enumerate(prompt.answers):
            with torch.no_grad():
                logits = stock(input_ids=torch.tensor([[*stem, *answer]])).logits[0]
            steps = logits[len(stem) - 1 : -1].double().log_softmax(-1)
            logs[i, j] = float(steps.gather(1, torch.tensor(answer)[:, None]).sum())
    expected = np.exp(logs - logs.max(1, keepdims=True))
    expected /= expected.sum(1, keepdims=True)
    assert (found.argmax(1) == expected.argmax(1)).all()
    np.testing.assert_allclose(found, expected, atol=0.011)  # the scorer's tolerance
    card = json.loads((tmp_path / "remora.json").read_text())
    assert card["base_model"] == "nano"

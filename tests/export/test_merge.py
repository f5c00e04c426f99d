"""A merged model is the same classifier, or is not written: stock transformers and PEFT check."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import exporting
from conftest import ARCHITECTURES, randomize_adapter, tiny_model
from exporting import MESSAGES, labels, refused, remora
from remora.data.dataset import load_data
from remora.export import merge
from remora.models import loading, lora, saved
from remora.runtime import files, run_directory

# PEFT still reads an attribute that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

original, place = exporting.original, exporting.place


def test_stock_transformers_loads_the_merged_model_alone(place: Path, capsys) -> None:
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    base = AutoModelForCausalLM.from_pretrained("base")
    wanted = peft.PeftModel.from_pretrained(base, "run/adapter").eval()(input_ids=ids).logits
    assert remora("run", "--merge", "--json") == 0
    shutil.rmtree("base")
    told = json.loads(capsys.readouterr().out)
    folder = place / "run" / "merged"
    assert told["directory"] == str(folder)
    assert told["num_bytes"] == sum(path.stat().st_size for path in folder.iterdir())
    assert (told["num_flips"], told["num_rows"], told["measured_on"]) == (0, 12, "test")
    assert 0 <= told["largest_difference"] < 1e-3
    merged = AutoModelForCausalLM.from_pretrained(folder)
    assert merged.dtype == torch.float32
    torch.testing.assert_close(merged(input_ids=ids).logits, wanted, rtol=1e-3, atol=1e-3)


THINKING = (
    "Today is {{ strftime_now('%d %B %Y') }}, \"{{ 'quoted' }}\" \\ {{ '{' }}{ é 😀\n"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>\n"
    "{% endif %}{% endif %}"
)


def test_stock_generate_writes_the_labels_that_predict_gives(place: Path) -> None:
    """By the merged model's own settings: a chat model's would draw them, and avoid repetition."""
    chat = {"do_sample": True, "temperature": 0.7, "top_k": 20, "repetition_penalty": 1.1}
    end = json.loads(Path("base/config.json").read_text())["eos_token_id"]
    Path("base/generation_config.json").write_text(json.dumps({**chat, "eos_token_id": end}))
    assert remora("run", "--merge", "--output", "out") == 0
    card = json.loads(Path("out/remora.json").read_text())
    model = AutoModelForCausalLM.from_pretrained("out")
    tokenizer = AutoTokenizer.from_pretrained("out", padding_side="left")
    asked = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": f"{card['instruction']}\n\n{message}"}],
            tokenize=False,
            add_generation_prompt=True,
        )
        for message in MESSAGES
    ]
    inputs = tokenizer(asked, add_special_tokens=False, padding=True, return_tensors="pt")
    written = model.generate(**inputs)[:, inputs.input_ids.shape[1] :]
    found = tokenizer.batch_decode(written, skip_special_tokens=True)
    assert [text.strip() for text in found] == [label for label, _ in labels(Path("run"))]


def test_the_merged_base_is_the_base_and_the_tokenizer_its_own(place: Path) -> None:
    assert remora("run", "--merge", "--output", "out") == 0
    base, merged = load_file("base/model.safetensors"), load_file("out/model.safetensors")
    adapter = load_file("run/adapter/adapter_model.safetensors")
    assert base.keys() == merged.keys()
    for name, weight in base.items():
        a = adapter.get(f"base_model.model.{name.replace('.weight', '.lora_A.weight')}")
        if a is None:
            assert torch.equal(merged[name], weight)
            continue
        b = adapter[f"base_model.model.{name.replace('.weight', '.lora_B.weight')}"]
        torch.testing.assert_close(merged[name], weight + 4 * (b @ a), rtol=1e-5, atol=1e-5)
        assert not torch.equal(merged[name], weight)
    first, second = (AutoTokenizer.from_pretrained(name) for name in ("base", "out"))
    assert first.get_vocab() == second.get_vocab()


def test_stock_rendering_of_a_merged_thinking_model_is_the_trained_prompt(place: Path) -> None:
    """Without an argument, on another day, with the instruction or without it."""
    base = AutoTokenizer.from_pretrained("base")
    base.chat_template = THINKING
    base.save_pretrained("base")
    card = json.loads(Path("run/adapter/remora.json").read_text())
    del card["rendered"]  # as it was before, so that the base's template is rendered
    Path("run/adapter/remora.json").write_text(json.dumps(card))
    assert remora("run", "--merge", "--output", "out") == 0
    prompt = saved.open_trained("out", device="cpu").prompt
    merged = AutoTokenizer.from_pretrained("out")
    for message in MESSAGES:
        (stem,) = prompt.stems([message])
        for content in (message, f"{card['instruction']}\n\n{message}"):
            asked = [{"role": "user", "content": content}]
            for more in ({}, {"enable_thinking": True}):
                ids = merged.apply_chat_template(asked, add_generation_prompt=True, **more)
                assert ids["input_ids"] == stem
        text = merged.apply_chat_template(
            [*asked, {"role": "assistant", "content": "refund"}], tokenize=False
        )
        answer = prompt.answers[prompt.labels.index("refund")]
        assert merged(text, add_special_tokens=False).input_ids == [*stem, *answer]
    with pytest.raises(Exception, match="one message"):
        merged.apply_chat_template([{"role": "system", "content": "x"}, *asked], tokenize=False)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_predict_works_on_a_merged_model_of_any_dtype(place: Path, dtype: str, capsys) -> None:
    assert remora("run", "--merge", "--dtype", dtype, "--output", "out") == 0
    shown = capsys.readouterr().out
    assert "the same label on all 12 test rows" in shown
    assert f"stored in  {dtype}" in shown
    stored = load_file("out/model.safetensors").values()
    assert {tensor.dtype for tensor in stored} == {getattr(torch, dtype)}
    assert json.loads(Path("out/config.json").read_text())["dtype"] == dtype
    wanted = labels(Path("run"))
    shutil.rmtree("base")
    found = labels(Path("out"))
    assert [label for label, _ in found] == [label for label, _ in wanted]
    tolerance = {"float32": 1e-4, "float16": 0.02, "bfloat16": 0.1}[dtype]
    assert [p for _, p in found] == pytest.approx([p for _, p in wanted], abs=tolerance)


def test_weights_are_stored_as_the_base_stores_them(place: Path) -> None:
    config = json.loads(Path("base/config.json").read_text())
    weights = load_file("base/model.safetensors")
    save_file(
        {n: t.bfloat16() for n, t in weights.items()}, "base/model.safetensors", {"format": "pt"}
    )
    Path("base/config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    card = json.loads(Path("run/adapter/remora.json").read_text())
    card["base_sha256"] = files.weights_sha256(Path("base"))
    Path("run/adapter/remora.json").write_text(json.dumps(card))
    assert remora("run", "--merge", "--output", "out") == 0
    stored = load_file("out/model.safetensors").values()
    assert {tensor.dtype for tensor in stored} == {torch.bfloat16}


def test_a_merged_model_needs_no_base_and_is_checked(place: Path, capsys) -> None:
    assert remora("run", "--merge", "--output", "out") == 0
    capsys.readouterr()
    Path("m.txt").write_text("Where is my card?\n")
    assert remora("out", "m.txt", "--model", "base", verb="predict") == 4
    assert "leave out --model" in capsys.readouterr().err
    assert remora("out", "m.txt", verb="predict") == 0
    (row,) = csv.DictReader(io.StringIO(capsys.readouterr().out))
    assert row["label"] == "card arrival"
    shutil.copy("base/model.safetensors", "out/model.safetensors")
    assert remora("out", "m.txt", verb="predict") == 4
    assert "have changed since they were written" in capsys.readouterr().err


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_fast_layers_do_not_disturb_merging(architecture: str, tmp_path: Path) -> None:
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    base = tiny_model(architecture).eval()
    plain = base(input_ids=ids).logits
    adapted = lora.add_adapter(base, rank=4, alpha=10, dropout=0.1).double()
    randomize_adapter(adapted)
    wanted = adapted.eval()(input_ids=ids).logits.detach()
    assert not torch.allclose(wanted, plain, atol=1e-3)
    adapted.merge_and_unload().save_pretrained(tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float64, attn_implementation=loading._attention(base.config)
    )
    torch.testing.assert_close(stock.eval()(input_ids=ids).logits, wanted, rtol=1e-6, atol=1e-6)


def broken_merge(monkeypatch, change) -> None:
    """Let PEFT change its adapter before it merges."""
    stock = peft.tuners.lora.LoraModel.merge_and_unload

    def changed(tuner, *args, **kwargs):
        with torch.no_grad():
            for layer in tuner.model.modules():
                if isinstance(layer, peft.tuners.lora.LoraLayer):
                    change(layer)
        return stock(tuner, *args, **kwargs)

    monkeypatch.setattr(peft.tuners.lora.LoraModel, "merge_and_unload", changed)


def scale(factor):
    def change(layer):
        layer.scaling["default"] *= factor

    return change


@pytest.mark.parametrize(
    ("factor", "dtype"),
    [(0, "float32"), (0, "bfloat16"), (0.97, "float32"), (1.05, "float32"), (2, "bfloat16")],
)
def test_a_merge_that_does_nothing_or_scales_wrongly_is_refused(
    place: Path, monkeypatch, capsys, factor: float, dtype: str
) -> None:
    broken_merge(monkeypatch, scale(factor))
    refused(place, capsys, 4, "is not the same classifier", "run", "--merge", "--dtype", dtype)


def test_a_merge_that_forgets_the_adapter_says_what_it_flips(place: Path, monkeypatch, capsys):
    monkeypatch.setattr(
        peft.tuners.lora.LoraModel,
        "merge_and_unload",
        peft.tuners.lora.LoraModel.unload,
    )
    assert remora("run", "--merge") == 4
    line = capsys.readouterr().err.splitlines()[-1]
    base = AutoModelForCausalLM.from_pretrained("base")
    _, prompt, _ = saved.load_adapter(
        Path("run"), base=None, dtype=torch.float32, device=torch.device("cpu")
    )
    dataset = load_data(run_directory.read_settings(Path("run")))
    base.requires_grad_(False)
    flips = 0
    for stem, true in zip(prompt.stems(dataset.test.texts), dataset.test.labels, strict=True):
        scores = []
        for answer in prompt.answers:
            logits = base(input_ids=torch.tensor([[*stem, *answer]])).logits[0].log_softmax(-1)
            places = range(len(stem) - 1, len(stem) + len(answer) - 1)
            scores.append(sum(float(logits[i, t]) for i, t in zip(places, answer, strict=True)))
        flips += prompt.labels[int(np.argmax(scores))] != true
    assert flips > 0
    assert f"{flips} of 12 rows get another label" in line


def test_a_merge_that_is_not_finite_is_refused(place: Path, monkeypatch, capsys) -> None:
    broken_merge(monkeypatch, scale(float("nan")))
    refused(place, capsys, 4, "weights that are not finite", "run", "--merge")


def test_what_is_compared_is_what_lies_on_the_disk(place: Path, monkeypatch, capsys) -> None:
    stock = PreTrainedModel.save_pretrained

    def broken(saved, folder, **kwargs):
        stock(saved, folder, **kwargs)
        weights = load_file(folder / "model.safetensors")
        weights["model.layers.1.mlp.down_proj.weight"] *= 0.9
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", broken)
    refused(place, capsys, 4, "the merged model is not the same classifier", "run", "--merge")


def test_the_less_an_adapter_does_the_nearer_must_the_merge_be(
    place: Path, monkeypatch, capsys
) -> None:
    path = Path("run/adapter/adapter_model.safetensors")
    weights = {n: 0.3 * t if "lora_B" in n else t for n, t in load_file(path).items()}
    save_file(weights, path)
    assert remora("run", "--merge", "--dtype", "float32", "--json", "--output", "out") == 0
    allowed = json.loads(capsys.readouterr().out)["allowed"]
    assert 0.001 < allowed <= 0.01
    broken_merge(monkeypatch, scale(0))
    arguments = "run", "--merge", "--dtype", "bfloat16"
    assert remora(*arguments) == 4
    moved = float(re.search(r"differ by up to (\S+)", capsys.readouterr().err)[1])
    assert moved < 0.3  # what bfloat16 alone would be allowed
    refused(place, capsys, 4, "the merged model is not the same classifier", *arguments)


def test_an_adapter_that_does_nothing_is_refused(place: Path, capsys) -> None:
    path = Path("run/adapter/adapter_model.safetensors")
    weights = {n: 0 * t if "lora_B" in n else t for n, t in load_file(path).items()}
    save_file(weights, path)
    refused(place, capsys, 4, "indistinguishable from its base; train it", "run", "--merge")


def test_only_near_ties_may_flip() -> None:
    wanted = np.array([[0.50, 0.49, 0.01], [0.6, 0.3, 0.1], [0.2, 0.3, 0.5]])
    flipped_tie = wanted.copy()
    flipped_tie[0] = [0.495, 0.496, 0.009]
    parity = merge.compare_probabilities(wanted, flipped_tie, dtype="bfloat16", allowed=0.3)
    assert (parity.num_flips, parity.num_near_ties, parity.holds) == (1, 1, True)
    assert parity.largest_difference == pytest.approx(np.log(0.010 / 0.009))
    strict = merge.compare_probabilities(wanted, flipped_tie, dtype="float32", allowed=0.01)
    assert (strict.num_flips, strict.num_near_ties, strict.holds) == (1, 0, False)
    clear = wanted.copy()
    clear[1] = [0.44, 0.45, 0.11]  # within 0.5 of each other now, and 0.7 apart before
    parity = merge.compare_probabilities(wanted, clear, dtype="bfloat16", allowed=0.5)
    assert (parity.num_flips, parity.num_near_ties, parity.holds) == (1, 0, False)


def test_what_no_answer_depends_on_is_not_compared() -> None:
    wanted = np.array([[0.9, 0.1 - 1e-9, 1e-9]])
    assert merge.compare_probabilities(
        wanted, np.array([[0.9, 0.1 - 1e-6, 1e-6]]), dtype="float32", allowed=0.01
    ).holds


def test_merging_needs_the_rows_but_not_the_table(place: Path) -> None:
    Path("data.csv").unlink()
    assert remora("run", "--merge") == 0


def test_a_template_edited_after_training_changes_no_label(place: Path, caplog) -> None:
    before = labels(Path("run"))
    assert not caplog.records
    base = AutoTokenizer.from_pretrained("base")
    base.chat_template = "Sort it! " + base.chat_template.replace("assistant", "expert")
    base.save_pretrained("base")
    assert labels(Path("run")) == before
    (record,) = caplog.records
    assert "'Sort it! <|im" in record.getMessage()
    assert record.getMessage().endswith("; what was trained is used")
    # A card of an earlier version has no prompt: the template of today is used, without a word.
    card = json.loads(Path("run/adapter/remora.json").read_text())
    del card["rendered"]
    Path("run/adapter/remora.json").write_text(json.dumps(card))
    assert labels(Path("run")) != before
    assert len(caplog.records) == 1

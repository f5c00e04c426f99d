"""A GGUF file as the base model of a run: every verb, and the adapter with the file elsewhere."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import gguf_files
from conftest import WAYS, WORDS, call
from remora import TextClassifier
from remora.export import push
from remora.models import gguf, gguf_conversion, hub, metadata
from remora.runtime.device import choose_precision
from remora.serving.adapters import AdapterSet

MESSAGES = ["Where is my card?", "still no refund", "top up again"]
CPU = torch.device("cpu")


def train(*more: str, model: str = "base.gguf", name: str = "run") -> list[str]:
    settings = ["--model", model, "--device", "cpu", "--precision", "float32", "--name", name]
    return ["train", "good.csv", *settings, "--max-steps", "3", "--batch-size", "5", *more]


def write(path: Path, base: Path, **more: Any) -> Path:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return gguf_files.write(path, model, AutoTokenizer.from_pretrained(base), **more)


@pytest.fixture(scope="module")
def shop(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """A folder with a GGUF file, a table and a run, which commands are run in."""
    folder, before = tmp_path_factory.mktemp("shop"), Path.cwd()
    file = write(folder / "base.gguf", base)
    rows = [f'"{way.format(word)}",{label}\n' for label, word in WORDS.items() for way in WAYS * 2]
    (folder / "good.csv").write_text("text,label\n" + "".join(rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(gguf.CACHE, str(folder / "cache"))
        patch.setattr(gguf, "_convert_apart", gguf_conversion.convert)
        os.chdir(folder)
        assert call(*train()) == 0
        yield SimpleNamespace(folder=folder, file=file, run=folder / "runs" / "run")
        os.chdir(before)


def adapter_bytes(run: Path) -> bytes:
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


def answers(run: Path, model: str | None = None) -> Any:
    loaded = TextClassifier.load(run, model=model, device="cpu", precision="float32")
    return loaded.predict_proba(MESSAGES)


def test_what_a_run_says_of_its_base(shop: SimpleNamespace) -> None:
    card = json.loads((shop.run / "adapter" / "remora.json").read_text())
    assert card["base_model"] == str(shop.file)
    assert card["gguf_sha256"] in gguf.folder_name(card["gguf_sha256"])
    assert card["gguf_quantization"] == "F32"
    assert "for `base.gguf` (GGUF, F32), trained" in (shop.run / "README.md").read_text()
    assert 'model = "base.gguf"' in (shop.run / "config.toml").read_text()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT reads it
def test_stock_peft_finds_the_converted_base(shop: SimpleNamespace) -> None:
    import peft

    config = json.loads((shop.run / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(hub.find("base.gguf"))
    stock = peft.AutoPeftModelForCausalLM.from_pretrained(shop.run / "adapter").eval()
    ours = TextClassifier.load(shop.run, device="cpu", precision="float32").model_
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    with torch.no_grad():
        torch.testing.assert_close(stock(input_ids=ids).logits, ours(input_ids=ids).logits)


def test_it_trains_as_the_converted_folder_does(shop: SimpleNamespace, base: Path) -> None:
    folder = hub.find("base.gguf")
    assert call(*train(model=str(folder), name="folder")) == 0
    assert adapter_bytes(shop.folder / "runs" / "folder") == adapter_bytes(shop.run)
    # A norm's epsilon is float32 in the file, so that much differs from the model it was made of.
    assert call(*train(model=str(base), name="original")) == 0
    original = answers(shop.folder / "runs" / "original")
    assert abs(original - answers(shop.run)).max() < 1e-3


def test_a_stopped_run_ends_with_the_same_bits(shop: SimpleNamespace) -> None:
    command = train(name="stopped")
    assert call(*command, "--max-time", "0s") == 75
    assert call(*command) == 0
    assert adapter_bytes(shop.folder / "runs" / "stopped") == adapter_bytes(shop.run)


def test_the_adapter_knows_its_file_wherever_it_lies(shop: SimpleNamespace) -> None:
    expected = answers(shop.run)
    moved = shutil.copy(shop.file, shop.folder / "moved.gguf")
    for model in (str(moved), str(hub.find("base.gguf"))):
        assert (answers(shop.run, model) == expected).all(), model
    # The same weights in another file are the same base too.
    other = shop.folder / "renamed.gguf"
    gguf_files.write(other, *loaded(shop), metadata={"general.name": "other"})
    assert (answers(shop.run, str(other)) == expected).all()


def loaded(shop: SimpleNamespace) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = hub.find(str(shop.file))
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def test_another_file_is_not_its_base(
    shop: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = loaded(shop)
    model.model.norm.weight.data[0] += 1
    gguf_files.write(shop.folder / "wrong.gguf", model, tokenizer)
    assert call("eval", str(shop.run), "good.csv", "--model", "wrong.gguf") == 4
    assert "was trained on other weights than those in" in capsys.readouterr().err
    command = train(name="begun")
    assert call(*command, "--max-time", "0s") == 75
    command[command.index("base.gguf")] = "wrong.gguf"
    assert call(*command) == 2
    assert "was started on a base model with the hash" in capsys.readouterr().err


def test_a_folder_converted_in_another_way_is_still_its_base(shop: SimpleNamespace) -> None:
    """As by another version of transformers, which rounds another way."""
    copied = shutil.copytree(shop.run, shop.folder / "copied")
    path = copied / "adapter" / "remora.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_sha256": "0" * 64}))
    assert (answers(copied) == answers(shop.run)).all()
    path.write_text(json.dumps(json.loads(path.read_text()) | {"gguf_sha256": "1" * 64}))
    assert call("eval", str(copied), "good.csv") == 4


def test_every_verb_opens_it(shop: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    run, on = str(shop.run), ["--device", "cpu"]
    (shop.folder / "messages.txt").write_text("\n".join(MESSAGES) + "\n")
    for command in (
        ["plan", "good.csv", "--model", "base.gguf", *on],
        ["eval", run, "good.csv", *on],
        ["predict", run, "messages.txt", *on],
        ["diagnose", run],
        ["compare", run],
        ["report", run],
    ):
        assert call(*command) == 0, capsys.readouterr().err
    assert "card arrival" in capsys.readouterr().out


def test_it_is_served(shop: SimpleNamespace) -> None:
    served = AdapterSet(
        {"run": shop.run},
        base=None,
        precision=choose_precision(CPU, "float32"),
        device=CPU,
        micro_batch_tokens=512,
        tolerance=1e-2,
    )
    generation = served.activate("run")
    assert (generation.scorer.probabilities(MESSAGES) == answers(shop.run)).all()


@pytest.mark.parametrize("method", ["full", "qlora"])
def test_other_methods_take_it(method: str, shop: SimpleNamespace) -> None:
    if method == "qlora":
        pytest.importorskip("bitsandbytes")
    assert call(*train("--method", method, name=method)) == 0
    assert answers(shop.folder / "runs" / method).shape == (3, 3)


def test_a_broken_chat_template_is_told_with_the_file(
    shop: SimpleNamespace, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(shop.folder / "broken.gguf", base, metadata={"tokenizer.chat_template": "{% for %}"})
    capsys.readouterr()
    assert call(*train(model="broken.gguf", name="broken")) == 4
    (line,) = [e for e in capsys.readouterr().err.splitlines() if e.startswith("error")]
    assert line.startswith("error: broken.gguf: the tokenizer's chat template fails (")


def test_what_is_published_names_the_file_only(shop: SimpleNamespace) -> None:
    card = metadata.read_card(shop.run / "adapter")
    published = push._files(shop.run, shop.run / "adapter", card.base_model)
    assert str(shop.folder) not in b"".join(
        published[name] for name in ("README.md", "remora.json", "adapter_config.json")
    ).decode(errors="replace")
    assert json.loads(published["remora.json"])["base_model"] == "base.gguf"
    assert json.loads(published["adapter_config.json"])["base_model_name_or_path"] == "base.gguf"
    assert json.loads(published["remora.json"])["gguf_sha256"] == card.gguf_sha256
    assert "local file, of which only the name base.gguf" in str(push._base_warning(card))


def test_the_run_is_named_without_the_ending(shop: SimpleNamespace) -> None:
    command = train()
    del command[command.index("--name") : command.index("--name") + 2]
    assert call(*command) == 0
    assert (shop.folder / "runs" / "good-base").is_dir()

"""A run keeps the prompt that it was trained with: another day, another template, another tool.

The template says today's date and lets the model think unless it is told not to, as those of
Llama 3.2 and Qwen3 do. 199 messages, of which any other prompt gives some another label.
"""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest

from conftest import CHAT_TEMPLATE, WAYS, WORDS, call, write_table
from remora.config import TrainConfig
from remora.serving import predictor
from remora.training.run import train

THOUGHT = "<think>\n\n</think>\n\n"
DATED_THINKING = (
    "Today is {{ strftime_now('%d %B %Y') }}.\n"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    f"{{% if m['role'] == 'assistant' %}}{THOUGHT}{{% endif %}}"
    "{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    f"{{% if enable_thinking is defined and enable_thinking is false %}}{THOUGHT}{{% endif %}}"
    "{% endif %}"
)
PAIRS = [
    (way.format(word), other) for way in WAYS[:4] for word in WORDS.values() for other in WORDS
]
MESSAGES = [f"{asked} {i}, {other}" for i in range(6) for asked, other in PAIRS][:199]


class Day:
    """A clock for templates."""

    today = "01 January 2026"

    @classmethod
    def now(cls) -> type[Day]:
        return cls

    @classmethod
    def strftime(cls, _: str) -> str:
        return cls.today


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose base has a template with a date, in one folder with it."""
    from transformers import AutoTokenizer
    from transformers.utils import chat_template_utils

    place = tmp_path_factory.mktemp("pinned")
    shutil.copytree(base, place / "base")
    tokenizer = AutoTokenizer.from_pretrained(place / "base")
    tokenizer.chat_template = DATED_THINKING
    tokenizer.save_pretrained(place / "base")
    settings = TrainConfig(
        str(write_table(place / "data.csv")),
        model=str(place / "base"),
        output=place,
        name="run",
        learning_rate=1e-2,
        epochs=6,
        batch_size=8,
        validation_fraction=0.0,
        baselines=("none",),
        rank=8,
        seed=1,
        precision="float32",
        device="cpu",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chat_template_utils, "datetime", Day)
        train(settings)
    texts = "\n".join(json.dumps({"text": message}) for message in MESSAGES)
    (place / "messages.jsonl").write_text(texts + "\n")
    return place


def predicted(place: Path, run: Path | str = "run") -> list[str]:
    """Return the labels that the command line predicts for all messages, in a new process."""
    predictor._loaded.clear()  # which a process keeps
    out = place / "predicted.csv"
    out.unlink(missing_ok=True)
    arguments = ("--output", out, "--device", "cpu", "--precision", "float32")
    assert call("predict", place / run, place / "messages.jsonl", *arguments) == 0
    with out.open(newline="") as file:
        return [row["label"] for row in csv.DictReader(file)]


def unpinned(place: Path, folder: Path) -> Path:
    """Return a copy of the run as earlier versions wrote it, without the prompt."""
    run = shutil.copytree(place / "run", folder / "unpinned")
    card = json.loads((run / "adapter" / "remora.json").read_text())
    del card["rendered"]
    (run / "adapter" / "remora.json").write_text(json.dumps(card))
    return run


def num_changed(first: list[str], second: list[str]) -> int:
    assert len(first) == len(second) == 199
    return sum(a != b for a, b in zip(first, second, strict=True))


def test_another_day_changes_none_of_199_labels(
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from transformers.utils import chat_template_utils

    monkeypatch.setattr(chat_template_utils, "datetime", Day)
    before = predicted(trained)
    assert len(set(before)) > 1
    assert not caplog.records
    monkeypatch.setattr(Day, "today", "31 December 2031")
    assert num_changed(before, predicted(trained)) == 0
    (told,) = caplog.messages
    assert "now renders 'Today is 31 December 2031." in told
    assert num_changed(before, predicted(trained, unpinned(trained, tmp_path))) > 0


def test_an_edited_template_changes_none_of_199_labels(trained: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    before = predicted(trained)
    place = shutil.copytree(trained, tmp_path / "copy")
    tokenizer = AutoTokenizer.from_pretrained(place / "base")
    tokenizer.chat_template = "Sort it! " + CHAT_TEMPLATE.replace("assistant", "expert")
    tokenizer.save_pretrained(place / "base")
    for run in (place / "run", unpinned(place, tmp_path)):
        path = run / "adapter" / "remora.json"
        path.write_text(path.read_text().replace(str(trained), str(place)))
    assert num_changed(before, predicted(place)) == 0
    assert num_changed(before, predicted(place, tmp_path / "unpinned")) > 0


def test_a_merged_thinking_model_writes_all_199_labels_under_stock_rendering(
    trained: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    before = predicted(trained)
    assert call("export", trained / "run", "--merge", "--output", tmp_path, "--device", "cpu") == 0
    assert num_changed(before, predicted(trained, tmp_path)) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, padding_side="left")
    instruction = json.loads((tmp_path / "remora.json").read_text())["instruction"]
    asked = [[{"role": "user", "content": f"{instruction}\n\n{each}"}] for each in MESSAGES]
    rendered = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    assert all("Today is 01 January 2026." in each for each in rendered)
    assert all(each.endswith(THOUGHT) for each in rendered)
    inputs = tokenizer(rendered, add_special_tokens=False, padding=True, return_tensors="pt")
    written = model.generate(**inputs)[:, inputs.input_ids.shape[1] :]
    found = tokenizer.batch_decode(written, skip_special_tokens=True)
    assert num_changed(before, [text.strip() for text in found]) == 0

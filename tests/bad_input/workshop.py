"""A folder with good and bad things, and how commands in it are made bad."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

import gguf_files
from conftest import WAYS, WORDS, call
from remora.models import gguf, gguf_conversion


@dataclass
class Workshop:
    """A folder with good and bad things, which commands are run in."""

    folder: Path
    base: Path
    run: Path
    held: ExitStack = field(default_factory=ExitStack)  # closed after each command

    def patch(self) -> pytest.MonkeyPatch:
        return self.held.enter_context(pytest.MonkeyPatch.context())

    def write(self, name: str, content: str | bytes) -> str:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return name

    def copy_of_base(self) -> Path:
        return shutil.copytree(self.base, self.folder / "copy", dirs_exist_ok=True)

    def copy_of_run(self) -> Path:
        return shutil.copytree(self.run, self.folder / "copy", dirs_exist_ok=True)


GOOD_ROWS = [(way.format(word), label) for label, word in WORDS.items() for way in WAYS * 2]


def table(rows: list[tuple[str, str]], header: str = "text,label") -> str:
    return header + "\n" + "".join(f'"{text}","{label}"\n' for text, label in rows)


Case = tuple[str, int, Callable[[Workshop], list[str]]]


def train(data: str, *more: str, model: str = "base") -> list[str]:
    return ["train", data, "--model", model, "--device", "cpu", "--max-steps", "1", *more]


def embeddings(shop: Workshop, folder: str, *, installed: bool = True) -> list[str]:
    spec = importlib.util.find_spec
    found = object() if installed else None
    shop.patch().setattr(
        importlib.util, "find_spec", lambda n: found if n == "sentence_transformers" else spec(n)
    )
    return train("good.csv", "--baselines", "embeddings", "--embedding-model", folder)


def of_unfinished(shop: Workshop, *verb: str) -> list[str]:
    unfinished(shop)
    return [*verb[:1], "runs/mine", *verb[1:]]


def of_validated(shop: Workshop, *verb: str) -> list[str]:
    """A verb on an unfinished run that has saved the best weights so far."""
    command = of_unfinished(shop, *verb)
    adapter = shop.folder / "runs" / "mine" / "adapter"
    shutil.copytree(shop.copy_of_run() / "adapter", adapter, dirs_exist_ok=True)
    return command


def unfinished(shop: Workshop, *more: str) -> list[str]:
    path = shop.folder / "runs" / "mine"
    if not path.exists():
        assert call(*train("good.csv", "--name", "mine", "--max-time", "0s")) == 75
    return train("good.csv", "--name", "mine", *more)


def of_gguf(shop: Workshop, name: str = "small.gguf", **more: Any) -> list[str]:
    """Train on a GGUF file that is the base with some keys changed, converted in this process."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(shop.base)
    gguf_files.write(shop.folder / name, model, AutoTokenizer.from_pretrained(shop.base), **more)
    shop.patch().setenv(gguf.CACHE, str(shop.folder / "cache"))
    shop.patch().setattr(gguf, "_convert_apart", gguf_conversion.convert)
    return train("good.csv", model=name)


def broken_run(shop: Workshop, name: str, content: str, *command: str) -> list[str]:
    (shop.copy_of_run() / name).write_text(content)
    return list(command)


SHEET = ("row", "text", "label", "suggested", "p_wrong", "decision")


def listed(shop: Workshop, *row: str, text: str = GOOD_ROWS[0][0], to: str = "") -> str:
    """Write a list of suspects into a copy of the run, as `diagnose` does."""
    label = GOOD_ROWS[0][1]
    lines = [",".join(SHEET), ",".join([*(row or ("1",)), f'"{text}"', label, "refund", "0.9", to])]
    (shop.copy_of_run() / "relabel.csv").write_text("\n".join(lines) + "\n")
    return "copy"


def several(shop: Workshop, *labels: str) -> str:
    """Write a table with rows of several labels; return its name."""
    one, other, *_ = labels or ("x", "y")
    rows = [{"text": f"a {i}", "label": [one, other][: i % 3]} for i in range(30)]
    return shop.write("several.jsonl", "".join(json.dumps(row) + "\n" for row in rows))

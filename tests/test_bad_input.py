"""Every bad input exits with its code and one line; docs/errors.md is the table of them.

python -m pytest tests/test_bad_input.py        # compares
REMORA_WRITE_DOCS=1 python -m pytest tests/test_bad_input.py    # writes
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import platform
import re
import shutil
import socket
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoTokenizer

import finished
import gguf_files
from conftest import WAYS, WORDS, call
from hybrids import save_base
from remora.diagnosis import relabel
from remora.models import gguf, gguf_conversion, quantize
from remora.runtime import memory
from remora.serving import ray_workers

DOCS = Path(__file__).parents[1] / "docs" / "errors.md"
HEAD = (
    "# Bad input\n\n"
    "Mistakes in the input, each with its exit code and its line on standard error. "
    "`tests/test_bad_input.py` makes each of them on the command line and writes this table. "
    "Folder names are shortened; a port and a size are examples.\n\n"
)


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


@pytest.fixture(scope="module")
def shop(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    folder = tmp_path_factory.mktemp("shop")
    before = Path.cwd()
    os.chdir(folder)
    shutil.copytree(base, folder / "base")
    made = Workshop(folder, folder / "base", folder / "runs" / "good")
    made.write("good.csv", table(GOOD_ROWS))
    settings = ["--model", "base", "--device", "cpu", "--max-steps", "1", "--name", "good"]
    assert call(*["train", "good.csv", *settings]) == 0
    yield made
    os.chdir(before)


Case = tuple[str, int, Callable[[Workshop], list[str]]]


def zipped(members: dict[str, str]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def train(data: str, *more: str, model: str = "base") -> list[str]:
    return ["train", data, "--model", model, "--device", "cpu", "--max-steps", "1", *more]


def windowed(shop: Workshop) -> list[str]:
    """A run that reads long messages in windows, exported for vLLM."""
    card = shop.copy_of_run() / "adapter" / "remora.json"
    card.write_text(json.dumps({**json.loads(card.read_text()), "truncate": "windows"}))
    return ["export", "copy", "--vllm", "--output", "out"]


def embeddings(shop: Workshop, folder: str, *, installed: bool = True) -> list[str]:
    spec = importlib.util.find_spec
    found = object() if installed else None
    shop.patch().setattr(
        importlib.util, "find_spec", lambda n: found if n == "sentence_transformers" else spec(n)
    )
    return train("good.csv", "--baselines", "embeddings", "--embedding-model", folder)


def on_ray(
    shop: Workshop,
    source: str,
    output: str,
    *more: str,
    installed: bool = True,
    memory_bytes: float | None = None,
) -> list[str]:
    """The command on a Ray that is not needed: none answers, or its room is known."""
    spec, patch = importlib.util.find_spec, shop.patch()
    found = object() if installed else None
    patch.setattr(importlib.util, "find_spec", lambda n: found if n == "ray" else spec(n))
    if memory_bytes is None:
        more = ("--address", "127.0.0.1:1", *more)
    else:
        nodes = [{"Alive": True, "Resources": {"CPU": 8.0, "memory": memory_bytes}}]
        ray = SimpleNamespace(nodes=lambda: nodes)
        patch.setattr(ray_workers, "connected", lambda _: contextlib.nullcontext(ray))
    return ["predict", "runs/good", source, "--engine", "ray", "--output", output, *more]


def begun_on_ray(shop: Workshop, output: str) -> None:
    """Leave the folder of a command that came as far as its cluster."""
    shop.write("begun.csv", table(GOOD_ROWS))
    assert call(*on_ray(shop, "begun.csv", output)) == 2


def changed_source(shop: Workshop) -> list[str]:
    begun_on_ray(shop, "answers.csv")
    shop.write("begun.csv", table(GOOD_ROWS[1:]))
    return on_ray(shop, "begun.csv", "answers.csv")


def other_run(shop: Workshop) -> list[str]:
    begun_on_ray(shop, "other.csv")
    return on_ray(shop, "begun.csv", "other.csv", "--top-k", "2")


def broken_adapter(shop: Workshop, **changes: object) -> list[str]:
    path = shop.copy_of_run() / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return ["eval", "copy", "good.csv"]


def broken_base(shop: Workshop, **changes: object) -> list[str]:
    path = shop.copy_of_base() / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return train("good.csv", model="copy")


LAYERS = ("--target-modules", "q_proj,w_pack")


def longer_tokenizer(shop: Workshop) -> list[str]:
    folder = shop.copy_of_base()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["zebra"])
    tokenizer.save_pretrained(folder)
    return train("good.csv", model="copy")


def moved_base(shop: Workshop) -> list[str]:
    path = shop.copy_of_run() / "adapter" / "remora.json"
    card = json.loads(path.read_text())
    path.write_text(json.dumps({**card, "base_model": str(shop.folder / "gone")}))
    return ["eval", "copy", "good.csv"]


def merge_into_4_bits(shop: Workshop) -> list[str]:
    base, path = shop.copy_of_base(), shop.copy_of_run() / "adapter" / "remora.json"
    config = json.loads((base / "config.json").read_text())
    stored = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": stored}))
    card = json.loads(path.read_text())
    path.write_text(json.dumps({**card, "base_model": str(base)}))
    return ["export", "copy", "--merge"]


def hybrid(shop: Workshop, kind: str) -> str:
    save_base(kind, shop.folder / kind)
    return kind


def without_kernel(shop: Workshop) -> list[str]:
    from transformers.models.lfm2 import modeling_lfm2

    def forward(*_: Any, **__: Any) -> None:
        raise ImportError("causal_conv1d is not installed, please install it")

    shop.patch().setattr(modeling_lfm2.Lfm2ShortConv, "forward", forward)
    return train("good.csv", model=hybrid(shop, "lfm2"))


def damaged(shop: Workshop, name: str, content: bytes) -> list[str]:
    (shop.copy_of_base() / name).write_bytes(content)
    return train("good.csv", model="copy")


def of_unfinished(shop: Workshop, *verb: str) -> list[str]:
    unfinished(shop)
    return [*verb[:1], "runs/mine", *verb[1:]]


def unfinished(shop: Workshop, *more: str) -> list[str]:
    path = shop.folder / "runs" / "mine"
    if not path.exists():
        assert call(*train("good.csv", "--name", "mine", "--max-time", "0s")) == 75
    return train("good.csv", "--name", "mine", *more)


def other_base(shop: Workshop, *command: str) -> list[str]:
    path = shop.copy_of_run() / "adapter" / "remora.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_sha256": "0" * 64}))
    return list(command)


def full(shop: Workshop, verb: str, *more: str) -> list[str]:
    run, whole = shop.copy_of_run(), shop.folder / "copy" / "model"
    shutil.copytree(shop.base, whole)
    card = json.loads((run / "adapter" / "remora.json").read_text())
    (whole / "remora.json").write_text(json.dumps({**card, "method": "full"}))
    shutil.rmtree(run / "adapter")
    return [verb, "copy", *more]


def of_classes(shop: Workshop, *more: str) -> list[str]:
    path = shop.copy_of_run() / "adapter" / "remora.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "answer": "classes"}))
    return [*more]


def several(shop: Workshop, *labels: str) -> str:
    """Write a table with rows of several labels; return its name."""
    one, other, *_ = labels or ("x", "y")
    rows = [{"text": f"a {i}", "label": [one, other][: i % 3]} for i in range(30)]
    return shop.write("several.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def of_several(shop: Workshop, verb: str) -> list[str]:
    path = shop.copy_of_run() / "config.toml"
    kept = path.read_text().replace('answer = "words"\n', "")
    path.write_text(kept.replace('multi_label = "auto"', 'multi_label = "on"'))
    return [verb, "copy"]


def taken_port(shop: Workshop) -> list[str]:
    listening = socket.create_server(("127.0.0.1", 0))
    shop.held.callback(listening.close)
    return ["serve", "runs/good", "--port", str(listening.getsockname()[1])]


def open_to_all(shop: Workshop) -> list[str]:
    shop.patch().delenv("REMORA_TOKEN", raising=False)
    return ["serve", "runs/good", "--host", "0.0.0.0", "--port", "0"]


def without(shop: Workshop, module: str, command: list[str]) -> list[str]:
    shop.patch().setitem(sys.modules, module, None)
    return command


def without_bitsandbytes(shop: Workshop) -> list[str]:
    shop.patch().setattr(quantize, "is_installed", lambda: False)
    return train("good.csv", "--method", "qlora")


def of_gguf(shop: Workshop, name: str = "small.gguf", **more: Any) -> list[str]:
    """Train on a GGUF file that is the base with some keys changed, converted in this process."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(shop.base)
    gguf_files.write(shop.folder / name, model, AutoTokenizer.from_pretrained(shop.base), **more)
    shop.patch().setenv(gguf.CACHE, str(shop.folder / "cache"))
    shop.patch().setattr(gguf, "_convert_apart", gguf_conversion.convert)
    return train("good.csv", model=name)


def cut_off_gguf(shop: Workshop) -> list[str]:
    command = of_gguf(shop)
    path = shop.folder / "small.gguf"
    path.write_bytes(path.read_bytes()[:5_000])
    return command


def in_little_memory(shop: Workshop) -> list[str]:
    command = of_gguf(shop)
    shop.patch().setattr(memory, "free_bytes", lambda *_, **__: 400_000_000)
    return command


def several_gguf(shop: Workshop) -> list[str]:
    for name in ("several/q4.gguf", "several/q8.gguf"):
        shop.write(name, b"GGUF")
    return train("good.csv", model="several")


def measured(shop: Workshop, texts: list[str]) -> str:
    """Write a finished run of other test rows than those of runs/good."""
    labels, true = list(WORDS), [0] * len(texts)
    finished.write(shop.folder / "copy", labels=labels, texts=texts, true=true, predicted=true)
    return "copy"


def other_rows(shop: Workshop) -> str:
    lines = (shop.run / "predictions.csv").read_text().splitlines()
    return measured(shop, ["another text"] * len(lines[1:]))


def broken_run(shop: Workshop, name: str, content: str, *command: str) -> list[str]:
    (shop.copy_of_run() / name).write_text(content)
    return list(command)


def changed_table(shop: Workshop, *command: str) -> list[str]:
    shop.write("changed.csv", table(GOOD_ROWS[1:]))
    settings = (shop.run / "config.toml").read_text()
    assert '"good.csv"' in settings
    return broken_run(shop, "config.toml", settings.replace("good.csv", "changed.csv"), *command)


def relabelled(shop: Workshop, *row: str) -> list[str]:
    shop.write("relabel.csv", "row,text,label,decision\n" + ",".join(row) + "\n")
    return ["diagnose", "runs/good", "--apply", "relabel.csv"]


SHEET = ("row", "text", "label", "suggested", "p_wrong", "decision")


def listed(shop: Workshop, *row: str, text: str = GOOD_ROWS[0][0], to: str = "") -> str:
    """Write a list of suspects into a copy of the run, as `diagnose` does."""
    label = GOOD_ROWS[0][1]
    lines = [",".join(SHEET), ",".join([*(row or ("1",)), f'"{text}"', label, "refund", "0.9", to])]
    (shop.copy_of_run() / "relabel.csv").write_text("\n".join(lines) + "\n")
    return "copy"


def review_of_changed_table(shop: Workshop) -> list[str]:
    command = changed_table(shop, "review", "copy")
    settings = (shop.folder / "copy" / "config.toml").read_text()
    listed(shop)  # copies the run again
    (shop.folder / "copy" / "config.toml").write_text(settings)
    return command


def reviewed_already(shop: Workshop) -> list[str]:
    run = listed(shop)
    shop.patch().setattr(platform, "node", lambda: "this-machine")
    shop.held.enter_context(relabel.hold(Path(run)))
    return ["review", run]


def without_fastapi(shop: Workshop) -> list[str]:
    patch = shop.patch()
    for module in ("remora.review.session", "remora.review.app"):
        patch.delitem(sys.modules, module, raising=False)
        patch.delattr(f"{module.rpartition('.')[0]}.{module.rpartition('.')[2]}", raising=False)
    return without(shop, "fastapi", ["review", listed(shop)])


def damaged_checkpoint(shop: Workshop) -> list[str]:
    command = unfinished(shop)
    (path,) = (shop.folder / "runs" / "mine" / "checkpoints").glob("*/tensors.safetensors")
    path.write_bytes(path.read_bytes()[:-1])
    return command


CASES: list[Case] = [
    # settings
    ("a misspelt flag", 2, lambda s: train("good.csv", "--lerning-rate", "1e-3")),
    ("no model", 2, lambda s: ["train", "good.csv"]),
    (
        "a rank of 0 and a dropout of 1",
        2,
        lambda s: train("good.csv", "--rank", "0", "--dropout", "1"),
    ),
    ("a negative learning rate", 2, lambda s: train("good.csv", "--learning-rate", "-1")),
    ("an absurd learning rate", 2, lambda s: train("good.csv", "--learning-rate", "1e9")),
    ("a batch of 0", 2, lambda s: train("good.csv", "--batch-size", "0")),
    (
        "an initialization that changes the base model",
        2,
        lambda s: train("good.csv", "--init-lora-weights", "pissa"),
    ),
    (
        "words for labels that classes stand for",
        2,
        lambda s: train("good.csv", "--answer", "classes", "--label-texts.refund", "money back"),
    ),
    (
        "a zero-shot baseline of a head that is not trained yet",
        2,
        lambda s: train("good.csv", "--answer", "classes", "--baselines", "svm,zero-shot"),
    ),
    (
        "DoRA on a 4-bit base, and a LoRA+ ratio of 0",
        2,
        lambda s: train(
            *("good.csv", "--use-dora", "--method", "qlora", "--loraplus-lr-ratio", "0")
        ),
    ),
    (
        "rsLoRA without an adapter",
        2,
        lambda s: train("good.csv", "--use-rslora", "--method", "full"),
    ),
    ("qlora without bitsandbytes", 2, without_bitsandbytes),
    (
        "a GGUF file without the package gguf",
        2,
        lambda s: without(s, "gguf", train("good.csv", model=s.write("small.gguf", b"GGUF"))),
    ),
    ("a word for a number", 2, lambda s: train("good.csv", "--epochs", "many")),
    ("an unknown precision", 2, lambda s: train("good.csv", "--precision", "float8")),
    ("float16 on a CPU", 2, lambda s: train("good.csv", "--precision", "float16")),
    ("a device that this machine lacks", 2, lambda s: [*train("good.csv")[:5], "cuda"]),
    (
        "fractions that sum to 1",
        2,
        lambda s: train("good.csv", "--validation-fraction", "0.5", "--test-fraction", "0.5"),
    ),
    ("an invalid time limit", 2, lambda s: train("good.csv", "--max-time", "soon")),
    ("a name with a slash", 2, lambda s: train("good.csv", "--name", "../mine")),
    ("a name that is taken", 2, lambda s: train("good.csv", "--name", "good")),
    ("another seed for an unfinished run", 2, lambda s: unfinished(s, "--seed", "7")),
    ("a missing settings file", 2, lambda s: ["train", "--config", "none.toml"]),
    ("an unknown baseline", 2, lambda s: train("good.csv", "--baselines", "svm,bert")),
    ("none beside another baseline", 2, lambda s: train("good.csv", "--baselines", "none,svm")),
    (
        "a learning curve without the SVM",
        2,
        lambda s: train("good.csv", "--learning-curve", "2,5", "--baselines", "probe"),
    ),
    ("embeddings without sentence-transformers", 2, lambda s: embeddings(s, "x", installed=False)),
    ("an unknown tracker", 2, lambda s: train("good.csv", "--trackers", "carrier-pigeon")),
    (
        "modules that the model lacks",
        2,
        lambda s: train("good.csv", "--target-modules", "nothing"),
    ),
    ("a number of devices of 0", 2, lambda s: train("good.csv", "--devices", "0")),
    ("a learning curve that falls", 2, lambda s: train("good.csv", "--learning-curve", "5,2")),
    ("a learning curve from 0", 2, lambda s: train("good.csv", "--learning-curve", "0,5")),
    ("a learning curve of words", 2, lambda s: train("good.csv", "--learning-curve", "few,all")),
    ("a learning curve of one size", 2, lambda s: train("good.csv", "--learning-curve", "all")),
    (
        "a learning curve beyond the data",
        2,
        lambda s: train("good.csv", "--learning-curve", "2,500,all"),
    ),
    (
        "a learning curve and rows per class",
        2,
        lambda s: train("good.csv", "--learning-curve", "2,5", "--rows-per-class", "2"),
    ),
    (
        "a learning curve on two devices",
        2,
        lambda s: train("good.csv", "--learning-curve", "2,5", "--devices", "2"),
    ),
    ("0 rows per class", 2, lambda s: train("good.csv", "--rows-per-class", "0")),
    ("an export of neither kind", 2, lambda s: ["export", "runs/good"]),
    (
        "an export of both kinds",
        2,
        lambda s: ["export", "runs/good", "--merge", "--compress"],
    ),
    ("GGUF files without a converter", 2, lambda s: ["export", "runs/good", "--gguf", "f16"]),
    ("an unknown type of GGUF files", 2, lambda s: ["export", "runs/good", "--gguf", "q9"]),
    (
        "llama.cpp in another folder",
        2,
        lambda s: ["export", "runs/good", "--gguf", "f16", "--llama-cpp", "base"],
    ),
    (
        "an export to a folder that is not empty",
        2,
        lambda s: ["export", "runs/good", "--merge", "--output", "base"],
    ),
    (
        "an invalid budget",
        2,
        lambda s: ["export", "runs/good", "--compress", "--budget", "small"],
    ),
    (
        "a budget too small for any adapter",
        2,
        lambda s: ["export", "runs/good", "--compress", "--budget", "1kB"],
    ),
    ("a cost without a volume", 2, lambda s: ["compare", "runs/good", "--cost-per-error", "2"]),
    ("more answers than labels", 2, lambda s: ["predict", "runs/good", "good.csv", "--top-k", "9"]),
    ("a comparison of nothing", 2, lambda s: ["compare"]),
    (
        "a comparison's report written to a folder",
        2,
        lambda s: ["compare", "runs/good", "--report", "runs"],
    ),
    ("a run compared with itself", 2, lambda s: ["compare", "runs/good", "runs/good/"]),
    (
        "a report written to a folder",
        2,
        lambda s: ["report", "runs/good", "--output", "runs"],
    ),
    ("a service of nothing", 2, lambda s: ["serve"]),
    ("a service on a port that is taken", 2, taken_port),
    ("a review on a port that is taken", 2, lambda s: ["review", listed(s), *taken_port(s)[2:]]),
    ("a review of a run that is being reviewed", 2, reviewed_already),
    ("a review without the serve extra", 2, without_fastapi),
    ("a service open to other machines without a token", 2, open_to_all),
    (
        "a missing token file",
        2,
        lambda s: ["serve", "runs/good", "--port", "0", "--token-file", "none"],
    ),
    (
        "two adapters with the same name",
        2,
        lambda s: ["serve", "runs/good", "runs/good/adapter", "--port", "0"],
    ),
    ("a repository without an owner", 2, lambda s: ["push", "runs/good", "bank"]),
    ("a push while HF_HUB_OFFLINE is set", 2, lambda s: ["push", "runs/good", "me/bank"]),
    # tables
    ("no such table", 3, lambda s: train("none.csv")),
    ("an empty file", 3, lambda s: train(s.write("empty.csv", ""))),
    ("a header and no rows", 3, lambda s: train(s.write("header.csv", "text,label\n"))),
    ("columns of other names", 3, lambda s: train(s.write("names.csv", table(GOOD_ROWS, "a,b")))),
    ("a missing column", 3, lambda s: train("good.csv", "--label-column", "topic")),
    (
        "a single label",
        3,
        lambda s: train(s.write("one.csv", table([(t, "same") for t, _ in GOOD_ROWS]))),
    ),
    (
        "an empty label, with --strict",
        3,
        lambda s: train(s.write("blank.csv", table([*GOOD_ROWS, ("a text", "")])), "--strict"),
    ),
    (
        "a row with too many fields",
        3,
        lambda s: train(s.write("wide.csv", table(GOOD_ROWS) + "a,b,c\n")),
    ),
    (
        "bytes that are not UTF-8",
        3,
        lambda s: train(s.write("bytes.csv", table(GOOD_ROWS).encode() + b"caf\xe9,refund\n")),
    ),
    (
        "broken JSON lines",
        3,
        lambda s: train(s.write("broken.jsonl", '{"text": "a", "label": "b"}\n{"text": \n')),
    ),
    ("a broken Parquet file", 3, lambda s: train(s.write("broken.parquet", b"PAR1nothing"))),
    ("a broken workbook", 3, lambda s: train(s.write("table.xlsx", b"PK\x03\x04"))),
    ("a file of another kind", 3, lambda s: train(s.write("table.dat", table(GOOD_ROWS)))),
    (
        "a table without a header",
        3,
        lambda s: train(s.write("bare.tsv", "ham\tsee you later\nspam\twin a prize\nham\tok\n")),
    ),
    (
        "a zip of two tables",
        3,
        lambda s: train(s.write("two.zip", zipped({"a.csv": "x", "b.csv": "y"}))),
    ),
    (
        "columns of 0 and 1",
        3,
        lambda s: train(s.write("flags.csv", "text,toxic,threat\na,1,0\nb,0,1\n")),
    ),
    (
        "a list of labels, where each row is to have one",
        3,
        lambda s: train(
            s.write("lists.jsonl", '{"text": "a", "label": ["x", "y"]}\n'), "--multi-label", "off"
        ),
    ),
    (
        "a list of labels without commas, as NumPy writes it",
        3,
        lambda s: train(s.write("numpy.csv", "text,label\na,\"['x' 'y']\"\n")),
    ),
    (
        "a list of labels in a list",
        3,
        lambda s: train(s.write("nested.jsonl", '{"text": "a", "label": ["x", ["y"]]}\n')),
    ),
    (
        "a blank label in a list",
        3,
        lambda s: train(s.write("blank.jsonl", '{"text": "a", "label": ["x", ""]}\n')),
    ),
    (
        "several labels a row, and none in any",
        3,
        lambda s: train(s.write("none.jsonl", '{"text": "a", "label": []}\n' * 4)),
    ),
    (
        "a column of 0 and 1 with a 2",
        3,
        lambda s: train(
            *(s.write("flags.csv", "text,toxic,threat\na,1,0\nb,0,2\n"),),
            *("--label-columns", "toxic,threat"),
        ),
    ),
    (
        "several labels a row, one of them in the test rows only",
        3,
        lambda s: train(
            *(several(s), "--test"),
            s.write("unheard.jsonl", '{"text": "a", "label": ["x", "unheard"]}\n'),
        ),
    ),
    (
        "several labels a row in the test rows only",
        3,
        lambda s: train("good.csv", "--test", several(s, *WORDS)),
    ),
    (
        "several labels a row, written as words",
        2,
        lambda s: train(several(s), "--answer", "words"),
    ),
    (
        "class weights for several labels a row",
        2,
        lambda s: train(several(s), "--class-weights", "balanced"),
    ),
    (
        "label columns beside a label column",
        2,
        lambda s: train("good.csv", "--label-columns", "x,y", "--label-column", "label"),
    ),
    ("one label column of 0 and 1", 2, lambda s: train("good.csv", "--label-columns", "x")),
    ("labels split at nothing", 2, lambda s: train("good.csv", "--split-labels-at", "")),
    (
        "a choice of models for several labels a row",
        2,
        lambda s: ["choose", several(s), "--models", "base", "--bar", "0.9"],
    ),
    ("a diagnosis of several labels a row", 2, lambda s: of_several(s, "diagnose")),
    ("a review of several labels a row", 2, lambda s: of_several(s, "review")),
    ("retraining on several labels a row", 2, lambda s: of_several(s, "retrain")),
    (
        "a chat with two questions",
        3,
        lambda s: train(s.write("chat.jsonl", json.dumps({"messages": [{"role": "user"}] * 2}))),
    ),
    (
        "names for columns of a table that has its own",
        2,
        lambda s: train(s.write("named.jsonl", "{}\n"), "--columns", "text,label"),
    ),
    ("standard input without a format", 2, lambda s: train("-")),
    (
        "an export of a run in windows for an engine that has none",
        4,
        windowed,
    ),
    (
        "a class weight for a label that is not there",
        3,
        lambda s: train(
            *("good.csv", "--class-weights"), s.write("weights.csv", "label,weight\nrefnud,2\n")
        ),
    ),
    (
        "a class weight of 0",
        3,
        lambda s: train(
            *("good.csv", "--class-weights"), s.write("weights.csv", "label,weight\nrefund,0\n")
        ),
    ),
    (
        "a separator of levels that no label holds",
        3,
        lambda s: train("good.csv", "--label-separator", " > "),
    ),
    (
        "a label with an empty level",
        3,
        lambda s: train(
            s.write("empty.csv", table([("a", "x > y"), ("b", "x >  > z")] * 4)),
            *("--label-separator", " > "),
        ),
    ),
    (
        "labels whose levels differ in spaces only",
        3,
        lambda s: train(
            s.write("spaces.csv", table([("a", "x > y"), ("b", "x  > y")] * 4)),
            *("--label-separator", " > "),
        ),
    ),
    (
        "a new name for a label that is not there",
        2,
        lambda s: train("good.csv", "--rename-labels", '{"refnud": "money"}'),
    ),
    (
        "a blank name for a label",
        2,
        lambda s: train("good.csv", "--rename-labels", '{"refund": " "}'),
    ),
    (
        "a test table without labels",
        3,
        lambda s: train("good.csv", "--test", s.write("test.csv", "id,text\n1,a\n")),
    ),
    (
        "an output of no known format",
        2,
        lambda s: ["predict", "runs/good", "good.csv", "--output", "out.xml"],
    ),
    (
        "engine ray without Ray",
        2,
        lambda s: on_ray(s, "good.csv", "parts.csv", installed=False),
    ),
    (
        "engine ray without an output",
        2,
        lambda s: ["predict", "runs/good", "good.csv", "--engine", "ray"],
    ),
    ("a Ray cluster that does not answer", 2, lambda s: on_ray(s, "good.csv", "silent.csv")),
    (
        "workers of Ray that have no room for the model",
        5,
        lambda s: on_ray(s, "good.csv", "roomless.csv", memory_bytes=1e8),
    ),
    ("a glob without files", 3, lambda s: on_ray(s, "none/*.parquet", "parts.csv")),
    ("a URL of no known file system", 2, lambda s: on_ray(s, "nowhere://a/b.csv", "parts.csv")),
    ("a source that changed between two starts", 3, changed_source),
    ("a folder of parts of another run", 2, other_run),
    (
        "a folder of other things for the parts",
        2,
        lambda s: on_ray(s, "good.csv", Path(s.write("photos.csv/me.png", "")).parent.name),
    ),
    (
        "a column to keep that is not there",
        3,
        lambda s: ["predict", "runs/good", "good.csv", "--id-column", "key"],
    ),
    (
        "two thresholds",
        2,
        lambda s: [
            *("predict", "runs/good", "good.csv", "--threshold", "0.5"),
            *("--abstain-at-accuracy", "0.9"),
        ],
    ),
    (
        "standard input for two processes",
        2,
        lambda s: train("-", "--input-format", "csv", "--devices", "2"),
    ),
    (
        "a test table with an unknown label",
        3,
        lambda s: train("good.csv", "--test", s.write("test.csv", table([("a", "unknown")]))),
    ),
    ("a push of a folder that is no run", 3, lambda s: ["push", "base", "me/bank"]),
    (
        "an evaluation table with an unknown label",
        3,
        lambda s: ["eval", "runs/good", s.write("test.csv", table([("a", "unknown")]))],
    ),
    # runs
    ("an export of no run", 3, lambda s: ["export", "runs/none", "--merge"]),
    ("an export of an unfinished run", 3, lambda s: of_unfinished(s, "export", "--merge")),
    ("a comparison with no run", 3, lambda s: ["compare", "runs/good", "runs/none"]),
    (
        "a comparison with an unfinished run",
        3,
        lambda s: ["compare", "runs/good", *of_unfinished(s)],
    ),
    (
        "a comparison over different numbers of rows",
        3,
        lambda s: ["compare", "runs/good", measured(s, ["one text"])],
    ),
    ("a comparison over different rows", 3, lambda s: ["compare", "runs/good", other_rows(s)]),
    (
        "an evaluation.json that is not JSON",
        3,
        lambda s: broken_run(s, "evaluation.json", "{", "compare", "runs/good", "copy"),
    ),
    (
        "an evaluation.json without figures",
        3,
        lambda s: broken_run(s, "evaluation.json", "{}", "compare", "runs/good", "copy"),
    ),
    ("a diagnosis of no run", 3, lambda s: ["diagnose", "runs/none"]),
    ("a diagnosis of an unfinished run", 3, lambda s: of_unfinished(s, "diagnose")),
    ("a diagnosis whose table has changed", 3, lambda s: changed_table(s, "diagnose", "copy")),
    (
        "an export whose table has changed",
        3,
        lambda s: changed_table(s, "export", "copy", "--compress"),
    ),
    (
        "decisions for no run",
        3,
        lambda s: ["diagnose", "runs/none", "--apply", "relabel.csv"],
    ),
    (
        "missing decisions",
        3,
        lambda s: ["diagnose", "runs/good", "--apply", "none.csv"],
    ),
    (
        "a decision for an unknown label",
        3,
        lambda s: relabelled(s, "1", *GOOD_ROWS[0], "refunds"),
    ),
    (
        "decisions whose rows have moved",
        3,
        lambda s: relabelled(s, "2", *GOOD_ROWS[0], "refund"),
    ),
    (
        "a decision for a missing row",
        3,
        lambda s: relabelled(s, "99", *GOOD_ROWS[0], "refund"),
    ),
    ("a review of no run", 3, lambda s: ["review", "runs/none"]),
    ("a review of a run without a diagnosis", 3, lambda s: ["review", "runs/good"]),
    ("a review whose table has changed", 3, review_of_changed_table),
    ("a review whose rows have moved", 3, lambda s: ["review", listed(s, "2")]),
    (
        "a review of a list that a spreadsheet has broken",
        3,
        lambda s: ["review", listed(s, "1", "too", "many")],
    ),
    ("a new run of a run without a diagnosis", 3, lambda s: ["retrain", "runs/good"]),
    ("a new run of a run that nothing was decided on", 3, lambda s: ["retrain", listed(s)]),
    (
        "corrections that are not there",
        3,
        lambda s: train("good.csv", "--corrections", "none.csv"),
    ),
    (
        "corrections of other rows",
        3,
        lambda s: train("good.csv", "--corrections", f"{listed(s, text='other')}/relabel.csv"),
    ),
    ("a report of no run", 3, lambda s: ["report", "runs/none"]),
    ("a report of an unfinished run", 3, lambda s: of_unfinished(s, "report")),
    (
        "a report of a broken run",
        3,
        lambda s: broken_run(s, "data.json", "{", "report", "copy"),
    ),
    # models and adapters
    ("no such model folder", 4, lambda s: train("good.csv", model="nothing")),
    ("a folder that holds no model", 4, lambda s: train("good.csv", model="runs")),
    ("a file for a model", 4, lambda s: train("good.csv", model="good.csv")),
    ("a configuration that is not JSON", 4, lambda s: damaged(s, "config.json", b"{")),
    (
        "a token tree of a model whose rows cannot branch",
        4,
        lambda s: train("good.csv", "--layout", "tree", model=hybrid(s, "lfm2")),
    ),
    (
        "classes with a model that has no head for them",
        4,
        lambda s: train("good.csv", "--answer", "classes", model=hybrid(s, "lfm2")),
    ),
    (
        "an adapter on a layer that is never called",
        2,
        lambda s: train("good.csv", "--target-modules", "dt_proj", model=hybrid(s, "mamba")),
    ),
    ("an unknown architecture", 4, lambda s: broken_base(s, model_type="unheard-of")),
    (
        "an encoder",
        4,
        lambda s: broken_base(s, model_type="bert", architectures=["BertForMaskedLM"]),
    ),
    ("an encoder-decoder", 4, lambda s: broken_base(s, model_type="t5")),
    ("a vision model", 4, lambda s: broken_base(s, model_type="vit")),
    (
        "a model that brings its own code",
        4,
        lambda s: broken_base(s, model_type="own", auto_map={"AutoConfig": "own.Config"}),
    ),
    (
        "a model whose kernels are not installed",
        4,
        without_kernel,
    ),
    (
        "weights in 4 bits of another kind, whose kernels are not installed",
        4,
        lambda s: broken_base(s, quantization_config={"quant_method": "awq", "bits": 4}),
    ),
    ("a tokenizer longer than the embedding", 4, longer_tokenizer),
    ("an adapter whose base model has moved", 4, moved_base),
    (
        "a list of labels that fills the context",
        4,
        lambda s: train("good.csv", "--list-labels", "--max-length", "20"),
    ),
    ("merging into a base that is stored in 4 bits", 4, merge_into_4_bits),
    ("a layer that the model does not have", 2, lambda s: train("good.csv", *LAYERS)),
    ("a configuration of a billion layers", 4, lambda s: broken_base(s, num_hidden_layers=10**9)),
    (
        "a configuration wider than its weights",
        4,
        lambda s: broken_base(s, intermediate_size=60_000),
    ),
    (
        "truncated weights",
        4,
        lambda s: damaged(
            s, "model.safetensors", (s.base / "model.safetensors").read_bytes()[:5_000]
        ),
    ),
    (
        "no tokenizer",
        4,
        lambda s: ((s.copy_of_base() / "tokenizer.json").unlink(), train("good.csv", model="copy"))[
            1
        ],
    ),
    ("no such folder of a sentence encoder", 4, lambda s: embeddings(s, "nothing")),
    ("a language model for a sentence encoder", 4, lambda s: embeddings(s, "base")),
    ("a GGUF file that is not there", 4, lambda s: train("good.csv", model="none.gguf")),
    (
        "a GGUF file that is another file",
        4,
        lambda s: train("good.csv", model=s.write("small.gguf", "text,label")),
    ),
    ("a GGUF file that is cut off", 4, cut_off_gguf),
    (
        "a GGUF file that counts too much",
        4,
        lambda s: train("good.csv", model=s.write("small.gguf", b"GGUF\3\0\0\0" + b"\xff" * 16)),
    ),
    (
        "a GGUF file of a billion layers",
        4,
        lambda s: of_gguf(s, metadata={"qwen2.block_count": 10**9}),
    ),
    ("a part of a split GGUF file", 4, lambda s: of_gguf(s, "small-00001-of-00002.gguf")),
    (
        "a LoRA adapter as a GGUF file",
        4,
        lambda s: of_gguf(s, metadata={"general.type": "adapter"}),
    ),
    (
        "an image encoder as a GGUF file",
        4,
        lambda s: of_gguf(s, metadata={"general.type": "mmproj"}),
    ),
    (
        "a GGUF file without a tokenizer",
        4,
        lambda s: of_gguf(s, without=("tokenizer.ggml.tokens",)),
    ),
    (
        "a GGUF file of an unknown architecture",
        4,
        lambda s: of_gguf(s, metadata={"general.architecture": "unheard-of"}),
    ),
    (
        "a GGUF file with positions that transformers does not read",
        4,
        lambda s: of_gguf(s, metadata={"qwen2.rope.scaling.type": "yarn"}),
    ),
    (
        "a GGUF file without some weights",
        4,
        lambda s: of_gguf(s, without=("blk.0.attn_q.weight",)),
    ),
    ("a folder of several GGUF files", 4, several_gguf),
    ("an adapter that was never fetched, offline", 4, lambda s: ["eval", "me/none", "good.csv"]),
    ("a folder that is not an adapter", 4, lambda s: ["eval", "base", "good.csv"]),
    (
        "an adapter with a pattern instead of names",
        4,
        lambda s: broken_adapter(s, target_modules="(a+)+$"),
    ),
    ("an adapter with another rank than its weights", 4, lambda s: broken_adapter(s, r=10**9)),
    (
        "an adapter with fully trained layers",
        4,
        lambda s: broken_adapter(s, modules_to_save=["lm_head"]),
    ),
    ("an evaluation of no run", 4, lambda s: ["eval", "runs/none", "good.csv"]),
    ("an evaluation of an unfinished run", 4, lambda s: [*of_unfinished(s, "eval"), "good.csv"]),
    ("a prediction of no run", 4, lambda s: ["predict", "runs/none", "good.csv"]),
    (
        "an adapter whose card is broken",
        4,
        lambda s: broken_run(s, "adapter/remora.json", "{", "predict", "copy", "good.csv"),
    ),
    (
        "an adapter whose card lacks its labels",
        4,
        lambda s: broken_run(s, "adapter/remora.json", "{}", "predict", "copy", "good.csv"),
    ),
    (
        "an adapter with truncated weights",
        4,
        lambda s: broken_run(
            s, "adapter/adapter_model.safetensors", "cut", "predict", "copy", "good.csv"
        ),
    ),
    (
        "an export for vLLM of a model that answers by classes",
        4,
        lambda s: of_classes(s, "export", "copy", "--vllm"),
    ),
    (
        "an adapter whose card names a head that it lacks",
        4,
        lambda s: of_classes(s, "predict", "copy", "good.csv"),
    ),
    (
        "an export of a fully fine-tuned model",
        4,
        lambda s: full(s, "export", "--merge"),
    ),
    ("a service of no run", 4, lambda s: ["serve", "runs/none", "--port", "0"]),
    (
        "a service of an adapter of another base model",
        4,
        lambda s: other_base(s, "serve", "runs/good", "copy", "--port", "0"),
    ),
    ("an adapter of another base model", 4, lambda s: other_base(s, "eval", "copy", "good.csv")),
    (
        "a fully fine-tuned model served beside an adapter",
        4,
        lambda s: full(s, "serve", "runs/good", "--port", "0"),
    ),
    ("a damaged checkpoint, and no other", 4, damaged_checkpoint),
    # memory and disk
    ("a GGUF file that memory does not suffice to convert", 5, in_little_memory),
    (
        "an output folder that cannot be created",
        5,
        lambda s: train("good.csv", "--output", "good.csv/runs"),
    ),
    # training
    (
        "a run that diverges",
        6,
        lambda s: [
            "train",
            "good.csv",
            "--model",
            "base",
            "--device",
            "cpu",
            "--precision",
            "float32",
            "--learning-rate",
            "1",
            "--max-grad-norm",
            "1e30",
            "--alpha",
            "1e37",
            "--epochs",
            "20",
            "--schedule",
            "constant",
            "--patience",
            "0",
            "--name",
            "wild",
        ],
    ),
    (
        "a time limit that is reached",
        75,
        lambda s: train("good.csv", "--name", "late", "--max-time", "0s"),
    ),
]


WRITE = bool(os.environ.get("REMORA_WRITE_DOCS"))


@pytest.fixture(scope="module")
def rows() -> Iterator[list[str]]:
    """The rows of docs/errors.md; written at the end where that is asked for."""
    made: list[str] = []
    yield made
    if WRITE:
        text = HEAD + "| input | exit code | line |\n|---|---:|---|\n" + "".join(made)
        DOCS.write_text(text, encoding="utf-8")


def test_the_page_has_a_row_for_each_input() -> None:
    documented = re.findall(r"^\| (.+?) \| \d+ \|", DOCS.read_text(encoding="utf-8"), re.MULTILINE)
    assert WRITE or documented == [what for what, _, _ in CASES]


def shortened(line: str, folder: Path) -> str:
    line = line.replace(f"{folder}/", "").replace(str(folder), ".")
    line = re.sub(r"port \d+", "port 8000", line)
    line = re.sub(r"process \d+", "process 4711", line)
    line = re.sub(r"takes [\d,]+;", "takes 2,000;", line)  # the size depends on folder names
    return line.replace("|", "\\|").replace("<", "\\<")


@pytest.mark.parametrize(("what", "code", "command"), CASES, ids=[c[0] for c in CASES])
def test_it_ends_with_its_code_and_one_line(
    what: str,
    code: int,
    command: Callable[[Workshop], list[str]],
    shop: Workshop,
    rows: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.rmtree(shop.folder / "copy", ignore_errors=True)
    arguments = command(shop)
    capsys.readouterr()
    with shop.held:
        assert call(*arguments) == code
    shown = capsys.readouterr().err.strip().splitlines()
    errors = [line for line in shown if line.startswith("error: ")]
    assert len(errors) == 1, shown
    assert errors[0] == shown[-1]
    assert "Traceback" not in "\n".join(shown)
    told = shortened(errors[0], shop.folder)
    row = f"| {what} | {code} | {f'`` {told} ``' if '`' in told else f'`{told}`'} |\n"
    rows.append(row)
    assert WRITE or row in DOCS.read_text(encoding="utf-8"), "run it with REMORA_WRITE_DOCS=1"

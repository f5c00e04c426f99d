"""Hostile and broken adapters, base models and tables: refused before anything acts on them."""

from __future__ import annotations

import gc
import json
import os
import pickle
import random
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

import gguf_files
from conftest import WAYS, WORDS, tiny_config, tiny_model
from remora.config import TrainConfig
from remora.data.dataset import load_dataset
from remora.errors import ModelError, RemoraError
from remora.models import gguf_conversion, gguf_header, loading, lora, saved, untrusted
from remora.training.run import train

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    rows = [f'"{way.format(word)}",{label}' for label, word in WORDS.items() for way in WAYS * 2]
    (folder / "table.csv").write_text("text,label\n" + "\n".join(rows) + "\n")
    config = TrainConfig(
        str(folder / "table.csv"), model=str(base), output=folder, max_steps=1, rank=4, device="cpu"
    )
    return train(config).directory / "adapter"


@pytest.fixture
def adapter(trained: Path, tmp_path: Path) -> Path:
    return shutil.copytree(trained, tmp_path / "adapter")


@pytest.fixture
def loaded(base: Path) -> Any:
    return loading.load(base, torch.float32)


def edit(path: Path, **changes: Any) -> None:
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, **changes}))


def load(folder: Path) -> None:
    saved.load_adapter(folder, base=None, dtype=torch.float32, device=CPU)


def test_what_remora_writes_is_let_in(adapter: Path) -> None:
    load(adapter)


@pytest.mark.parametrize("architecture", ["gpt2", "opt", "llama", "gemma3"])
def test_adapters_of_other_architectures_are_let_in(architecture: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    def base() -> Any:
        return AutoModelForCausalLM.from_config(tiny_config(architecture))

    adapted = lora.add_adapter(base(), rank=4, alpha=8, dropout=0)
    adapted.save_pretrained(tmp_path)
    untrusted.adapter(tmp_path, base())


SLOW_PATTERN = "(a+)+" * 12 + "$"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"target_modules": SLOW_PATTERN}, "by plain names"),
        ({"target_modules": [SLOW_PATTERN]}, "by plain names"),
        ({"target_modules": ["../../etc"]}, "by plain names"),
        ({"target_modules": None}, "by plain names"),
        ({"target_modules": ["embed_tokens"]}, "lacks"),
        ({"rank_pattern": {SLOW_PATTERN: 4}}, "by plain names"),
        ({"alpha_pattern": {SLOW_PATTERN: 4}}, "by plain names"),
        ({"rank_pattern": {"q_proj": 10**12}}, "with the shape"),
        ({"r": 10**12}, "with the shape"),
        ({"r": -1}, "not a positive integer"),
        ({"r": "4"}, "not a positive integer"),
        ({"r": True}, "not a positive integer"),
        ({"lora_alpha": 1e300}, "not a number below 1,000,000"),
        ({"lora_alpha": "x"}, "not a number below 1,000,000"),
        ({"peft_type": "IA3"}, "not 'LORA'"),
        ({"auto_mapping": {"base_model_class": "os", "parent_library": "os"}}, "auto_mapping"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"use_dora": True}, "lacks .*lora_magnitude_vector"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"no_such_key": {"__class__": "os.system"}}, "no_such_key"),
    ],
)
def test_a_hostile_adapter_configuration_is_refused_at_once(
    adapter: Path, changes: dict[str, Any], told: str
) -> None:
    edit(adapter / "adapter_config.json", **changes)
    began = time.monotonic()
    with pytest.raises(ModelError, match=told):
        load(adapter)
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("content", ["", "[]", "null", "1", "{", "[" * 100_000, '{"r": NaN}', "\0"])
@pytest.mark.parametrize("name", ["adapter_config.json", "remora.json"])
def test_what_is_no_json_object_is_one_line(adapter: Path, name: str, content: str) -> None:
    (adapter / name).write_text(content)
    with pytest.raises(ModelError) as caught:
        load(adapter)
    assert "\n" not in str(caught.value)


def test_tensors_of_other_shapes_are_refused(adapter: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    name = sorted(tensors)[0]
    save_file({**tensors, name: tensors[name][:, :-1].contiguous()}, path)
    with pytest.raises(ModelError, match=f"has {name} with the shape"):
        load(adapter)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_links_are_refused(adapter: Path, tmp_path: Path, name: str) -> None:
    (adapter / name).rename(tmp_path / name)
    (adapter / name).symlink_to(tmp_path / name)
    with pytest.raises(ModelError, match="links to a file outside"):
        load(adapter)


def test_pickles_beside_are_not_opened(adapter: Path, tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "executed"),)

    for name in ("adapter_model.bin", "adapter_model.pt", "pytorch_model.bin"):
        (adapter / name).write_bytes(pickle.dumps(Hostile()))
    load(adapter)
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"no adapter_model\.safetensors"):
        load(adapter)
    assert not (tmp_path / "executed").exists()


@pytest.fixture
def copied(base: Path, tmp_path: Path) -> Path:
    return shutil.copytree(base, tmp_path / "base")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers 1e"),
        ({"hidden_size": 10**9}, "hidden_size 1e"),
        ({"vocab_size": 10**8}, "vocab_size 1e"),
        ({"intermediate_size": 9_000_000}, "download the model again"),
        ({"hidden_size": -1}, None),
        ({"num_attention_heads": 0}, None),
        ({"hidden_act": "__import__('os').system('true')"}, None),
        ({"layer_types": ["full_attention"] * 2_000}, "layer_types 2"),
    ],
)
def test_a_hostile_base_configuration_is_refused_at_once(
    copied: Path, changes: dict[str, Any], told: str | None
) -> None:
    edit(copied / "config.json", **changes)
    before = psutil.Process().memory_info().rss
    began = time.monotonic()
    with pytest.raises(ModelError, match=told) as caught:
        loading.load(copied, torch.float32)
    assert "\n" not in str(caught.value)
    assert time.monotonic() - began < 5
    assert psutil.Process().memory_info().rss - before < 500e6


def test_code_in_the_folder_is_never_run(copied: Path, tmp_path: Path) -> None:
    (copied / "modeling_evil.py").write_text(f"import os; os.mkdir({str(tmp_path / 'run')!r})\n")
    auto = {"AutoModelForCausalLM": "modeling_evil.Evil", "AutoConfig": "modeling_evil.Config"}
    edit(copied / "config.json", auto_map=auto)
    loading.load(copied, torch.float32)  # the architecture is one that transformers knows
    edit(copied / "config.json", model_type="evil")
    with pytest.raises(ModelError):
        loading.load(copied, torch.float32)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd", "absent.safetensors"])
def test_an_index_leads_to_no_file_elsewhere(copied: Path, name: str) -> None:
    (copied.parent / "other.safetensors").write_bytes((copied / "model.safetensors").read_bytes())
    index = {"metadata": {}, "weight_map": {"model.norm.weight": name}}
    (copied / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="which is not a file beside it"):
        loading.load(copied, torch.float32)


def test_weights_that_lie_elsewhere_are_refused_but_not_the_hubs_cache(
    copied: Path, tmp_path: Path
) -> None:
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir(parents=True)
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    for path in copied.iterdir():
        shutil.copy(path, blobs / path.name)
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    loading.load(snapshot, torch.float32)
    (copied / "model.safetensors").unlink()
    (copied / "model.safetensors").symlink_to(blobs / "model.safetensors")
    with pytest.raises(ModelError, match="links to a file outside of its folder"):
        loading.load(copied, torch.float32)


VALUES: tuple[Any, ...] = (
    *(None, True, 0, -1, 3, 10**9, 10**30, 1.5, float("nan"), float("inf"), "", "x", "../x"),
    *("\0", "\ud800", "__import__('os')", SLOW_PATTERN, [], [[]], {}, {"a": []}, ["q_proj"] * 99),
)


def mutate(content: bytes, generator: random.Random) -> bytes:
    """Change a JSON value, or bytes anywhere."""
    if content[:1] == b"{" and b"}\n{" not in content and generator.random() < 0.8:
        values = json.loads(content)
        key = generator.choice([*values, "auto_map", "quantization_config", "modules_to_save"])
        values[key] = generator.choice(VALUES)
        return json.dumps(values).encode()
    changed = bytearray(content)
    for _ in range(generator.randint(1, 8)):
        at = generator.randrange(min(len(changed), generator.choice((64, 4096, 10**9))))
        kind = generator.randrange(3)
        if kind == 0:
            changed[at] = generator.randrange(256)
        elif kind == 1:
            del changed[at : at + generator.randint(1, 64)]
        else:
            changed[at:at] = generator.randbytes(generator.randint(1, 64))
        if not changed:
            return b""
    return bytes(changed)


class Watch:
    """Notes what no reader of files may do: run, connect, or write outside of a folder."""

    def __init__(self) -> None:
        self.allowed: Path | None = None
        self.seen: list[str] = []
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.allowed is None:
            return
        if event in {
            "os.system",
            "os.exec",
            "os.posix_spawn",
            "subprocess.Popen",
            "socket.connect",
        }:
            self.seen.append(event)
        elif event == "open" and isinstance(arguments[0], str):
            path, mode, _ = arguments
            if (
                mode
                and set(mode) & set("wax+")
                and not path.startswith(("/dev/", str(self.allowed)))
            ):
                self.seen.append(f"{event} {path}")


WATCH = Watch()


def fuzzed(
    make: Callable[[], Path], names: list[str], use: Callable[[Path], Any], count: int, seed: int
) -> dict[str, int]:
    """Mutate a file of a folder again and again; return how often each way to end was met."""
    generator = random.Random(seed)
    ends: dict[str, int] = {}
    folder = make()
    originals = {name: (folder / name).read_bytes() for name in names}
    # A collection of what all tests of this process have left takes a second by itself.
    gc.collect()
    gc.freeze()
    for number in range(count):
        name = generator.choice(names)
        (folder / name).write_bytes(mutate(originals[name], generator))
        WATCH.seen.clear()
        WATCH.allowed = folder
        began, before, told = time.process_time(), psutil.Process().memory_info().rss, ""
        try:
            use(folder)
            end = "0"
        except RemoraError as error:
            end, told = str(error.exit_code), str(error)
        finally:
            WATCH.allowed = None
        assert "\n" not in told, (number, name, told)
        assert not WATCH.seen, (number, name, WATCH.seen)
        assert time.process_time() - began < 1, (number, name)
        assert psutil.Process().memory_info().rss - before < 500e6, (number, name)
        ends[end] = ends.get(end, 0) + 1
        (folder / name).write_bytes(originals[name])
    gc.unfreeze()
    return ends


COUNTS = [
    pytest.param(60, 0, id="a-few"),
    pytest.param(3_400, 1, id="thousands", marks=pytest.mark.durability),
]


@pytest.mark.parametrize(("count", "seed"), COUNTS)
def test_mutated_adapters_end_in_a_documented_way(adapter: Path, count: int, seed: int) -> None:
    names = ["adapter_config.json", "adapter_model.safetensors", "remora.json"]
    ends = fuzzed(lambda: adapter, names, load, count, seed)
    assert set(ends) <= {"0", "4"}
    assert ends["4"] > count / 10


@pytest.mark.parametrize(("count", "seed"), COUNTS)
def test_mutated_bases_end_in_a_documented_way(copied: Path, count: int, seed: int) -> None:
    names = ["config.json", "model.safetensors", "tokenizer_config.json", "tokenizer.json"]

    def use(folder: Path) -> None:
        loading.load_tokenizer(folder)
        loading.load(folder, torch.float32)

    ends = fuzzed(lambda: copied, names, use, count, seed)
    assert set(ends) <= {"0", "4"}
    assert ends["4"] > count / 10


@pytest.mark.parametrize(("count", "seed"), COUNTS)
def test_mutated_gguf_files_end_in_a_documented_way(
    tokenizer: Any, tmp_path: Path, count: int, seed: int
) -> None:
    model = tiny_model("llama", torch.float32, vocabulary=len(tokenizer))
    path = gguf_files.write(tmp_path / "m.gguf", model, tokenizer)
    header = path.read_bytes()[: gguf_header.read(path).weights_start]
    weights = path.read_bytes()[len(header) :]

    def use(folder: Path) -> None:
        path.write_bytes((folder / "header").read_bytes() + weights)
        converted = folder / "converted"
        shutil.rmtree(converted, ignore_errors=True)
        converted.mkdir()
        gguf_conversion.convert(path, converted)
        loading.load(converted, torch.float32)

    (tmp_path / "header").write_bytes(header)
    use(tmp_path)  # imports take their time once
    ends = fuzzed(lambda: tmp_path, ["header"], use, count, seed)
    assert set(ends) <= {"0", "4"}
    assert ends["4"] > count / 10


@pytest.mark.parametrize(("count", "seed"), COUNTS)
def test_mutated_tables_end_in_a_documented_way(tmp_path: Path, count: int, seed: int) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [(way.format(word), label) for label, word in WORDS.items() for way in WAYS * 2]
    texts, labels = (list(column) for column in zip(*rows, strict=True))
    (tmp_path / "a.csv").write_text(
        "text,label\n" + "\n".join(f'"{text}",{label}' for text, label in rows)
    )
    (tmp_path / "a.jsonl").write_text(
        "\n".join(json.dumps({"text": text, "label": label}) for text, label in rows)
    )
    pyarrow.parquet.write_table(
        pyarrow.table({"text": texts, "label": labels}), tmp_path / "a.parquet"
    )
    for name in ("a.csv", "a.jsonl", "a.parquet"):
        ends = fuzzed(
            lambda: tmp_path,
            [name],
            lambda folder, name=name: load_dataset(str(folder / name)),
            count // 3,
            seed,
        )
        assert set(ends) <= {"0", "3"}, name


@pytest.fixture(autouse=True)
def _unwatched() -> Iterator[None]:
    yield
    WATCH.allowed = None

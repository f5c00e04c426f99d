"""Hostile, broken and other GGUF files are refused by their header, before anything acts on it."""

from __future__ import annotations

import struct
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from gguf import GGMLQuantizationType as Type

import gguf_files
from conftest import tiny_model
from remora.errors import ConfigError, ModelError
from remora.models import gguf_header


@pytest.fixture(scope="module")
def model(tokenizer: Any) -> Any:
    import torch

    return tiny_model("llama", torch.float32, vocabulary=len(tokenizer))


@pytest.fixture(scope="module")
def written(model: Any, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gguf_files.write(tmp_path_factory.mktemp("gguf") / "m.gguf", model, tokenizer)


def test_what_it_says_of_a_file(model: Any, tokenizer: Any, written: Path) -> None:
    header = gguf_header.read(written)
    assert header.architecture == "llama"
    assert header.num_weights == sum(p.numel() for p in model.parameters())
    assert header.size_bytes == written.stat().st_size
    assert (header.dtype, header.is_quantized, header.quantization) == ("float32", False, "F32")
    assert header.metadata["tokenizer.ggml.tokens"] == len(tokenizer)
    tensor = header.tensors["blk.0.attn_q.weight"]
    assert (tensor.shape, tensor.num_bytes) == ((32, 32), 4 * 32 * 32)


@pytest.mark.parametrize(
    ("stored", "file_type", "expected"),
    [
        (Type.F16, None, ("float16", False, "F16")),
        (Type.BF16, None, ("bfloat16", False, "BF16")),
        (Type.Q8_0, None, ("bfloat16", True, "Q8_0")),
        (Type.Q8_0, 15, ("bfloat16", True, "Q4_K_M")),
        (Type.Q8_0, 9999, ("bfloat16", True, "Q8_0")),
        (Type.Q8_0, 1024, ("bfloat16", True, "Q8_0")),  # llama.cpp's GUESSED
        (Type.F32, 0, ("float32", False, "F32")),
    ],
)
def test_types_of_weights(
    stored: Type,
    file_type: int | None,
    expected: tuple[str, bool, str],
    tokenizer: Any,
    tmp_path: Path,
) -> None:
    import torch

    wide = tiny_model("gpt2", torch.float32, vocabulary=len(tokenizer))
    more = {} if file_type is None else {"general.file_type": file_type}
    path = gguf_files.write(tmp_path / "m.gguf", wide, tokenizer, stored, metadata=more)
    header = gguf_header.read(path)
    assert (header.dtype, header.is_quantized, header.quantization) == expected


@pytest.mark.parametrize(
    ("metadata", "told"),
    [
        ({"general.type": "adapter"}, "is a LoRA adapter; give"),
        ({"adapter.type": "lora"}, "is a LoRA adapter; give"),
        ({"general.type": "mmproj"}, r"image encoder of a model \(mmproj\)"),
        ({"general.architecture": "clip"}, r"image encoder of a model \(mmproj\)"),
        ({"general.type": "imatrix"}, "a GGUF file of 'imatrix'"),
        ({"split.count": 2}, "one of 2 parts .* llama-gguf-split --merge"),
        ({"general.architecture": "a b"}, "does not name its architecture"),
        ({"tokenizer.ggml.model": "none"}, "has no tokenizer"),
        ({"tokenizer.chat_template": 3}, "chat template that is no text"),
        ({"llama.block_count": 10**9}, "llama.block_count 1e"),
        ({"llama.block_count": 1_001}, "more than 1,000"),
        ({"llama.block_count": 999}, r"counts 999 layers and holds the weights of \d"),
        ({"llama.rope.freq_base": float("inf")}, "freq_base inf"),
        ({"llama.rope.freq_base": float("nan")}, "freq_base nan"),
        ({"llama.rope.freq_base": 0.0}, "freq_base 0"),
        ({"llama.context_length": 10**9}, "llama.context_length 1e"),
        ({"llama.vocab_size": 10**8}, "llama.vocab_size 1e"),
        ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, "epsilon nan"),
        ({"general.alignment": 7}, "its alignment is 7"),
        ({"general.alignment": 0}, "its alignment is 0"),
    ],
)
def test_other_kinds_and_absurd_sizes_are_refused(
    metadata: dict[str, Any], told: str, model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    path = gguf_files.write(tmp_path / "m.gguf", model, tokenizer, metadata=metadata)
    refused(path, told)


def refused(path: Path, told: str | None = None) -> None:
    before = psutil.Process().memory_info().rss
    began = time.process_time()
    with pytest.raises(ModelError, match=told) as caught:
        gguf_header.read(path)
    assert "\n" not in str(caught.value)
    assert "; " in str(caught.value)
    assert time.process_time() - began < 1
    assert psutil.Process().memory_info().rss - before < 100e6


@pytest.mark.parametrize("without", ["tokenizer.ggml.tokens", "tokenizer.ggml.model"])
def test_a_file_without_a_tokenizer_is_refused(
    without: str, model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    path = gguf_files.write(tmp_path / "m.gguf", model, tokenizer, without=(without,))
    refused(path, "has no tokenizer")


@pytest.mark.parametrize("name", ["m-00001-of-00002.gguf", "m-Q4_K_M-00002-of-00002.GGUF"])
def test_a_part_of_a_split_file_is_refused(name: str, written: Path, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(written.read_bytes())
    refused(path, "of 2 of a split model; join the parts with llama-gguf-split --merge")


@pytest.mark.parametrize("share", [0.0, 0.00001, 0.0001, 0.01, 0.1, 0.5, 0.999])
def test_a_file_that_is_cut_off_is_refused(share: float, written: Path, tmp_path: Path) -> None:
    content = written.read_bytes()
    path = tmp_path / "m.gguf"
    path.write_bytes(content[: int(share * len(content))])
    refused(path, "is cut off|not a GGUF file")


def header(num_tensors: int = 0, num_keys: int = 0, rest: bytes = b"", version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, num_tensors, num_keys) + rest


def text(value: bytes | str) -> bytes:
    content = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(content)) + content


def array(kind: int, count: int, rest: bytes = b"") -> bytes:
    return text("a.b") + struct.pack("<IIQ", 9, kind, count) + rest


def tensor(
    name: str = "a", shape: tuple[int, ...] = (32,), kind: int = 0, start: int = 0, room: int = 4096
) -> bytes:
    dimensions = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return text(name) + dimensions + struct.pack("<IQ", kind, start) + bytes(room)


FEW = 2**64 - 1
LYING: dict[str, tuple[bytes, str]] = {
    "another file": (b"PK\x03\x04" + bytes(99), "not a GGUF file"),
    "an old version": (header(version=1), "of version 1"),
    "a newer version": (header(version=4), "of version 4"),
    "big-endian": (b"GGUF\0\0\0\3" + bytes(99), "big-endian"),
    "billions of keys": (header(num_keys=FEW), "it counts 0 tensors and 18,446"),
    "billions of tensors": (header(num_tensors=10**12), "it counts 1,000,000,000,000 tensors"),
    "keys that are not there": (header(num_keys=4_000), "is cut off"),
    "a key of 16 exabytes": (header(num_keys=1, rest=struct.pack("<Q", FEW)), "a string of 18,446"),
    "a key that ends late": (header(num_keys=1, rest=struct.pack("<Q", 99)), "is cut off"),
    "a key that is no text": (header(num_keys=1, rest=text(b"\xff\xfe")), "a string is not UTF-8"),
    "a key of two lines": (header(num_keys=1, rest=text("a\nb")), "is no plain name"),
    "a key of the terminal's": (header(num_keys=1, rest=text("\x1b[31m")), "is no plain name"),
    "a key twice": (header(num_keys=2, rest=2 * (text("a") + bytes(4) + b"\1")), "a twice"),
    "a value of no type": (header(num_keys=1, rest=text("a") + b"c\0\0\0"), "is of type 99"),
    "nested arrays": (header(num_keys=1, rest=array(9, 1, array(9, 1))), "an array of type 9"),
    "an endless array": (header(num_keys=1, rest=array(0, FEW)), "has 18,446"),
    "an array that is not there": (header(num_keys=1, rest=array(10, 10**6)), "is cut off"),
    "many empty texts": (
        header(num_keys=1, rest=array(8, 4_000_001) + bytes(9)),
        "has 4,000,001 elements",
    ),
    "a text in an array of 16 exabytes": (
        header(num_keys=1, rest=array(8, 1, struct.pack("<Q", FEW))),
        "a string of 18,446",
    ),
    "a token that is no text": (
        header(num_keys=1, rest=array(8, 1, text(b"\xff\xfe"))),
        "a string is not UTF-8",
    ),
    "no dimensions": (header(1, rest=tensor(shape=())), "has 0 dimensions"),
    "billions of dimensions": (
        header(1, rest=text("a") + struct.pack("<I", 2**32 - 1)),
        "has 4,294,967,295 dimensions",
    ),
    "an empty dimension": (header(1, rest=tensor(shape=(0,))), "has the shape"),
    "an endless dimension": (header(1, rest=tensor(shape=(FEW, 2))), "has the shape"),
    "dimensions that overflow": (header(1, rest=tensor(shape=(10**7,) * 4)), "is cut off"),
    "half a block": (header(1, rest=tensor(shape=(33,), kind=8)), "has the shape"),
    "a type that nobody knows": (header(1, rest=tensor(kind=999)), "in type 999"),
    "a tensor past the end": (header(1, rest=tensor(start=10**15)), "is cut off"),
    "a tensor that wraps around": (header(1, rest=tensor(start=FEW)), "is cut off"),
    "a tensor beside its place": (header(1, rest=tensor(start=5)), "not aligned"),
    "tensors in one place": (
        header(2, rest=tensor("a", (1000,), room=0) + tensor("b", (1000,), room=5_000)),
        "its tensors overlap",
    ),
    "a tensor twice": (header(2, rest=tensor(room=0) + tensor()), "a twice"),
    "a tensor with a path for a name": (header(1, rest=tensor("../../a")), "is no plain name"),
    "nothing at all": (header(rest=bytes(8)), "does not name its architecture"),
}


@pytest.mark.parametrize(("content", "told"), LYING.values(), ids=LYING.keys())
def test_a_header_that_lies_is_refused_at_once(content: bytes, told: str, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    refused(path, told)


def test_a_file_that_may_not_be_read_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    path = tmp_path / "m.gguf"
    path.write_bytes(header())
    monkeypatch.setattr(Path, "open", forbidden)
    refused(path, "cannot be read .*Permission denied.*; restore it")


def test_without_the_package_it_says_what_to_install(
    written: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ConfigError, match=r"pip install 'remora\[gguf\]'"):
        gguf_header.read(written)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("m.gguf", b"anything", True),
        ("M.GGUF", b"", True),
        ("sha256-0a", b"GGUF\3", True),
        ("m.bin", b"GGU", False),
        ("good.csv", b"text,label", False),
    ],
)
def test_a_file_is_known_by_its_name_or_its_first_bytes(
    name: str, content: bytes, expected: bool, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    assert gguf_header.is_gguf(tmp_path / name) is expected

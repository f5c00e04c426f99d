"""GGUF files as base models: each is converted once, into a plain model folder in a cache.

So nothing else in Remora needs to know of them. The folder is named by the file's SHA-256, so a
file is found again wherever it lies, and a changed one is another. Another process converts: its
memory is gone with it, and what it prints or how it ends touches nobody else.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

import torch

import remora
from remora.errors import ConfigError, ModelError, RemoraError, ResourceError
from remora.formatting import listed, one_line, spoken_bytes, spoken_seconds
from remora.models import gguf_header, untrusted
from remora.models.gguf_header import Header
from remora.runtime import files, memory

CACHE = "REMORA_CACHE"
"""Environment variable with the folder of the cache."""

ORIGIN = "gguf.json"
"""File in a converted folder that says what it was converted from; it is written last."""

TESTED = frozenset({"llama", "qwen2", "qwen3", "gemma2", "gemma3", "gpt2"})
"""Architectures whose conversion the tests compare with the model that a file was written from."""

ADVICE = f"set {CACHE} to a folder on another disk"
TELL_SECONDS = 30.0
"""A long conversion reports its progress this often."""

# Memory of a conversion as measured on Gemma 3 270M and SmolLM2 135M, rounded up; docs/log.md.
LIBRARIES_BYTES, ITEM_BYTES, LARGEST_BYTES = 500_000_000, 900, 12
"""Of the libraries, of an element of the header's arrays, of a weight of the largest tensor."""

_CONVERT = """
import sys
sys.path[:] = sys.argv[3:]
from remora.models import gguf_conversion
gguf_conversion.main(sys.argv[1], sys.argv[2])
"""
_ALONE = ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What a folder was converted from, the contents of gguf.json."""

    file: str  # its name
    sha256: str
    quantization: str  # as llama.cpp names it, such as Q4_K_M
    weights_sha256: str  # of the converted weights
    remora_version: str = remora.__version__


def file_of(name: str) -> Path | None:
    """Return the GGUF file that a base model's name means, absolute; None if it means another.

    It is that file, or a folder with this file only, and no safetensors.

    Raises:
        ModelError: If the file is missing, or a folder holds several, or it links elsewhere.
    """
    path = Path(name).expanduser()
    is_model = (path / "config.json").is_file() and any(path.glob("*.safetensors"))
    if path.is_dir() and not is_model:
        found = sorted(each for each in path.iterdir() if each.suffix.lower() == ".gguf")
        if not found:
            return None
        if len(found) > 1:
            gguf_header.refuse_part(found[0])
            raise ModelError(
                f"{name} holds {len(found)} GGUF files, {listed([each.name for each in found])}; "
                "give the path of one"
            )
        return Path(os.path.abspath(untrusted.followed(found[0])))
    if path.is_file() and gguf_header.is_gguf(path):
        return Path(os.path.abspath(path))  # a link keeps its name, which says more
    if path.suffix.lower() == ".gguf" and not path.exists():
        raise ModelError(f"there is no file {name}; give the path of a GGUF file")
    return None


def folder_of(path: Path) -> Path:
    """Return the folder that a GGUF file was converted into, converted now if need be.

    Raises:
        ConfigError: If the package `gguf` is not installed.
        ModelError: If the file cannot be converted.
        ResourceError: If memory or disk do not suffice.
    """
    return _folder_of(path, _state(path), cache())  # reads it once, as long as it stays the same


def cache() -> Path:
    """Return the folder of all converted files."""
    if chosen := os.environ.get(CACHE):
        return Path(chosen).expanduser().absolute() / "gguf"
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home).absolute() / "remora" / "gguf"


def folder_name(sha256: str) -> str:
    """Return the name of the folder that the file with a hash is converted into; "" for ""."""
    return str(cache() / sha256) if sha256 else ""


def origin(folder: Path) -> Origin | None:
    """Return what a model's folder was converted from; None if its weights are not from a GGUF.

    Raises:
        ModelError: If gguf.json is broken.
    """
    path = folder / ORIGIN
    if not path.is_file():
        return None
    try:
        found = Origin(**untrusted.read_json(untrusted.followed(path)))
    except TypeError:
        found = None
    if found is None or not all(isinstance(value, str) for value in asdict(found).values()):
        raise ModelError(f"{path} is broken (other keys or values); remove {folder}")
    return found


def described(quantization: str) -> str:
    """Return what a model card says of weights from a GGUF file, such as GGUF, Q4_K_M."""
    is_plain = quantization in {"F32", "F16", "BF16"}
    return f"GGUF, {quantization}" + ("" if is_plain else ", dequantized")


@functools.lru_cache(maxsize=16)
def _folder_of(path: Path, state: tuple[int, int], root: Path) -> Path:
    """Find or make the folder of a file in a state, below a root."""
    gguf_header.refuse_part(path)
    with _reading(path):
        digest = files.sha256([path])
    folder = root / digest
    if _is_whole(folder):
        return folder
    header = gguf_header.read(path)
    with files.disk_errors(root, ADVICE):
        root.mkdir(parents=True, exist_ok=True)
        with _locked(root / f"{digest}.lock", path):
            if not _is_whole(folder):
                gguf_header.refuse_unknown(header)
                _refuse_too_large(header, root)
                _make(header, digest, folder)
    if _state(path) != state:
        raise ModelError(f"{path} was changed while it was converted; run the command again")
    return folder


def _state(path: Path) -> tuple[int, int]:
    with _reading(path):
        status = path.stat()
    return status.st_size, status.st_mtime_ns


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Raise errors of reading a file as a ModelError of one line."""
    try:
        yield
    except OSError as error:
        raise ModelError(f"{path} cannot be read ({one_line(error)}); restore it") from error


def _is_whole(folder: Path) -> bool:
    """Return whether a folder is converted, and nobody has cleaned it up since."""
    names = (ORIGIN, "config.json", "tokenizer.json")
    return all((folder / name).is_file() for name in names) and any(folder.glob("*.safetensors"))


@contextlib.contextmanager
def _locked(path: Path, file: Path) -> Iterator[None]:
    """Hold a lock, so that one process converts a file and the others wait for it."""
    from filelock import FileLock, Timeout

    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        _say(f"waiting for another process, which converts {file.name}")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _refuse_too_large(header: Header, root: Path) -> None:
    """Refuse a file that this machine has not the memory or the disk to convert.

    Raises:
        ResourceError: If there is less than it needs.
    """
    needed, stored = needed_bytes(header), _stored_bytes(header)
    free = memory.free_bytes(torch.device("cpu"), is_shared=False)
    if free is not None and needed > free:
        raise ResourceError(
            f"converting {header.path} needs {spoken_bytes(needed)} of memory, "
            f"{spoken_bytes(free)} are free; free some, or convert it on a larger machine and "
            f"copy the folder in {root}"
        )
    stored += 200 * header.num_items  # the tokenizer
    if stored > (free := shutil.disk_usage(root).free):
        raise ResourceError(
            f"converting {header.path} needs {spoken_bytes(stored)} of disk, "
            f"{spoken_bytes(free)} are free in {root}; free space, or {ADVICE}"
        )


def needed_bytes(header: Header) -> int:
    """Return the peak of memory of a conversion."""
    largest = max(tensor.num_weights for tensor in header.tensors.values())
    return (
        LIBRARIES_BYTES
        + ITEM_BYTES * header.num_items
        + _stored_bytes(header)
        + LARGEST_BYTES * largest
    )


def _stored_bytes(header: Header) -> int:
    """Return the size of the converted weights."""
    return header.num_weights * (4 if header.dtype == "float32" else 2)


def _make(header: Header, digest: str, folder: Path) -> None:
    """Convert a file into a folder, which is there whole or not at all; called under the lock."""
    for left in (folder, *folder.parent.glob(f"{digest}.*.tmp")):  # from what was cut off
        shutil.rmtree(left, ignore_errors=True)
    stored = f"stored in {header.dtype}"
    if header.is_quantized:
        stored = f"quantized ({header.quantization}); they are dequantized to {header.dtype}"
    _say(
        f"converting {header.path.name} ({spoken_bytes(header.size_bytes)}) once, which takes a "
        f"minute or more, to {spoken_bytes(_stored_bytes(header))} in {folder}: its "
        f"{header.num_weights:,} weights are {stored}"
    )
    if header.architecture not in TESTED:
        _say(
            f"the conversion of the architecture {header.architecture} is transformers' own and "
            "has no test in Remora; compare some answers with those of llama.cpp"
        )
    began = time.monotonic()
    temporary = folder.with_name(f"{digest}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.mkdir()
        _convert_apart(header.path, temporary)
        about = Origin(
            file=header.path.name,
            sha256=digest,
            quantization=header.quantization,
            weights_sha256=files.weights_sha256(temporary),
        )
        files.write_json(temporary / ORIGIN, asdict(about))
        for each in (*temporary.iterdir(), temporary):
            files.sync(each)
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    files.sync(folder.parent)
    _say(f"converted in {spoken_seconds(time.monotonic() - began)}")


def _convert_apart(path: Path, folder: Path) -> None:
    """Convert a file in a process of its own, which ends with this one, however that ends.

    Raises:
        RemoraError: The error of that process.
    """
    environment = {name: value for name, value in os.environ.items() if name not in _ALONE}
    environment["HF_HUB_OFFLINE"] = "1"  # nothing is fetched that nobody has named
    process = subprocess.Popen(
        [sys.executable, "-c", _CONVERT, str(path), str(folder), *sys.path],
        stdin=subprocess.PIPE,  # it ends when this is closed
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        printed = _follow(process.stderr)
        answered = process.stdout.read().decode(errors="replace").strip().splitlines()
        code = process.wait()
    finally:
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                stream.close()
    if code == 0 and answered:
        error = json.loads(answered[-1])
        if error:
            kinds = {kind.exit_code: kind for kind in (ConfigError, ModelError, ResourceError)}
            raise kinds.get(error["exit_code"], RemoraError)(error["message"])
        return
    if code == -9:
        raise ResourceError(
            f"converting {path} was ended by SIGKILL, probably as memory ran out; free some"
        )
    ended = f"signal {-code}" if code < 0 else f"exit code {code}"
    reason = printed.splitlines()[-1] if printed else ended
    raise ModelError(f"{path} cannot be converted ({reason}); {gguf_header.FOLDER}")


def _follow(stream: IO[bytes]) -> str:
    """Read what transformers prints until it ends, and report its progress now and then."""
    seen, told = "", time.monotonic()
    while chunk := os.read(stream.fileno(), 4_096):
        seen = (seen + chunk.decode(errors="replace"))[-4_096:]
        if time.monotonic() - told > TELL_SECONDS and (shares := re.findall(r"(\d+)%\|", seen)):
            _say(f"{shares[-1]} % converted")
            told = time.monotonic()
    return seen.strip()


def _say(line: str) -> None:
    """Tell the user, wherever a base model was asked for."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()

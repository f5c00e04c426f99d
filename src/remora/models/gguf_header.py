"""The header of a GGUF file, checked before any other library reads the file.

https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The file may come from a stranger: every
count and length in it is compared with what is there before anything is read or allocated, so that
reading takes no more than the file itself holds.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import re
import struct
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from remora.errors import ConfigError, ModelError
from remora.formatting import one_line, quote
from remora.models import untrusted

MAGIC = b"GGUF"
MAX_KEYS, MAX_TENSORS, MAX_ITEMS = 4_096, 65_536, 4_000_000
"""Upper limits of metadata keys, of tensors, and of the elements of all arrays together."""

SCALARS = {
    **{0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?"},
    **{10: "<Q", 11: "<q", 12: "<d"},
}
"""Formats of the types of a value that have a fixed size."""

STRING, ARRAY = 8, 9
F32, F16, BF16 = 0, 1, 30
AGAIN = "download it again"
FOLDER = "give the folder of the model in Hugging Face's format"

_NAME = re.compile(r"[\w.-]{1,200}", re.ASCII)
_LAYER = re.compile(r"blk\.(\d{1,6})\.", re.ASCII)
_PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """Where a tensor lies, and in what type."""

    shape: tuple[int, ...]  # the row length first, as in the file
    type: int  # ggml's number
    start: int  # bytes from the start of the weights
    num_bytes: int

    @property
    def num_weights(self) -> int:
        """Return the number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True, kw_only=True)
class Header:
    """A header that was checked. Of arrays in the metadata only the lengths are kept."""

    path: Path
    size_bytes: int
    metadata: dict[str, Any]
    tensors: dict[str, Tensor]
    num_items: int  # elements of all arrays of the metadata
    weights_start: int  # bytes from the start of the file

    @property
    def architecture(self) -> str:
        """Return llama.cpp's name of the architecture."""
        return str(self.metadata["general.architecture"])

    @property
    def num_weights(self) -> int:
        """Return the weights of all tensors."""
        return sum(tensor.num_weights for tensor in self.tensors.values())

    @property
    def dtype(self) -> str:
        """Return the name of the torch type that holds these weights; bfloat16 if quantized."""
        types = {tensor.type for tensor in self.tensors.values()}
        if types <= {F32}:
            return "float32"
        return "float16" if types <= {F32, F16} else "bfloat16"

    @property
    def is_quantized(self) -> bool:
        """Return whether any tensor is stored in fewer bits than 16."""
        return not {tensor.type for tensor in self.tensors.values()} <= {F32, F16, BF16}

    @property
    def quantization(self) -> str:
        """Return llama.cpp's name of the file's type, such as Q4_K_M, or that of most weights."""
        from gguf import GGMLQuantizationType, LlamaFileType

        with contextlib.suppress(KeyError, ValueError):  # not said, or a newer one
            name = LlamaFileType(self.metadata["general.file_type"]).name  # MOSTLY_Q4_K_M, GUESSED
            if "_" in name:
                return name.partition("_")[2]
        weights: Counter[int] = Counter()
        for tensor in self.tensors.values():
            weights[tensor.type] += tensor.num_weights
        return GGMLQuantizationType(max(weights, key=weights.__getitem__)).name


def is_gguf(path: Path) -> bool:
    """Return whether a file is a GGUF file, by its first bytes, or is named like one.

    Ollama's have no ending.
    """
    if path.suffix.lower() == ".gguf":
        return True
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def require_package() -> None:
    """Make sure that the package that reads GGUF files is installed.

    Raises:
        ConfigError: If it is not.
    """
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "GGUF files need the package gguf, which is not installed; "
            "run pip install 'remora[gguf]'"
        ) from error


def refuse_part(path: Path) -> None:
    """Refuse a part of a model that was split over several files.

    Raises:
        ModelError: If it is named like one.
    """
    if part := _PART.search(path.name):
        raise ModelError(
            f"{path} is part {int(part[1])} of {int(part[2])} of a split model; join the parts "
            "with llama-gguf-split --merge, and give the result"
        )


def read(path: Path) -> Header:
    """Return the header of a GGUF file, all of it checked.

    Raises:
        ConfigError: If the package `gguf` is not installed.
        ModelError: If the file is broken or hostile, or holds no language model of its own.
    """
    require_package()
    refuse_part(path)
    try:
        with path.open("rb") as file:
            if file.read(len(MAGIC)) != MAGIC:
                raise ModelError(f"{path} is not a GGUF file; {FOLDER}, or a GGUF file")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                header = _Reader(path, content).header()
    except (OSError, ValueError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"{path} cannot be read ({one_line(error)}); restore it") from error
    _refuse_other_kinds(header)
    _refuse_absurd_sizes(header)
    return header


def refuse_unknown(header: Header) -> None:
    """Refuse an architecture that transformers does not read from GGUF files.

    Raises:
        ModelError: If it does not.
    """
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    known = set(GGUF_SUPPORTED_ARCHITECTURES) - {"general", "tokenizer"}
    with contextlib.suppress(ImportError):  # before transformers 5.23
        from transformers.integrations.gguf.gguf_config_mapping import GGUF_CONFIG_ARCHS

        known |= set(GGUF_CONFIG_ARCHS)

    def plain(name: str) -> str:  # it writes them in several ways
        return name.replace("-", "").replace("_", "")

    if plain(header.architecture) not in set(map(plain, known)):
        raise ModelError(
            f"{header.path} has the architecture {header.architecture}, which transformers does "
            f"not read from GGUF files; {FOLDER}"
        )


@dataclass
class _Reader:
    """Reads a header from front to back."""

    path: Path
    content: mmap.mmap
    place: int = len(MAGIC)
    num_items: int = 0
    metadata: dict[str, Any] = field(default_factory=dict)

    def header(self) -> Header:
        """Read everything up to the weights."""
        (version,) = self.take("<I")
        if version not in (2, 3):
            what = "of big-endian order" if version & 0xFFFF == 0 else f"of version {version}"
            raise ModelError(
                f"{self.path} is a GGUF file {what}; convert it again with llama.cpp, which writes "
                "version 3 and little-endian order"
            )
        num_tensors, num_keys = self.take("<QQ")
        if num_keys > MAX_KEYS or num_tensors > MAX_TENSORS:
            raise self.broken(f"it counts {num_tensors:,} tensors and {num_keys:,} keys")
        for _ in range(num_keys):
            key = self.name(self.metadata)
            (kind,) = self.take("<I")
            self.metadata[key] = self.value(key, kind)
        tensors = self.tensors(num_tensors)
        return Header(
            path=self.path,
            size_bytes=len(self.content),
            metadata=self.metadata,
            tensors=tensors,
            num_items=self.num_items,
            weights_start=self.weights_start(tensors),
        )

    def tensors(self, count: int) -> dict[str, Tensor]:
        """Read the table of tensors."""
        from gguf import GGML_QUANT_SIZES

        sizes = {int(kind): size for kind, size in GGML_QUANT_SIZES.items()}
        found: dict[str, Tensor] = {}
        for _ in range(count):
            name = self.name(found)
            (num_dimensions,) = self.take("<I")
            if not 1 <= num_dimensions <= 4:
                raise self.broken(f"{name} has {num_dimensions:,} dimensions")
            shape = self.take(f"<{num_dimensions}Q")
            kind, start = self.take("<IQ")
            if kind not in sizes:
                raise ModelError(
                    f"{self.path} has {name} in type {kind}, which the package gguf does not know; "
                    "update it with pip install --upgrade gguf, or convert the model to Q8_0"
                )
            block, block_bytes = sizes[kind]
            if not all(0 < size <= untrusted.MAX_SIZE for size in shape) or shape[0] % block:
                raise self.broken(f"{name} has the shape {shape}")
            num_bytes = math.prod(shape) // block * block_bytes
            found[name] = Tensor(shape=shape, type=kind, start=start, num_bytes=num_bytes)
        return found

    def weights_start(self, tensors: dict[str, Tensor]) -> int:
        """Return where the weights begin, if the file holds all of them."""
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment not in {2**n for n in range(3, 17)}:
            raise self.broken(f"its alignment is {alignment}")
        begin = -(-self.place // alignment) * alignment
        room = len(self.content) - begin
        if (needed := max((t.start + t.num_bytes for t in tensors.values()), default=0)) > room:
            raise self.cut_off(begin + needed)
        # If tensors shared their bytes, a small file could ask for any amount of memory.
        if sum(tensor.num_bytes for tensor in tensors.values()) > room:
            raise self.broken("its tensors overlap")
        if any(tensor.start % alignment for tensor in tensors.values()):
            raise self.broken("a tensor is not aligned")
        return begin

    def value(self, key: str, kind: int) -> Any:
        """Read a value; of an array, the number of its elements."""
        if kind in SCALARS:
            return self.take(SCALARS[kind])[0]
        if kind == STRING:
            return self.text(untrusted.MAX_JSON_BYTES)
        if kind != ARRAY:
            raise self.broken(f"{key} is of type {kind}")
        element, count = self.take("<IQ")
        self.num_items += count
        if self.num_items > MAX_ITEMS:
            raise self.broken(f"{key} has {count:,} elements")
        if element in SCALARS:
            self.skip(count * struct.calcsize(SCALARS[element]))
        elif element == STRING:
            for _ in range(count):
                self.text(untrusted.MAX_JSON_BYTES)
        else:
            raise self.broken(f"{key} is an array of type {element}")
        return int(count)

    def name(self, known: dict[str, Any]) -> str:
        """Read the name of a key or a tensor, which is plain and not known yet."""
        name = self.text(1_000)
        if not _NAME.fullmatch(name):
            raise self.broken(f"{quote(name)} is no plain name")
        if name in known:
            raise self.broken(f"it has {name} twice")
        return name

    def text(self, limit: int) -> str:
        """Read a string of at most `limit` bytes."""
        (length,) = self.take("<Q")
        if length > limit:
            raise self.broken(f"it has a string of {length:,} bytes")
        start = self.place
        self.skip(length)
        try:
            return self.content[start : self.place].decode()
        except UnicodeDecodeError as error:
            raise self.broken("a string is not UTF-8") from error

    def take(self, form: str) -> tuple[Any, ...]:
        """Read numbers."""
        start = self.place
        self.skip(struct.calcsize(form))
        return struct.unpack_from(form, self.content, start)

    def skip(self, count: int) -> None:
        """Step over bytes that must be there."""
        self.place += count
        if self.place > len(self.content):
            raise self.cut_off(self.place)

    def broken(self, what: str) -> ModelError:
        """Return the error of a header that no program has written."""
        return ModelError(f"{self.path} has a broken header ({what}); {AGAIN}")

    def cut_off(self, needed: int) -> ModelError:
        """Return the error of a file that ends too early."""
        return ModelError(
            f"{self.path} is cut off: its header asks for at least {needed:,} bytes, and it has "
            f"{len(self.content):,}; {AGAIN}"
        )


def _refuse_absurd_sizes(header: Header) -> None:
    """Refuse sizes beyond those of `untrusted.configuration`: transformers acts on them at once.

    Raises:
        ModelError: If there is one.
    """
    for key, value in header.metadata.items():
        if not key.startswith(f"{header.architecture}.") or not isinstance(value, int | float):
            continue
        if not math.isfinite(value) or (key.endswith("freq_base") and value <= 0):
            raise ModelError(f"{header.path} has {key} {value:g}, which no model has; {AGAIN}")
        limit = untrusted.MAX_LAYERS if "layer" in key or "block" in key else untrusted.MAX_SIZE
        if abs(value) > limit and "freq_base" not in key:
            raise ModelError(f"{header.path} has {key} {value:g}, more than {limit:,}; {AGAIN}")
    layers = {int(found[1]) for name in header.tensors if (found := _LAYER.match(name))}
    counted = header.metadata.get(f"{header.architecture}.block_count", 0)
    if layers and isinstance(counted, int) and counted > max(layers) + 1:
        raise ModelError(
            f"{header.path} counts {counted:,} layers and holds the weights of "
            f"{max(layers) + 1:,}; {AGAIN}"
        )


def _refuse_other_kinds(header: Header) -> None:
    """Refuse files that hold something else than a whole language model with its tokenizer.

    Raises:
        ModelError: If it is one of them.
    """
    path, metadata = header.path, header.metadata
    architecture, kind = metadata.get("general.architecture"), metadata.get("general.type", "model")
    if not isinstance(architecture, str) or not _NAME.fullmatch(architecture):
        raise ModelError(f"{path} does not name its architecture; {AGAIN}")
    if kind == "adapter" or "adapter.type" in metadata:
        raise ModelError(f"{path} is a LoRA adapter; give the GGUF file of its base model")
    if kind in {"mmproj", "projector"} or architecture == "clip":
        raise ModelError(
            f"{path} is the image encoder of a model (mmproj); give the GGUF file of the model "
            "itself, which lies beside it"
        )
    if kind != "model":
        raise ModelError(f"{path} is a GGUF file of {quote(str(kind))}; give that of a model")
    if metadata.get("split.count", 0) not in {0, 1}:
        raise ModelError(
            f"{path} is one of {metadata['split.count']} parts of a split model; join the parts "
            "with llama-gguf-split --merge, and give the result"
        )
    if not header.tensors:
        raise ModelError(f"{path} holds no weights; {AGAIN}")
    tokens = metadata.get("tokenizer.ggml.tokens")
    if metadata.get("tokenizer.ggml.model") in {None, "none", "no_vocab"} or not tokens:
        raise ModelError(f"{path} has no tokenizer; {FOLDER}")
    if not isinstance(metadata.get("tokenizer.chat_template", ""), str):
        raise ModelError(f"{path} has a chat template that is no text; {AGAIN}")

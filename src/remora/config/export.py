"""The settings of `remora export`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from remora.config.checks import (
    DEFAULT_MICRO_BATCH_TOKENS,
    Constraint,
    Conversion,
    Count,
    DeviceName,
    FileSize,
    Positive,
    check,
    convert,
    split_names,
    to_bytes,
)

CONVERTED = ("f32", "f16", "bf16", "q8_0")
"""Types of GGUF files that llama.cpp's converter writes itself."""

GGUF_TYPES = (
    *CONVERTED,
    *("q6_k", "q5_k_m", "q5_k_s", "q5_1", "q5_0", "q4_k_m", "q4_k_s", "q4_1", "q4_0", "iq4_xs"),
    *("iq4_nl", "q3_k_l", "q3_k_m", "q3_k_s", "q2_k"),
)
"""Types of GGUF files, the last ones by llama-quantize."""

WAYS = ("merge", "compress", "gguf", "gguf_lora", "vllm", "onnx")
"""The settings that say what is written."""

Names = Annotated[tuple[str, ...], Parameter(negative=()), Conversion(split_names)]
Points = Annotated[float, Constraint("a number of points from 0 to 100", lambda x: 0 <= x <= 100)]


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Settings of `remora export`."""

    run: Path = field(kw_only=False)
    """Directory of a finished run."""

    merge: bool = False
    """Write base model and adapter as one model folder."""

    compress: bool = False
    """Write a smaller adapter: each layer's update truncated to the rank it needs."""

    gguf: Names = ()
    """Write GGUF files for llama.cpp and Ollama, such as f16, q8_0 or q4_k_m (several are separated
    by commas), with the prompt inside; llama.cpp itself answers the run's rows, and its labels are
    compared with the adapter's."""

    gguf_lora: bool = False
    """Write the adapter alone as GGUF, for llama.cpp's --lora, compared in the same way."""

    vllm: bool = False
    """Write a merged model folder for vLLM, with a script that serves it and a client."""

    onnx: bool = False
    """Write an ONNX model, of a run with `--answer classes`, with its tokenizer and a client;
    ONNX Runtime answers the run's rows, and its labels are compared with the adapter's."""

    llama_cpp: Path | None = None
    """Folder of llama.cpp's source, whose converter writes GGUF files. Types other than f32, f16,
    bf16 and q8_0 need its llama-quantize, built there or on the PATH."""

    differing: Points | None = None
    """Percentage of the rows that may get another label from a GGUF file than from the adapter; by
    default 1, for q8_0 2, in fewer bits 10. Above it nothing is written."""

    output: Path | None = None
    """Folder to write; by default merged, compressed, gguf, gguf-lora, vllm or onnx in the
    run directory."""

    dtype: Literal["float32", "bfloat16", "float16", "float8"] | None = None
    """Data type to store weights in; by default that of the base model with `merge`, float8 with
    `compress`."""

    budget: FileSize | None = None
    """Most bytes that the compressed adapter's files may take together, such as 3MB."""

    ratio: Positive | None = None
    """Make the compressed adapter at least this many times smaller than the base model's
    weights."""

    distill: bool = False
    """Where truncation costs too much accuracy, fine-tune the truncated adapter to match the full
    one on the training rows, for up to 2,000 steps per size."""

    tolerance: Points = 0.5
    """Without budget and ratio: percentage points of validation accuracy that the compressed
    adapter may lose, rounded up to a whole row."""

    model: str | None = None
    """Base model, if it has moved since training."""

    micro_batch_tokens: Count = DEFAULT_MICRO_BATCH_TOKENS
    """Most tokens computed at once; limits memory, changes no result."""

    device: DeviceName = "auto"
    """Device to compute on."""

    json: bool = False
    """Write the figures as JSON to standard output."""

    def __post_init__(self) -> None:
        """Check every value; raises ConfigError."""
        convert(self)
        object.__setattr__(self, "gguf", tuple(dict.fromkeys(map(str.lower, self.gguf))))
        unknown = [name for name in self.gguf if name not in GGUF_TYPES]
        ways = [name for name in WAYS if getattr(self, name)]
        flags = [f"--{name.replace('_', '-')}" for name in WAYS]
        is_sized = self.budget is not None or self.ratio is not None
        engine = self.gguf or self.gguf_lora
        check(
            self,
            (
                len(ways) != 1,
                (f"{' and '.join(ways)} are given together" if ways else "nothing is to be written")
                + f"; give one of {', '.join(flags[:-1])} and {flags[-1]}",
            ),
            (
                bool(unknown),
                f"gguf has {', '.join(map(repr, unknown))}; give some of {', '.join(GGUF_TYPES)}",
            ),
            (
                is_sized and not self.compress,
                f"budget and ratio need compress; leave them out with {' and '.join(ways)}",
            ),
            (self.distill and not self.compress, "distill needs compress; leave it out"),
            (
                self.dtype == "float8" and not self.compress,
                "dtype float8 needs compress; merge in 16 or 32 bits",
            ),
            (
                self.onnx and self.dtype not in (None, "float32"),
                "an ONNX model is stored in float32; leave out dtype",
            ),
            (
                bool(engine) and self.dtype is not None,
                "dtype has no meaning with GGUF files; name their types with --gguf",
            ),
            (
                not engine and (self.llama_cpp is not None or self.differing is not None),
                "llama_cpp and differing are settings of GGUF files; add --gguf or --gguf-lora",
            ),
            (
                self.budget is not None and self.ratio is not None,
                "budget and ratio are both given; give one of them",
            ),
        )

    def budget_bytes(self) -> int | None:
        """Return the budget in bytes, None if it was not given."""
        return None if self.budget is None else to_bytes(self.budget)

"""What it takes to convert a GGUF file: seconds, and the peak of memory beside what is asked for.

    python benchmarks/gguf_conversion.py

Real models, which real_models.py fetches. Each is converted into a folder that is deleted after.
"""

from __future__ import annotations

import os
import resource
import sys
import tempfile
import time

import real_models
from remora.formatting import spoken_bytes
from remora.models import gguf, gguf_header
from remora.runtime import files


def main() -> None:
    print("| file | weights | seconds | peak | asked for | folder | SHA-256, seconds |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for name in ("smollm2", "gemma3-270m"):
        path = real_models.fetch(name)
        header = gguf_header.read(path)
        began = time.monotonic()
        files.sha256([path])
        hashed = time.monotonic() - began
        with tempfile.TemporaryDirectory() as folder:
            os.environ[gguf.CACHE] = folder
            began = time.monotonic()
            converted = gguf.folder_of(path)
            seconds = time.monotonic() - began
            stored = files.folder_bytes(converted)
        # The largest child so far: the second model needs more than the first.
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        peak *= 1 if sys.platform == "darwin" else 1024
        print(
            f"| {path.name} | {header.num_weights:,} | {seconds:.0f} | {spoken_bytes(peak)} | "
            f"{spoken_bytes(gguf.needed_bytes(header))} | {spoken_bytes(stored)} | {hashed:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()

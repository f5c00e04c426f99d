"""A run's GGUF files by a real llama.cpp: bytes, accuracy, labels that differ, messages a second.

    python benchmarks/engines.py runs/RUN --llama-cpp llama.cpp --types f16 q8_0 q4_k_m

The rows are those that the run was measured on. Files are written to a temporary folder.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import workload
from remora.config import ExportConfig, PredictConfig
from remora.display import TerminalReporter
from remora.evaluation import results
from remora.export import export_run
from remora.serving.predict import predict_stream


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--llama-cpp", type=Path, required=True)
    parser.add_argument("--types", nargs="*", default=["f16", "q8_0", "q4_k_m"])
    parser.add_argument("--model", help="the base model, if it has moved")
    parser.add_argument("--lora", action="store_true", help="the adapter alone too")
    options = parser.parse_args()
    found: dict[str, Any] = {"predict": by_predict(options)}
    with tempfile.TemporaryDirectory() as folder:
        ways: list[dict[str, Any]] = [{"gguf": tuple(options.types)}] if options.types else []
        ways += [{"gguf_lora": True}] * options.lora
        for number, way in enumerate(ways):
            config = ExportConfig(
                options.run,
                **way,
                llama_cpp=options.llama_cpp,
                model=options.model,
                differing=100.0,
                output=Path(folder) / str(number),
            )
            reporter = TerminalReporter()
            with reporter.live():
                told = export_run(config, reporter=reporter).to_dict()
            found |= {each["name"]: each for each in told["files"]}
            found |= {key: told[key] for key in ("num_rows", "adapter_accuracy")}
    rows = [
        [
            each["name"],
            f"{each['num_bytes'] / 1e6:.1f} MB",
            f"{each['accuracy']:.2%}",
            f"{each['num_differing']:,}",
            f"{each['greedy_accuracy']:.2%}",
            f"{each['num_greedy_differing']:,}",
            f"{each['rows_per_second']:.1f}",
        ]
        for each in found.values()
        if isinstance(each, dict) and "name" in each
    ]
    header = ["file", "size", "accuracy", "other labels", "token by token", "other labels"]
    workload.print_table([*header, "messages/s"], rows)
    print(
        f"{found['num_rows']:,} rows, the adapter {found['adapter_accuracy']:.2%}; "
        f"predict {found['predict']['rows_per_second']:.1f} messages/s"
    )
    workload.write(f"engines-{options.run.absolute().name}", found)


def by_predict(options: argparse.Namespace) -> dict[str, float]:
    """Return the speed of `remora predict` on the same rows, loading left out."""
    texts = results.read(options.run).texts
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "texts.txt"
        path.write_text("\n".join(" ".join(text.split()) for text in texts), encoding="utf-8")
        stream = predict_stream(
            PredictConfig(options.run, source=str(path), model=options.model, device="cpu")
        )
        next(iter(stream))
        began = time.monotonic()
        num_rows = sum(1 for _ in stream)
    return {"rows_per_second": num_rows / (time.monotonic() - began)}


if __name__ == "__main__":
    main()

"""The verb export: a run as a plain model folder, a smaller adapter or GGUF files, measured first.

Each is written to a temporary folder beside its own, read back, measured on the rows that the run
was measured on, and only then renamed.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from remora.config import ExportConfig
from remora.config.export import WAYS
from remora.errors import ConfigError, ModelError, ResourceError
from remora.evaluation import results
from remora.export.compress import Compressed, compress
from remora.export.gguf import Gguf, write_gguf
from remora.export.merge import Parity, merge
from remora.export.onnx import write_onnx
from remora.export.vllm import write_vllm
from remora.models import metadata
from remora.report import charts, pages
from remora.runtime import files
from remora.runtime.reporter import Reporter


@dataclass(frozen=True, kw_only=True)
class Exported:
    """The folder that was written, and its measurements."""

    directory: Path
    num_bytes: int
    measured_on: str  # "test" or "validation" rows
    result: Parity | Compressed | Gguf
    plot: Path | None  # accuracy against size, if several sizes were measured

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as `--json` prints them."""
        figures = {k: v for k, v in asdict(self).items() if k != "result"}
        paths = {"directory": str(self.directory), "plot": self.plot and str(self.plot)}
        return figures | paths | asdict(self.result)


def export_run(config: ExportConfig, *, reporter: Reporter | None = None) -> Exported:
    """Write a run as the settings say; after an error nothing is left.

    Raises:
        ConfigError: If the output exists, or nothing fits into the budget.
        DataError: If this is not a finished run, or its rows are needed and missing.
        ModelError: If adapter or base model cannot be used, or the model written is not the same
            classifier.
        ResourceError: If the disk fails.
    """
    reporter = reporter or Reporter()
    output = (config.output or config.run / _default_name(config)).absolute()
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise ConfigError(f"{output} exists already; give another --output or remove it")
    if metadata.is_full(config.run) and not (config.gguf or config.onnx):
        raise ModelError(
            f"{config.run} trained all weights and has no adapter to merge or compress; use "
            f"{metadata.trained_folder(config.run)}, which is a plain model folder already"
        )
    _refuse_other_answer(config)
    measured = results.read(config.run)
    with _placed(output) as folder:
        result = _export_into(config, folder, measured, reporter)
        plot = None
        if isinstance(result, Compressed) and result.frontier:
            plot = output.with_name(f"{output.name}.svg")
            pages.write_chart(plot, _frontier(result))
    return Exported(
        directory=output,
        num_bytes=files.folder_bytes(output),
        measured_on=measured.figures["measured_on"],
        result=result,
        plot=plot,
    )


def _refuse_other_answer(config: ExportConfig) -> None:
    """Refuse what is written for models of the other kind of answer, or without windows.

    Raises:
        ModelError: If the run's labels are classes and the way needs written ones, or the reverse;
            or if another engine would see the first window of a message alone.
    """
    folder = metadata.trained_folder(config.run)
    if config.merge or not (folder / "remora.json").is_file():
        return
    card = metadata.parse_card(folder)
    (way,) = (way for way in WAYS if getattr(config, way))
    if card.truncate == "windows" and not config.compress:
        raise ModelError(
            f"{config.run} reads long messages in windows and averages their answers, which the "
            f"engines that --{way.replace('_', '-')} is for do not; use --merge, or train with "
            "--truncate both"
        )
    if card.classes and not config.onnx:
        words = "" if card.multi_label else ", or train with --answer words"
        raise ModelError(
            f"{config.run} answers by classes, and --{way.replace('_', '-')} is for models that "
            f"write their labels; use --merge or --onnx{words}"
        )
    if config.onnx and not card.classes:
        raise ModelError(
            f"{config.run} writes its labels, and --onnx is for a head over classes; use --gguf, "
            "or train with --answer classes"
        )


def _default_name(config: ExportConfig) -> str:
    names = {"merge": "merged", "compress": "compressed"}
    (way,) = (way for way in WAYS if getattr(config, way))
    return names.get(way, way.replace("_", "-"))


def _export_into(
    config: ExportConfig, folder: Path, measured: results.Results, reporter: Reporter
) -> Parity | Compressed | Gguf:
    if config.merge:
        return merge(config, folder, measured, reporter)
    if config.compress:
        return compress(config, folder, measured, reporter)
    if config.onnx:
        return write_onnx(config, folder, measured, reporter)
    if config.vllm:
        return write_vllm(config, folder, measured, reporter)
    return write_gguf(config, folder, measured, reporter)


def _frontier(compressed: Compressed) -> charts.Chart:
    """Draw accuracy against size, before and after fine-tuning again."""
    sized = [(compressed.adapter_bytes / point.num_bytes, point) for point in compressed.frontier]
    cut = [
        (x, point.accuracy if point.cut_accuracy is None else point.cut_accuracy)
        for x, point in sized
    ]
    accuracies = [(x, point.accuracy) for x, point in sized]
    assert compressed.least_accuracy is not None
    return charts.frontier(accuracies, cut if cut != accuracies else [], compressed.least_accuracy)


@contextlib.contextmanager
def _placed(output: Path) -> Iterator[Path]:
    """Yield an empty folder that is renamed to `output` at the end, and removed after an error."""
    with files.disk_errors(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        folder = beside / output.name
        folder.mkdir()
        yield folder
        with files.disk_errors(output):
            for path in (*folder.iterdir(), folder):
                files.sync(path)
            if output.is_dir():
                output.rmdir()  # which fails unless it is empty
            folder.rename(output)
            files.sync(output.parent)
    except ResourceError as error:  # of the disk; nobody knows the hidden name
        raise ResourceError(str(error).replace(str(folder), str(output))) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)

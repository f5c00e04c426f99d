"""What leaves a run: one plain model folder, or a smaller adapter; nothing that was not measured.

Each is written to a folder beside its place, read back from there, measured on the rows that the
run was measured on, and only then renamed to its place.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from remora.config import ExportConfig
from remora.errors import ConfigError, ModelError
from remora.evaluation import charts, report, results
from remora.export.compress import Compressed, compress
from remora.export.merge import Parity, merge
from remora.models import adapter_card
from remora.runtime import files
from remora.runtime.reporter import Reporter


@dataclass(frozen=True, kw_only=True)
class Exported:
    """A folder that was written, and what was measured of it."""

    directory: Path
    num_bytes: int
    measured_on: str  # "test" or "validation" rows
    result: Parity | Compressed
    plot: Path | None  # of accuracy against size, where several sizes were measured

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as JSON holds them."""
        figures = {k: v for k, v in asdict(self).items() if k != "result"}
        paths = {"directory": str(self.directory), "plot": self.plot and str(self.plot)}
        return figures | paths | asdict(self.result)


def export_run(config: ExportConfig, *, reporter: Reporter | None = None) -> Exported:
    """Write what the settings ask for; after an error there is nothing.

    Raises:
        ConfigError: If the output exists, or nothing fits into the budget.
        DataError: If this is no finished run, or its rows are needed and gone.
        ModelError: If adapter or base model cannot be used, or what was written is not the same
            classifier.
        ResourceError: If the disk fails.
    """
    reporter = reporter or Reporter()
    output = (config.output or config.run / ("merged" if config.merge else "compressed")).absolute()
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise ConfigError(f"{output} exists already; give another --output or remove it")
    if adapter_card.is_full(config.run):
        raise ModelError(
            f"{config.run} trained all weights and has no adapter to merge or compress; use "
            f"{adapter_card.adapter_folder(config.run)}, which is a plain model folder already"
        )
    found = results.read(config.run)
    export_into = merge if config.merge else compress
    with _published(output) as folder:
        result = export_into(config, folder, found, reporter)
        plot = None
        if isinstance(result, Compressed) and result.frontier:
            plot = output.with_name(f"{output.name}.svg")
            report.write_chart(plot, _frontier(result))
    return Exported(
        directory=output,
        num_bytes=files.folder_bytes(output),
        measured_on=found.figures["measured_on"],
        result=result,
        plot=plot,
    )


def _frontier(found: Compressed) -> charts.Chart:
    sized = [(found.adapter_bytes / point.num_bytes, point) for point in found.frontier]
    cut = [
        (x, point.accuracy if point.cut_accuracy is None else point.cut_accuracy)
        for x, point in sized
    ]
    accuracies = [(x, point.accuracy) for x, point in sized]
    assert found.least_accuracy is not None
    return charts.frontier(accuracies, cut if cut != accuracies else [], found.least_accuracy)


@contextlib.contextmanager
def _published(output: Path) -> Iterator[Path]:
    """Give an empty folder that takes its place once it is whole, and is gone after an error."""
    with files.disk_errors(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        folder = beside / output.name
        folder.mkdir()
        yield folder
        with files.disk_errors(output):
            for path in (*folder.iterdir(), folder):
                _sync(path)
            if output.is_dir():
                output.rmdir()  # it is empty, or this fails
            folder.rename(output)
            _sync(output.parent)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _sync(path: Path) -> None:
    """See that a file or a folder's entries are on the disk."""
    if os.name == "nt" and path.is_dir():  # Windows has no way to open one
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

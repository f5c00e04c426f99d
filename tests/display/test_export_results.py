"""Exports and published models as they are printed."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from display.test_evaluation_results import printed
from remora.display.export_results import show_export
from remora.export.compress import Compressed, Point
from remora.export.export import Exported
from remora.export.gguf import Gguf, GgufFile
from remora.export.merge import Parity


def exported(result: Parity | Compressed | Gguf) -> Exported:
    return Exported(
        directory=Path("out"), num_bytes=1_500_000, measured_on="test", result=result, plot=None
    )


@pytest.mark.parametrize(
    ("num_flips", "expected"),
    [
        (0, "the same label on all 300 test rows"),
        (2, "another label on 2 of 300 test rows, all of"),
    ],
)
def test_parity_is_printed_with_its_flips(num_flips: int, expected: str) -> None:
    parity = Parity(
        dtype="float16",
        num_rows=300,
        num_flips=num_flips,
        num_near_ties=num_flips,
        largest_difference=0.01,
        allowed=0.05,
    )
    shown = printed(show_export, exported(parity))
    assert f"parity     {expected}" in shown
    assert "differ by at most 0.01, 0.05 allowed" in shown
    assert shown.rstrip().endswith("written    out, 1.5 MB")


def test_types_of_gguf_are_told_apart_however_long_the_name_of_the_run() -> None:
    files = [
        GgufFile(
            name=f"a-run-with-a-long-name-{kind}.gguf",
            type=kind,
            num_bytes=1_234_000_000,
            accuracy=0.9,
            num_differing=12,
            greedy_accuracy=0.89,
            num_greedy_differing=34,
            rows_per_second=5.6,
        )
        for kind in ("f16", "q4_k_m")
    ]
    written = Gguf(num_rows=300, adapter_accuracy=0.91, files=tuple(files))
    file = io.StringIO()
    show_export(exported(written), Console(file=file, width=80))
    rows = [line.split() for line in file.getvalue().splitlines()]
    assert [row[0] for row in rows if row and row[-1] == "5.6"] == ["f16", "q4_k_m"]


@pytest.mark.parametrize("cut_accuracy", [None, 0.8])
def test_the_frontier_says_what_truncation_alone_costs(cut_accuracy: float | None) -> None:
    points = [
        Point(
            num_bytes=size,
            ratio=ratio,
            mean_rank=rank,
            accuracy=0.9,
            num_flips=3,
            cut_accuracy=cut,
        )
        for size, ratio, rank, cut in ((1_000_000, 10, 16, None), (100_000, 100, 2, cut_accuracy))
    ]
    compressed = Compressed(
        dtype="float8",
        adapter_bytes=1_000_000,
        frontier=tuple(points),
        least_accuracy=0.89,
        chosen=points[1],
        num_rows=300,
        full_accuracy=0.91,
    )
    shown = printed(show_export, exported(compressed))
    (chosen,) = (line for line in shown.splitlines() if line.rstrip().endswith("chosen"))
    assert "100 kB" in chosen
    assert ("truncated" in shown) == ("80.00%" in chosen) == (cut_accuracy is not None)
    assert "90.00% on 300 test rows, the full adapter 91.00%; 3 labels differ" in shown

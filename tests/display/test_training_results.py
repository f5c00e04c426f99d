"""The result of a training run as it is printed."""

from __future__ import annotations

from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import finished
from remora.display.training_results import show_result
from remora.training.finish import TrainResult
from reporting import write


def test_a_speed_that_was_not_measured_is_not_printed_as_zero(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[TrainResult] = []

    def make(**figures: Any) -> TrainResult:
        made.append(TrainResult(**figures))
        return made[-1]

    monkeypatch.setattr(finished, "TrainResult", make)
    write(tmp_path / "run")
    for speed, told in (
        (12.5, "speed      12.5 examples/s, 125 supervised tokens/s; 6 steps"),
        (0.0, "speed      not measured in so few steps; 6 steps"),
    ):
        file = StringIO()
        show_result(replace(made[0], examples_per_second=speed), Console(file=file, width=200))
        assert told in file.getvalue()

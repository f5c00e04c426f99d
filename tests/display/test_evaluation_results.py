"""Metrics, reliability and comparisons as they are printed.

Also covers remora.display.console.
"""

from __future__ import annotations

from collections.abc import Callable
from io import StringIO
from typing import Any

import pytest
from rich.console import Console

from remora.display.console import spoken_file_bytes
from remora.display.evaluation_results import show_metrics, show_reliability
from remora.evaluation.calibration import Abstention, OutOfScope, Reliability
from remora.evaluation.metrics import measure


def printed(show: Callable[..., None], *values: Any) -> str:
    """What a function prints on a console of 200 columns."""
    file = StringIO()
    show(*values, Console(file=file, width=200, highlight=False))
    return file.getvalue()


def reliability(**changes: Any) -> Reliability:
    return Reliability(
        calibration_error=0.0123,
        bins=(),
        temperature=None,
        num_validation=0,
        scaled_calibration_error=None,
        scaled_log_loss=None,
        coverage=(),
        area_under_risk_coverage=0.1,
        **changes,
    )


def abstention(**changes: Any) -> Abstention:
    shown = {
        "wanted_accuracy": 0.98,
        "threshold": 0.75,
        "chosen_on": "validation",
        "num_chosen_on": 2_000,
        "coverage": 0.8,
        "accuracy": 0.985,
        "accuracy_interval": (0.97, 0.995),
    }
    return Abstention(**shown | changes)


def test_labels_are_printed_as_they_are() -> None:
    labels = ["[bold]card[/bold]", "pin"]
    metrics = measure(labels, labels * 2, [labels[0], labels[0], *labels])
    shown = printed(show_metrics, metrics, "test")
    assert shown.splitlines()[1].startswith("[bold]card[/bold]")
    assert (
        "     1  [bold]card[/bold] / pin: 0 rows of the first predicted as the second, 1" in shown
    )
    assert "accuracy   75.00%" in shown
    assert shown.rstrip().splitlines()[-2].endswith("on 4 test rows")
    shown = printed(show_metrics, metrics, "validation")
    assert "on 4 validation rows, which also selected the weights: slightly optimistic" in shown


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {},
            "threshold 0.7500 for 98.0% accuracy, chosen on 2,000 validation rows: answers 80.0% "
            "of the rows, 98.50% of them correctly (95% interval 97.0% to 99.5%)",
        ),
        ({"threshold": None}, "no threshold reaches 98.0% accuracy on validation; train longer"),
        ({"accuracy": None}, "validation rows: no row reaches it"),
        ({"chosen_on": "the measured rows"}, "on these same rows, so the accuracy is slightly"),
    ],
)
def test_a_threshold_is_printed_with_its_result(changes: dict[str, Any], expected: str) -> None:
    shown = printed(show_reliability, reliability(abstention=abstention(**changes)))
    assert expected in shown


def test_out_of_scope_detection_is_printed() -> None:
    outside = OutOfScope(num_rows=1_000, auroc=0.91, refused=0.5)
    assert (
        "AUROC 0.910 of the confidence on 1,000 out-of-scope messages; 50.0% below the threshold"
    ) in printed(show_reliability, reliability(out_of_scope=outside))


def test_sizes_of_files_have_a_decimal_from_megabytes_on() -> None:
    sizes = [999, 1_500, 1_500_000, 2_500_000_000]
    assert [spoken_file_bytes(size) for size in sizes] == ["999 B", "2 kB", "1.5 MB", "2.50 GB"]

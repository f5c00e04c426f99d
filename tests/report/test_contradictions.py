"""Figures of a run that seem to contradict each other, explained."""

from __future__ import annotations

from pathlib import Path

from remora.report import contradictions


def test_contradictions_are_explained(tmp_path: Path) -> None:
    """The p-value is the sum of hypergeometric probabilities, computed by hand."""
    figures = {
        "measured_on": "test",
        "metrics": {"num_correct": 70, "num_rows": 100, "accuracy": 0.7}
        | {"accuracy_interval": [0.6, 0.78]},
        "reliability": {"bins": [{"confidence": 0.9, "num_rows": 100}], "calibration_error": 0.05}
        | {"scaled_calibration_error": 0.07, "num_validation": 40},
    }

    def validated(accuracy: float) -> str | None:
        best = {"validation_best": True, "validation_rows": 200, "validation_accuracy": accuracy}
        return contradictions.of_validation([best], figures)

    assert "the difference may be chance (p = 0.406," in (validated(0.75) or "")
    assert "validation chose the weights, and so is optimistic" in (validated(0.9) or "")
    assert "the test rows are easier" in (validated(0.5) or "")
    assert contradictions.of_validation([], figures) is None
    summary, (note,) = contradictions.of_confidence(figures)
    assert "Mean confidence is 90.0%, accuracy 70.0%" in summary
    assert "too confident" in summary
    assert "The temperature makes it worse on these rows" in note
    judged = {"out_of_sample_accuracy": 0.9, "num_rows": 500, "ceiling": {"accuracy": 0.65}}
    worse, above = contradictions.of_diagnosis(judged, figures)
    assert "The judges have 90.0% accuracy and this run 70.0%" in worse
    assert "above the ceiling" in above
    judged = {"out_of_sample_accuracy": 0.72, "num_rows": 500, "ceiling": {"accuracy": 0.9}}
    assert contradictions.of_diagnosis(judged, figures) == []

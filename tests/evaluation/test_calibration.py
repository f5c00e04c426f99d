"""Calibration, temperature and abstaining against scikit-learn, closed forms and hand counts."""

from __future__ import annotations

import numpy as np
import pytest

from remora.evaluation import calibration
from remora.evaluation.predictions import Scored


def scored(probabilities: list[list[float]], true: list[int]) -> Scored:
    return Scored(probabilities=np.array(probabilities), true=np.array(true))


def drawn(num_rows: int, temperature: float, seed: int = 0) -> Scored:
    """Rows whose labels are drawn from probabilities that are then told at another temperature."""
    generator = np.random.default_rng(seed)
    logs = generator.normal(size=(num_rows, 4)) * 2
    honest = np.exp(logs) / np.exp(logs).sum(1, keepdims=True)
    true = (honest.cumsum(1) > generator.random((num_rows, 1))).argmax(1)
    told = np.exp(logs * temperature)
    return Scored(probabilities=told / told.sum(1, keepdims=True), true=true)


def test_the_reliability_curve_is_scikit_learns() -> None:
    from sklearn.calibration import calibration_curve

    rows = drawn(3000, 2.0)
    error, bins = calibration.calibration_error(rows.confidence, rows.correct, num_bins=10)
    accuracy, confidence = calibration_curve(
        rows.correct, rows.confidence, n_bins=10, strategy="quantile"
    )
    np.testing.assert_allclose([b.accuracy for b in bins], accuracy)
    np.testing.assert_allclose([b.confidence for b in bins], confidence)
    assert {b.num_rows for b in bins} == {300}
    assert error == pytest.approx(np.abs(accuracy - confidence).mean())


def test_calibration_error_by_hand_with_ties_and_few_rows() -> None:
    confidence = np.array([0.6, 0.6, 0.9, 0.9])
    correct = np.array([True, False, True, True])
    error, bins = calibration.calibration_error(confidence, correct, num_bins=2)
    assert error == pytest.approx((2 * 0.1 + 2 * 0.1) / 4)
    assert [b.num_rows for b in bins] == [2, 2]
    same = calibration.calibration_error(np.full(9, 0.7), np.arange(9) < 6, num_bins=3)
    assert same[0] == pytest.approx(0.7 - 6 / 9)
    assert len(calibration.calibration_error(confidence, correct)[1]) == 1


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_temperature_undoes_what_made_the_rows_overconfident(temperature: float) -> None:
    rows = drawn(6000, temperature)
    assert calibration.fit_temperature(rows) == pytest.approx(temperature, rel=0.06)
    assert calibration.assess(rows).temperature is None


def test_temperature_comes_from_the_validation_rows_only() -> None:
    measured = drawn(1500, 3.0, seed=1)
    found = calibration.assess(measured, drawn(1500, 3.0, seed=2))
    assert found.temperature == calibration.fit_temperature(drawn(1500, 3.0, seed=2))
    assert found.temperature != calibration.fit_temperature(measured)
    assert found.scaled_calibration_error is not None
    assert found.scaled_calibration_error < 0.04 < 0.1 < found.calibration_error
    assert found.scaled_log_loss is not None
    assert found.scaled_log_loss < measured.log_loss


def test_coverage_and_its_area_by_hand() -> None:
    """From the surest on: right, right, wrong, right; two of them tie."""
    confidence = np.array([0.5, 0.9, 0.7, 0.7])
    correct = np.array([True, True, True, False])
    points = calibration.coverage_points(confidence, correct)
    assert [(p.threshold, p.coverage) for p in points] == [(0.9, 0.25), (0.7, 0.75), (0.5, 1.0)]
    assert [p.accuracy for p in points] == pytest.approx([1, 2 / 3, 3 / 4])
    area = calibration.area_under_risk_coverage(confidence, correct)
    assert area == pytest.approx(0 * 0.25 + 1 / 3 * 0.5 + 1 / 4 * 0.25)


def test_the_threshold_answers_as_much_as_the_accuracy_allows() -> None:
    validation = scored([[0.95, 0.05], [0.9, 0.1], [0.8, 0.2], [0.6, 0.4]], [0, 0, 1, 0])
    assert calibration.choose_threshold(validation, 0.75) == 0.6
    assert calibration.choose_threshold(validation, 0.9) == 0.9
    wrong = scored([[0.9, 0.1]], [1])
    assert calibration.choose_threshold(wrong, 0.5) is None


def test_abstaining_is_measured_on_other_rows_than_it_was_chosen_on() -> None:
    validation = scored([[0.9, 0.1], [0.8, 0.2]], [0, 1])
    measured = scored([[0.95, 0.05], [0.92, 0.08], [0.85, 0.15], [0.2, 0.8]], [0, 1, 0, 1])
    found = calibration.assess(measured, validation, abstain_at_accuracy=0.9).abstention
    assert found is not None
    assert (found.threshold, found.chosen_on, found.coverage) == (0.9, "validation", 0.5)
    assert found.accuracy == 0.5
    assert found.accuracy_interval == pytest.approx((0.0945, 0.9055), abs=1e-4)  # Wilson, 1 of 2
    alone = calibration.assess(measured, abstain_at_accuracy=0.9).abstention
    assert alone is not None
    assert (alone.threshold, alone.chosen_on) == (0.95, "the measured rows")
    hopeless = calibration.assess(
        measured, scored([[0.9, 0.1]], [1]), abstain_at_accuracy=0.9
    ).abstention
    assert hopeless is not None
    assert (hopeless.threshold, hopeless.coverage, hopeless.accuracy) == (None, 0, None)


def test_out_of_scope_messages_are_told_by_confidence() -> None:
    """Of six pairs of a message in scope and one out of it, five are in the right order."""
    measured = scored([[0.9, 0.1], [0.7, 0.3], [0.2, 0.8]], [0, 0, 1])
    outside = np.array([[0.55, 0.45], [0.25, 0.75]])
    found = calibration.assess(measured, abstain_at_accuracy=1, out_of_scope=outside).out_of_scope
    assert found is not None
    assert found.auroc == pytest.approx(5 / 6)
    assert found.refused == 0.5  # the threshold is 0.7
    assert calibration.assess(measured, out_of_scope=outside).out_of_scope.refused is None

"""Metrics against numbers computed by hand."""

from __future__ import annotations

import numpy as np
import pytest

from remora.evaluation.metrics import measure


def test_figures_computed_by_hand() -> None:
    true = ["a", "a", "a", "a", "b", "b", "c"]
    predicted = ["a", "a", "b", "b", "b", "a", "c"]
    metrics = measure(["a", "b", "c", "never"], true, predicted)
    assert metrics.accuracy == pytest.approx(4 / 7)
    a, b, _, never = metrics.per_class
    assert (a.precision, a.recall, a.support) == (pytest.approx(2 / 3), 0.5, 4)
    assert (b.precision, b.recall, b.f1) == pytest.approx((1 / 3, 1 / 2, 2 / 5))
    assert (never.support, never.f1) == (0, 0)
    assert metrics.macro_f1 == pytest.approx((4 / 7 + 2 / 5 + 1) / 3)  # not over `never`
    first, second = metrics.confusions
    assert (first.true, first.predicted, first.count, first.share) == ("a", "b", 2, 0.5)
    assert (second.true, second.predicted, second.count) == ("b", "a", 1)


def test_confused_pairs_hold_both_directions() -> None:
    true = ["a"] * 5 + ["b"] * 4 + ["c"] * 2
    predicted = ["b", "b", "b", "a", "a", "a", "b", "b", "b", "b", "c"]
    first, second = measure(["a", "b", "c"], true, predicted).confused_pairs
    assert (first.first, first.second, first.count, first.num_rows) == ("a", "b", 4, 9)
    assert (first.first_as_second, first.second_as_first) == (3, 1)
    assert (second.first, second.first_as_second, second.second_as_first) == ("b", 0, 1)


def test_wilson_interval_of_90_in_100() -> None:
    """Closed form with z = 1.959964: (0.8256, 0.9448)."""
    true = ["a"] * 100
    metrics = measure(["a", "b"], true, ["a"] * 90 + ["b"] * 10)
    assert metrics.accuracy_interval == pytest.approx((0.8256, 0.9448), abs=1e-4)


def test_log_loss_by_hand_and_finite_at_zero() -> None:
    probabilities = np.array([[0.5, 0.5], [0.25, 0.75]])
    metrics = measure(["a", "b"], ["a", "b"], ["a", "b"], probabilities)
    assert metrics.log_loss == pytest.approx(-(np.log(0.5) + np.log(0.75)) / 2)
    sure = measure(["a", "b"], ["a"], ["b"], np.array([[0.0, 1.0]]))
    assert sure.log_loss is not None
    assert np.isfinite(sure.log_loss)


@pytest.mark.parametrize("wrong", ["c", "A"])
def test_labels_outside_the_closed_set_are_not_left_out_silently(wrong) -> None:
    with pytest.raises(AssertionError):
        measure(["a", "b"], ["a", wrong], ["a", "a"])
    with pytest.raises(AssertionError):
        measure(["a", "b"], ["a", "a"], ["a", wrong])

"""Accuracy and macro-F1 at each level, beside scikit-learn's."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import f1_score

from remora.data.levels import Hierarchy
from remora.evaluation.level_metrics import with_levels
from remora.evaluation.metrics import measure

LABELS = ("card > arrival", "card > lost", "cash", "loan > new", "loan > old")


def test_each_level_is_measured_on_the_nodes_above_the_labels() -> None:
    generator = np.random.default_rng(0)
    true = generator.choice(LABELS, 200).tolist()
    predicted = [true[i if i % 3 else i - 1] for i in range(200)]
    metrics = measure(LABELS, true, predicted)
    hierarchy = Hierarchy(LABELS, " > ")
    first, second = with_levels(metrics, hierarchy, true, predicted).levels
    above = [[label.split(" > ")[0] for label in rows] for rows in (true, predicted)]
    right = sum(a == b for a, b in zip(*above, strict=True))
    assert (first.level, first.num_nodes, first.num_correct) == (1, 3, right)
    assert first.accuracy == right / 200
    assert first.macro_f1 == pytest.approx(f1_score(*above, average="macro"))
    assert second.accuracy == metrics.accuracy
    assert second.accuracy_interval == metrics.accuracy_interval
    assert second.macro_f1 == pytest.approx(metrics.macro_f1)
    for level in (first, second):
        low, high = level.macro_f1_interval
        assert low < level.macro_f1 < high
        assert 0.05 < high - low < 0.2  # 1.96 times a standard error of 3.3 points, twice, is 0.13


def test_classes_that_do_not_occur_are_left_out() -> None:
    """As in the macro-F1 over the labels."""
    true, predicted = ["cash", "card > lost"], ["cash", "card > arrival"]
    metrics = measure(LABELS, true, predicted)
    first, second = with_levels(metrics, Hierarchy(LABELS, " > "), true, predicted).levels
    assert (first.macro_f1, first.accuracy) == (1.0, 1.0)
    assert second.macro_f1 == pytest.approx(metrics.macro_f1)
    assert second.macro_f1 == pytest.approx(1 / 3)


def test_labels_that_are_no_hierarchy_have_no_levels() -> None:
    metrics = measure(LABELS, LABELS, LABELS)
    assert with_levels(metrics, None, LABELS, LABELS) is metrics
    assert "levels" not in metrics.to_dict()

"""Two runs label by label, against scipy's test and scikit-learn's figures."""

from __future__ import annotations

import pytest
from scipy.stats import binomtest
from sklearn.metrics import precision_recall_fscore_support

from remora.evaluation.label_changes import label_changes

LABELS = ["a", "b", "c"]
TRUE = ["a"] * 40 + ["b"] * 40


def test_figures_are_scikit_learns_and_p_values_scipys() -> None:
    first = ["a"] * 40 + ["b"] * 30 + ["a"] * 10
    second = ["b"] * 20 + ["a"] * 20 + ["b"] * 31 + ["a"] * 9
    found = label_changes(("x", "y"), LABELS, TRUE, first, second)
    by_name = {each.label: each for each in found.labels}
    for answers, which in ((first, "first"), (second, "second")):
        _, recalls, scores, counts = precision_recall_fscore_support(
            TRUE, answers, labels=LABELS, zero_division=0.0
        )
        for label, recall, f1, count in zip(LABELS, recalls, scores, counts, strict=True):
            each = by_name[label]
            assert getattr(each, f"{which}_recall") == pytest.approx(recall)
            assert getattr(each, f"{which}_f1") == pytest.approx(f1)
            assert each.num_rows == count
    assert (by_name["a"].only_first_right, by_name["a"].only_second_right) == (20, 0)
    assert by_name["a"].p_value == pytest.approx(binomtest(20, 20).pvalue)
    assert by_name["a"].adjusted_p_value == pytest.approx(3 * binomtest(20, 20).pvalue)
    assert (by_name["b"].only_first_right, by_name["b"].only_second_right) == (0, 1)
    assert by_name["c"].p_value == 1  # it has no rows
    gains = [each.f1_difference for each in found.labels]
    assert gains == sorted(gains, reverse=True)
    assert found.summary.startswith("By more than chance, x recalls 1 label better (exact McNemar")


def test_chance_is_not_called_a_change() -> None:
    second = ["b"] * 3 + TRUE[3:]
    found = label_changes(("x", "y"), LABELS, TRUE, TRUE, second)
    assert found.labels[0].f1_difference > 0
    assert found.summary == (
        "Of no label the recall differs by more than chance (exact McNemar test on each label's "
        "rows, adjusted for 3 labels)."
    )


def test_of_several_labels_each_is_given_or_not() -> None:
    """Both runs are wrong about sets whose label `a` they give."""
    true = ['["a", "b"]'] * 8 + ['["b"]'] * 8
    first = ['["a"]'] * 8 + ['["a", "b"]'] * 8
    second = ['["b", "c"]'] * 8 + ['["b"]'] * 8
    found = label_changes(("x", "y"), LABELS, true, first, second, multi_label=True)
    by_name = {each.label: each for each in found.labels}
    a, b = by_name["a"], by_name["b"]
    assert (a.num_rows, a.first_recall, a.second_recall) == (8, 1, 0)
    assert (a.first_f1, a.second_f1) == (pytest.approx(2 / 3), 0)
    assert (a.only_first_right, a.only_second_right) == (8, 0)
    assert a.p_value == pytest.approx(binomtest(8, 8).pvalue)
    assert (b.num_rows, b.only_first_right, b.only_second_right) == (16, 0, 8)
    assert by_name["c"].p_value == 1

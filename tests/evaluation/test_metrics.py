"""Metrics against numbers from outside; the baseline's fallbacks."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from remora.evaluation import baselines
from remora.evaluation.baselines import BYTES_PER_CHARACTER, _stratified_rows, train_baseline
from remora.evaluation.metrics import measure
from remora.evaluation.significance import mcnemar


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


def test_mcnemar_exact() -> None:
    """Nine rows against one: 2 * (1 + 10) / 2**10."""
    true = ["x"] * 20
    first = ["x"] * 9 + ["y"] * 1 + ["x"] * 10
    second = ["y"] * 9 + ["x"] * 1 + ["x"] * 10
    assert mcnemar(true, first, second) == pytest.approx(22 / 1024)
    assert mcnemar(true, first, first) == 1.0


@pytest.mark.parametrize(
    ("texts", "labels", "expected"),
    [
        (["a b", "c d"], ["x", "x"], {"x"}),
        (["", " ", ""], ["x", "y", "y"], {"y"}),
        (["!!", "??"], ["x", "y"], {"x", "y"}),
    ],
)
def test_baseline_of_degenerate_tables(texts, labels, expected) -> None:
    found = train_baseline(texts, labels, ["a b", "ü", ""], ["x", "x", "y"], ["x", "y"])
    assert set(found.predictions) <= expected
    assert len(found.predictions) == 3


def test_a_large_table_is_sampled_and_says_so() -> None:
    texts = [f"red {i}" if i % 2 else f"blue {i}" for i in range(400)]
    labels = ["r" if i % 2 else "b" for i in range(400)]
    found = train_baseline(texts, labels, ["red", "blue"], ["r", "b"], ["b", "r"], max_rows=100)
    assert (found.num_train_rows, found.num_all_train_rows) == (100, 400)
    assert found.predictions == ["r", "b"]


def test_a_baseline_that_would_not_fit_takes_fewer_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines, "MIN_BASELINE_ROWS", 10)
    texts = ["red red red red red" if i % 2 else "blue blue blue blue" for i in range(400)]
    labels = ["r" if i % 2 else "b" for i in range(400)]
    for room, expected in ((10**9, 400), (BYTES_PER_CHARACTER * 19 * 50, 50), (0, 10)):
        found = train_baseline(texts, labels, ["red"], ["r"], ["b", "r"], max_bytes=room)
        assert found.num_train_rows == expected
        assert found.predictions == ["r"]


def test_the_sample_keeps_the_shares_of_the_labels() -> None:
    labels = ["rare", *["common"] * 19] * 100  # 5 % and 95 %
    rows = _stratified_rows(labels, 200, seed=0)
    assert len(set(rows)) == 200
    assert Counter(labels[row] for row in rows) == {"rare": 10, "common": 190}
    assert rows == _stratified_rows(labels, 200, seed=0)
    assert rows != _stratified_rows(labels, 200, seed=1)


def test_no_warning_where_the_svm_does_not_converge(monkeypatch) -> None:
    """Warnings are errors in these tests."""
    import sklearn.svm

    hurried = sklearn.svm.LinearSVC
    monkeypatch.setattr(
        sklearn.svm, "LinearSVC", lambda **given: hurried(**given | {"max_iter": 1})
    )
    found = train_baseline(
        ["red a", "blue b", "red c"], ["r", "b", "r"], ["red"], ["r"], ["b", "r"]
    )
    assert len(found.predictions) == 1


@pytest.mark.parametrize("wrong", ["c", "A"])
def test_labels_outside_the_closed_set_are_not_left_out_silently(wrong) -> None:
    with pytest.raises(AssertionError):
        measure(["a", "b"], ["a", wrong], ["a", "a"])
    with pytest.raises(AssertionError):
        measure(["a", "b"], ["a", "a"], ["a", wrong])


def test_lengths_must_agree() -> None:
    with pytest.raises(AssertionError):
        train_baseline(["t", "u"], ["a", "b", "b"], ["t"], ["a"], ["a", "b"])


def test_banking77_baseline_is_the_published_one(shared: Path) -> None:
    """TF-IDF + linear SVM gets about 90.6 % there."""
    tables = {}
    for split in ("train", "test"):
        with (shared / "data" / "banking77" / f"{split}.csv").open(encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        tables[split] = [r["text"] for r in rows], [r["category"] for r in rows]
    labels = sorted(set(tables["train"][1]))
    found = train_baseline(*tables["train"], *tables["test"], labels)
    assert found.metrics.accuracy == pytest.approx(0.906, abs=0.005)

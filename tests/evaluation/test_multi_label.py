"""Measures of rows with several labels are scikit-learn's; thresholds maximize F1."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import permutation_test
from sklearn import metrics as sklearn_metrics

from remora.data.label_sets import set_text
from remora.data.table import Table
from remora.evaluation import multi_label
from remora.evaluation.baselines import train_set_baseline
from remora.evaluation.multi_label import as_sets, fit_thresholds, indicators, measure_sets
from remora.evaluation.predictions import (
    ScoredSets,
    read_predictions,
    read_probabilities,
    write_predictions,
    write_probabilities,
)

LABELS = ["a", "b", "c", "d", "e, f", "never"]


def scored(num_rows: int = 200, seed: int = 0) -> ScoredSets:
    rng = np.random.default_rng(seed)
    true = (rng.random((num_rows, len(LABELS))) < [0.5, 0.3, 0.1, 0.01, 0.2, 0]).astype(np.int64)
    noise = rng.normal(size=true.shape)
    probabilities = 1 / (1 + np.exp(-(3 * true - 2 + noise)))
    probabilities[:, 5] = 0.01
    return ScoredSets(probabilities=probabilities, true=true, thresholds=np.full(6, 0.5))


def test_figures_are_those_of_scikit_learn() -> None:
    rows = scored()
    given = rows.given.astype(int)
    found = measure_sets(
        LABELS, as_sets(rows.true > 0, LABELS), as_sets(rows.given, LABELS), rows.probabilities
    )
    assert found.accuracy == pytest.approx(sklearn_metrics.accuracy_score(rows.true, given))
    assert found.micro_f1 == pytest.approx(
        sklearn_metrics.f1_score(rows.true, given, average="micro")
    )
    occurs = rows.true.any(0) | rows.given.any(0)
    assert found.macro_f1 == pytest.approx(
        sklearn_metrics.f1_score(rows.true[:, occurs], given[:, occurs], average="macro")
    )
    assert found.label_ranking == pytest.approx(
        sklearn_metrics.label_ranking_average_precision_score(rows.true, rows.probabilities)
    )
    per_label = [
        sklearn_metrics.log_loss(rows.true[:, i], rows.probabilities[:, i], labels=[0, 1])
        for i in range(6)
    ]
    assert found.log_loss == pytest.approx(np.mean(per_label))
    assert [each.support for each in found.per_class] == rows.true.sum(0).tolist()
    for name in ("micro_f1", "macro_f1", "label_ranking", "accuracy"):
        low, high = getattr(found, f"{name}_interval")
        assert low < getattr(found, name) < high
        assert high - low < 0.25


def test_the_ranking_of_every_row_averages_to_scikit_learns() -> None:
    """The interval is of these; ties and rows without a label or with all of them among them."""
    rng = np.random.default_rng(1)
    true = np.concatenate([(rng.random((50, 5)) < 0.4), np.zeros((1, 5)), np.ones((1, 5))])
    scores = rng.integers(0, 4, true.shape) / 3  # ties
    mean, (low, high) = multi_label._ranking(true.astype(np.int64), scores, 0)
    assert mean == pytest.approx(
        sklearn_metrics.label_ranking_average_precision_score(true, scores)
    )
    assert low < mean < high


def best_f1(scores: NDArray[np.float64], true: NDArray[np.int64]) -> float:
    """Return the best F1 of any threshold, by trying all of them."""
    tried = [*scores, np.inf]
    return max(sklearn_metrics.f1_score(true, scores >= t, zero_division=0) for t in tried)


def test_thresholds_maximize_the_f1_of_each_label() -> None:
    rows = scored()
    thresholds = fit_thresholds(rows.probabilities, rows.true)
    frequent = rows.true.sum(0) >= multi_label.MIN_POSITIVES
    assert frequent.tolist() == [True, True, True, False, True, False]
    for label in np.flatnonzero(frequent):
        given = rows.probabilities[:, label] >= thresholds[label]
        reached = sklearn_metrics.f1_score(rows.true[:, label], given)
        assert reached == pytest.approx(best_f1(rows.probabilities[:, label], rows.true[:, label]))
    # The rare one has too few rows of its own, and gets the threshold that is best for all labels
    pooled = rows.probabilities.ravel() >= thresholds[3]
    assert sklearn_metrics.f1_score(rows.true.ravel(), pooled) == pytest.approx(
        best_f1(rows.probabilities.ravel(), rows.true.ravel())
    )
    assert (fit_thresholds(rows.probabilities, np.zeros_like(rows.true)) == 0.5).all()


def test_a_threshold_lies_between_the_scores_on_its_sides() -> None:
    scores = np.array([[0.9], [0.8], [0.8], [0.3], [0.2]])
    true = np.array([[1], [1], [1], [0], [0]])
    repeated = np.repeat(scores, 3, 0), np.repeat(true, 3, 0)
    assert fit_thresholds(*repeated)[0] == pytest.approx((0.8 + 0.3) / 2)


def test_confidence_is_the_probability_of_the_set_that_is_given() -> None:
    rows = ScoredSets(
        probabilities=np.array([[0.9, 0.2], [0.4, 0.6]]),
        true=np.array([[1, 0], [1, 1]]),
        thresholds=np.array([0.5, 0.5]),
    )
    np.testing.assert_allclose(rows.confidence, [0.9 * 0.8, 0.6 * 0.6])
    assert rows.correct.tolist() == [True, False]
    assert rows.log_loss == pytest.approx(-np.log([0.9, 0.8, 0.4, 0.6]).mean())
    hot = rows.at(2.0)
    np.testing.assert_allclose(hot.probabilities[0, 0], 1 / (1 + (0.1 / 0.9) ** 0.5))
    assert (hot.given == rows.given).all()


def test_a_paired_bootstrap_finds_a_difference_and_none() -> None:
    rows = scored()
    true, ours = as_sets(rows.true > 0, LABELS), as_sets(rows.given, LABELS)
    nothing = [set_text([])] * len(true)
    lead, (low, high) = multi_label.micro_f1_difference(LABELS, true, ours, nothing)
    assert low < lead < high
    assert low > 0.5
    assert multi_label.micro_f1_difference(LABELS, true, ours, ours) == (0.0, (0.0, 0.0))


def test_a_randomization_test_is_scipys() -> None:
    ones = scored(60)
    true = as_sets(ones.true > 0, LABELS)
    mixed = ones.given.copy()
    mixed[::7, 0] ^= True
    first, second = as_sets(ones.given, LABELS), as_sets(mixed > 0, LABELS)

    def lead(a: NDArray[Any], b: NDArray[Any]) -> float:
        rows = np.stack([a, b]).astype(int)
        one, other = (
            sklearn_metrics.f1_score(
                ones.true,
                [(ones.given, mixed)[which][row] for row, which in enumerate(each)],
                average="micro",
            )
            for each in rows
        )
        return float(one - other)

    expected = permutation_test(
        (np.zeros(60), np.ones(60)),
        lead,
        permutation_type="samples",
        n_resamples=600,
        rng=np.random.default_rng(3),
    )
    found = multi_label.micro_f1_p_value(LABELS, true, first, second)
    assert 0.02 < found < 0.98
    assert found == pytest.approx(expected.pvalue, abs=0.03)
    assert multi_label.micro_f1_p_value(LABELS, true, second, first) == pytest.approx(found, 0.05)
    # The same sets, and sets that are never as good
    assert multi_label.micro_f1_p_value(LABELS, true, first, first) == 1.0
    nothing = [set_text([])] * len(true)
    least = 1 / (1 + multi_label.NUM_SHUFFLES)
    assert multi_label.micro_f1_p_value(LABELS, true, first, nothing) == least


def drawn_at_once(true: NDArray[np.int64], seed: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return how often labels occur, and means over rows, of samples that are drawn together."""
    number, size = len(true), (multi_label.NUM_RESAMPLES, len(true))
    weights = np.random.default_rng(seed).multinomial(number, np.full(number, 1 / number), size[0])
    rows = np.random.default_rng(seed).integers(number, size=size)
    return weights @ true, true.mean(1)[rows].mean(1)


def test_samples_in_blocks_are_those_drawn_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    true = scored(301).true
    counts, means = drawn_at_once(true, 7)
    for most in (multi_label.BLOCK_ELEMENTS, 40_000, 700, 301):
        monkeypatch.setattr(multi_label, "BLOCK_ELEMENTS", most)
        found = multi_label._resampled(true, 1 - true, 7)
        assert (found[0][0] == true.sum(0)).all()
        assert (found[0][1:] == counts).all()
        assert (found[0] + found[1] == 301).all()
        assert not found[2].any()
        assert (multi_label._means_of_samples(true.mean(1), 7) == means).all()


def test_samples_of_many_rows_take_little_memory() -> None:
    """Drawn at once, weights and rows of 10,000 rows take 120 MB and 160 MB."""
    true = np.ones((10_000, 2), dtype=np.int64)
    for draw in (
        lambda: multi_label._resampled(true, true, 0),
        lambda: multi_label._means_of_samples(true[:, 0].astype(float), 0),
    ):
        tracemalloc.start()
        draw()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 60e6


def test_files_give_back_sets_and_thresholds(tmp_path: Path) -> None:
    rows = scored(5)
    true, given = as_sets(rows.true > 0, LABELS), as_sets(rows.given, LABELS)
    write_predictions(tmp_path / "p.csv", ["=text"] * 5, true, given, [0.5] * 5, given)
    back = read_predictions(tmp_path / "p.csv", LABELS, multi_label=True)
    assert (back.true, back.predicted, back.baseline) == (true, given, given)
    path = tmp_path / "p.safetensors"
    write_probabilities(path, LABELS, {"test": rows})
    found = read_probabilities(path, LABELS, "test")
    assert isinstance(found, ScoredSets)
    assert (found.true == rows.true).all()
    assert found.thresholds.tolist() == [0.5] * 6


def test_the_svm_gives_sets_by_thresholds_of_its_own() -> None:
    words = {"card": "a", "fee": "b", "late": "c"}
    rng = np.random.default_rng(0)
    rows = []
    for i in range(120):
        chosen = [word for word in words if rng.random() < 0.4]
        rows.append((f"{' '.join(chosen)} please {i}", set_text(words[w] for w in chosen)))
    tables = [
        Table(*map(list, zip(*part, strict=True)), multi_label=True)  # type: ignore[arg-type]
        for part in (rows[:80], rows[80:100], rows[100:])
    ]
    found = train_set_baseline(*tables, ["a", "b", "c", "never"])
    assert found.metrics.accuracy > 0.9
    assert found.description == "TF-IDF + linear SVMs"
    empty = train_set_baseline(tables[0], tables[1].take([]), tables[2], ["a", "b", "c"])
    assert empty.description.endswith("threshold 0")
    assert (indicators(found.predictions, ["never", "a", "b", "c"])[:, 0] == 0).all()

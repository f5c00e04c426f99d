"""The regression of probes and embeddings: against scikit-learn's own, and on odd rows."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from remora.data.splits import deal_folds
from remora.evaluation import regression


def rows(num_rows: int, num_labels: int = 4, noise: float = 1.0, seed: int = 0):
    """Rows around one centre for each label; features of unlike scales."""
    generator = np.random.default_rng(seed)
    centres = np.random.default_rng(9).normal(size=(num_labels, 12))
    true = np.arange(num_rows) % num_labels
    features = centres[true] + noise * generator.normal(size=(num_rows, 12))
    scales = 10.0 ** np.arange(-3, 9, 1)[:12]
    return (features * scales).astype(np.float32), [f"label {i}" for i in true]


def test_it_predicts_as_a_grid_search_of_scikit_learn() -> None:
    """The same scaling, folds by accuracy and values of C, with scikit-learn's own search."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    train, labels = rows(400, noise=1.5)
    held_out, true = rows(400, noise=1.5, seed=1)
    search = GridSearchCV(
        make_pipeline(StandardScaler(), LogisticRegression(max_iter=1_000)),
        {"logisticregression__C": regression.STRENGTHS},
        cv=regression.NUM_FOLDS,
    )
    stock = search.fit(train, labels).predict(held_out)
    found = regression.predict(train, labels, held_out)
    assert np.mean(stock == np.array(found)) > 0.97
    accuracy = np.mean(np.array(found) == np.array(true))
    assert accuracy == pytest.approx(np.mean(stock == np.array(true)), abs=0.02)
    assert found == regression.predict(train, labels, held_out)


def test_the_strength_is_the_one_that_scikit_learn_finds_on_these_folds() -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import cross_val_score

    found = []
    for noise, width in ((1.5, 0), (2.0, 0), (1.0, 300)):
        features, labels = rows(240, noise=noise)
        unrelated = np.random.default_rng(1).normal(size=(240, width)).astype(np.float32)
        features = np.hstack([(features - features.mean(0)) / features.std(0), unrelated])
        true = np.arange(240) % 4
        folds = deal_folds(true, regression.NUM_FOLDS, 0)
        scores = [
            cross_val_score(LogisticRegression(C=c, tol=1e-3), features, true, cv=folds).mean()
            for c in regression.STRENGTHS
        ]
        found.append(regression._strength(features, true, labels, 0))
        assert found[-1] == regression.STRENGTHS[int(np.argmax(np.round(scores, 9)))]
    assert len(set(found)) > 1


@pytest.mark.parametrize("counts", [(1, 1), (1, 1, 1, 1), (30, 1), (2, 1, 1)])
def test_labels_of_a_single_row_are_no_obstacle(counts: tuple[int, ...]) -> None:
    labels = [f"{i}" for i, count in enumerate(counts) for _ in range(count)]
    features = np.eye(len(labels), 40, dtype=np.float16)
    found = regression.predict(features, labels, features)
    assert set(found) <= set(labels)
    assert len(found) == len(labels)


def test_one_class_and_constant_features_give_the_most_frequent_label() -> None:
    assert regression.predict(np.eye(3), ["a"] * 3, np.eye(3)) == ["a"] * 3
    constant = np.ones((9, 5), np.float16)
    assert regression.predict(constant, [*"aabbbbbcc"], constant) == ["b"] * 9


def test_the_largest_fit_is_bounded() -> None:
    assert regression.max_rows(384, 77) > 50_000
    wide = regression.max_rows(4_096, 150)
    assert 1_000 < wide < 10_000
    assert wide * 4_096 * 150 <= regression.MAX_WORK
    assert regression.max_rows(100_000, 10_000) == 1_000


def test_what_is_not_finite_is_an_error() -> None:
    """So the baseline is left out, not measured wrongly."""
    features = np.full((6, 3), np.nan, np.float16)
    for train, held_out in ((features, features), (np.eye(6, 3), features)):
        with pytest.raises(ValueError, match="features are not finite"):
            regression.predict(train, [*"ababab"], held_out)


def test_16_bit_features_are_scaled_in_32_bits() -> None:
    """Near the largest number of 16 bits, a difference of two of them would be infinite."""
    train, labels = rows(200)
    train, held_out = (np.clip(part, -9, 9) for part in (train, rows(100, seed=1)[0]))
    whole = regression.predict(train, labels, held_out)
    large = [(part / 9 * 60_000).astype(np.float16) for part in (train, held_out)]
    found = regression.predict(large[0], labels, large[1])
    assert np.mean([a == b for a, b in zip(found, whole, strict=True)]) > 0.95


def test_labels_stay_text() -> None:
    labels = ["1", "01", "nan", "1"] * 5
    features = np.repeat(np.eye(4, dtype=np.float32)[None], 5, 0).reshape(20, 4)
    found = regression.predict(features, labels, features)
    assert Counter(found) == Counter(labels)
    assert all(type(each) is str for each in found)

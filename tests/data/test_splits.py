"""Held-out rows are stratified and drawn by the seed; batches cover each epoch."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from data.test_dataset import many, rows
from data.test_table import write_csv
from remora.data.dataset import load_dataset
from remora.data.splits import batches, deal_folds, sample, sample_rows
from remora.data.table import Table
from remora.errors import ConfigError


def test_batches_cover_each_epoch_in_another_order():
    drawn = list(batches(7, 3, 7, seed=1))
    assert [len(batch) for batch in drawn] == [3, 3, 1, 3, 3, 1, 3]
    first, second = ([*a, *b, *c] for a, b, c in (drawn[:3], drawn[3:6]))
    assert sorted(first) == sorted(second) == list(range(7))
    assert first != second
    assert drawn == list(batches(7, 3, 7, seed=1))
    assert drawn != list(batches(7, 3, 7, seed=2))


def test_a_split_is_stratified_and_loses_no_row(tmp_path):
    path = write_csv(tmp_path / "a.csv", many({"a": 600, "b": 300, "c": 100}))
    dataset = load_dataset(str(path), validation_fraction=0.1, test_fraction=0.2)
    assert Counter(dataset.test.labels) == {"a": 120, "b": 60, "c": 20}
    assert Counter(dataset.validation.labels) == {"a": 60, "b": 30, "c": 10}
    splits = [dataset.train, dataset.validation, dataset.test]
    assert sorted(row for split in splits for row in rows(split)) == sorted(
        many({"a": 600, "b": 300, "c": 100})
    )
    assert dataset.train.texts == sorted(dataset.train.texts, key=lambda t: (t[0], int(t[2:])))


def test_a_sample_is_stratified_and_drawn_by_the_seed():
    labels = ["a"] * 60 + ["b"] * 30 + ["c"]
    table = Table([f"t{i:02}" for i in range(91)], labels)
    drawn = sample(table, 31, seed=1)
    assert Counter(drawn.labels) in ({"a": 20, "b": 10, "c": 1}, {"a": 21, "b": 10})
    assert drawn.texts == sorted(set(drawn.texts))  # in the order of the table, none twice
    assert all(
        table.labels[int(t[1:])] == c for t, c in zip(drawn.texts, drawn.labels, strict=True)
    )
    assert drawn == sample(table, 31, seed=1)
    assert drawn != sample(table, 31, seed=2)
    assert sample(table, 91, seed=1) is sample(table, 200, seed=1) is table
    assert Counter(sample(table, 90, seed=1).labels).total() == 90


def test_a_split_depends_on_the_seed_alone(tmp_path):
    path = str(write_csv(tmp_path / "a.csv", many({"a": 60, "b": 40})))
    first, again, other = (load_dataset(path, seed=seed) for seed in (3, 3, 4))
    assert first == again
    assert first.test != other.test
    assert first.validation != other.validation


def test_held_out_rows_are_drawn_at_random(tmp_path):
    path = str(write_csv(tmp_path / "a.csv", many({"a": 4, "b": 4})))
    seen = Counter()
    for seed in range(200):
        dataset = load_dataset(path, test_fraction=0.25, validation_fraction=0, seed=seed)
        seen.update(dataset.test.texts)
    assert len(seen) == 8
    # Each row is in the test set with probability 1/4: 50 of 200, standard deviation 6.1.
    assert all(abs(count - 50) < 5 * 6.1 for count in seen.values())


def test_a_fraction_of_a_small_table_is_at_least_a_row(tmp_path):
    path = write_csv(tmp_path / "a.csv", many({"a": 2, "b": 2}))  # a tenth of 4 rows is 0.4
    dataset = load_dataset(str(path), validation_fraction=0.1, test_fraction=0.1)
    assert (len(dataset.train), len(dataset.validation), len(dataset.test)) == (2, 1, 1)


@pytest.mark.parametrize("seed", range(5))
def test_every_class_stays_in_training(tmp_path, seed):
    counts = {"a": 5, "b": 3, "c": 1, "d": 1}
    path = write_csv(tmp_path / "a.csv", many(counts))  # 10 rows
    dataset = load_dataset(str(path), seed=seed)
    assert (len(dataset.train), len(dataset.validation), len(dataset.test)) == (8, 1, 1)
    assert set(dataset.train.labels) == set(counts)
    greedy = load_dataset(str(path), seed=seed, validation_fraction=0.45, test_fraction=0.45)
    assert set(greedy.train.labels) == set(counts)
    # 4.5 and 4.5 are asked for; of the 6 rows that can go, the test set takes round(4.5) = 4.
    assert (len(greedy.train), len(greedy.validation), len(greedy.test)) == (4, 2, 4)


def test_more_classes_than_validation_rows(tmp_path):
    path = write_csv(tmp_path / "a.csv", many({f"class {i:02}": 3 for i in range(40)}))
    dataset = load_dataset(str(path), validation_fraction=0.05, test_fraction=0.05)
    for split in (dataset.validation, dataset.test):
        assert len(split) == 6  # of 120
        assert len(set(split.labels)) == 6
    assert len(set(dataset.train.labels)) == 40


def test_the_largest_remainders_come_first(tmp_path):
    path = str(write_csv(tmp_path / "a.csv", many({"a": 4, "b": 16})))
    for seed in range(5):  # of 20 rows 1: a's share is 0.2 and b's 0.8
        dataset = load_dataset(path, validation_fraction=0.05, test_fraction=0, seed=seed)
        assert dataset.validation.labels == ["b"]
    path = str(write_csv(tmp_path / "b.csv", many({"a": 8, "b": 8})))
    drawn = {load_dataset(path, test_fraction=0.05, seed=seed).test.labels[0] for seed in range(20)}
    assert drawn == {"a", "b"}  # equal remainders: chance decides


@pytest.mark.parametrize(
    ("fractions", "message"),
    [
        ({"validation_fraction": -0.1}, "the validation fraction is -0.1; give"),
        ({"validation_fraction": 1.0}, "the validation fraction is 1.0; give"),
        ({"test_fraction": float("nan")}, "the test fraction is nan; give"),
        ({"validation_fraction": 0.5, "test_fraction": 0.5}, "fractions sum to 1; give less"),
    ],
)
def test_fractions_out_of_range(tmp_path, fractions, message):
    path = write_csv(tmp_path / "a.csv", many({"a": 3, "b": 3}))
    with pytest.raises(ConfigError, match=message):
        load_dataset(str(path), **fractions)


def test_folds_hold_each_row_out_once():
    folds = deal_folds(np.arange(30) % 3, 5, seed=0)
    assert sorted(i for _, own in folds for i in own.tolist()) == list(range(30))
    assert all(not set(others) & set(own) for others, own in folds)


def test_the_sample_keeps_the_shares_of_the_labels():
    labels = ["rare", *["common"] * 19] * 100  # 5 % and 95 %
    rows = sample_rows(labels, 200, seed=0)
    assert len(set(rows)) == 200
    assert Counter(labels[row] for row in rows) == {"rare": 10, "common": 190}
    assert rows == sample_rows(labels, 200, seed=0)
    assert rows != sample_rows(labels, 200, seed=1)

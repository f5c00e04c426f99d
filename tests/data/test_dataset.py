"""Datasets from tables and lists; the counts are worked out by hand."""

from __future__ import annotations

import dataclasses
import json
import zipfile
from collections import Counter

import pytest

from data.test_table import write, write_csv, write_parquet
from remora.data import dataset
from remora.data.dataset import dataset_from_lists, load_dataset
from remora.data.parts import ReadOptions
from remora.data.table import Table
from remora.errors import ConfigError, DataError


def many(counts):
    """Rows with as many of each label as `counts` says, one label after the other."""
    return [(f"{label} {i}", label) for label, count in counts.items() for i in range(count)]


def rows(table):
    return list(zip(table.texts, table.labels, strict=True))


def test_held_out_splits_have_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "MAX_VALIDATION_ROWS", 7)
    monkeypatch.setattr(dataset, "MAX_TEST_ROWS", 9)
    path = write_csv(tmp_path / "a.csv", many({"a": 100, "b": 100}))
    summary = load_dataset(str(path)).summary
    assert (summary.num_validation, summary.num_test, summary.num_train) == (7, 9, 184)


def test_fractions_of_zero_hold_out_nothing(tmp_path):
    path = write_csv(tmp_path / "a.csv", many({"a": 3, "b": 3}))
    dataset = load_dataset(str(path), validation_fraction=0, test_fraction=0)
    assert rows(dataset.train) == many({"a": 3, "b": 3})
    assert dataset.validation == Table([], [])
    assert dataset.test is None
    assert dataset.summary.num_test is None


def test_one_class_and_unknown_labels(tmp_path):
    path = write_csv(tmp_path / "one.csv", many({"a": 3}))
    with pytest.raises(DataError, match=r"one\.csv: every training row has the label 'a'; add"):
        load_dataset(str(path))
    train = write_csv(tmp_path / "train.csv", many({"refund": 3, "card": 3}))
    test = write_csv(tmp_path / "test.csv", [("x", "card"), ("y", "refnud")])
    for option in ("test", "validation"):
        with pytest.raises(DataError) as caught:
            load_dataset(str(train), **{option: str(test)})
        assert str(caught.value) == (
            f"{test}: row 2 (line 3) has the label 'refnud', which is none of the 2 training"
            " labels; did you mean 'refund'?"
        )


def test_from_lists():
    texts = [f"message {i}" for i in range(20)]
    labels = [" a", "b"] * 10  # white space is part of a label that came from a program
    dataset = dataset_from_lists(texts, labels, validation_fraction=0.2, seed=5)
    assert Counter(dataset.validation.labels) == {" a": 2, "b": 2}
    assert sorted(rows(dataset.train) + rows(dataset.validation)) == sorted(
        zip(texts, labels, strict=True)
    )
    assert dataset.labels == (" a", "b")
    assert dataset.test is None
    assert dataset.summary.source == "memory"
    assert dataset == dataset_from_lists(texts, labels, validation_fraction=0.2, seed=5)
    assert dataset != dataset_from_lists(texts, labels, validation_fraction=0.2, seed=6)


@pytest.mark.parametrize(
    ("texts", "labels", "message"),
    [
        (["x", "y"], ["a", "a"], "memory: every training row has the label 'a'"),
        (["x", " "], ["a", "b"], "memory: row 2 has a blank text"),
        (["x", "y"], ["", "b"], "memory: row 1 has a blank label"),
        (["x", 5], ["a", "b"], "memory: row 2 has a text of type int"),
        (["x", "\ud83d"], ["a", "b"], "memory: row 2 has half of a surrogate pair"),
        (["x"], ["a", "b"], "there are 1 texts and 2 labels"),
        ([], [], "memory has no rows"),
    ],
)
def test_lists_that_cannot_be_learned_from(texts, labels, message):
    with pytest.raises(DataError, match=message):
        dataset_from_lists(texts, labels, validation_fraction=0.1, seed=0)


def test_a_fraction_of_lists_out_of_range():
    with pytest.raises(ConfigError, match="the validation fraction is 1"):
        dataset_from_lists(["x", "y"], ["a", "b"], validation_fraction=1, seed=0)


def test_counts_and_lines(tmp_path):
    train = [
        *[("x", "a"), ("x", "a"), ("x", "b"), ("x", "b")],  # the 2nd and 4th repeat; all 4 conflict
        *[("y", "a"), ("y", "a"), ("y", "a")],  # 2 repeat
        *[("z", "c"), ("w", "a")],
    ]
    test = [("x", "c"), ("z", "c"), ("new", "a"), ("z", "a")]  # 3 are texts of training
    validation = [("w", "a"), ("a longer text", "b")]  # 1
    write_csv(tmp_path / "train.csv", train, ("message", "intent"))
    write_csv(tmp_path / "test.csv", test, ("message", "intent"))
    write_csv(tmp_path / "val.csv", validation, ("message", "intent"))
    summary = load_dataset(str(tmp_path)).summary
    fields = dataclasses.asdict(summary)
    del fields["sha256"]
    assert fields == {
        "source": str(tmp_path),
        "text_column": "message",
        "label_column": "intent",
        "num_train": 9,
        "num_validation": 2,
        "num_test": 4,
        "num_labels": 3,
        "labels": ("a", "b", "c"),
        "smallest_label": "c",
        "smallest_label_rows": 1,
        "largest_label": "a",
        "largest_label_rows": 6,
        "num_duplicates": 4,
        "num_conflicting": 4,
        "num_train_validation_shared": 1,
        "num_train_test_shared": 3,
        "longest_text_chars": 13,
        "text_columns": ("message",),
        "remarks": (),
        "rows_per_label": {"a": 6, "b": 2, "c": 1},
        "multi_label": False,
    }
    assert summary.lines() == [
        f"9 training, 2 validation and 4 test rows from {tmp_path} (text: 'message',"
        " label: 'intent')",
        "3 labels, from 1 row ('c') to 6 rows ('a')",
        "4 rows in training repeat an earlier text and label",
        "4 rows in training have a text that also occurs with another label",
        "1 row in validation have a text that is also in training",
        "3 rows in test have a text that is also in training: test accuracy may be optimistic",
    ]
    assert json.loads(json.dumps(summary.to_dict()))["labels"] == ["a", "b", "c"]


def test_named_tables_may_have_another_format_than_the_training_table(tmp_path):
    table = many({"a": 3, "b": 3})
    records = [json.dumps({"label": label, "text": text}) for text, label in table]
    test = write(tmp_path / "test.jsonl", "\n".join(records))
    csv = write_csv(tmp_path / "train", table)
    for options in (
        ReadOptions(format="csv"),
        ReadOptions(format="csv", columns=("text", "label")),
    ):
        if options.columns:
            csv = write_csv(tmp_path / "train", table[1:], table[0])
        dataset = load_dataset(
            str(csv), test=str(test), validation=str(csv), test_fraction=0, options=options
        )
        assert rows(dataset.test) == rows(dataset.train) == rows(dataset.validation) == table
    with zipfile.ZipFile(tmp_path / "test.zip", "w") as archive:
        archive.write(test, "test.jsonl")
    packed = load_dataset(str(csv), test=str(tmp_path / "test.zip"), options=options)
    assert rows(packed.test) == table
    headed = write_csv(tmp_path / "test.csv", table)
    with pytest.raises(DataError, match=r"test\.csv has the names of --columns in its first line"):
        load_dataset(str(csv), test=str(headed), options=options)


def test_clean_data_gives_two_lines(tmp_path):
    path = write_csv(tmp_path / "a.csv", many({"a": 3, "b": 3}))
    assert len(load_dataset(str(path)).summary.lines()) == 2


def test_the_hash_is_of_the_rows_and_not_of_the_file(tmp_path):
    table = many({"a": 12, "b": 9})

    def sha256(path):
        return load_dataset(str(path)).summary.sha256

    first = sha256(write_csv(tmp_path / "a.csv", table))
    texts, labels = [text for text, _ in table], [label for _, label in table]
    assert sha256(write_parquet(tmp_path / "a.parquet", {"label": labels, "text": texts})) == first
    options = {"delimiter": ";", "quoting": 1, "encoding": "utf-8-sig"}
    assert sha256(write_csv(tmp_path / "b.csv", table, **options)) == first
    relabelled = [*table[:-1], (table[-1][0], "a")]
    assert sha256(write_csv(tmp_path / "c.csv", relabelled)) != first
    assert sha256(write_csv(tmp_path / "d.csv", table[::-1])) != first
    assert sha256(write_csv(tmp_path / "e.csv", table[:-1])) != first

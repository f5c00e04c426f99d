"""Sources become splits; the counts are worked out by hand."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections import Counter

import pytest

from data.test_table import write, write_csv, write_parquet
from hub_server import running
from remora.data import dataset
from remora.data.dataset import dataset_from_lists, load_dataset
from remora.data.table import Table
from remora.errors import ConfigError, DataError


def many(counts):
    """Rows with as many of each label as `counts` says, one label after the other."""
    return [(f"{label} {i}", label) for label, count in counts.items() for i in range(count)]


def rows(table):
    return list(zip(table.texts, table.labels, strict=True))


# Splits


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


@pytest.mark.parametrize(
    ("fractions", "message"),
    [
        ({"validation_fraction": -0.1}, "the validation fraction is -0.1; choose"),
        ({"validation_fraction": 1.0}, "the validation fraction is 1.0; choose"),
        ({"test_fraction": float("nan")}, "the test fraction is nan; choose"),
        ({"validation_fraction": 0.5, "test_fraction": 0.5}, "fractions sum to 1; choose less"),
    ],
)
def test_fractions_out_of_range(tmp_path, fractions, message):
    path = write_csv(tmp_path / "a.csv", many({"a": 3, "b": 3}))
    with pytest.raises(ConfigError, match=message):
        load_dataset(str(path), **fractions)


# Sources


def test_a_folder_of_splits(tmp_path):
    write_csv(tmp_path / "train.csv", many({"a": 2, "b": 2}))
    write_csv(tmp_path / "dev.tsv", [("v", "a")], delimiter="\t")
    write_parquet(tmp_path / "Test.parquet", {"text": ["t"], "label": ["b"]})
    write(tmp_path / "train_notes.csv", "none of your business\n")
    write(tmp_path / "README.md", "# Data\n")
    dataset = load_dataset(str(tmp_path))
    assert rows(dataset.train) == many({"a": 2, "b": 2})
    assert rows(dataset.validation) == [("v", "a")]
    assert rows(dataset.test) == [("t", "b")]


def test_named_tables_replace_those_of_the_folder(tmp_path):
    write_csv(tmp_path / "train.csv", many({"a": 2, "b": 2}))
    write_csv(tmp_path / "test.csv", [("mine", "a")])
    other = write_csv(tmp_path / "other.csv", [("yours", "b")])
    dataset = load_dataset(str(tmp_path), test=str(other), validation=str(other))
    assert dataset.test.texts == dataset.validation.texts == ["yours"]


def shard(folder, number, texts, num_shards=2):
    folder.mkdir(exist_ok=True)
    path = folder / f"train-{number:05}-of-{num_shards:05}.parquet"
    write_parquet(path, {"text": texts, "label": list("ab")})


def test_a_folder_of_shards(tmp_path):
    shard(tmp_path / "data", 1, ["three", "four"])
    shard(tmp_path / "data", 0, ["one", "two"])
    dataset = load_dataset(str(tmp_path), validation_fraction=0, test_fraction=0)
    assert dataset.train.texts == ["one", "two", "three", "four"]


def test_a_missing_shard_and_a_second_table(tmp_path):
    shard(tmp_path / "data", 0, ["one", "two"])
    with pytest.raises(DataError, match="is one of 2 shards, and 1 are there"):
        load_dataset(str(tmp_path))
    write_csv(tmp_path / "train.csv", many({"a": 1, "b": 1}))
    for name in ("train.tsv", "training.csv"):
        write_csv(tmp_path / name, many({"a": 1, "b": 1}))
        with pytest.raises(DataError, match=rf"train\.csv and {name} are both train tables"):
            load_dataset(str(tmp_path))
        (tmp_path / name).unlink()


def test_a_folder_without_a_train_file(tmp_path):
    with pytest.raises(DataError, match=r"has no train file \(found nothing\)"):
        load_dataset(str(tmp_path))
    write_csv(tmp_path / "test.csv", many({"a": 1, "b": 1}))
    with pytest.raises(DataError, match=r"has no train file \(found 'test.csv'\)"):
        load_dataset(str(tmp_path))


def test_the_sample():
    summary = load_dataset("sample:support", validation_fraction=0).summary
    # Counts of samples/support/README.md
    assert (summary.num_train, summary.num_test, summary.num_labels) == (1736, 580, 24)
    assert (summary.text_column, summary.label_column) == ("text", "category")
    for name in ("sample:suport", "sample:", "sample:../samples/support"):
        with pytest.raises(DataError, match=r"there is no sample .*; choose one of 'support'"):
            load_dataset(name)


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
            f"{test}: row 2 (line 3) has the label 'refnud', which is none of the 2 labels to"
            " learn; did you mean 'refund'?"
        )


def test_a_source_that_is_not_there(tmp_path):
    write(tmp_path / "train.csv", "")
    with pytest.raises(DataError, match=r"there is no file or folder .*did you mean 'train\.csv'"):
        load_dataset(str(tmp_path / "tran.csv"))
    with pytest.raises(DataError, match=r"there is no file or folder .*none\.csv"):
        load_dataset(str(tmp_path / "train.csv"), test=str(tmp_path / "none.csv"))


# Lists


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


# What there is to say


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
    }
    assert summary.lines() == [
        f"9 training, 2 validation and 4 test rows from {tmp_path} (text: 'message',"
        " label: 'intent')",
        "3 labels, from 1 row ('c') to 6 rows ('a')",
        "4 rows in training repeat an earlier text and label",
        "4 rows in training have a text that also occurs with another label",
        "1 row in validation have a text that is in training too",
        "3 rows in test have a text that is in training too: the test score may flatter",
    ]
    assert json.loads(json.dumps(summary.to_dict()))["labels"] == ["a", "b", "c"]


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


# The hub


def test_a_dataset_of_the_hub(tmp_path):
    features = {
        "text": {"dtype": "string", "_type": "Value"},
        "label": {"names": ["card", "refund"], "_type": "ClassLabel"},
    }
    columns = {"text": ["one", "two", "three"], "label": [1, 0, 1]}
    train = write_parquet(tmp_path / "train.parquet", columns, features).read_bytes()
    columns = {"text": ["four"], "label": [0]}
    test = write_parquet(tmp_path / "test.parquet", columns, features).read_bytes()
    code = """
import json
from remora.data import load_dataset
from remora.errors import DataError
dataset = load_dataset("hf:owner/name", validation_fraction=0)
answer = [dataset.train.texts, dataset.train.labels, dataset.test.texts, dataset.test.labels]
for source in ("hf:owner/nowhere", "hf:owner/name:english"):
    try:
        load_dataset(source)
    except DataError as error:
        answer.append(str(error))
print(json.dumps(answer))
"""
    with running() as hub:
        hub.publish("datasets/owner/name", {"train.parquet": train, "test.parquet": test})
        outside = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=outside | hub.environment(tmp_path / "home"),
            capture_output=True,
            text=True,
            check=False,
            timeout=100,
        )
    assert done.returncode == 0, done.stderr
    *found, message, no_config = json.loads(done.stdout)
    assert found == [["one", "two", "three"], ["refund", "card", "refund"], ["four"], ["card"]]
    assert message.startswith("hf:owner/nowhere cannot be loaded (Dataset 'owner/nowhere' doesn't")
    assert "\n" not in message
    assert no_config.startswith("hf:owner/name:english cannot be loaded (")
    assert "'english' not found" in no_config

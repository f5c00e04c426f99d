"""A file, a folder, shards, a sample and a Hub dataset as sources."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace

import datasets
import pytest

from data.test_dataset import many, rows
from data.test_table import write, write_csv, write_parquet
from hub_server import running
from remora.data import arrow, sources
from remora.data.dataset import load_dataset
from remora.data.parts import ReadOptions
from remora.data.table import read_table, stream_texts
from remora.errors import ConfigError, DataError


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


def test_a_folder_of_two_formats_and_names_for_columns(tmp_path):
    write_csv(tmp_path / "train.csv", many({"a": 3, "b": 3})[1:], ("a 0", "a"))
    write(tmp_path / "test.jsonl", '{"label": "b", "text": "t"}\n')
    write_csv(tmp_path / "dev.csv", [("w", "b")], ("v", "a"))
    dataset = load_dataset(str(tmp_path), options=ReadOptions(columns=("text", "label")))
    assert rows(dataset.train) == many({"a": 3, "b": 3})
    assert rows(dataset.test) == [("t", "b")]
    assert rows(dataset.validation) == [("v", "a"), ("w", "b")]
    write(tmp_path / "train.jsonl", '{"label": "b", "text": "t"}\n')
    (tmp_path / "train.csv").unlink()
    with pytest.raises(ConfigError, match=r"train\.jsonl, but .*; leave out --columns"):
        load_dataset(str(tmp_path), options=ReadOptions(columns=("text", "label")))


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
    with pytest.raises(DataError, match="is one of 2 shards, but the folder has 1;"):
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


def test_a_source_that_is_not_there(tmp_path):
    write(tmp_path / "train.csv", "")
    with pytest.raises(DataError, match=r"there is no file or folder .*did you mean 'train\.csv'"):
        load_dataset(str(tmp_path / "tran.csv"))
    with pytest.raises(DataError, match=r"there is no file or folder .*none\.csv"):
        load_dataset(str(tmp_path / "train.csv"), test=str(tmp_path / "none.csv"))


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


def test_shards_with_hashed_names(tmp_path):
    for number, texts in enumerate((["one", "two"], ["three", "four"])):
        path = tmp_path / "data" / f"train-0000{number}-of-00002-b42a775f407cee4{number}.parquet"
        path.parent.mkdir(exist_ok=True)
        write_parquet(path, {"text": texts, "label": list("ab")})
    dataset = load_dataset(str(tmp_path), validation_fraction=0, test_fraction=0)
    assert dataset.train.texts == ["one", "two", "three", "four"]
    path.rename(path.with_name("train-00000-of-00002-ffff.parquet"))  # two of one number
    with pytest.raises(DataError, match="is one of 2 shards, but the folder has 2"):
        load_dataset(str(tmp_path))


@pytest.mark.parametrize(
    ("names", "test", "validation"),
    [
        (("training", "testing"), "testing", None),
        (("train", "eval"), "eval", None),
        (("train", "val", "evaluation"), "evaluation", "val"),
        (("train", "eval", "test"), "test", "eval"),
        (("train", "dev", "test", "eval"), "test", "dev"),
    ],
)
def test_tables_to_measure_on_by_their_names(names, test, validation, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    splits = {}
    for name in names:
        pairs = many({"a": 9, "b": 9}) if name.startswith("train") else [(name, "a")]
        write_csv(folder / f"{name}.csv", pairs)
        splits[name] = datasets.Dataset.from_dict(
            {"text": [t for t, _ in pairs], "label": [x for _, x in pairs]}
        )
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "saved"))
    for source in (folder, tmp_path / "saved"):
        dataset = load_dataset(str(source))
        assert dataset.test.texts == [test]
        if validation:
            assert dataset.validation.texts == [validation]
        unread = [each for each in dataset.summary.remarks if "not read" in each]
        assert not unread


def test_a_split_of_a_saved_data_set_is_a_table(tmp_path, monkeypatch):
    pairs = many({"a": 20, "b": 20})
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["a", "b"])}
    )
    texts, labels = [text for text, _ in pairs], [label for _, label in pairs]
    whole = datasets.Dataset.from_dict({"text": texts, "label": labels}, features=features)
    hidden = datasets.Dataset.from_dict({"text": ["x", "y"], "label": [-1, -1]}, features=features)
    folder = tmp_path / "glue ds"
    datasets.DatasetDict({"train": whole, "test": hidden}).save_to_disk(str(folder))
    (line,) = [each for each in load_dataset(str(folder)).summary.remarks if "predict" in each]
    (command,) = re.findall("`(.*)`", line)
    *_, path = shlex.split(command)
    assert list(stream_texts(path)) == ["x", "y"]
    assert rows(read_table(folder / "train")) == pairs
    named = load_dataset(str(folder), test=f"{folder}/train", validation=f"{folder}/train")
    assert rows(named.test) == rows(named.validation) == pairs
    with pytest.raises(
        DataError, match="glue ds holds 2 splits; name the folder of one, 'train', 'test'"
    ):
        read_table(folder)
    splits = arrow.saved_splits(folder)
    monkeypatch.setattr(sources, "hub_splits", lambda source: splits)
    hidden = replace(splits["test"], name="hf:owner/name (test)")  # which predict cannot read
    monkeypatch.setitem(splits, "test", hidden)
    (line,) = [each for each in load_dataset("hf:owner/name").summary.remarks if "predict" in each]
    assert line.endswith("save it to a file, and classify it with `remora predict RUN FILE`")


def test_tables_whose_names_tell_of_a_split_are_told_where_rows_are_held_out(tmp_path):
    write_csv(tmp_path / "train.csv", many({"a": 9, "b": 9}))
    write_csv(tmp_path / "test_data.csv", [("t", "a")])
    write_csv(tmp_path / "dev_matched.tsv", [("v", "a")], delimiter="\t")
    write_csv(tmp_path / "contest.csv", [("c", "a")])
    validation, test = load_dataset(str(tmp_path)).summary.remarks
    assert validation.startswith(
        "'dev_matched.tsv' is not read, and rows of the training table are held"
    )
    assert validation.endswith("held out as validation rows; --validation names a table of them")
    assert "test_data.csv' is not read" in test
    named = load_dataset(
        str(tmp_path),
        test=str(tmp_path / "test_data.csv"),
        validation=str(tmp_path / "dev_matched.tsv"),
    )
    assert not named.summary.remarks
    assert not load_dataset(str(tmp_path), test_fraction=0, validation_fraction=0).summary.remarks

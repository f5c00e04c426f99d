"""Labels that differ in form only are told, and merged on request; an imbalance is told."""

from __future__ import annotations

import re

import pytest

from data.test_table import write_csv
from remora.data import label_forms
from remora.data.dataset import load_dataset
from remora.data.parts import ReadOptions
from remora.data.table import read_table
from remora.errors import ConfigError, DataError

FORMS = ["Positive", "positive", "POSITIVE", "caf\u00e9 bar", "cafe\u0301  bar", "negative"]


def test_twins_are_labels_of_one_key():
    assert label_forms.twins(FORMS) == [
        ["POSITIVE", "Positive", "positive"],
        ["cafe\u0301  bar", "caf\u00e9 bar"],
    ]
    assert label_forms.twins(["a_b", "a b", "ab", "a-b"]) == []
    assert label_forms.twins(["c", "c\u200b", "d"]) == [["c", "c\u200b"]]
    assert label_forms.twins(["1", "1.0", "0.0", "0", "1.5", "v1.0", "v1"]) == [
        ["0", "0.0"],
        ["1", "1.0"],
    ]
    assert label_forms.twins(["１", "1", "\ufb01n", "fin"]) == [["1", "１"], ["fin", "\ufb01n"]]


def forms_table(path, counts):
    rows = [(f"{label} {i}", label) for label, count in counts.items() for i in range(count)]
    return str(write_csv(path, rows))


def test_twins_are_told_and_merged_on_request(tmp_path):
    counts = {"Positive": 3, "positive": 9, "POSITIVE": 2, "negative": 10}
    source = forms_table(tmp_path / "a.csv", counts)
    dataset = load_dataset(source)
    assert len(dataset.labels) == 4
    (line,) = [line for line in dataset.summary.lines() if "--merge-labels" in line]
    assert "'POSITIVE', 'Positive', 'positive'" in line
    test = forms_table(tmp_path / "b.csv", {"pOSITIVE": 1, "Negative": 1})
    merged = load_dataset(source, test=test, merge_labels=True)
    assert merged.labels == ("negative", "positive")
    assert sorted(merged.test.labels) == ["negative", "positive"]
    assert not [line for line in merged.summary.lines() if "--merge-labels" in line]
    assert merged.train.labels.count("positive") + merged.validation.labels.count("positive") == 14
    unknown = (
        "'pOSITIVE', which is none of the 4 training labels; --merge-labels takes it for '[Pp]"
    )
    with pytest.raises(DataError, match=unknown):
        load_dataset(source, test=test)
    forms = label_forms.most_frequent_forms(["a", "B"])
    assert read_table(
        forms_table(tmp_path / "c.csv", {"A": 1, "b ": 1}), known=["a", "B"], forms=forms
    ).labels == ["a", "B"]


def test_an_imbalance_is_told_with_the_accuracy_of_the_majority(tmp_path):
    options = {"validation_fraction": 0, "test_fraction": 0}
    lines = load_dataset(forms_table(tmp_path / "a.csv", {"ham": 90, "spam": 10}), **options)
    (line,) = [each for each in lines.summary.lines() if "imbalanced" in each]
    assert "always answering 'ham' would be right for 90.0% of the training rows" in line
    assert "--class-weights balanced or --metric macro_f1" in line
    even = load_dataset(forms_table(tmp_path / "b.csv", {"ham": 6, "spam": 4}), **options)
    assert not [each for each in even.summary.lines() if "imbalanced" in each]


def test_labels_of_a_table_without_a_header(tmp_path):
    path = write_csv(tmp_path / "a.csv", [("x", "1")], ("t", "l"))
    table = read_table(path, options=ReadOptions(columns=("text", "label")))
    assert table.labels == ["l", "1"]


def test_renamed_labels_are_merged_in_every_table(tmp_path):
    source = forms_table(tmp_path / "a.csv", {"late": 9, "lost": 9, "refund": 9})
    test = forms_table(tmp_path / "b.csv", {"lost": 2, "late": 1, "refund": 1})
    names = {"late": "late or lost", "lost": "late or lost"}
    dataset = load_dataset(source, test=test, rename_labels=names)
    assert dataset.labels == ("late or lost", "refund")
    assert sorted(dataset.test.labels) == ["late or lost"] * 3 + ["refund"]
    counts = dataset.summary.to_dict()["rows_per_label"]
    assert sum(counts.values()) == len(dataset.train)
    assert counts["late or lost"] > counts["refund"]
    assert len(load_dataset(source, test=test).labels) == 3


@pytest.mark.parametrize(
    ("names", "told"),
    [
        ({"lates": "x"}, "'lates', which no training row has; did you mean 'late'?"),
        ({"zzz": "x"}, "'zzz', which no training row has; give one of 'late', 'lost'"),
        ({"late": " "}, "'late' the name ' '; give one without white space around it"),
    ],
)
def test_a_label_that_is_not_there_is_not_renamed(tmp_path, names, told):
    source = forms_table(tmp_path / "a.csv", {"late": 9, "lost": 9})
    with pytest.raises(ConfigError, match=re.escape(told)):
        load_dataset(source, rename_labels=names)


def test_labels_that_all_get_one_name_cannot_be_learned(tmp_path):
    source = forms_table(tmp_path / "a.csv", {"late": 9, "lost": 9})
    with pytest.raises(DataError, match="every training row has the label 'late'"):
        load_dataset(source, rename_labels={"lost": "late"})

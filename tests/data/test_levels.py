"""Labels as a hierarchy: its nodes, their probabilities, and labels that are none."""

from __future__ import annotations

import numpy as np
import pytest

from data.test_table import write_csv
from remora.config import TrainConfig
from remora.data.dataset import load_data
from remora.data.levels import Hierarchy
from remora.errors import ConfigError, DataError

LABELS = ("card > arrival", "card > lost", "cash", "loan > new > rate", "loan > old")


def test_a_level_has_the_first_parts_of_each_label() -> None:
    hierarchy = Hierarchy(LABELS, " > ")
    assert hierarchy.depth == 3
    assert hierarchy.names(1) == ("card", "cash", "loan")
    assert hierarchy.places(1).tolist() == [0, 0, 1, 2, 2]
    assert hierarchy.names(2) == (*LABELS[:3], "loan > new", "loan > old")
    assert hierarchy.names(3) == LABELS  # a shorter label stands for itself


def test_the_probability_of_a_node_is_the_sum_over_its_labels() -> None:
    of_labels = np.array([[0.1, 0.2, 0.3, 0.05, 0.35], [0, 0, 0, 1, 0]])
    found = Hierarchy(LABELS, " > ").probabilities(1, of_labels)
    assert found == pytest.approx(np.array([[0.3, 0.3, 0.4], [0, 0, 1]]))


def test_spaces_around_parts_are_no_part_of_them() -> None:
    """A separator in the middle of a word separates, and labels are named as they are written."""
    hierarchy = Hierarchy(("a >  b", "a> c", "x > y>z"), ">")
    assert hierarchy.paths == (("a", "b"), ("a", "c"), ("x", "y", "z"))
    assert hierarchy.names(1) == ("a", "x")
    assert hierarchy.names(2) == ("a >  b", "a> c", "x > y")
    assert Hierarchy(("self-service - card", "b"), " - ").paths[0] == ("self-service", "card")


def test_a_label_may_be_the_parent_of_others() -> None:
    hierarchy = Hierarchy(("card", "card > lost", "cash"), " > ")
    assert hierarchy.names(1) == ("card", "cash")
    assert hierarchy.probabilities(1, np.array([[0.25, 0.5, 0.25]])).tolist() == [[0.75, 0.25]]
    assert list(hierarchy.lines()) == [
        "labels of 2 levels: 2, then 3 by level",
        "2 of 3 labels have fewer levels, and stand for themselves at those below",
        "also the parents of other labels: 'card'",
    ]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (("a", "b"), "no label has the separator ' > ', they are such as 'a', 'b'; correct"),
        (("a >  > b", "c"), "the label 'a >  > b' has an empty part beside a separator ' > '"),
        ((" > b", "c"), "the label ' > b' has an empty part"),
        (("a > b", "a  >  b"), "'a > b' and 'a  >  b' differ only in the spaces around"),
    ],
)
def test_labels_that_are_no_hierarchy_are_refused(labels: tuple[str, ...], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Hierarchy(labels, " > ").refuse_broken()


def test_the_rows_of_a_run_are_checked_after_their_labels_are_renamed(tmp_path) -> None:
    rows = [(f"{label} {i}", label) for label in ("a > b", "a  >  b", "c") for i in range(4)]
    path = str(write_csv(tmp_path / "a.csv", rows))
    with pytest.raises(DataError, match="differ only in the spaces"):
        load_data(TrainConfig(path, model="m", label_separator=" > "))
    names = {"a  >  b": "a > b"}
    dataset = load_data(TrainConfig(path, model="m", label_separator=" > ", rename_labels=names))
    assert "labels of 2 levels: 2, then 2 by level" in dataset.summary.lines()
    lines = load_data(TrainConfig(path, model="m")).summary.lines()
    assert not any("levels" in line for line in lines)
    with pytest.raises(ConfigError, match="label_separator is ''; give a text"):
        TrainConfig(path, model="m", label_separator="")
    settings = TrainConfig("a", model="m", label_separator=" > ")
    kept = TrainConfig.from_toml(settings.to_toml(), tmp_path)
    assert kept.label_separator == " > "

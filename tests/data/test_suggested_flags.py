"""Flags that an error suggests name the columns when they are pasted, however these are called."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

import workbooks
from data.test_table import write_csv
from remora import cli
from remora.config import TrainConfig
from remora.data.dataset import Dataset, label_form, load_data, load_dataset
from remora.data.table import read_table
from remora.errors import DataError

ISSUES = [f"my card number {i} has not come yet, where is it?" for i in range(40)]
TOPICS = ["card", "refund", "login"]


def settings_of(path: Path, flags: str) -> TrainConfig:
    """Return the settings of a command line that the flags were pasted to."""
    words = ["train", str(path), "--model", "m", *shlex.split(flags)]
    _, bound, _ = cli.app.parse_args(words, exit_on_error=False, print_error=False)
    config = bound.args[0]
    assert isinstance(config, TrainConfig)
    return config


def pasted(path: Path, expected: str) -> Dataset:
    """Read a table with the flags that its error suggests."""
    with pytest.raises(DataError) as told:
        load_dataset(str(path))
    assert str(told.value).rstrip("?").endswith(f" {expected}")
    return load_data(settings_of(path, expected))


@pytest.mark.parametrize(
    ("names", "flag"),
    [
        (("toxic, severe", "threat"), """--label-columns '"toxic, severe",threat'"""),
        (('say "no"', "threat"), '--label-columns \'"say ""no""",threat\''),
        (("very toxic", "threat"), '--label-columns "very toxic,threat"'),
        (("-toxic", "threat"), "--label-columns=-toxic,threat"),
        (("very\ntoxic", "threat"), '--label-columns "very toxic,threat"'),
    ],
)
def test_columns_of_0_and_1(names: tuple[str, str], flag: str, tmp_path: Path) -> None:
    rows = [(text, i % 2, i % 3 == 0) for i, text in enumerate(ISSUES)]
    path = write_csv(tmp_path / "a.csv", [(x, y, int(z)) for x, y, z in rows], ("text", *names))
    folded = [" ".join(name.split()) for name in names]
    assert pasted(path, flag).labels == tuple(sorted(folded))
    test = write_csv(tmp_path / "b.csv", [("one", 1, 1)], ("text", *names))
    (label,) = load_data(settings_of(path, f"{flag} --test {test}")).test.labels
    assert json.loads(label) == sorted(folded)


def test_quoted_names_stay_through_a_run(tmp_path: Path) -> None:
    """A run's settings are converted again when they are changed, and when they are read again."""
    given = settings_of(tmp_path, """--label-columns ' "a, b" ,"c",5" pipe'""")
    again = TrainConfig.from_toml(given.to_toml(), tmp_path)
    assert label_form(again).columns == label_form(given).columns == ("a, b", "c", '5" pipe')


@pytest.mark.parametrize(
    ("names", "flags"),
    [
        (("Ticket\ntext", "queue no"), '--text-column "Ticket text" --label-column "queue no"'),
        (("\u200bissue", "queue\u00a0no"), '--text-column issue --label-column "queue no"'),
        (("-a", "--b c"), '--text-column=-a --label-column="--b c"'),
    ],
)
def test_names_that_cannot_be_typed(names: tuple[str, str], flags: str, tmp_path: Path) -> None:
    header = (*names, "n")
    rows = [(text, TOPICS[i % 3], i) for i, text in enumerate(ISSUES)]
    path = workbooks.write(tmp_path / "a.xlsx", [header, *rows])
    dataset = pasted(path, flags)
    assert dataset.labels == tuple(sorted(TOPICS))
    assert {*dataset.train.texts} < {*ISSUES}
    test = load_data(settings_of(path, f"{flags} --test {path}")).test
    assert test.labels == [topic for _, topic, _ in rows]


def test_a_name_that_two_columns_have_on_one_line(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv", [("x", "y", "z")], ("a  b", "a\nb", "label"))
    assert read_table(path, text_column="a\nb").texts == ["y"]
    with pytest.raises(DataError, match=r"2 columns called 'a b'; rename all but one"):
        read_table(path, text_column="a b")

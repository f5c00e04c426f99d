"""Several labels a row: every form of them gives the same rows, and what is wrong is told."""

from __future__ import annotations

import csv
import json
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from remora.data import label_sets
from remora.data.dataset import Dataset, load_dataset
from remora.data.label_sets import LabelForm, list_in, names_in, set_text
from remora.data.table import Table, read_table
from remora.errors import DataError

ROWS: list[tuple[str, list[str]]] = [
    (f"message {i}", [["card", "fee"], ["fee"], [], ["late, lost", "card"]][i % 4])
    for i in range(40)
]
LABELS = ("card", "fee", "late, lost")


def write_csv(path: Path, header: list[str], rows: list[list[Any]]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def write_jsonl(path: Path, rows: list[tuple[str, Any]]) -> Path:
    lines = [json.dumps({"text": text, "labels": labels}) for text, labels in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_parquet(path: Path, *, numbered: bool) -> Path:
    datasets = pytest.importorskip("datasets")
    names = list(LABELS)
    kind: Any = datasets.ClassLabel(names=names) if numbered else datasets.Value("string")
    lists = [[names.index(x) for x in y] if numbered else y for _, y in ROWS]
    rows = datasets.Dataset.from_dict(
        {"text": [x for x, _ in ROWS], "labels": lists},
        features=datasets.Features({"text": datasets.Value("string"), "labels": [kind]}),
    )
    if path.suffix == ".parquet":
        rows.to_parquet(path)
    else:
        rows.save_to_disk(path)
    return path


def written(folder: Path, form: str) -> tuple[Path, LabelForm]:
    """Return the table in one of the forms that people have it in."""
    if form == "jsonl":
        return write_jsonl(folder / "a.jsonl", ROWS), LabelForm()
    if form in {"python", "json"}:
        text = str if form == "python" else json.dumps
        return write_csv(
            folder / "a.csv", ["text", "labels"], [[x, text(y)] for x, y in ROWS]
        ), LabelForm()
    if form == "separator":
        rows = [[x, " | ".join(y)] for x, y in ROWS]
        return write_csv(folder / "a.csv", ["text", "labels"], rows), LabelForm(separator="|")
    if form == "flags":
        rows = [[i, x, *(int(label in y) for label in LABELS)] for i, (x, y) in enumerate(ROWS)]
        return write_csv(folder / "a.csv", ["id", "text", *LABELS], rows), LabelForm(columns=LABELS)
    name = "a.parquet" if form.startswith("parquet") else "saved"
    return write_parquet(folder / name, numbered=form.endswith("numbers")), LabelForm()


FORMS = (
    *("jsonl", "python", "json", "separator", "flags"),
    *("parquet", "parquet numbers", "saved", "saved numbers"),
)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_rows(form: str, tmp_path: Path) -> None:
    path, how = written(tmp_path, form)
    dataset = load_dataset(str(path), form=how, test_fraction=0, validation_fraction=0)
    assert dataset.multi_label
    assert dataset.labels == LABELS
    assert dataset.train.texts == [text for text, _ in ROWS]
    assert [label_sets.labels_in(each) for each in dataset.train.labels] == [
        tuple(sorted(labels)) for _, labels in ROWS
    ]
    (told,) = [line for line in dataset.summary.lines() if "several labels" in line]
    assert f"({how.spoken}): 1.25 on average, from 0 to 2; 10 rows with none of them" in told


def test_lists_of_one_label_each_are_ordinary_labels_unless_asked(tmp_path: Path) -> None:
    path = write_jsonl(
        tmp_path / "a.jsonl", [(x, [["a"], ["b"]][i % 2]) for i, (x, _) in enumerate(ROWS)]
    )
    ordinary = load_dataset(str(path))
    assert (ordinary.multi_label, ordinary.labels) == (False, ("a", "b"))
    assert any(
        "lists of one label each, read as one label a row" in x for x in ordinary.summary.remarks
    )
    several = load_dataset(str(path), form=LabelForm("on"))
    assert several.multi_label
    assert several.train.labels[0] == '["a"]'


def test_a_string_beside_lists_is_a_set_of_one(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [("one", "a"), ("two", ["a", "b"]), ("three", [])])
    table = load_dataset(str(path), test_fraction=0, validation_fraction=0).train
    assert table.labels == ['["a"]', '["a", "b"]', "[]"]


def test_a_table_of_lists_is_read_as_it_is_with_a_separator(tmp_path: Path) -> None:
    lists: list[list[str]] = [[], ["a"], ["a", "b|c"]]
    path = write_jsonl(tmp_path / "a.jsonl", [("x", own) for own in lists])
    assert read_table(path, form=LabelForm(separator="|")).labels == [*map(set_text, lists)]


@pytest.mark.parametrize(
    "names", [["a", "b"], ["a|b", "c"], ["|"], ["[a", "b]"], ["['a'", "b]"], ["{x", "y}"], ["[]"]]
)
def test_what_is_written_is_read_back(names: list[str]) -> None:
    form = LabelForm(separator="|")
    cell = label_sets.written(set_text(names), form)
    assert set_text(map(str, names_in(cell, form))) == set_text(names)
    is_plain = names[0] in {"a", "[a", "{x"}  # which in the order of a set is no list
    assert cell == ("|".join(sorted(names)) if is_plain else set_text(names))


@pytest.mark.parametrize("separator", [",", '", "', "|"])
def test_so_are_lists_written_as_text(separator: str, tmp_path: Path) -> None:
    lists: list[list[str]] = [[], ["a"], ["a", "b"], ["d, e", "f"]]
    path = write_jsonl(tmp_path / "a.jsonl", [("x", json.dumps(own)) for own in lists])
    form = LabelForm(separator=separator)
    assert read_table(path, form=form).labels == [*map(set_text, lists)]
    text = "[urgent, it's late]|[new]"
    write_jsonl(path, [("x", text)])
    expected = [part.strip() for part in text.split(separator)]
    assert read_table(path, form=form).labels == [set_text(expected)]
    write_jsonl(path, [("x", "['a', nan]")])
    with pytest.raises(DataError, match="row 1 has a broken list as its label"):
        read_table(path, form=form)


@pytest.mark.parametrize("cell", [r"(\d)", r"['\d', 'b']"])
def test_a_backslash_in_a_label_is_no_warning(cell: str) -> None:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        items = list_in(cell)
    assert found == []
    assert items == (["\\d", "b"] if cell[0] == "[" else None)


def test_blank_cells_are_no_labels_with_a_separator_only(tmp_path: Path) -> None:
    rows = [["one", "a;b"], ["two", ""], ["three", "b"]]
    path = write_csv(tmp_path / "a.csv", ["text", "labels"], rows)
    how: dict[str, Any] = {"test_fraction": 0, "validation_fraction": 0}
    table = load_dataset(str(path), form=LabelForm(separator=";"), **how).train
    assert table.labels == ['["a", "b"]', "[]", '["b"]']
    lists = write_csv(
        tmp_path / "b.csv", ["text", "labels"], [["1", '["a", "b"]'], ["2", ""], ["3", "b"]]
    )
    dataset = load_dataset(str(lists), **how)
    assert dataset.train.labels == ['["a", "b"]', '["b"]']
    assert any("without a label, skipped" in line for line in dataset.summary.remarks)


def test_labels_are_renamed_and_merged_within_their_sets(tmp_path: Path) -> None:
    rows = [("one", ["a", "B"]), ("two", ["b", "c"]), ("three", ["b"]), ("four", ["c", "a"])]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    dataset = load_dataset(
        str(path),
        merge_labels=True,
        rename_labels={"c": "a"},
        test_fraction=0,
        validation_fraction=0,
    )
    assert dataset.train.labels == ['["a", "b"]', '["a", "b"]', '["b"]', '["a"]']


def test_rows_are_held_out_by_their_rarest_label(tmp_path: Path) -> None:
    """Nearly every combination occurs once; each label keeps its share all the same."""
    names = [f"l{i:02}" for i in range(20)]
    rows = [
        (f"text {i}", [names[i % 20], names[(i // 20 + i) % 20], names[(7 * i) % 20]])
        for i in range(1_000)
    ]
    dataset = load_dataset(str(write_jsonl(tmp_path / "a.jsonl", rows)), test_fraction=0.2)
    assert dataset.test is not None
    assert len(dataset.test) == 200
    whole = Counter(label for _, labels in rows for label in {*labels})
    held_out = Counter(dataset.test.each_label)
    assert {*dataset.train.each_label} == {*names}
    for label in names:
        assert 0.1 < held_out[label] / whole[label] < 0.3


def test_rarest_names_the_label_with_fewest_rows() -> None:
    sets = [set_text(each) for each in (["a", "b"], ["a"], ["a", "b"], ["c", "a"], [])]
    assert label_sets.rarest(sets) == ["b", "a", "b", "c", ""]
    assert Table(["x"] * 5, sets, multi_label=True).strata == ["b", "a", "b", "c", ""]


@pytest.mark.parametrize(
    ("cell", "items"),
    [
        ('["a", "b"]', ["a", "b"]),
        ("['a', \"it's\"]", ["a", "it's"]),
        ("[]", []),
        ("[1, 2]", [1, 2]),
        (["a"], ["a"]),
        (("b", "a"), ["b", "a"]),
        ("('b', 'a')", ["b", "a"]),
        ("{'b', 'a'}", ["a", "b"]),
        ('{"choices": ["b", "a"]}', ["b", "a"]),  # as Label Studio writes it
        ({"choices": ["b", "a"]}, ["b", "a"]),
        ("[0, 1]", [0, 1]),  # two classes by their numbers
        ("[urgent]", None),
        ("(none)", None),
        ("(1, 2)", None),
        ("{a}", None),
        ("set()", []),
        ("frozenset()", []),
        ("frozenset({'b', 'a'})", ["a", "b"]),
        (frozenset({"b", "a"}), ["a", "b"]),
        ("{}", []),
        ('{"card arrival"}', ["card arrival"]),
        ("reset()", None),
        ('{"a": 1, "b": 2}', None),
        ({"a": ["b"]}, None),
        ("plain", None),
        ([{"role": "user", "content": "a chat"}], None),
    ],
)
def test_what_is_a_list(cell: object, items: list[object] | None) -> None:
    assert list_in(cell) == items


def load(folder: Path, rows: list[tuple[str, Any]], **more: Any) -> Dataset:
    return load_dataset(str(write_jsonl(folder / "a.jsonl", rows)), **more)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("one", ["a", ["b"]])], "row 1 has a list within its list of labels"),
        ([("one", ["a", " "])], "row 1 has a blank label in its list; remove it"),
        ([("one", "['a' 'b']")], "row 1 has a list without commas between its labels"),
        ([("one", "['a', nan]")], r"row 1 has a broken list as its label, \"\['a', nan\]\"; write"),
        ([("one", "[a, b]")], r"a list without quotes around its labels, '\[a, b\]'; write it as"),
        ([("one", "{a,b c}")], "a list without quotes around its labels, '{a,b c}'; write it as"),
        ([("one", '{a,"b c"}')], "a list without quotes around its labels"),
        ([("one", "frozenset({'a' 'b'})")], "a list without commas between its labels"),
        ([("one", [0, 1, 0])], r"a vector of 0 and 1 as its label, '\[0, 1, 0\]'; write a list"),
        ([("one", [0.0, 1.0, 1.0])], "a vector of 0 and 1 as its label"),
        ([("one", [True, False, True])], "a vector of 0 and 1 as its label"),
        ([("one", "[0, 0, 1]")], "or a column for each label, and name them with --label-columns"),
        ([("one", "[0 1 0]")], r"a vector of 0 and 1 as its label, '\[0 1 0\]'"),
        ([("one", "[0. 1. 0.]")], "a vector of 0 and 1 as its label"),
        ([("one", []), ("two", [])], "the training rows have no label at all"),
        ([("one", ["a"]), ("two", [])], "the training rows have no label but 'a'"),
        ([("one", ["b", "a"]), ("two", ["a", "b"])], "has the labels 'a', 'b'; add rows with oth"),
    ],
)
def test_broken_lists_are_told_with_their_row(
    rows: list[tuple[str, Any]], message: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=message):
        load(tmp_path, rows)


def test_a_flag_is_0_or_1(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv", ["text", "x", "y"], [["one", 1, 0], ["two", 2, 1]])
    flags = LabelForm(columns=("x", "y"))
    with pytest.raises(DataError, match=r"row 2 .*has '2' in the column 'x'; write 1 where"):
        load_dataset(str(path), form=flags)
    write_csv(path, ["text", "x", "y"], [["one", 1, 0], ["two", 0, 1]])
    with pytest.raises(DataError, match=r"Then name them with --label-columns x,y$"):
        load_dataset(str(path))
    write_csv(path, ["text", "x", "y"], [["one", 1, 0], ["two", 0, 1], ["three", "", 1]])
    dataset = load_dataset(str(path), form=flags, test_fraction=0, validation_fraction=0)
    assert dataset.train.labels == ['["x"]', '["y"]']
    assert any("without a label, skipped" in line for line in dataset.summary.remarks)


def test_a_column_of_0_alone_is_told(tmp_path: Path) -> None:
    rows = [[text, i % 2, 0, 1 - i % 2] for i, (text, _) in enumerate(ROWS)]
    path = write_csv(tmp_path / "a.csv", ["text", "a", "b", "C"], rows)
    flags = LabelForm(columns=("a", "b", "C"))
    dataset = load_dataset(str(path), form=flags, merge_labels=True, rename_labels={"C": "c"})
    assert dataset.labels == ("a", "c")
    told = "the column 'b' is 0 in every training row, so it is no label"
    assert told in dataset.summary.lines()
    more = LabelForm(columns=("a", "b", "C", "d"))
    write_csv(path, ["text", "a", "b", "C", "d"], [[*row, 0] for row in rows])
    told = "the columns 'b', 'd' are 0 in every training row, so they are no labels"
    assert told in load_dataset(str(path), form=more).summary.lines()


def test_blanks_for_0_leave_rows_of_one_set(tmp_path: Path) -> None:
    rows = [[text, 1, 1 if i % 2 else ""] for i, (text, _) in enumerate(ROWS)]
    path = write_csv(tmp_path / "a.csv", ["text", "x", "y"], rows)
    with pytest.raises(DataError, match=r"every training row has the labels 'x', 'y'; .* write 0,"):
        load_dataset(str(path), form=LabelForm(columns=("x", "y")))


@pytest.mark.parametrize(
    "vectors",
    [([1, 0], [0, 1]), ([True, False], [False, True]), ([1.0, 0.0], [0.0, 1.0])],
)
@pytest.mark.parametrize("as_text", [False, True])
def test_a_vector_of_two_is_no_set(
    vectors: tuple[list[Any], list[Any]], as_text: bool, tmp_path: Path
) -> None:
    own = [str(each) if as_text else each for each in vectors]
    rows = [(text, own[i % 2]) for i, (text, _) in enumerate(ROWS)]
    with pytest.raises(DataError, match=r"are these vectors of 0 and 1\? Then write a list of"):
        load(tmp_path, rows)
    either = [(text, [[0, 1], [0]][i % 2]) for i, (text, _) in enumerate(ROWS)]
    assert load(tmp_path, either).labels == ("0", "1")  # two classes by their numbers


def test_held_out_rows_have_the_labels_of_training(tmp_path: Path) -> None:
    other = write_jsonl(tmp_path / "test.jsonl", [("one", ["card", "unheard"])])
    train = write_jsonl(tmp_path / "a.jsonl", ROWS)
    with pytest.raises(DataError, match="'unheard', which is none of the 3 training labels"):
        load_dataset(str(train), test=str(other))
    single = write_jsonl(tmp_path / "b.jsonl", [("one", "card"), ("two", "unheard")] * 20)
    with pytest.raises(DataError, match="rows with several labels, and the training rows have one"):
        load_dataset(str(single), test=str(other))

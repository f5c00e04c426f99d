"""Decisions of a person: read however a spreadsheet wrote them, applied to training rows only."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import pytest

from remora.config import TrainConfig
from remora.data import label_sets
from remora.data.corrections import correct, read_corrections, read_sheet
from remora.data.dataset import load_data, source_rows
from remora.data.table import Table
from remora.errors import DataError
from remora.runtime import run_directory

TABLE = Table(["where, my card?", "größer; Überweisung", "a\nline"], ["card", "refund", "top up"])


def write(path: Path, decisions: list[str], *, mark: str = ",", encoding: str = "utf-8") -> Path:
    """Write a sheet as a spreadsheet does; the last column is one that a person has added."""
    with path.open("w", encoding=encoding, newline="") as file:
        writer = csv.writer(file, delimiter=mark)
        writer.writerow(["row", "text", "label", "p_wrong", "decision", "my notes"])
        for row, (text, label, decision) in enumerate(
            zip(TABLE.texts, TABLE.labels, decisions, strict=True), 1
        ):
            writer.writerow([row, text, label, "0,93", decision, "why"])
    return path


@pytest.mark.parametrize("mark", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
def test_a_sheet_is_read_as_any_spreadsheet_writes_it(
    tmp_path: Path, mark: str, encoding: str
) -> None:
    path = write(tmp_path / "r.csv", ["refund", "", "delete"], mark=mark, encoding=encoding)
    assert read_corrections(path, TABLE).decisions == {0: "refund", 2: None}
    blank = mark * 5 + "\r\n"  # empty rows, and Excel's word to itself
    text = f"sep={mark}\r\n" + path.read_bytes().decode(encoding) + blank * 2
    path.write_bytes(text.replace("a\nline", "a\r\nline").encode(encoding))
    found = read_corrections(path, TABLE)
    assert found.decisions == {0: "refund", 2: None}
    assert found.sheet.columns[-1] == "my notes"
    assert [each["row"] for each in found.sheet.records] == ["1", "3"]


@pytest.mark.parametrize("is_older", [True, False])
def test_a_sheet_may_be_older_than_the_names_of_labels(tmp_path: Path, is_older: bool) -> None:
    """A run that was corrected gets new names, or one with new names is corrected."""
    names = {"card": "refund", "refund": "card"}  # each is another label's old name
    table = Table(["a", "b"], ["card", "refund"])  # as they are called now
    labels, decision = (["refund", "card"], "refund") if is_older else (["card", "refund"], "card")
    path = tmp_path / "r.csv"
    path.write_text(f"row,text,label,decision\n1,a,{labels[0]},\n2,b,{labels[1]},{decision}\n")
    assert read_corrections(path, table, names).decisions == {1: "card"}
    sets = label_sets.set_text
    several = Table(["a", "b"], [sets(["x or y", "z"]), sets(["z"])], multi_label=True)
    path.write_text('row,text,label,decision\n1,a,"[""x"", ""z""]","[""y""]"\n')
    names = {"x": "x or y", "y": "x or y"}
    assert read_corrections(path, several, names).decisions == {0: sets(["x or y"])}
    with pytest.raises(DataError, match="line 2 no longer matches row 1"):
        read_corrections(path, several)


def test_two_decisions_on_one_row_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "r.csv", ["refund", "", ""])
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines, lines[1].replace("refund", "top up")]))
    with pytest.raises(DataError, match=r"line 6 decides row 1 otherwise than line 2; keep one"):
        read_corrections(path, TABLE)
    path.write_text("".join([*lines, lines[1]]))
    assert read_corrections(path, TABLE).decisions == {0: "refund"}


def test_a_label_named_delete_is_a_label(tmp_path: Path) -> None:
    table = Table(["a", "b"], ["delete", "card"])
    path = tmp_path / "r.csv"
    path.write_text("row,text,label,decision\n2,b,card,delete\n")
    assert read_corrections(path, table).decisions == {1: "delete"}
    path.write_text("row,text,label,decision\n2,b,card,Delete\n")  # neither: nothing is deleted
    with pytest.raises(DataError, match="'Delete', which is no label; did you mean 'delete'"):
        read_corrections(path, table)


def test_rows_keep_their_numbers_when_others_are_deleted() -> None:
    cleaned, num_corrected, num_deleted = correct(TABLE, {0: None, 2: "card", 1: "refund"})
    assert (cleaned.texts, cleaned.labels) == (TABLE.texts[1:], ["refund", "card"])
    assert (list(cleaned.places), num_corrected, num_deleted) == ([1, 2], 1, 1)
    assert correct(cleaned, {2: None})[0].texts == TABLE.texts[1:2]


@pytest.fixture
def settings(tmp_path: Path) -> TrainConfig:
    """60 rows of three labels; every third message occurs twice."""
    path = tmp_path / "data.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows([f"message {i - i % 2 if i % 3 else i}", "abc"[i % 3]] for i in range(60))
    return TrainConfig(str(path), model="nano", seed=3)


def decide(settings: TrainConfig, choices: dict[int, str]) -> TrainConfig:
    """Return settings with a sheet that decides on rows, by their places."""
    rows = source_rows(load_data(replace(settings, rows_per_class=None)))
    path = Path(settings.data).with_name("relabel.csv")
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["row", "text", "label", "decision"])
        writer.writerows([i + 1, rows.texts[i], rows.labels[i], to] for i, to in choices.items())
    return replace(settings, corrections=str(path))


@pytest.mark.parametrize("per_class", [None, 10])
def test_training_rows_change_and_no_others(settings: TrainConfig, per_class: int | None) -> None:
    settings = replace(settings, rows_per_class=per_class)
    before = load_data(settings)
    assert source_rows(load_data(replace(settings, rows_per_class=None))).places[-1] == 59
    trained, tested = before.train.rows[:3], before.test.rows[0]
    other = {"a": "b", "b": "c", "c": "a"}
    label = dict(zip(source_rows(before).places, source_rows(before).labels, strict=True))
    choices = {row: other[label[row]] for row in (trained[0], tested)}
    after = load_data(decide(settings, {**choices, trained[1]: "delete", trained[2]: ""}))
    assert after.validation == before.validation
    assert after.test == before.test
    assert after.labels == before.labels
    assert list(after.train.rows) == [row for row in before.train.rows if row != trained[1]]
    changed = [
        row
        for row, new in zip(after.train.rows, after.train.labels, strict=True)
        if new != label[row]
    ]
    assert changed == [trained[0]]
    assert after.summary.sha256 != before.summary.sha256
    assert after.summary.lines()[-1] == (
        "corrections: 1 row in training relabelled and 1 deleted; 1 row held out with the label as "
        "it was, though decided otherwise"
    )


def test_a_folder_with_a_test_table_and_a_sample_are_corrected(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    lines = [f"message {i},{'ab'[i % 2]}" for i in range(20)]
    (folder / "train.csv").write_text("\n".join(["text,label", *lines]))
    (folder / "test.csv").write_text("\n".join(["text,label", *lines[:4]]))
    path = tmp_path / "relabel.csv"
    path.write_text("row,text,label,decision\n1,message 0,a,b\n2,message 1,b,delete\n")
    settings = TrainConfig(str(folder), model="nano", validation_fraction=0.0)
    before = load_data(settings)
    after = load_data(replace(settings, corrections=str(path)))
    assert after.train.labels == ["b", *before.train.labels[2:]]
    assert after.test == before.test  # rows of a table of its own are never meant

    path.write_text("row,text,label,decision\n")
    rows = load_data(TrainConfig("sample:support", model="nano")).train
    with path.open("a", newline="") as file:
        csv.writer(file).writerow([rows.places[0] + 1, rows.texts[0], rows.labels[0], "no_signal"])
    sample = TrainConfig("sample:support", model="nano", corrections=str(path))
    assert load_data(sample).train.labels == ["no_signal", *rows.labels[1:]]


def test_corrections_that_leave_one_label_are_refused(settings: TrainConfig) -> None:
    rows = source_rows(load_data(settings))
    wanted = decide(settings, dict.fromkeys(rows.places, "a"))
    with pytest.raises(DataError, match="every training row has the label 'a'"):
        load_data(wanted)
    with pytest.raises(DataError, match="the corrections delete every training row; keep some"):
        load_data(decide(settings, dict.fromkeys(rows.places, "delete")))


def test_a_label_without_a_training_row_is_told(settings: TrainConfig) -> None:
    rows = load_data(settings).train
    gone = [row for row, label in zip(rows.rows, rows.labels, strict=True) if label == "c"]
    found = load_data(decide(settings, dict.fromkeys(gone, "a"))).summary
    assert found.num_labels == 3
    assert "3 labels, from 0 rows ('c') to" in found.lines()[1]
    assert found.rows_per_label["c"] == 0
    assert "; no training row is left of 'c'" in found.lines()[-1]


def test_a_run_finds_its_corrections_wherever_it_was_moved(
    settings: TrainConfig, tmp_path: Path
) -> None:
    (tmp_path / "config.toml").write_text(replace(settings, corrections="gone.csv").to_toml())
    found = run_directory.read_settings(tmp_path)
    assert found.corrections == str(tmp_path / "corrections.csv")


def test_a_sheet_that_is_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    for content, told in (
        (b"", "has no column row"),
        (b"\xff\xfe\x00", "cannot be read"),
        (b"row,text,label,decision\n1,a\n", "line 2 has too few or too many fields"),
        (b'row,text,label,decision\n1,"a\n', "cannot be read"),
    ):
        path.write_bytes(content)
        with pytest.raises(DataError, match=told):
            read_sheet(path)

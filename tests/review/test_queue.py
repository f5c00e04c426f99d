"""The rows of a review: their order, and decisions that are saved at once in relabel.csv."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import pytest

from remora.data.corrections import RELABEL
from remora.data.table import Table
from remora.errors import DataError, ResourceError
from remora.review import Queue
from remora.runtime import files
from reviewing import ROWS, decisions, write_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path)


def test_rows_come_by_band_then_in_batches_of_two_labels(run: Path) -> None:
    queue = Queue(run, ROWS)
    assert [(each.row, each.band) for each in queue.items] == [
        *((2, "almost surely wrong"), (6, "almost surely wrong")),  # card or refund, both ways
        (5, "almost surely wrong"),
        (8, "worth a look"),
        (10, "probably right"),
    ]
    pairs = {each.row: each.pair for each in queue.items}
    assert pairs[2] == pairs[6] == pairs[10]
    assert pairs[5] == pairs[8] != pairs[2]  # top up and refund
    assert queue.items[1].suggested == "refund"
    assert queue.labels == ["card", "refund", "top up"]


def test_a_decision_is_in_the_file_at_once(run: Path) -> None:
    queue = Queue(run, ROWS)
    queue.decide(2, "card")
    assert decisions(run) == {2: "card", 5: "", 6: "", 8: "", 10: ""}
    queue.decide(5, "top up")  # kept
    queue.decide(6, None, delete=True)
    queue.decide(2, None)  # taken back
    assert decisions(run) == {2: "", 5: "top up", 6: "delete", 8: "", 10: ""}
    with (run / RELABEL).open(newline="") as file:
        row = next(each for each in csv.DictReader(file) if each["row"] == "6")
    assert row["text"] == "'=refund(1) where is it"  # still safe in a spreadsheet
    found = queue.summary()
    assert (found.num_kept, found.num_relabelled, found.num_deleted) == (1, 0, 1)
    assert (found.num_open, found.num_probably_right, found.num_rows) == (2, 1, 5)
    again = Queue(run, ROWS)  # after a crash
    assert again.summary() == found
    assert again.decisions()[6] == {"label": None, "delete": True}


def test_neighbours_have_the_labels_that_they_have_now(run: Path) -> None:
    queue = Queue(run, ROWS)
    found = queue.details(2)
    assert found["text"] == "my card is late"
    assert (found["p_wrong"], found["p_label"], found["p_suggested"]) == (0.99, 0.1, 0.8)
    assert len(found["neighbours"]) == 5
    labels = {each["row"]: each["label"] for each in found["neighbours"]}
    assert labels[1] == "card"
    other = next(row for row in (5, 6, 8, 10) if row in labels)
    queue.decide(other, None, delete=True)
    labels = {each["row"]: each["label"] for each in queue.details(2)["neighbours"]}
    assert labels[other] is None


def test_what_a_spreadsheet_writes_meanwhile_is_kept(run: Path) -> None:
    queue = Queue(run, ROWS)
    path = run / RELABEL
    text = path.read_text(encoding="utf-8")
    with path.open("w", encoding="utf-8", newline="") as file:  # semicolons, decimal commas, a note
        writer = csv.writer(file, delimiter=";")
        for each in csv.reader(text.splitlines()):
            cells = [cell.replace("0.", "0,") for cell in each]
            note = "note" if each[0] == "row" else "seen"
            writer.writerow([*cells[:-1], "refund" if each[0] == "5" else each[-1], note])
    os.utime(path, ns=(1, 1))
    queue.decide(2, "card")
    assert decisions(run) == {2: "card", 5: "refund", 6: "", 8: "", 10: ""}
    with path.open(newline="") as file:
        assert {each["note"] for each in csv.DictReader(file)} == {"seen"}
    assert queue.details(2)["p_wrong"] == 0.99


def test_a_file_that_was_broken_meanwhile_is_left_alone(run: Path) -> None:
    queue = Queue(run, ROWS)
    path = run / RELABEL
    broken = path.read_text().replace("top up,refund", "top up,refnd") + "5,x\n"
    path.write_text(broken)
    for _ in range(2):
        with pytest.raises(DataError, match="too few or too many fields"):
            queue.decide(2, "card")
        assert path.read_text() == broken
    path.unlink()
    with pytest.raises(DataError, match="cannot be read"):
        queue.decide(2, "card")


def test_a_decision_that_cannot_be_saved_is_as_before(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = Queue(run, ROWS)
    queue.decide(2, "card")

    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "sync", full)
    with pytest.raises(ResourceError, match="No space left on device"):
        queue.decide(2, None, delete=True)
    assert decisions(run)[2] == "card"
    assert queue.decisions()[2] == {"label": "card", "delete": False}
    assert [each.name for each in run.glob("*.tmp")] == []


def test_what_cannot_be_decided_is_refused(run: Path, tmp_path: Path) -> None:
    queue = Queue(run, ROWS)
    for row, label, told in ((2, "crad", "no label"), (1, "card", "no longer in")):
        with pytest.raises(DataError, match=told):
            queue.decide(row, label)
    table = Table(["a", "b", "c", "d"], ["delete", "x", "delete", "x"])
    named = Queue(write_run(tmp_path / "named", table, [(1, "x", 0.9)]), table)
    assert not named.can_delete
    with pytest.raises(DataError, match="a label is named delete"):
        named.decide(1, None, delete=True)
    named.decide(1, "delete")
    assert named.summary().num_kept == 1


def test_columns_that_a_person_took_out_are_not_missed(run: Path) -> None:
    (run / RELABEL).write_text("row,text,label,decision\n2,my card is late,refund,\n")
    queue = Queue(run, ROWS)
    assert [(each.row, each.suggested) for each in queue.items] == [(2, None)]
    assert queue.details(2)["p_wrong"] is None
    queue.decide(2, "card")
    assert decisions(run) == {2: "card"}

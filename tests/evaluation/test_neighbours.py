"""The nearest training texts of a run's mistakes: found, kept, and bounded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from remora.data.table import Table
from remora.evaluation import neighbours

TRAIN = Table(
    ["where is my card", "a refund please", "my card is lost", "top up failed", "   "],
    ["card", "refund", "card", "top up", "top up"],
    [10, 11, 12, 13, 14],
)


def test_the_most_alike_come_first_and_strangers_not_at_all() -> None:
    found = neighbours.find(TRAIN, ["where is my new card", "zzz"], [4, 9], seed=0)
    assert (found.num_rows, found.num_all_rows) == (5, 5)
    first, *others = (found.texts[place] for place in found.nearest[4])
    assert (first.row, first.text, first.label) == (11, "where is my card", "card")
    assert others[0].text == "my card is lost"
    assert "top up failed" not in {each.text for each in others}
    assert found.nearest[9] == ()


def test_a_large_table_is_sampled_and_texts_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "MAX_TRAIN_CHARS", 10_000)
    monkeypatch.setattr(neighbours, "MAX_MISTAKES", 2)
    train = Table([f"card number {i} " + "x" * 400 for i in range(100)], ["a", "b"] * 50)
    found = neighbours.find(train, ["card number 7"] * 3, [1, 2, 3], seed=0)
    assert found.num_all_rows == 100
    assert 20 <= found.num_rows <= 25
    assert set(found.nearest) == {1, 2}
    assert all(each.text.startswith(f"card number {each.row - 1} x") for each in found.texts)
    assert {len(each.text) for each in found.texts} == {neighbours.EXCERPT_CHARS + 2}


def test_texts_without_characters_have_no_neighbours() -> None:
    assert neighbours.find(Table([" ", "  "], ["a", "b"]), ["x"], [1], seed=0) == neighbours.NONE
    assert neighbours.find(TRAIN, [], [], seed=0).nearest == {}


def test_what_is_kept_is_read_and_what_is_broken_is_left_out(tmp_path: Path) -> None:
    found = neighbours.find(TRAIN, ["where is my new card"], [4], seed=0)
    assert neighbours.read(tmp_path) == neighbours.NONE
    neighbours.write(tmp_path, found)
    assert neighbours.read(tmp_path) == found
    path = tmp_path / neighbours.FILE
    figures = json.loads(path.read_text())
    for broken in (
        "{",
        "[]",
        "{}",
        json.dumps(figures | {"nearest": {"4": [99]}}),
        json.dumps(figures | {"nearest": {"x": [0]}}),
        json.dumps(figures | {"texts": [{"row": 1}]}),
        json.dumps(figures | {"nearest": [0]}),
    ):
        path.write_text(broken)
        assert neighbours.read(tmp_path) == neighbours.NONE

"""`diagnose --apply` changes labels and nothing else: what reads the source reads its result."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from conftest import call
from remora.config import TrainConfig
from remora.data.dataset import load_data
from remora.data.label_sets import labels_in
from remora.diagnosis import suspect_list
from remora.runtime import files

HELD_OUT = {"validation_fraction": 0.0, "test_fraction": 0.0}


def write_run(folder: Path, data: Path, **settings: Any) -> Path:
    """Write a run directory as far as decisions are applied to its table."""
    config = TrainConfig(str(data), model="nano", **HELD_OUT, **settings)
    run = folder / "run"
    run.mkdir()
    files.write_text(run / "config.toml", config.to_toml())
    files.write_json(run / "data.json", load_data(config).summary.to_dict())
    return run


def applied(run: Path, decisions: Mapping[int, str], **settings: Any) -> list[list[str]]:
    """Apply decisions on rows, from 1, of a run's training table; return the lines of the result.

    What has been written trains with the run's own settings.
    """
    data = TrainConfig.from_toml((run / "config.toml").read_text("utf-8"), run).data
    rows = load_data(TrainConfig(data, model="nano", **HELD_OUT, **settings)).train
    records = [
        [str(row), files.escape_formula(rows.texts[row - 1]), rows.written(rows.labels[row - 1])]
        + [""] * 5
        + [decision]
        for row, decision in decisions.items()
    ]
    sheet = run / "sheet.csv"
    files.write_csv(sheet, suspect_list.COLUMNS, records)
    assert call("diagnose", run, "--apply", sheet) == 0
    cleaned = run / "cleaned.csv"
    again = load_data(TrainConfig(str(cleaned), model="nano", **HELD_OUT, **settings)).train
    expected = [
        decisions.get(row, label).strip() if not rows.multi_label else label
        for row, label in enumerate(rows.labels, 1)
        if decisions.get(row) != "delete"
    ]
    if not rows.multi_label:
        assert again.labels == expected
    kept = [text for row, text in enumerate(rows.texts, 1) if decisions.get(row) != "delete"]
    assert again.texts == kept
    with cleaned.open(encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


def write(path: Path, lines: list[list[str]]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(lines)
    return path


ORDERS = [
    ["id", "subject", "team", "body", "note", "note"],
    ["7", "=late", " card ", "where is it\nplease", "a", "b"],
    ["8", "gone", "refund", "give it back", "", "c, d"],
    ["9", "", "", "nobody labelled this", "e", ""],
    ["10", "again", "card", "still nothing", "f", "g"],
    ["11", "money", "refund", "I want it", '"h"', ""],
]


def test_columns_and_rows_are_those_of_the_source(tmp_path: Path) -> None:
    settings = {"text_column": ("subject", "body"), "label_column": "team"}
    run = write_run(tmp_path, write(tmp_path / "orders.csv", ORDERS), **settings)
    expected = [list(line) for line in ORDERS]
    expected[4][2] = "refund"  # the row before it is skipped, so it is the third
    del expected[2]
    assert applied(run, {2: "delete", 3: "refund"}, **settings) == expected


def test_labels_that_a_run_renames_keep_their_names(tmp_path: Path) -> None:
    lines = [["text", "label"], *([f"message {i}", "ab"[i % 2]] for i in range(6))]
    settings = {"rename_labels": {"a": "apple"}}
    run = write_run(tmp_path, write(tmp_path / "data.csv", lines), **settings)
    expected = [list(line) for line in lines]
    expected[2][1], expected[3][1] = "a", "b"
    assert applied(run, {2: "apple", 3: "b"}, **settings) == expected


def test_tables_of_other_formats_become_csv(tmp_path: Path) -> None:
    columns = {
        "when": [date(2026, 1, day) for day in range(1, 5)],
        "text": ["where is it", "give it back", "still nothing", "a, b"],
        "tags": [["x", "y"], [], None, ["z"]],
        "label": ["card", "refund", "card", "refund"],
    }
    path = tmp_path / "data.parquet"
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    assert applied(write_run(tmp_path, path), {1: "refund"}) == [
        ["when", "text", "tags", "label"],
        ["2026-01-01", "where is it", '["x", "y"]', "refund"],
        ["2026-01-02", "give it back", "[]", "refund"],
        ["2026-01-03", "still nothing", "", "card"],
        ["2026-01-04", "a, b", '["z"]', "refund"],
    ]


def test_shards_become_one_table(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    shards = [
        [{"text": "one", "label": "a", "id": 1}, {"text": "two", "label": "b", "id": 2}],
        [{"id": 3, "label": "a", "text": "three"}, {"label": "b", "text": "four", "id": 4}],
    ]
    for number, records in enumerate(shards):
        with gzip.open(folder / f"train-0000{number}-of-00002.jsonl.gz", "wt") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)
    assert applied(write_run(tmp_path, folder), {3: "b", 2: "delete"}) == [
        ["text", "label", "id"],
        *(["one", "a", "1"], ["three", "b", "3"], ["four", "b", "4"]),
    ]


def test_fields_that_are_left_out_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = [{"text": f"message {i}", "label": "ab"[i % 2]} for i in range(250)]
    records[240]["note"] = "late"
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in records))
    assert applied(write_run(tmp_path, path), {1: "b"})[1] == ["message 0", "b"]
    assert "1 row with a field that the first rows lack, left out" in capsys.readouterr().err


def test_a_chat_becomes_its_text_and_a_column_of_labels(tmp_path: Path) -> None:
    def chat(text: str, label: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": text}, {"role": "assistant", "content": label}]

    chats = [chat("where is it", "card"), chat("give it back", "refund"), chat("nothing", "card")]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps({"id": 1, "messages": each}) + "\n" for each in chats))
    assert applied(write_run(tmp_path, path), {3: "refund"}) == [
        ["id", "text", "label_text"],
        ["1", "where is it", "card"],
        ["1", "give it back", "refund"],
        ["1", "nothing", "refund"],
    ]


@pytest.mark.parametrize("form", ["lists", "text", "columns"])
def test_sets_of_labels_are_written_as_they_were(tmp_path: Path, form: str) -> None:
    settings: dict[str, Any] = {"multi_label": "on", "answer": "classes"}
    sets = [["a", "b"], [], ["b"], ["a"], ["a"]]
    header, cells, changed = ["text", "labels", "id"], [[json.dumps(each)] for each in sets], ["[]"]
    decision = '["b"]'
    if form == "text":
        settings |= {"split_labels_at": "|"}
        cells, decision, changed = [["|".join(each)] for each in sets], "b", ["[]"]
    if form == "columns":
        settings |= {"label_columns": ("a", "b")}
        header = ["text", "a", "b", "id"]
        cells = [[str(name in each) for name in "ab"] for each in sets]
        changed = ["0", "0"]
    lines = [[f"text {i}", *cell, str(i)] for i, cell in enumerate(cells)]
    run = write_run(tmp_path, write(tmp_path / "data.csv", [header, *lines]), **settings)
    found = applied(run, {1: decision, 4: "[]"}, **settings)
    lines[0][1:-1] = ["0", "1"] if form == "columns" else [decision]
    lines[3][1:-1] = changed
    assert found == [header, *lines]
    again = TrainConfig(str(run / "cleaned.csv"), model="nano", **HELD_OUT, **settings)
    found_sets = [labels_in(each) for each in load_data(again).train.labels]
    assert found_sets == [("b",), (), ("b",), (), ("a",)]

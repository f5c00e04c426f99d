"""Rows of JSON: their columns are the fields of the first rows, whichever has them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from remora.data import json_rows
from remora.data.dataset import load_dataset
from remora.data.label_sets import LabelForm
from remora.data.parts import Peek, Remarks
from remora.errors import DataError


def test_fields_that_the_first_json_rows_leave_out(tmp_path: Path) -> None:
    """Many writers leave out what is null, so no single row names all columns."""
    path = tmp_path / "rows.jsonl"
    rows = [{"id": 0, "text": "a card is late", "topic": "x"}]
    rows += [{"id": i, "text": f"text {i}", "label": "ab"[i % 2]} for i in range(1, 31)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    dataset = load_dataset(str(path))
    assert dataset.labels == ("a", "b")
    assert dataset.summary.label_column == "label"
    named = load_dataset(str(path), label_column="label", text_column="text")
    assert named.labels == ("a", "b")
    assert dataset.summary.remarks == (f"{path}: 1 row without a label, skipped; row 1",)


def test_an_empty_file_needs_no_header(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.json"):
        path = tmp_path / name
        path.write_text("", encoding="utf-8")
        with pytest.raises(DataError, match=r"is empty; add rows$"):
            load_dataset(str(path))


def test_an_empty_list_is_no_single_label(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a b", "label": []}\n', encoding="utf-8")
    with pytest.raises(DataError, match="each row needs one label: write it, or leave"):
        load_dataset(str(path), form=LabelForm("off"))


def test_a_pipe_is_asked_for_more_rows_only_if_the_first_lacks_what_is_wanted() -> None:
    def lines(records: list[dict[str, object]], taken: list[int]) -> Iterator[str]:
        for number, record in enumerate(records):
            taken.append(number)
            yield json.dumps(record) + "\n"

    def pick(columns: Sequence[str], peek: Peek) -> list[int]:
        del peek
        if "label" not in columns:
            raise DataError("it has no label column")
        return [columns.index("label")]

    taken: list[int] = []
    records: list[dict[str, object]] = [{"text": "a", "label": "b"}] * 9
    found = json_rows.line_rows(lines(records, taken), "pipe", pick, Remarks(), may_wait=True)
    assert (next(found), taken) == ((1, 1, ["b"]), [0])
    records = [{"text": "a"}, {"text": "a", "label": "b"}]
    found = json_rows.line_rows(lines(records, taken), "pipe", pick, Remarks(), may_wait=True)
    assert [values for _, _, values in found] == [[None], ["b"]]
    records = [{"text": "a"}] * 3
    found = json_rows.line_rows(lines(records, taken), "pipe", pick, Remarks(), may_wait=True)
    with pytest.raises(DataError, match="no label column"):
        next(found)

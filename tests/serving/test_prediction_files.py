"""Parquet holds the input's values as they are, or refuses them by the name of their column."""

from __future__ import annotations

from datetime import date, datetime, timezone
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from remora.errors import DataError
from remora.serving import prediction_files
from remora.serving.prediction_files import ParquetWriter

DAY, HOUR = date(2024, 1, 1), datetime(2024, 1, 2, 7, 30)
NAN = float("nan")


@pytest.fixture(autouse=True)
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the first three rows decide on the types."""
    monkeypatch.setattr(prediction_files, "ROW_GROUP_ROWS", 3)


def written(path: Path, values: list[object], kind: pyarrow.DataType | None = None) -> list[object]:
    """Return the values of a column as Parquet gives them back."""
    schema = None if kind is None else pyarrow.schema([("x", kind)])
    writer = ParquetWriter(path, ["x"], ["label", "probability"], schema)
    for value in values:
        writer.write([value], [("a", 0.5)], "a")
    writer.close()
    found: list[object] = pyarrow.parquet.read_table(path)["x"].to_pylist()
    return found


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ([1, 2, 3, 4.7], "4.7 is no int64, the type of its first rows"),
        ([1, 2, 3, NAN], "nan is no int64"),
        ([1.5, 2.5, 3.5, True], "True is no double"),
        ([1, 2.5, 2**53 + 1], "Integer value 9007199254740993 is outside of the range"),
        ([1, 2, 2**63], "too large"),
        ([1, "a"], "Could not convert 'a'|'a' is no int64"),
        (["a"] * 3 + [b"a"], "b'a' is no string"),
        ([{"a": 1}] * 3 + [{"a": 1, "ticket": "T-1"}], "its first rows lack the field 'ticket'"),
        ([[{"a": 1}]] * 3 + [[{"a": 1, "b": 2}]], "its first rows lack the field 'b'"),
        ([{"a": [1, 2]}] * 3 + [{"a": [1, 2.5]}], "2.5 is no int64"),
        ([[1.5, True]], "True is no double"),
        ([DAY] * 3 + [HOUR], r"2024-01-02 07:30:00 is no date32\[day\]"),
        ([HOUR.replace(tzinfo=timezone.utc)] * 3 + [HOUR], "2024-01-02 07:30:00 is no timestamp"),
        ([{}], "objects without fields"),
        (["\ud83d"], "surrogates not allowed"),
    ],
)
def test_what_parquet_would_alter_is_refused(tmp_path, values, reason):
    with pytest.raises(DataError, match=reason) as told:
        written(tmp_path / "a.parquet", values)
    message = str(told.value)
    assert message.startswith("Parquet cannot hold the column 'x' as it is (")
    assert message.endswith("; end the name of --output with .csv or .jsonl")
    assert "\n" not in message


@pytest.mark.parametrize(
    "values",
    [
        [1, 2.5, None, 3],
        [1, 2, 3, 4.0],
        [1.5, 2.5, 3.5, 2**53],
        [[]] * 3 + [["a"], None],
        [{"a": None, "b": []}] * 3 + [{"a": "x", "b": ["y"]}],
        [None] * 3 + ["a"],
        [[1, None], None, [2]],
    ],
)
def test_values_come_back_from_parquet(tmp_path, values):
    assert written(tmp_path / "a.parquet", values) == values


def test_dates_beside_times_are_midnights(tmp_path):
    midnight = datetime(2024, 1, 1)
    for values in ([DAY, HOUR], [HOUR, DAY], [HOUR] * 3 + [DAY], [None, DAY, HOUR]):
        found = written(tmp_path / "a.parquet", values)
        assert found == [midnight if value == DAY else value for value in values]
    assert written(tmp_path / "a.parquet", [DAY, None]) == [DAY, None]


def test_types_that_a_table_gives_are_kept(tmp_path):
    floats = [[0.1, NAN], None, [-0.0]]
    for list_of in (pyarrow.list_, pyarrow.large_list):
        kind = list_of(pyarrow.float32())
        values = pyarrow.array(floats, kind).to_pylist()
        assert repr(written(tmp_path / "a.parquet", values, kind)) == repr(values)
    pairs = [[("a", NAN)], [("b", 1.5)]]
    kind = pyarrow.map_(pyarrow.string(), pyarrow.float64())
    assert repr(written(tmp_path / "a.parquet", pairs, kind)) == repr(pairs)
    numbers = pyarrow.dictionary(pyarrow.int8(), pyarrow.int64())
    assert written(tmp_path / "a.parquet", [5, 7], numbers) == [5, 7]
    with pytest.raises(DataError, match=r"0\.1 is no float, the type"):
        written(tmp_path / "a.parquet", [0.1], pyarrow.float32())

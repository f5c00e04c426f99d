"""CSV: its delimiter, and spaces around quoted fields."""

from __future__ import annotations

import csv
import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from remora.data import delimited
from remora.data.parts import Remarks


def read(content: str) -> list[list[object]]:
    """Return the rows of CSV, the header among them."""
    header: list[list[object]] = []

    def pick(columns, peek):
        del peek
        header.append(list(columns))
        return list(range(len(columns)))

    lines = iter(content.splitlines(keepends=True))
    rows = [list(v) for _, _, v in delimited.rows(lines, "t", None, (), pick, Remarks())]
    return [*header, *rows]


@pytest.mark.parametrize(
    ("line", "fields"),
    [
        ('a text, "refund"', ["a text", "refund"]),
        ('refund, "a text, yes"', ["refund", "a text, yes"]),
        ('"a" , "b" ', ["a", "b"]),
        ('"see, ","x"', ["see, ", "x"]),
        ('"he said, ""hi"" ", x', ['he said, "hi" ', " x"]),
        ('" ""hi"" there",x', [' "hi" there', "x"]),
        (" plain , text ", [" plain ", " text "]),
        ('a 5" screen, 7" too', ['a 5" screen', ' 7" too']),
        ('a, ""', ["a", ""]),
        ('"Wow" , 5" pipe', ["Wow", ' 5" pipe']),
        ('a, "Wow" she said of a 5" pipe', ["a", ' "Wow" she said of a 5" pipe']),
    ],
)
def test_spaces_around_quoted_fields_hide_no_quotes(line: str, fields: list[str]) -> None:
    assert read(f"text,label\n{line}\n")[1] == fields


def test_a_spaced_field_may_span_lines() -> None:
    rows = read('text,label\n "one\n, ""two"" , three", a\n"x ","y"\n')
    assert rows[1:] == [['one\n, "two" , three', " a"], ["x ", "y"]]


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.lists(st.text(alphabet='a ",;\n', max_size=9), min_size=2, max_size=2), max_size=5)
)
def test_what_csv_writes_is_read_as_it_was(rows: list[list[str]]) -> None:
    rows = [row for row in rows if any(row)]
    out = io.StringIO()
    csv.writer(out, quoting=csv.QUOTE_ALL, lineterminator="\n").writerows(
        [["text", "label"], *rows]
    )
    assert read(out.getvalue())[1:] == rows


@pytest.mark.parametrize(
    ("content", "rows"),
    [
        ('label;"text, long"\na;b\n', [["label", "text, long"], ["a", "b"]]),
        ("text (de, en);label\nb;a\n", [["text (de, en)", "label"], ["b", "a"]]),
        ("text (de; en),label\nb;a\n", None),
        ("text,label\n", [["text", "label"]]),
        ("text;x,label\n", [["text;x", "label"]]),
    ],
)
def test_a_tie_of_delimiters_is_settled_by_the_next_line(content: str, rows: list | None) -> None:
    if rows is None:  # the second line has it otherwise
        assert read(content)[0] == ["text (de", "en),label"]
    else:
        assert read(content) == rows

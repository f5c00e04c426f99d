"""CSV: its delimiter, and spaces around quoted fields."""

from __future__ import annotations

import csv
import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import workbooks
from data.test_table import write
from remora.data import delimited
from remora.data.columns import UnlabelledError
from remora.data.parts import ReadOptions, Remarks
from remora.data.table import Table, read_table, stream_texts
from remora.errors import DataError


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


@pytest.mark.parametrize("delimiter", [",", "\t"])
@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.lists(st.text(alphabet='a ",;\t\n', max_size=9), min_size=2, max_size=2), max_size=5
    )
)
def test_what_csv_writes_is_read_as_it_was(delimiter: str, rows: list[list[str]]) -> None:
    rows = [row for row in rows if any(row)]
    out = io.StringIO()
    csv.writer(out, delimiter=delimiter, quoting=csv.QUOTE_ALL, lineterminator="\n").writerows(
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


@pytest.mark.parametrize("delimiter", [",", "\t"])
def test_a_line_of_spaces_is_a_blank_row(tmp_path, delimiter):
    lines = ["id,text,label", "1,a,x", "   ", " , ", "2,b,y"]
    path = write(tmp_path / "a.csv", "\n".join(lines).replace(",", delimiter))
    remarks = Remarks()
    assert read_table(path, remarks=remarks) == Table(["a", "b"], ["x", "y"])
    assert remarks.lines() == [
        f"{path}: 2 rows with a blank text, skipped; the first is row 2 (line 3)"
    ]


def test_a_header_without_a_name_for_the_names_of_rows(tmp_path):
    rows = [f'"{i}","text, {i}","{"xy"[i % 2]}"' for i in range(9)]
    path = write(tmp_path / "a.csv", "\n".join(['"text","label"', *rows]))
    with pytest.raises(
        DataError, match=r"each row has 3 fields, and the header names 2; add the name"
    ):
        read_table(path)
    path = write(tmp_path / "b.csv", "\n".join(["text,label", "a, b,x", "c,y"]))
    with pytest.raises(DataError, match=r"row 1 .* in double quotes"):
        read_table(path)


@pytest.mark.parametrize("title", ["# made by me", "Report 2024", '"Report, 2024"', "Report\n"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_a_line_above_the_header_is_to_be_deleted(tmp_path, title, delimiter):
    table = "text,label\na b,x\nc d,y\n".replace(",", delimiter)
    path = write(tmp_path / "a.csv", f"{title}\n{table}")
    for named in ({}, {"text_column": "text"}, {"label_column": "label"}):
        with pytest.raises(DataError, match=r"one field in its first line, .*; delete what stands"):
            read_table(path, **named)
    with pytest.raises(DataError, match=r"one field in its first line, .*; delete what stands"):
        stream_texts(str(path))


def test_one_column_of_texts_with_commas_has_no_title(tmp_path):
    path = write(tmp_path / "a.csv", "text\nhello; you\ngood; bye\n")
    assert list(stream_texts(str(path))) == ["hello; you", "good; bye"]
    with pytest.raises(DataError, match="has one column, 'text', and texts and labels need two"):
        read_table(path)
    path = write(tmp_path / "a.csv", "__label__a so\n__label__b hello; you\n__label__a good; bye\n")
    with pytest.raises(DataError, match="has lines of fastText"):
        read_table(path)
    path = write(tmp_path / "b.csv", "remark_of_user\nhello; you\ngood; bye\n")
    with pytest.raises(UnlabelledError):
        read_table(path, trained=("remark_of_user", "label"), known=["x", "y"])


def test_a_first_line_that_columns_were_named_for(tmp_path):
    path = write(tmp_path / "a.csv", "Text, label\na,x\nb,y\n")
    with pytest.raises(DataError, match=r"the names of --columns in its first line; delete that"):
        read_table(path, options=ReadOptions(columns=("text", "label")))
    assert read_table(path, options=ReadOptions(columns=("label", "text"))).texts[0] == " label"
    path = workbooks.write(tmp_path / "a.xlsx", [("Text", " 1"), ("a", "x"), ("b", "y")])
    with pytest.raises(DataError, match=r"the names of --columns in its first row; delete that"):
        read_table(path, options=ReadOptions(columns=("text", "1")), label_column="1")
    assert read_table(path, options=ReadOptions(columns=("label", "text"))).texts[0] == " 1"


@pytest.mark.parametrize("mark", [",", ";", "|"])
def test_a_csv_whose_name_says_tabs_is_told_how_to_be_read(tmp_path, mark):
    path = write(tmp_path / "a.tsv", "id,text,label\n1,a b,x\n\n2,c d,y\n".replace(",", mark))
    for read_it in (read_table, lambda path: stream_texts(str(path))):
        with pytest.raises(DataError, match=r"3 fields each by .*; read it with --input-format cs"):
            read_it(path)
    assert len(read_table(path, options=ReadOptions("csv"))) == 2
    path = write(tmp_path / "b.tsv", "text,label\na\nb,c\n".replace(",", mark))
    with pytest.raises(DataError, match=r"has one column, .* and texts and labels need two"):
        read_table(path)


QUOTED = [["label", "text"], ["x", "Hello 1\nName:\tBob x"], ["y", 'a "b"\r\n\tc\n\nd'], ["x", ""]]


@pytest.mark.parametrize("quoting", [csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_lines_of_a_quoted_field_are_no_rows_where_the_header_is_quoted(quoting, end):
    out = io.StringIO()
    csv.writer(out, delimiter="\t", quoting=quoting, lineterminator=end).writerows(QUOTED * 2)
    assert read(out.getvalue()) == QUOTED * 2
    rows = [["text"], ["one\ntwo"], ["three"]]
    out = io.StringIO()
    csv.writer(out, delimiter="\t", quoting=quoting, lineterminator=end).writerows(rows)
    lines = iter(out.getvalue().splitlines(keepends=True))
    found = delimited.rows(lines, "t", "\t", (), lambda *_: [0], Remarks())
    assert [values for _, _, values in found] == rows[1:]


def test_the_first_row_of_a_quoted_table_without_a_header_may_span_lines():
    lines = iter(['"x"\t"Hello\n', 'Name:\tBob"\n', '"y"\t"b"\n'])
    found = delimited.rows(lines, "t", "\t", ("label", "text"), lambda *_: [0, 1], Remarks())
    assert [values for _, _, values in found] == [["x", "Hello\nName:\tBob"], ["y", "b"]]


def test_a_quote_that_is_never_closed_is_text_below_a_quoted_header_too():
    rows = read('"label"\t"text"\nx\t"Hello\ny\t"b" c\nx\td\n')
    assert rows[1:] == [["x", '"Hello'], ["y", '"b" c'], ["x", "d"]]


def test_the_line_ends_within_a_tab_separated_field_stay():
    assert read('id\ttext\n1\t"one\r\nsecond\r\nthird"\r\n')[1:] == [
        ["1", "one\r\nsecond\r\nthird"]
    ]
    assert read('id\ttext\n1\t"one\nsecond\r\nthird"\n')[1:] == [["1", "one\nsecond\r\nthird"]]

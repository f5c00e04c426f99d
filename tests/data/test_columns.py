"""Text and label columns are found by their usual names, or given."""

from __future__ import annotations

import itertools
import json
import shlex
import shutil
import subprocess

import pytest

import workbooks
from data.test_table import write, write_csv
from remora.data.columns import UnlabelledError
from remora.data.dataset import load_dataset
from remora.data.parts import ReadOptions, Remarks
from remora.data.table import Table, read_table, stream_texts
from remora.errors import ConfigError, DataError


@pytest.mark.parametrize(
    ("header", "places"),
    [
        (["text", "label"], (0, 1)),
        (["label", "text"], (1, 0)),
        (["id", "Message", "Category"], (1, 2)),
        (["label", "label_text", "text"], (2, 1)),  # the name of a class rather than its number
        (["idx", "sentence", "intent"], (1, 2)),
        (["prompt", "completion"], (0, 1)),
        (["content", "text", "topic"], (1, 2)),
        (["words", "label"], (0, 1)),  # of two columns the other one
        (["text", "verdict"], (0, 1)),
        ([" text ", " label"], (0, 1)),
        (["n", "Text", "text", "label"], (1, 3)),
    ],
)
def test_usual_column_names_are_found(tmp_path, header, places):
    cells = [[f"{row}{place}" for place in range(len(header))] for row in range(2)]
    table = read_table(write_csv(tmp_path / "a.csv", cells, header))
    assert table.texts == [row[places[0]] for row in cells]
    assert table.labels == [row[places[1]] for row in cells]


def test_given_names_win(tmp_path):
    path = write_csv(tmp_path / "a.csv", [("t", "l", "x", "y")], ("text", "label", "note", "kind"))
    table = read_table(path, text_column="note", label_column="kind")
    assert table == Table(["x"], ["y"])
    assert read_table(path, text_column="label", label_column="text") == Table(["l"], ["t"])
    assert read_table(path, text_column="label", label_column="kind") == Table(["l"], ["y"])
    assert list(stream_texts(str(path), text_column="note")) == ["x"]
    other = write_csv(tmp_path / "b.csv", [("x", "y", "z")], ("label", "category", "n"))
    assert read_table(other, text_column="label") == Table(["x"], ["y"])
    with pytest.raises(ConfigError, match="'note' is both text and label column"):
        read_table(path, text_column="note", label_column="note")


def test_a_given_column_that_is_not_there(tmp_path):
    path = write_csv(tmp_path / "a.csv", [("a", "x")], ("message", "intent"))
    with pytest.raises(DataError, match=r"no column 'mesage'.*did you mean 'message'"):
        read_table(path, text_column="mesage")
    with pytest.raises(DataError, match=r"no column 'zzz'.*name one with --label-column"):
        read_table(path, label_column="zzz")


def test_several_text_columns_are_read_by_their_names(tmp_path):
    rows = [("1", "Card", "  where is it?", "x"), ("2", "", "a refund", "y"), ("3", "t", " ", "x")]
    path = write_csv(tmp_path / "a.csv", rows, ("id", "title", "body", "label"))
    remarks = Remarks()
    table = read_table(path, text_column=("title", "body"), remarks=remarks)
    texts = ["title: Card\nbody: where is it?", "body: a refund", "title: t"]
    assert table == Table(texts, ["x", "y", "x"])
    assert read_table(path, text_column=["body", "title"]).texts[0] == (
        "body: where is it?\ntitle: Card"
    )
    dataset = load_dataset(str(path), text_column=("title", "body"), test_fraction=0)
    assert dataset.summary.text_columns == ("title", "body")
    assert "text: 'title', 'body', label: 'label'" in dataset.summary.lines()[0]
    blank = write_csv(
        tmp_path / "b.csv", [*rows, ("4", " ", "", "x")], ("id", "title", "body", "l")
    )
    read_table(blank, text_column=("title", "body"), label_column="l", remarks=remarks)
    assert remarks.lines() == [f"{blank}: 1 row with a blank text, skipped; row 4 (line 5)"]
    with pytest.raises(DataError, match=r"no column 'bdy'.*did you mean 'body'"):
        read_table(path, text_column=("title", "bdy"))
    with pytest.raises(ConfigError, match="'label' is both text and label column"):
        read_table(path, text_column=("title", "label"), label_column="label")


def test_the_columns_of_the_training_table_come_first(tmp_path):
    rows = [("a b", "c d", "x", "1"), ("e f", "g h", "y", "2")]
    path = write_csv(tmp_path / "a.csv", rows, ("text", "clean", "label", "kind"))
    trained = ("clean", "kind")
    assert read_table(path, trained=trained) == Table(["c d", "g h"], ["1", "2"])
    assert list(stream_texts(str(path), trained=("clean",))) == ["c d", "g h"]
    assert list(stream_texts(str(path), text_column="text", trained=("clean",))) == ["a b", "e f"]
    assert list(stream_texts(str(path), trained=("gone",))) == ["a b", "e f"]
    with pytest.raises(
        DataError, match=r"no column 'gone', which the model was trained on .*--text-"
    ):
        stream_texts(str(path), trained=("clean", "gone"))
    two = write_csv(tmp_path / "b.csv", [("a", "1"), ("b", "2")], ("clean", "verdict"))
    assert read_table(two, trained=trained, known=["1", "2"]).labels == ["1", "2"]
    with pytest.raises(UnlabelledError, match=r"has no label column 'kind' .*remora predict"):
        read_table(two, trained=trained, known=["x", "y"])


def test_several_columns_of_other_names_stand_for_those_of_training(tmp_path):
    trained = ("title", "body", "label")
    rows = [("a", "b", "x"), ("", "c", "y")]
    texts = ["title: a\nbody: b", "body: c"]

    def read(header, *given, rows=rows):
        path = write_csv(tmp_path / "a.csv", rows, header)
        table = read_table(path, text_column=given, label_column=header[-1], trained=trained)
        assert list(stream_texts(str(path), text_column=given, trained=trained[:-1])) == table.texts
        return table.texts

    assert read(trained) == texts
    assert read(("x1", "x2", "l"), "x1", "x2") == texts
    assert read(("x2", "body", "l"), "body", "x2") == texts
    swapped = [("b", "a", "x"), ("c", "", "y")]
    assert read(("body", "title", "l"), "body", "title", rows=swapped) == texts
    whole = [(text, "x") for text in texts]
    assert read(("text", "l"), "text", rows=whole) == texts
    for given, message in (
        ((), r"no column 'title', which the model was trained on .* in the order of 'title', 'bod"),
        (
            ("c",),
            r"row 1 .*has one text, 'b', and the model was trained on 'title', 'body'; name a",
        ),
        (("a", "c", "d"), r"names 'a', 'c', 'd', and the model was trained on 'title', 'body'; na"),
    ):
        path = write_csv(tmp_path / "b.csv", [("a", "b", "d", "x")], ("a", "c", "d", "label"))
        with pytest.raises(DataError, match=message):
            read_table(path, text_column=given, trained=trained)
        with pytest.raises(DataError, match=message):
            list(stream_texts(str(path), text_column=given, trained=trained[:-1]))
    with pytest.raises(DataError, match="names 'a', 'c', and the model was trained on 'text'; nam"):
        read_table(path, text_column=("a", "c"), trained=("text", "label"))


TALK = ["my parcel came late again", "a fine film about dogs", "send me two more of these please"]
ROWS = [(f"{TALK[i % 3]}, number {i}", ["late", "film", "order"][i % 3]) for i in range(30)]


def advised(error):
    """Return the flags at the end of an error's advice, as a shell reads them."""
    words = shlex.split(str(error.value).partition("; ")[2].rstrip("?"))
    flags: dict[str, list[str]] = {}
    for flag, value in itertools.pairwise(words):
        if flag.startswith("--"):
            flags.setdefault(flag, []).append(value)
    return flags


GOOD_HEADERS = {
    "spam of Kaggle": (("v1", "v2", "", "", ""), lambda i, t, a: (a, t, "", "", "")),
    "a comma too many": (("Ticket", "Dept", ""), lambda i, t, a: (t, a, "")),
    "a question of a form": (
        ("Timestamp", "How would you describe your experience with our service?", "Kind"),
        lambda i, t, a: (f"2024/01/{i + 1:02d} 10:00:00", t, a),
    ),
    "questions of a form": (
        ("Timestamp", "What did you like most about it?", "And what did you like the least?", "n"),
        lambda i, t, a: (f"2024/01/{i + 1:02d} 10:00:00", t, f"{t}, and so on", a),
    ),
    "questions alone": (
        ("How would you describe your stay with us?", "What is the reason for your call today?"),
        lambda i, t, a: (t, a),
    ),
    "a year": (("comment_txt", "topic_name", "2023"), lambda i, t, a: (t, a, 2 * i)),
    "quotes and dollars": (('said "so"', "$kind", "n"), lambda i, t, a: (t, a, i)),
}


@pytest.mark.parametrize("case", GOOD_HEADERS)
def test_an_odd_header_is_no_row(tmp_path, case):
    header, row = GOOD_HEADERS[case]
    cells = [row(i, *each) for i, each in enumerate(ROWS)]
    path = write_csv(tmp_path / "a.csv", cells, header)
    with pytest.raises(DataError, match=r"has no text and no label column.*did you mean") as told:
        read_table(path)
    assert ("'$kind'" in str(told.value)) == ("$kind" in header)  # a shell must not expand it
    flags = advised(told)
    (text,), (label,) = flags["--text-column"], flags["--label-column"]
    table = read_table(path, text_column=text, label_column=label)
    assert table.labels == [label for _, label in ROWS]
    assert all(a.startswith(b) for a, (b, _) in zip(table.texts, ROWS, strict=True))
    with pytest.raises(DataError, match="no column 'zzz'"):
        read_table(path, text_column="zzz", label_column=label)


def test_a_title_above_the_header(tmp_path):
    cells = [("Tickets 2024", "", ""), ("text", "label", "n"), *((*row, "x") for row in ROWS)]
    (header, *rows) = cells
    for path in (
        write_csv(tmp_path / "a.csv", rows, header),
        workbooks.write(tmp_path / "a.xlsx", cells),
    ):
        for given in ({}, {"text_column": "text"}, {"label_column": "label"}):
            with pytest.raises(
                DataError, match=r"names one of its 3 columns in its first line.*delete a title"
            ):
                read_table(path, **given)


HEADERLESS = {
    "Sentiment140": lambda i, t, a: (4 * (i % 2), 1467810 + i, "Mon Apr 6 22:19 PDT 2009", "NO", t),
    "SMS spam": lambda i, t, a: (["ham", "spam"][i % 2], t),
    "emotions": lambda i, t, a: (f"i feel sad {i}" if i % 2 else f"i am so glad {i}", a),
    "a label for each row": lambda i, t, a: (f"{t} and so on", f"label{i}"),
    "scores": lambda i, t, a: (f"{t} and so on", i / 64),
    "a text of one word": lambda i, t, a: (t if i else "ok", a),
}


@pytest.mark.parametrize("case", HEADERLESS)
def test_a_table_without_a_header_is_recognised(tmp_path, case):
    first, *rows = [tuple(map(str, HEADERLESS[case](i, *each))) for i, each in enumerate(ROWS)]
    path = write_csv(tmp_path / "a.csv", rows, first)
    with pytest.raises(DataError, match=r"seems to have no header.*--columns") as told:
        read_table(path)
    (names,) = advised(told)["--columns"]
    assert len(read_table(path, options=ReadOptions(columns=tuple(names.split(","))))) == 30


UNLABELLED = {
    "SST-2": [("index", "text"), *((i, f"good {i}") for i in range(10))],
    "SST-2 of two rows": [("index", "text"), (0, "good"), (1, "bad")],
    "Kaggle": [("id", "text"), (0, "good"), (1, "bad"), (2, "so so")],
    "another number": [("stars", "text"), *((i, f"good {i}") for i in range(10))],
}


@pytest.mark.parametrize("case", UNLABELLED)
def test_keys_are_no_labels(tmp_path, case):
    write_csv(tmp_path / "train.csv", [(text, i % 2) for i, (text, _) in enumerate(ROWS)])
    header, *rows = UNLABELLED[case]
    write_csv(tmp_path / "test.csv", rows, header)
    dataset = load_dataset(str(tmp_path))
    assert any("test.csv has no labels" in line for line in dataset.summary.lines())
    assert set(dataset.test.texts) <= {text for text, _ in ROWS}


def test_of_two_columns_the_other_one_may_have_a_label_of_another_form(tmp_path):
    write_csv(tmp_path / "train.csv", ROWS)
    rows = [*ROWS[:9], ("a word", "LATE")]
    write_csv(tmp_path / "test.csv", rows, ("text", "verdict"))
    assert load_dataset(str(tmp_path), merge_labels=True).test.labels[-2:] == ["order", "late"]
    write_csv(tmp_path / "test.csv", [*rows, ("a word", "fim")], ("text", "verdict"))
    with pytest.raises(DataError, match=r"row 10 .line 11. has the label 'LATE'.*--merge"):
        load_dataset(str(tmp_path))


def test_of_two_columns_a_key_is_neither_text_nor_label(tmp_path):
    cells = [(i, text) for i, (text, _) in enumerate(ROWS)]
    with pytest.raises(DataError, match=r"has no label column.*name it with --label-column"):
        read_table(write_csv(tmp_path / "a.csv", cells, ("id", "text")))
    with pytest.raises(DataError, match="has no text column"):
        read_table(write_csv(tmp_path / "b.csv", cells, ("id", "label")))
    numbers = [(i % 4, text) for i, (text, _) in enumerate(ROWS)]
    path = write_csv(tmp_path / "c.csv", numbers, ("Class Index", "Description"))
    assert read_table(path).labels[:5] == ["0", "1", "2", "3", "0"]


SUGGESTED = {
    "Amazon fine food": (
        lambda i, t, a: {"Numerator": i % 2, "Score": i % 5, "Time": 1303862 + i, "Text": t},
        "--label-column Score",
    ),
    "Women's clothing": (
        lambda i, t, a: {"Age": 20 + i % 9, "Text": t, "Rating": i % 5, "Good": i % 2, "x": i % 2},
        "--label-column Rating",
    ),
    "Prodigy": (
        lambda i, t, a: {"text": t, "options": [{"id": a}], "accept": [a], "answer": "ab"[i % 2]},
        "--label-column accept",
    ),
    "Argilla": (
        lambda i, t, a: {"text": t, "inputs": {"text": t}, "annotation": a, "multi_label": False},
        "--label-column annotation",
    ),
    "an agent": (
        lambda i, t, a: {"text": t, "label_agent": "ab"[i % 2], "gold_label": a, "n": i},
        "--label-column gold_label",
    ),
    "prices": (
        lambda i, t, a: {"text": t, "price": i, "department": "ab"[i % 2], "age": i},
        "--label-column department",
    ),
    "a user's query": (
        lambda i, t, a: {"user": f"u{i}", "utterence": t, "label": a, "n": i},
        "--text-column utterence",
    ),
    "objects as text": (
        lambda i, t, a: {"inputs": {"text": t, "more": t}, "headline": t, "label": a},
        "--text-column headline",
    ),
    "a text and a label of a version": (
        lambda i, t, a: {"v1": a, "v2": t, "n": i},
        "--text-column v2 --label-column v1",
    ),
    "flags beside a number": (
        lambda i, t, a: {"text": t, "class_a": i % 2, "class_b": 0, "n": i},
        "--label-columns class_a,class_b",
    ),
}


@pytest.mark.parametrize("case", SUGGESTED)
def test_a_suggested_column_holds_what_it_is_suggested_for(tmp_path, case):
    record, expected = SUGGESTED[case]
    lines = [json.dumps(record(i, *each)) for i, each in enumerate(ROWS)]
    path = write(tmp_path / "a.jsonl", "\n".join(lines))
    with pytest.raises(DataError) as told:
        read_table(path)
    assert str(told.value).rstrip("?").endswith(f" {expected}")


def test_nothing_is_suggested_where_nothing_fits(tmp_path):
    times = [(text, 1303862 + i, i) for i, (text, _) in enumerate(ROWS)]
    path = write_csv(tmp_path / "a.csv", times, ("text", "time", "topic_no"))
    with pytest.raises(DataError, match=r"; name it with --label-column$"):
        read_table(path)
    records = [
        {"id": i, "text": text, "annotations": [{"label": i % 2}]}
        for i, (text, _) in enumerate(ROWS)
    ]
    path = write(tmp_path / "b.jsonl", "\n".join(map(json.dumps, records)))
    with pytest.raises(DataError, match=r"in place of the objects in 'annotations'$"):
        read_table(path)


FASTTEXT = {
    "one label": ("__label__a", "a"),
    "two labels": ("__label__a __label__b", "a|b"),
}


@pytest.mark.parametrize("case", FASTTEXT)
def test_lines_of_fasttext_are_told_with_a_command_that_works(tmp_path, case):
    written, label = FASTTEXT[case]
    lines = [
        f"{written} {text}" if i % 2 else f"__label__c {text}" for i, (text, _) in enumerate(ROWS)
    ]
    path = write(tmp_path / "a.txt", "\n".join(lines) + "\n")
    for options in (ReadOptions("csv"), ReadOptions("tsv"), ReadOptions("tsv", ("text",))):
        for given in ({}, {"label_column": "label"}):
            with pytest.raises(DataError, match="has lines of fastText, such as '__label") as told:
                read_table(path, options=options, **given)
    if shutil.which("awk") is None:
        pytest.skip("needs awk")
    words = shlex.split(str(told.value))
    program = words[words.index("awk") + 1]
    rows = subprocess.run(["awk", program, path], check=True, capture_output=True, text=True)
    table = read_table(
        write(tmp_path / "a.tsv", rows.stdout), options=ReadOptions("tsv", ("label", "text"))
    )
    assert table == Table([t for t, _ in ROWS], ["c" if i % 2 == 0 else label for i in range(30)])
    assert str(told.value).endswith("--split-labels-at '|'") == ("|" in label)


def test_one_column_is_not_enough(tmp_path):
    for header in ("text::label", "text", f"{ROWS[0][0]} :: {ROWS[0][1]}"):
        cells = [(f"{text.replace(',', '')} :: {label}",) for text, label in ROWS]
        path = write_csv(tmp_path / "a.csv", cells, (header.replace(",", ""),))
        with pytest.raises(
            DataError, match=r"has one column, '.*', and texts and labels need two; write them as"
        ):
            read_table(path)


def chats(name, **more):
    return [
        {
            name: [{"from": "human", "value": text}, {"from": "gpt", "value": label}],
            **{key: value[i % len(value)] for key, value in more.items()},
        }
        for i, (text, label) in enumerate(ROWS)
    ]


def write_json(path, records):
    return write(path, "\n".join(map(json.dumps, records)))


@pytest.mark.parametrize("name", ["messages", "conversations", "chat", "dialog", "Verlauf"])
def test_a_column_that_holds_chats_is_taken_as_chats(tmp_path, name):
    expected = Table([text for text, _ in ROWS], [label for _, label in ROWS])
    for more in ({}, {"n": "12"}, {"n": "12", "source": "ab"}):
        path = write_json(tmp_path / "a.jsonl", chats(name, **more))
        assert read_table(path) == expected
        assert read_table(path, text_column=name) == expected
        assert read_table(path, text_column=name, label_column=name) == expected
        assert list(stream_texts(str(path))) == expected.texts
        known = {"trained": (name, name), "known": ["late", "film", "order"]}
        assert read_table(path, **known) == expected
    labelled = write_json(tmp_path / "b.jsonl", chats(name, label="xy", n="12"))
    assert read_table(labelled, text_column=name).labels[:3] == ["x", "y", "x"]
    with pytest.raises(ConfigError, match="'label' is both text and label column"):
        read_table(labelled, text_column="label", label_column="label")


def test_a_label_column_beside_chats_has_the_labels(tmp_path):
    for name in ("messages", "conversations"):
        for more in ({}, {"n": "12"}):
            records = chats(name, label="xy", **more)
            for each in (records, [{**each, name: each[name][:1]} for each in records]):
                table = read_table(write_json(tmp_path / "a.jsonl", each))
                assert table == Table([text for text, _ in ROWS], ["x", "y"] * 15)


def test_the_parts_of_a_message_are_its_text_where_there_is_one(tmp_path):
    for key, asker, answerer, part in (
        ("parts", "user", "model", lambda text: {"text": text}),
        ("parts", "user", "model", lambda text: text),
        ("content", "user", "assistant", lambda text: {"type": "text", "text": text}),
    ):
        records = [
            {"contents": [{"role": asker, key: [part(a)]}, {"role": answerer, key: [part(b)]}]}
            for a, b in ROWS
        ]
        table = read_table(write_json(tmp_path / "a.jsonl", records))
        assert table == Table([text for text, _ in ROWS], [label for _, label in ROWS])
    for content, found in (
        ({"says": "x"}, "no content"),
        ({"content": None}, "no content"),
        ({"content": []}, "no content"),
        ({"content": [{"type": "image", "image": "x"}]}, "no content"),
        ({"content": [{"text": "x"}, {"text": "y"}]}, "2 parts"),
    ):
        turns = [{"role": "user", **content}, {"role": "assistant", "content": "b"}]
        path = write_json(tmp_path / "b.jsonl", [{"messages": turns}] * 2)
        with pytest.raises(
            DataError, match=f"row 1 has a chat whose message of the user has {found}; write"
        ):
            read_table(path)


def test_lines_of_text_for_a_model_of_several_columns(tmp_path):
    path = write(tmp_path / "a.txt", "where is it?\n")
    with pytest.raises(
        DataError, match=r"lines of text, .* 'title', 'body'; give a table .* --input-format csv"
    ):
        stream_texts(str(path), trained=("title", "body"))


def test_what_is_no_chat_is_not_taken_as_one(tmp_path):
    path = write_csv(tmp_path / "a.csv", ROWS, ("messages", "label"))
    assert read_table(path) == Table([text for text, _ in ROWS], [label for _, label in ROWS])
    both = [{"chosen": a["chosen"], "rejected": a["chosen"]} for a in chats("chosen")]
    with pytest.raises(DataError, match="no text and no label column"):
        read_table(write_json(tmp_path / "b.jsonl", both))
    spans = [{"spans": [{"from": 0, "to": 5, "label": "x"}]}] * 3
    with pytest.raises(DataError, match=r"has one column, 'spans', and texts and labels need two"):
        read_table(write_json(tmp_path / "c.jsonl", spans))


def test_a_broken_row_is_told_once_the_columns_are_right(tmp_path):
    lines = [*map(json.dumps, chats("conversations")), "{"]
    path = write(tmp_path / "a.jsonl", "\n".join(lines))
    for given in ({}, {"text_column": "conversations"}):
        with pytest.raises(DataError, match="row 31 is not valid JSON"):
            read_table(path, **given)
    rows = "\n".join(f'"{text}",{label},x' for text, label in ROWS)
    path = write(tmp_path / "b.csv", f"text,kind,n\n{rows}\na,b\n")
    with pytest.raises(DataError, match="has no label column"):
        read_table(path)
    path = write(tmp_path / "c.csv", f"text,kind\n{rows.replace(',x', '')}\na\n")
    with pytest.raises(DataError, match=r"row 31 .line 32. has 1 field"):
        read_table(path)

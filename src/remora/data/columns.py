"""The choice of a table's text and label columns: given, by their usual names, or suggested.

Columns are never chosen by what they hold, since a wrong guess costs a training run. What they hold
decides what an error suggests.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from remora.data.contents import Contents
from remora.data.parts import Peek
from remora.errors import ConfigError, DataError
from remora.formatting import close_match, listed, quote

# The usual column names, the preferred first.
TEXT_NAMES = (
    *("text", "message", "sentence", "utterance", "content", "query", "review", "question"),
    *("document", "body", "comment", "tweet", "sms", "request", "description", "input", "prompt"),
)
LABEL_NAMES = (
    *("label_text", "label_name", "label", "labels", "category", "intent", "class", "target"),
    *("sentiment", "topic", "tag", "output", "completion"),
)
CHAT_NAME = "messages"
"""A column of chats, from which both the text and the label come."""

MAX_SUGGESTED_NAME = 60
"""Characters of the longest name that an error asks to type."""


class UnlabelledError(DataError):
    """A table has texts and no labels."""


def choose(
    name: str,
    text_columns: Sequence[str],
    label_column: str | Sequence[str] | None,
    columns: Sequence[str],
    peek: Peek = list,
    trained: Sequence[str] = (),
    known: Collection[str] | None = None,
) -> list[int]:
    """Return the indices of the text columns, and those of the label columns last.

    Args:
        name: Of the table, for messages.
        text_columns: Names that were given; none to find one.
        label_column: The name that was given, or those of columns of 0 and 1; None to find it.
        columns: The names of the table's columns.
        peek: Returns the first rows.
        trained: The names in the training table, the label last: they come before the usual ones,
            and a table that has its texts but not its label has no labels.
        known: The labels of the training table; another column of two is one of labels if it has
            some of them.

    Raises:
        ConfigError: A column is to be both.
        DataError: A column is missing or ambiguous.
        UnlabelledError: The table has the texts, and no label.
    """
    if trained and not text_columns and set(trained[:-1]) <= set(columns):
        text_columns = trained[:-1]
    text = [_given(name, "text", each, columns, peek) for each in text_columns]
    if label_column is not None and not isinstance(label_column, str):
        return _with_flags(name, text, label_column, columns, peek, trained)
    label: int | None = None
    if label_column is not None and not (trained and label_column not in columns and text):
        label = _given(name, "label", label_column, columns, peek)
    elif trained and label_column is None and trained[-1] in columns:
        label = _only(name, trained[-1], columns)
    if not text and (found := _usual(name, TEXT_NAMES, columns, label)) is not None:
        text = [found]
    if not text and label is None and CHAT_NAME in columns:
        return [columns.index(CHAT_NAME)] * 2
    if label is None and label_column is None:
        label = _usual(name, LABEL_NAMES, columns, text[0] if len(text) == 1 else None)
    if len(columns) == 2:
        text, label = _both(text, label, peek if trained else None, known)
    if label is None and trained and text:
        raise UnlabelledError(
            f"{name} has no label column {quote(trained[-1])} (found {listed(columns)});"
            " name it with --label-column, or classify the table with `remora predict`"
        )
    if not text or label is None:
        missing = [*(() if text else ("text",)), *(("label",) if label is None else ())]
        found_places = [*text, *(() if label is None else (label,))]
        raise _missing_columns(name, missing, columns, peek, found_places)
    if label in text:
        raise ConfigError(
            f"column {quote(columns[label])} is both text and label column;"
            " give different columns with --text-column and --label-column"
        )
    return [*text, label]


def _with_flags(
    name: str,
    text: list[int],
    flags: Sequence[str],
    columns: Sequence[str],
    peek: Peek,
    trained: Sequence[str],
) -> list[int]:
    """Return the columns of the texts and those of 0 and 1, one for each label."""
    if trained and not {*flags} & {*columns}:
        raise UnlabelledError(
            f"{name} has none of the label columns {listed(flags)}; add them, or classify the "
            "table with `remora predict`"
        )
    labels = [_given(name, "label", each, columns, peek) for each in flags]
    if not text:
        others = [each for each in columns if each not in flags]
        text = (
            [columns.index(others[0])] if len(others) == 1 else choose_text(name, (), columns, peek)
        )
    if both := {*text} & {*labels}:
        raise ConfigError(
            f"column {quote(columns[min(both)])} is both text and label column;"
            " give different columns with --text-column and --label-columns"
        )
    return [*text, *labels]


def _both(
    text: list[int], label: int | None, peek: Peek | None, known: Collection[str] | None
) -> tuple[list[int], int | None]:
    """Return the columns of a table of two: if one is known, so is the other.

    Beside a training table, the other column is one of labels only if it has some of them.
    """
    if not text and label is not None:
        return [1 - label], label
    if label is None and len(text) == 1:
        other = 1 - text[0]
        cells = {str(row[other]).strip() for row in peek()} if peek else set()
        return text, other if peek is None or cells & {*(known or ())} else None
    return text, label


def choose_text(
    name: str,
    text_columns: Sequence[str],
    columns: Sequence[str],
    peek: Peek = list,
    trained: Sequence[str] = (),
) -> list[int]:
    """Return the indices of the text columns.

    Args:
        name: Of the table, for messages.
        text_columns: Names that were given; none to find one.
        columns: The names of the table's columns.
        peek: Returns the first rows.
        trained: The names in the training table, which come before the usual ones.

    Raises:
        DataError: A column is missing or ambiguous.
    """
    if trained and not text_columns and set(trained) <= set(columns):
        text_columns = trained
    if text_columns:
        return [_given(name, "text", each, columns, peek) for each in text_columns]
    if len(trained) > 1:
        lacking = [each for each in trained if each not in columns]
        raise DataError(
            f"{name} has no column {quote(lacking[0])}, which the model was trained on (found"
            f" {listed(columns)}); name the text columns with --text-column, in the order of"
            f" {listed(trained)}"
        )
    if CHAT_NAME in columns and not {*TEXT_NAMES} & {each.casefold() for each in columns}:
        return [columns.index(CHAT_NAME)]
    text = _usual(name, TEXT_NAMES, columns, None)
    if text is None:
        raise _missing_columns(name, ["text"], columns, peek, [])
    return [text]


def joined(names: Sequence[str], texts: Sequence[str]) -> str:
    """Return the text of several columns as the model reads it: a line for each, by its name.

    The text of a single column stays as it is; a blank one among several is left out.
    """
    if len(names) == 1:
        return texts[0]
    pairs = zip(names, texts, strict=True)
    return "\n".join(f"{name}: {text.strip()}" for name, text in pairs if text.strip())


def _given(name: str, kind: str, column: str, columns: Sequence[str], peek: Peek) -> int:
    if column not in columns:
        close = close_match(column, columns)
        contents = _contents(columns, peek)
        if not close and contents.lacks_header:
            raise _headerless(name, columns, contents)
        raise DataError(
            f"{name} has no column {quote(column)} (found {listed(columns)}); "
            + (f"did you mean {quote(close)}?" if close else f"name one with --{kind}-column")
        )
    return _only(name, column, columns)


def _usual(
    name: str, usual: Sequence[str], columns: Sequence[str], taken: int | None
) -> int | None:
    lowered = {column.casefold(): column for column in reversed(columns)}
    for candidate in usual:
        if candidate in lowered:
            place = _only(name, lowered[candidate], columns)
            if place != taken:
                return place
    return None


def _only(name: str, column: str, columns: Sequence[str]) -> int:
    if (count := columns.count(column)) > 1:
        raise DataError(f"{name} has {count} columns called {quote(column)}; rename all but one")
    return columns.index(column)


def _contents(columns: Sequence[str], peek: Peek) -> Contents:
    try:
        return Contents(columns, peek())
    except DataError:  # of a broken row, told once the columns are right
        return Contents(columns, [])


def _missing_columns(
    name: str, missing: Sequence[str], columns: Sequence[str], peek: Peek, known: Sequence[int]
) -> DataError:
    """Return the error of columns that were not found, with what would mend it."""
    contents = _contents(columns, peek)
    if contents.lacks_header and not known:
        return _headerless(name, columns, contents)
    kind = missing[0]
    found = (
        f"{name} has no {' and no '.join(missing)} column: found {listed(columns)}, expected one of"
        f" {', '.join((TEXT_NAMES if kind == 'text' else LABEL_NAMES)[:8])}"
    )
    binary = [columns[place] for place in contents.binary]
    if "label" in missing and len(binary) > 1:
        return DataError(
            f"{found}; are the columns of 0 and 1 ({listed(binary)}) its labels? Then name them"
            f" with --label-columns {','.join(map(_argument, binary))}"
        )
    suggested = _suggested(contents, missing, columns, known)
    if not suggested:
        return DataError(
            f"{found}; name {'them' if len(missing) > 1 else 'it'} with "
            + " and ".join(f"--{each}-column" for each in missing)
        )
    flags_text = " ".join(f"--{each}-column {_argument(column)}" for each, column in suggested)
    return DataError(f"{found}; did you mean {flags_text}?")


def _suggested(
    contents: Contents, missing: Sequence[str], columns: Sequence[str], known: Sequence[int]
) -> list[tuple[str, str]]:
    """Return what to name for each missing column, none if there is no good guess for one."""
    taken, suggested = list(known), []
    for kind in missing:
        free = [place for place in range(len(columns)) if place not in taken]
        usual = TEXT_NAMES if kind == "text" else LABEL_NAMES
        others = [c for c in columns if c.casefold() not in (*TEXT_NAMES, *LABEL_NAMES)]
        close = [p for p in free if columns[p] in others]
        close = [p for p in close if close_match(columns[p].casefold(), usual)]
        best = contents.text(free, close) if kind == "text" else contents.label(free, close)
        if best is None or len(columns[best]) > MAX_SUGGESTED_NAME:
            return []
        places = [best]
        if kind == "text":
            places += [p for p in free if _are_a_pair(columns[best], columns[p])]
        taken += places
        suggested += [(kind, columns[place]) for place in sorted(places)]
    return suggested


def _are_a_pair(one: str, other: str) -> bool:
    """Whether two columns of texts belong together by name, as sentence1 and sentence2 do."""
    first, second = sorted((one.casefold(), other.casefold()))
    ends = {first[-1:], second[-1:]}
    numbered = first[:-1] == second[:-1] != "" and ends in ({"1", "2"}, {"a", "b"})
    return numbered or (first, second) == ("hypothesis", "premise")


def _headerless(name: str, columns: Sequence[str], contents: Contents) -> DataError:
    text = contents.text(range(len(columns)), [])
    others = [place for place in range(len(columns)) if place != text]
    label = contents.label(others, [])
    names = [
        "text" if place == text else "label" if place == label else f"column{place + 1}"
        for place in range(len(columns))
    ]
    return DataError(
        f"{name} seems to have no header, its first line is {listed(columns)};"
        f" add one, or name the columns with --columns {','.join(names)}"
    )


def _argument(column: str) -> str:
    """Return a column's name as it is written on a command line, on one line."""
    if column and all(c.isalnum() or c in "_.-" for c in column):
        return column
    return f'"{column}"' if column.isprintable() and '"' not in column else repr(column)

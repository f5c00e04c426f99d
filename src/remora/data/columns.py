"""The choice of a table's text and label columns: given, by their usual names, or suggested.

Columns are never chosen by what they hold, since a wrong guess costs a training run; chats alone
cannot be taken for anything else. What columns hold decides what an error suggests.
"""

from __future__ import annotations

import shlex
from collections.abc import Collection, Sequence
from difflib import get_close_matches

from remora.data.contents import Contents, is_key, words
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
CHAT_NAMES = ("messages", "conversations", "conversation", "chat", "dialog", "dialogue")
"""Of columns of chats, from which both the text and the label come, where there are several."""
LIKELY_LABEL_NAMES = (
    *LABEL_NAMES,
    *("annotation", "accept", "rating", "score", "emotion", "polarity"),
)
"""Names that an error suggests; the last ones stand for other things too often to be taken."""

MAX_SUGGESTED_NAME = 60
"""Characters of the longest name that an error asks to type."""
MIN_LIKENESS = 0.8
"""Least similarity of a word that resembles a usual name, by difflib."""

_FASTTEXT_TO_TSV = (
    r"""awk '{sub(/^__label__/, ""); gsub(/[ \t]+__label__/, "|"); sub(/[ \t]+/, "\t"); print}'"""
)


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
        known: The labels of the training table; another column of two is one of labels if nearly
            all of its own are among them.

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
    label = _named_label(name, label_column, columns, peek, trained, has_text=bool(text))
    if not text and (found := _usual(name, TEXT_NAMES, columns, label)) is not None:
        text = [found]
    if label is None and label_column is None:
        label = _usual(name, LABEL_NAMES, columns, text[0] if len(text) == 1 else None)
    if (chat := _chat(text, label, columns, peek, trained)) is not None:
        return [chat, chat if label is None else label]
    places = [*text, *(() if label is None else (label,))]
    if len(columns) == 2 and len(places) == 1:
        text, label = _both(text, label, columns, peek, (known or ()) if trained else None)
    if label is None and trained and text:
        raise UnlabelledError(
            f"{name} has no label column {quote(trained[-1])} (found {listed(columns)});"
            " name it with --label-column, or classify the table with `remora predict`"
        )
    if not text or label is None:
        missing = [*(() if text else ("text",)), *(("label",) if label is None else ())]
        raise _missing_columns(name, missing, columns, peek, places)
    if label in text:
        raise ConfigError(
            f"column {quote(columns[label])} is both text and label column;"
            " give different columns with --text-column and --label-column"
        )
    return [*text, label]


def _named_label(
    name: str,
    label_column: str | None,
    columns: Sequence[str],
    peek: Peek,
    trained: Sequence[str],
    *,
    has_text: bool,
) -> int | None:
    """Return the label column that was given, or is that of the training table."""
    if label_column is not None and (
        not trained or not has_text or _is_among(label_column, columns)
    ):
        return _given(name, "label", label_column, columns, peek)
    if trained and label_column is None and trained[-1] in columns:
        return _only(name, trained[-1], columns)
    return None


def _with_flags(
    name: str,
    text: list[int],
    flags: Sequence[str],
    columns: Sequence[str],
    peek: Peek,
    trained: Sequence[str],
) -> list[int]:
    """Return the columns of the texts and those of 0 and 1, one for each label."""
    if trained and not any(_is_among(each, columns) for each in flags):
        raise UnlabelledError(
            f"{name} has none of the label columns {listed(flags)}; add them, or classify the "
            "table with `remora predict`"
        )
    labels = [_given(name, "label", each, columns, peek) for each in flags]
    if not text:
        others = [place for place in range(len(columns)) if place not in labels]
        text = others if len(others) == 1 else choose_text(name, (), columns, peek)
    if both := {*text} & {*labels}:
        raise ConfigError(
            f"column {quote(columns[min(both)])} is both text and label column;"
            " give different columns with --text-column and --label-columns"
        )
    return [*text, *labels]


def _chat(
    text: Sequence[int],
    label: int | None,
    columns: Sequence[str],
    peek: Peek,
    trained: Sequence[str] = (),
) -> int | None:
    """Return the column of chats, from which the text comes, and the label where none is known.

    It is the column of texts, or the only one that holds chats, or one of them with a usual name.
    """
    if text:
        has_labels = label not in {None, text[0]} or (trained and trained[-1] not in trained[:-1])
        if len(text) > 1 or has_labels:
            return None
        # Of two columns the other one may be taken yet, which a broken row must not pass over
        contents = Contents(columns, peek()) if len(columns) == 2 else _contents(columns, peek)
        return text[0] if text[0] in contents.chats else None
    if label is not None and len(columns) == 2:  # the other one is the text in any case
        return None
    chats = _contents(columns, peek).chats
    named = [columns.index(each) for each in CHAT_NAMES if each in columns]
    return chats[0] if len(chats) == 1 else next((each for each in named if each in chats), None)


def _both(
    text: list[int],
    label: int | None,
    columns: Sequence[str],
    peek: Peek,
    known: Collection[str] | None,
) -> tuple[list[int], int | None]:
    """Return the columns of a table of two, of which one is known: the other is the other.

    It is not if its name is one of keys or, beside a training table, if it has other labels.
    """
    other = 1 - (text[0] if label is None else label)
    if is_key(columns[other]) and not _likenesses("label", columns)[other]:
        return text, label
    if label is not None:
        return [other], label
    if known is not None and not Contents(columns, peek()).holds_known(other, known):
        return text, None
    return text, other


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
        if list(columns) == ["text"] and not peek():  # one text a line, or a table of no rows
            raise DataError(
                f"{name} has lines of text, and the model was trained on the columns"
                f" {listed(trained)}; give a table with these columns, with --input-format csv"
            )
        raise DataError(
            f"{name} has no column {quote(lacking[0])}, which the model was trained on (found"
            f" {listed(columns)}); name the text columns with --text-column, in the order of"
            f" {listed(trained)}"
        )
    text = _usual(name, TEXT_NAMES, columns, None)
    if text is None:
        text = _chat((), None, columns, peek)
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


def has_names(text: str, names: Sequence[str]) -> bool:
    """Return whether a text may be one of several columns as `joined` writes it."""
    return len(names) < 2 or text.startswith(tuple(f"{name}: " for name in names))


def _given(name: str, kind: str, column: str, columns: Sequence[str], peek: Peek) -> int:
    if column not in columns:
        column, columns = _folded(column), [*map(_folded, columns)]
    if column not in columns:
        close = close_match(column, columns)
        fault = _first_line(name, columns, _contents(columns, peek), labelled=kind == "label")
        if fault and not close:
            raise fault
        raise DataError(
            f"{name} has no column {quote(column)} (found {listed(columns)}); "
            + (f"did you mean {quote(close)}?" if close else f"name one with --{kind}-column")
        )
    return _only(name, column, columns)


def _is_among(column: str, columns: Sequence[str]) -> bool:
    return _folded(column) in map(_folded, columns)


def _folded(column: str) -> str:
    """Return a name on one line, as it can be typed: workbooks break names as they do texts."""
    return " ".join("".join(c if c.isprintable() else " " for c in column).split())


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
    labelled = "label" in missing
    fault = _first_line(name, columns, contents, labelled=labelled)
    if fault and (not known or len(columns) == 1):
        return fault
    if labelled and len(columns) == 1:
        return _one_column(name, columns[0])
    kind = missing[0]
    found = (
        f"{name} has no {' and no '.join(missing)} column: found {listed(columns)}, expected one of"
        f" {', '.join((TEXT_NAMES if kind == 'text' else LABEL_NAMES)[:8])}"
    )
    binary = [columns[place] for place in contents.binary if columns[place]]
    if labelled and len(binary) > 1 and not _has_likely(contents, columns, known):
        return DataError(
            f"{found}; are the columns of 0 and 1 ({listed(binary)}) its labels? Then name them"
            f" with {_flag('label-columns', ','.join(map(_in_list, binary)))}"
        )
    suggested = _suggested(contents, missing, columns, known)
    objects = [p for p in contents.objects if p not in (*known, *contents.chats)]
    plain = [p for p in _nameable(columns, [*known, *objects]) if not is_key(columns[p])]
    if objects and len(plain) < len(missing):
        return DataError(
            f"{found}; write a column of strings or numbers in place of the objects in"
            f" {listed([columns[p] for p in objects])}"
        )
    if not suggested:
        return DataError(
            f"{found}; name {'them' if len(missing) > 1 else 'it'} with "
            + " and ".join(f"--{each}-column" for each in missing)
        )
    flags_text = " ".join(_flag(f"{each}-column", column) for each, column in suggested)
    return DataError(f"{found}; did you mean {flags_text}?")


def _suggested(
    contents: Contents, missing: Sequence[str], columns: Sequence[str], known: Sequence[int]
) -> list[tuple[str, str]]:
    """Return what to name for each missing column, none if there is no good guess for one."""
    taken, suggested = list(known), []
    for kind in missing:
        free = _nameable(columns, taken)
        choice = contents.text if kind == "text" else contents.label
        best = choice(free, _likenesses(kind, columns))
        if best is None or len(columns[best]) > MAX_SUGGESTED_NAME:
            return []
        places = [best]
        if kind == "text":
            pair = [p for p in free if _are_a_pair(columns[best], columns[p])]
            places += [p for p in pair if contents.text([best, p], {p: 1}) == p]
        taken += places
        suggested += [(kind, columns[place]) for place in sorted(places)]
    return suggested


def _nameable(columns: Sequence[str], taken: Sequence[int]) -> list[int]:
    """Return the places of other columns that a flag can name: by a name of their own."""
    return [
        place
        for place, column in enumerate(columns)
        if place not in taken and column and columns.count(column) == 1
    ]


def _has_likely(contents: Contents, columns: Sequence[str], known: Sequence[int]) -> bool:
    """Whether a column that holds labels, and not just 0 and 1, is called so."""
    likeness = _likenesses("label", columns)
    best = contents.label(_nameable(columns, known), likeness)
    return best is not None and likeness[best] > 0 and best not in contents.binary


def _likenesses(kind: str, columns: Sequence[str]) -> dict[int, int]:
    """Return how much each name resembles a usual one: 2 by its last word, 1 by another one."""
    usual = TEXT_NAMES if kind == "text" else LIKELY_LABEL_NAMES
    likenesses = {}
    for place, column in enumerate(columns):
        lowered = column.casefold()
        alike = [False] + [_is_close(word, usual) for word in words(column)]
        if lowered in (*TEXT_NAMES, *LABEL_NAMES):  # of its own kind it would have been found
            alike = [False]
        elif _is_close(lowered, usual):
            alike = [True]
        likenesses[place] = 2 if alike[-1] else int(any(alike))
    return likenesses


def _is_close(word: str, usual: Sequence[str]) -> bool:
    return bool(get_close_matches(word, usual, n=1, cutoff=MIN_LIKENESS))


def _are_a_pair(one: str, other: str) -> bool:
    """Whether two columns of texts belong together by name, as sentence1 and sentence2 do."""
    first, second = sorted((one.casefold(), other.casefold()))
    ends = {first[-1:], second[-1:]}
    numbered = first[:-1] == second[:-1] != "" and ends in ({"1", "2"}, {"a", "b"})
    return numbered or (first, second) == ("hypothesis", "premise")


def _first_line(
    name: str, columns: Sequence[str], contents: Contents, *, labelled: bool
) -> DataError | None:
    """Return the error of a first line that does not name the columns, None if it seems to."""
    if lines := contents.fasttext_lines:
        several = any(line.split()[1].startswith("__label__") for line in lines)
        return DataError(
            f"{name} has lines of fastText, such as {quote(lines[0])}; write each as label, tab and"
            f" text, as {_FASTTEXT_TO_TSV} does, and read that with --input-format tsv --columns"
            " label,text" + (" --split-labels-at '|'" if several else "")
        )
    if contents.has_title:
        return DataError(
            f"{name} names one of its {len(columns)} columns in its first line, {listed(columns)};"
            " name all there, and delete a title above them"
        )
    if not contents.lacks_header:
        return None
    if labelled and len(columns) == 1:
        return _one_column(name, columns[0])
    return _headerless(name, columns, contents)


def _one_column(name: str, column: str) -> DataError:
    return DataError(
        f"{name} has one column, {quote(column)}, and texts and labels need two; write them as two"
        " columns"
    )


def _headerless(name: str, columns: Sequence[str], contents: Contents) -> DataError:
    text = contents.text(range(len(columns)), {})
    others = [place for place in range(len(columns)) if place != text]
    label = contents.label(others, {})
    names = [
        "text" if place == text else "label" if place == label else f"column{place + 1}"
        for place in range(len(columns))
    ]
    return DataError(
        f"{name} seems to have no header, its first line is {listed(columns)};"
        f" add one, or name the columns with --columns {','.join(names)}"
    )


def _in_list(column: str) -> str:
    """Return a column's name as it is written among others, separated by commas."""
    return '"' + column.replace('"', '""') + '"' if {*column} & {*',"'} else column


def _flag(flag: str, value: str) -> str:
    """Return a flag and its value as they are written on a command line, on one line."""
    value = _folded(value)
    between = "=" if value.startswith("-") else " "  # as a word of its own it would be a flag
    if not value or not all(c.isalnum() or c in "_.-," for c in value):
        value = shlex.quote(value) if {*value} & {*'"$`\\!'} else f'"{value}"'
    return f"--{flag}{between}{value}"

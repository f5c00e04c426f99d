"""The choice of a table's text and label columns."""

from __future__ import annotations

from collections.abc import Sequence

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


def choose(
    name: str, text_column: str | None, label_column: str | None, columns: Sequence[str]
) -> list[int]:
    """Return the indices of the text column and of the label column."""
    text = None if text_column is None else _given(name, "text", text_column, columns)
    label = None if label_column is None else _given(name, "label", label_column, columns)
    if text is None:
        text = _usual(name, TEXT_NAMES, columns, label)
    if label is None:
        label = _usual(name, LABEL_NAMES, columns, text)
    if len(columns) == 2:  # if one is known, so is the other
        if text is None and label is not None:
            text = 1 - label
        elif label is None and text is not None:
            label = 1 - text
    if text is None:
        raise _missing_column(name, "text", TEXT_NAMES, columns)
    if label is None:
        raise _missing_column(name, "label", LABEL_NAMES, columns)
    if text == label:
        raise ConfigError(
            f"column {quote(columns[text])} is both text and label column;"
            " give different columns with --text-column and --label-column"
        )
    return [text, label]


def choose_text(name: str, text_column: str | None, columns: Sequence[str]) -> list[int]:
    """Return the index of the text column, in a list."""
    if text_column is not None:
        return [_given(name, "text", text_column, columns)]
    text = _usual(name, TEXT_NAMES, columns, None)
    if text is None:
        raise _missing_column(name, "text", TEXT_NAMES, columns)
    return [text]


def _given(name: str, kind: str, column: str, columns: Sequence[str]) -> int:
    if column not in columns:
        close = close_match(column, columns)
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


def _missing_column(
    name: str, kind: str, usual: Sequence[str], columns: Sequence[str]
) -> DataError:
    others = [c for c in columns if c.casefold() not in (*TEXT_NAMES, *LABEL_NAMES)]
    close = next((c for c in others if close_match(c.casefold(), usual)), None)
    hint = f"did you mean --{kind}-column {close}?" if close else f"name it with --{kind}-column"
    return DataError(
        f"{name} has no {kind} column: found {listed(columns)},"
        f" expected one of {', '.join(usual[:8])}; {hint}"
    )

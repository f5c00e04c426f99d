"""Cells as texts and labels: numbers, blanks, lists, chats."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

from remora.data.label_forms import label_key
from remora.errors import DataError
from remora.formatting import close_match, quote

_LIST = re.compile(r"""\[\s*(['"]).*\1\s*,?\s*\]""", re.DOTALL)
_ONE_LABEL = "each row needs one label: keep one, or write a row for each"
_ROLES = {
    **{"user": "user", "human": "user"},
    **{"assistant": "assistant", "gpt": "assistant", "model": "assistant"},
}
HIDDEN = "-1"
"""The label of rows whose label is not published, as in GLUE."""


def is_blank(value: object) -> bool:
    """Whether a value is white space, null or NaN."""
    if isinstance(value, str):
        return not value or value.isspace()
    return value is None or (isinstance(value, float) and math.isnan(value))


def text_of(value: object) -> str:
    """Return a cell as a text: a number as CSV would have it, the user's message of a chat.

    Raises:
        DataError: Without the row: the cell holds something else.
    """
    if _is_chat(value):
        value = _turn(value, "user")
    text = value if isinstance(value, str) else _written(value)
    if text is None:
        raise DataError(
            f"a text of type {type(value).__name__};"
            " make it a string, or name another column with --text-column"
        )
    _check_encodable(text)
    return text


def label_of(
    value: object, known: Collection[str] | None, forms: Mapping[str, str] | None = None
) -> str:
    """Return a cell as a label, without white space around it.

    Args:
        value: The cell.
        known: The labels that may occur; any, by default.
        forms: The labels of `known` by their keys, by which others become one of them.

    Raises:
        DataError: Without the row: the cell holds no label, several, or none of `known`.
    """
    if _is_chat(value):
        value = _turn(value, "assistant")
    written = value if isinstance(value, str) else _written(value)
    if written is None:
        advice = "make it a string or a number, or name another column with --label-column"
        if isinstance(value, list | tuple | set):
            of_objects = any(isinstance(each, dict) for each in value)
            advice = "write a string in place of the objects" if of_objects else _ONE_LABEL
            if not value:
                advice = "each row needs one label: write it, or leave the row out"
        raise DataError(f"the label {quote(str(value))} of type {type(value).__name__}; {advice}")
    label = sys.intern(written.strip())
    if known is not None and label not in known and forms:
        label = forms.get(label_key(label), label)
    if known is None:
        _check_encodable(label)
        if label.startswith("[") and _LIST.fullmatch(label):
            raise DataError(f"a list as its label, {quote(label)}; {_ONE_LABEL}")
    elif label not in known:
        raise DataError(
            f"the label {quote(label)}, which is none of the {len(known):,} training labels; "
            + _advice(label, known)
        )
    return label


def _advice(label: str, known: Collection[str]) -> str:
    """Return what to do about a label that is none of the known ones."""
    key = label_key(label)
    if twin := next((each for each in sorted(known) if label_key(each) == key), None):
        return f"--merge-labels takes it for {quote(twin)}"
    close = close_match(label, known)
    return f"did you mean {quote(close)}?" if close else "correct it, or add training rows of it"


def is_hidden(value: object, known: Collection[str] | None) -> bool:
    """Whether a cell stands for a label that is not published: -1, if that is no label.

    Nor may -1.0 be one, which the writer of another table may have made of it.
    """
    spelled = {HIDDEN, f"{HIDDEN}.0"}
    return known is not None and _written(value) in spelled and spelled.isdisjoint(known)


def plain_number(value: object) -> object:
    """Return a number, a truth value or a date as text, anything else as it is."""
    written = _written(value)
    return value if written is None else written


def _written(value: object) -> str | None:
    """Return a string, a number, a truth value or a date as text; None for anything else."""
    if isinstance(value, str):
        return value
    if isinstance(value, float) and value.is_integer():
        return str(int(value))  # pandas writes whole numbers so in a column with a gap
    if isinstance(value, int | float) or hasattr(value, "isoformat") or _is_decimal(value):
        return str(value)
    return None


def _is_decimal(value: object) -> bool:
    return type(value).__name__ == "Decimal"


def _is_chat(value: object) -> bool:
    return (
        isinstance(value, list)
        and all(isinstance(turn, dict) for turn in value)
        and any("role" in turn or "from" in turn for turn in value)
    )


def _turn(chat: object, role: str) -> object:
    """Return the only message of a role in a chat of one question and one answer.

    Raises:
        DataError: Without the row: there is none, or more than one.
    """
    assert isinstance(chat, list)
    found = [
        turn for turn in chat if _ROLES.get(str(turn.get("role", turn.get("from"))).lower()) == role
    ]
    if len(found) != 1:
        raise DataError(
            f"a chat with {len(found)} messages of the {role}; write one of the user and one of"
            " the assistant, or columns of texts and labels"
        )
    content = _content(found[0])
    if content is None or isinstance(content, list):
        number = f"{len(content)} parts" if content else "no content"
        raise DataError(
            f"a chat whose message of the {role} has {number}; write it as one text in 'content'"
        )
    return content


def _content(turn: Mapping[str, object]) -> object:
    """Return the content of a message, in place of a list of one part the text of it."""
    values = (turn.get(key) for key in ("content", "value", "parts"))
    content = next((value for value in values if value is not None), None)
    if isinstance(content, list) and len(content) == 1:
        part = content[0]
        return part.get("text") if isinstance(part, dict) else part
    return content


def _check_encodable(value: str) -> None:
    if "\0" in value:
        raise DataError("a NUL character; remove it")
    try:
        value.isascii() or value.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"half of a surrogate pair, \\u{ord(value[error.start]):04x};"
            " write the character whole or remove it"
        ) from None


def is_text(value: Any) -> bool:
    """Return whether a value is text that UTF-8 can encode; JSON may hold lone surrogates."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


def csv_cell(value: object) -> str:
    """Return a value as a cell of CSV: a text as it is, a list as JSON."""
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    if isinstance(value, list | dict):
        return json_line(value)
    return str(value)


def json_line(value: object) -> str:
    """Return JSON on one line, with null for NaN and infinity, which JSON lacks."""
    dumps = partial(json.dumps, ensure_ascii=False, allow_nan=False, default=str)
    try:
        return dumps(value)
    except ValueError:
        return dumps(_finite(value))


def _finite(value: object) -> object:
    """Return a value without NaN and infinity, also in lists and objects."""
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

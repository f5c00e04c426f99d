"""Rows with several labels: lists, labels in one text with a separator, columns of 0 and 1.

Multi-label classification: a row has a set of labels, which may be empty. From here on the label of
such a row is the set as one text, a sorted JSON list, so that whatever compares, counts or keeps a
row's label does so with sets as well.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import io
import json
import re
import sys
import tokenize
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from remora.data.values import is_blank, label_of, plain_number
from remora.errors import DataError
from remora.formatting import listed, quote

_VECTOR = re.compile(r"\[\s*[01]\.?(\s+[01]\.?)+\s*\]")
_QUOTED = re.compile(r"""\[(.*,)?\s*['"].*\]""", re.DOTALL)
_UNQUOTED = re.compile(
    r"""\[[^][{}'":]*,[^][{}'":]*\]|\{([^][{}'":]*|"[^"]*")(,([^][{}'":]*|"[^"]*"))+\}"""
)
_EMPTY = {"set()", "frozenset()", "{}"}  # as Python and Postgres write what has no items
_FROZEN = re.compile(r"frozenset\((\{.*\})\)", re.DOTALL)

NAME_THEM = (
    'write a list of the names of its labels, such as ["a", "b"], or a column for each label, and '
    "name them with --label-columns"
)
"""What to write in place of a vector of 0 and 1."""

NONE_OF_THEM = "[]"
"""The text of the empty set."""


def set_text(labels: Iterable[str]) -> str:
    """Return a set of labels as one text."""
    return json.dumps(sorted({*labels}), ensure_ascii=False)


@functools.lru_cache(maxsize=100_000)
def labels_in(text: str) -> tuple[str, ...]:
    """Return the labels of a set that is one text, sorted."""
    return tuple(json.loads(text))


def flattened(sets: Iterable[str]) -> list[str]:
    """Return every label of every row, as often as it occurs."""
    return [label for text in sets for label in labels_in(text)]


def changed(sets: Iterable[str], change: Callable[[Sequence[str]], Iterable[str]]) -> list[str]:
    """Return sets whose labels were replaced; several that get one name become one."""
    return [set_text(change(labels_in(text))) for text in sets]


def rarest(sets: Sequence[str]) -> list[str]:
    """Return for each row the rarest of its labels, "" where it has none.

    Rows are stratified by it: combinations are too many, and most occur once.
    """
    counts = Counter(flattened(sets))
    return [min(labels_in(text), key=lambda x: (counts[x], x), default="") for text in sets]


@dataclass(frozen=True)
class LabelForm:
    """How the labels of a row are written."""

    several: Literal["auto", "on", "off"] = "auto"  # auto: where a label is a list
    separator: str | None = None  # between the labels in one text
    columns: tuple[str, ...] = ()  # of 0 and 1, one for each label; as in CSV they may be quoted

    def __post_init__(self) -> None:
        """Take the quotes from names of columns, which those that hold a comma are given in."""
        object.__setattr__(self, "columns", tuple(map(_without_quotes, self.columns)))

    @property
    def spoken(self) -> str:
        """The form in words."""
        if self.columns:
            return "columns of 0 and 1"
        return f"separated by {quote(self.separator)}" if self.separator else "lists"


def _without_quotes(name: str) -> str:
    match = re.fullmatch(r'"((?:[^"]|"")*)"', name)
    return match[1].replace('""', '"') if match else name


def written(text: str, form: LabelForm) -> str:
    """Return a set of labels in one cell: joined by the form's separator, else as a list.

    The empty set is `[]` in either form, since an empty cell may mean that nothing is said; and so
    is a list what would not be read back, such as labels that hold the separator.
    """
    names = labels_in(text)
    if form.separator is None or not names:
        return text
    joined = form.separator.join(names)
    with contextlib.suppress(DataError):  # of what looks like a broken list
        if tuple(names_in(joined, form)) == names:
            return joined
    return text


def names_in(cell: str, form: LabelForm) -> Sequence[object]:
    """Return the labels in a cell that a person may have written as one label, or as several.

    Raises:
        DataError: Without the row: the items of a written list have no commas between them.
    """
    found = list_in(cell)
    if found is None and form.separator is not None:
        return [name for part in cell.split(form.separator) if (name := part.strip())]
    return [cell] if found is None else found


class LabelReader:
    """Reads the label of each row of a table: one, or a set."""

    def __init__(
        self,
        form: LabelForm,
        known: Collection[str] | None = None,
        forms: Mapping[str, str] | None = None,
    ) -> None:
        """Keep how labels are written.

        Args:
            form: How several labels are written.
            known: The labels that may occur; any, by default.
            forms: The labels of `known` by their keys, by which others become one of them.
        """
        self._form, self._known, self._forms = form, known, forms
        self._found: list[str | tuple[str, ...]] = []
        self._num_lists = 0

    def is_unlabelled(self, cells: Sequence[object]) -> bool:
        """Return whether a row has no label: an empty set is one."""
        if self._form.separator is not None:
            return cells[0] is None
        return any(map(is_blank, cells))

    def read(self, cells: Sequence[object]) -> None:
        """Read the label cells of the next row.

        Raises:
            DataError: Without the row: they hold no label, or none that may occur.
        """
        if self._form.columns:
            self._found.append(self._of_columns(cells))
            return
        (cell,) = cells
        items = None if self._form.several == "off" else self._items(cell)
        if items is None:
            self._found.append(label_of(cell, self._known, self._forms))
            return
        self._num_lists += 1
        self._found.append(tuple(self._one(item) for item in items))

    def finish(self) -> tuple[list[str], bool, int | None]:
        """Return the label of each row, whether they are sets, and how many lists had one label.

        Lists of one label each are ordinary labels, unless several are asked for.
        """
        sets = [(each,) if isinstance(each, str) else each for each in self._found]
        several = self._form.several == "on" or self._form != LabelForm(self._form.several)
        if not several and self._num_lists and any(len({*each}) != 1 for each in sets):
            several = True
        if several:
            text = functools.lru_cache(maxsize=None)(set_text)
            return [sys.intern(text(each)) for each in sets], True, None
        return [each[0] for each in sets], False, self._num_lists or None

    def _items(self, cell: object) -> Sequence[object] | None:
        """Return the labels in a cell; None if it holds one."""
        found = list_in(cell)
        if found is not None or self._form.separator is None:
            return found
        written = "" if is_blank(cell) else plain_number(cell)
        if not isinstance(written, str):
            return [cell]
        parts = (part.strip() for part in written.split(self._form.separator))
        return [part for part in parts if part]

    def _one(self, item: object) -> str:
        if is_blank(item):
            raise DataError("a blank label in its list; remove it")
        if isinstance(item, list | tuple | dict):
            raise DataError(f"a list within its list of labels, {quote(str(item))}; write one list")
        return label_of(item, self._known, self._forms)

    def _of_columns(self, cells: Sequence[object]) -> tuple[str, ...]:
        found = []
        for column, cell in zip(self._form.columns, cells, strict=True):
            written = str(plain_number(cell)).strip().casefold()
            if written not in {"0", "1", "true", "false", "0.0", "1.0"}:
                raise DataError(
                    f"{quote(str(cell))} in the column {quote(column)}; write 1 where the row has "
                    "this label and 0 where it has not"
                )
            if written in {"1", "1.0", "true"}:
                found.append(label_of(column, self._known, self._forms))
        return tuple(found)


def list_in(cell: object) -> Sequence[object] | None:
    """Return the items of a list, also of one that is written as text; None if it is none.

    Raises:
        DataError: Without the row: a list is written in a way that cannot be read.
    """
    if isinstance(cell, set | frozenset):
        return sorted(cell)
    if isinstance(cell, list | tuple):
        chat = bool(cell) and all(isinstance(each, dict) for each in cell)
        return None if chat else _names(list(cell), str(cell))
    if isinstance(cell, dict):
        return _chosen(cell)
    return _written_list(cell.strip()) if isinstance(cell, str) else None


def _written_list(text: str) -> Sequence[object] | None:
    """Return the items of a list, a tuple or a set that is written as text; None if it is none."""
    if text in _EMPTY:
        return []
    if match := _FROZEN.fullmatch(text):
        text = match[1]
    if (text[:1] + text[-1:]) not in {"[]", "()", "{}"}:
        return None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = _python_list(text)
    if isinstance(found, dict):
        return _chosen(found)
    return _names(found, text) if isinstance(found, list) else None


def _chosen(cell: Mapping[str, object]) -> Sequence[object] | None:
    """Return the labels in what Label Studio writes where several are chosen; None otherwise."""
    choices = cell.get("choices")
    return choices if len(cell) == 1 and isinstance(choices, list) else None


def _names(items: list[object], shown: str) -> list[object]:
    """Return the items of a list, unless they are a vector of 0 and 1, which names no label.

    Raises:
        DataError: Without the row: a number in it occurs twice.
    """
    numbers = [each for each in items if isinstance(each, bool | int | float)]
    if len(numbers) == len(items) and len({*numbers}) < len(numbers) and {*numbers} <= {0, 1}:
        raise DataError(f"a vector of 0 and 1 as its label, {quote(shown)}; {NAME_THEM}")
    return items


def _python_list(text: str) -> object:
    """Return a list, a tuple or a set of Python or Postgres as a list; None if it is none.

    Raises:
        DataError: Without the row: what stands between its items, or around them, is missing.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a backslash in a label
            found = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        if _VECTOR.fullmatch(text):  # as NumPy writes it
            return [int(float(each)) for each in text.strip("[]").split()]
        if _UNQUOTED.fullmatch(text):
            raise DataError(
                f"a list without quotes around its labels, {quote(text)}; write it as JSON, such "
                'as ["a", "b"]'
            ) from None
        if _QUOTED.fullmatch(text):
            raise DataError(
                f'a broken list as its label, {quote(text)}; write it as JSON, such as ["a", "b"]'
            ) from None
        return None
    if isinstance(found, tuple | set) and all(isinstance(each, str) for each in found):
        found = sorted(found) if isinstance(found, set) else list(found)
    # Python joins neighbouring texts, and NumPy writes arrays without commas
    if isinstance(found, list) and all(isinstance(each, str) for each in found):
        tokens = tokenize.generate_tokens(io.StringIO(text).readline)
        if sum(token.type == tokenize.STRING for token in tokens) != len(found):
            raise DataError(
                f"a list without commas between its labels, {quote(text)}; write it as JSON, such "
                'as ["a", "b"]'
            )
    return found


def advice_on_same_sets(labels: Collection[str], form: LabelForm) -> str:
    """Return what to do about rows that all have the same labels."""
    if form.columns:
        return "add rows with other labels; write 0, not a blank, where a row has not a label"
    if {*labels} <= {"0", "1", "0.0", "1.0", "False", "True", "false", "true"}:
        return f"are these vectors of 0 and 1? Then {NAME_THEM}"
    return "add rows with other labels"


def spoken_columns_of_0(columns: Sequence[str], labels: Collection[str]) -> list[str]:
    """Return a sentence on columns of labels that no row has, none if there are no such columns."""
    found = {*labels}
    missing = [each for each in columns if each.strip() not in found]
    if not missing:
        return []
    if len(missing) == 1:
        return [f"the column {quote(missing[0])} is 0 in every training row, so it is no label"]
    return [f"the columns {listed(missing)} are 0 in every training row, so they are no labels"]


def spoken_sets(sets: Sequence[str], form: LabelForm) -> str:
    """Return a sentence on how many labels the rows have."""
    sizes = [len(labels_in(text)) for text in sets]
    none = sizes.count(0)
    return (
        f"several labels a row ({form.spoken}): {sum(sizes) / len(sizes):.2f} on average, from "
        f"{min(sizes)} to {max(sizes)}"
        + (f"; {none:,} row{'' if none == 1 else 's'} with none of them" if none else "")
    )

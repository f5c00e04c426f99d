"""What a table's columns hold, by their first rows: texts, labels, numbers, flags, chats."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import chain

from remora.data.label_forms import label_key
from remora.data.values import HIDDEN, is_blank, plain_number

MAX_LABEL_WORDS = 5
MAX_LABEL_SHARE = 0.5
"""Most values that differ among the rows of a column of labels."""
MIN_KNOWN_SHARE = 0.8
"""Least share of training labels in another table's column of labels."""

_KEY_WORDS = {"id", "idx", "index", "uid", "uuid", "guid"}
_FLAGS = {"0", "1", "0.0", "1.0", "True", "False"}
_ASKERS = {"user", "human"}
_FASTTEXT = re.compile(r"__label__\S+\s+\S")


def words(name: str) -> list[str]:
    """Return the words of a column's name in lower case: review and text of reviewText."""
    parted = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)
    return re.findall(r"[^\W\d_]+", parted.casefold())


def is_key(name: str) -> bool:
    """Whether a column's name tells that it holds keys, such as SentenceId."""
    last = words(name)[-1:]
    return bool(last) and last[0].removesuffix("s") in _KEY_WORDS


class Contents:
    """The first rows of a table, by columns."""

    def __init__(self, names: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        self._names = list(names)
        columns = list(zip(*rows, strict=False))
        self.num_rows = len(columns[0]) if columns else 0
        self._cells = [
            [value for value in column if value is not None]
            for column in columns or [()] * len(self._names)
        ]
        self._columns = [[str(value).strip() for value in column] for column in self._cells]

    @cached_property
    def binary(self) -> list[int]:
        """The columns that hold 0 and 1 only, in more than one row; none if each holds one."""
        flags = [
            place
            for place, values in enumerate(self._columns)
            if len(values) > 1 and set(values) <= _FLAGS
        ]
        return flags if any(len(set(self._columns[place])) > 1 for place in flags) else []

    @cached_property
    def chats(self) -> list[int]:
        """The columns whose cells are chats, lists of messages with a role."""
        return [
            place
            for place, cells in enumerate(self._cells)
            if 2 * sum(map(_is_chat, cells)) > sum(not is_blank(cell) for cell in cells)
        ]

    @cached_property
    def objects(self) -> list[int]:
        """The columns with JSON objects, or lists of them, which are neither texts nor labels."""
        return [
            place
            for place, cells in enumerate(self._cells)
            if any(isinstance(each, dict) for each in _spread(cells))
        ]

    @property
    def lacks_header(self) -> bool:
        """Whether the first line reads like a row: values of its columns, sentences, numbers.

        A sentence or a number is not enough if another cell is unlike its column.
        """
        signs = [self._sign(place) for place in range(len(self._columns))]
        return 2 * signs.count("value") + ("form" in signs) > signs.count("unlike")

    @property
    def has_title(self) -> bool:
        """Whether the first line has one cell, where the columns below are several."""
        return (
            any(self._names[:1]) and not any(self._names[1:]) and any(map(any, self._columns[1:]))
        )

    @property
    def fasttext_lines(self) -> list[str]:
        """The first lines if most are of fastText, a label and a text each; else none."""
        lines = [*self._names[:1], *chain(*self._columns[:1])]
        found = [line for line in lines if _FASTTEXT.match(line)]
        return found if 2 * len(found) > len(lines) else []

    def text(self, among: Iterable[int], likeness: Mapping[int, int]) -> int | None:
        """Return the likeliest column of texts: long, of several words, hardly ever the same.

        Args:
            among: The columns to choose from.
            likeness: How much their names resemble usual ones, 0 for not at all; such a column
                wins unless it holds far shorter texts.
        """
        score = {place: self._text_score(place) for place in among}
        if not score:
            return None
        best = max(score, key=lambda place: score[place])
        near = max(score, key=lambda place: (likeness.get(place, 0) > 0, score[place]))
        if score[near] * 4 >= score[best]:
            best = near
        return best if score[best] > 0 else None

    def label(self, among: Iterable[int], likeness: Mapping[int, int]) -> int | None:
        """Return the likeliest column of labels: a few values, each of a few words.

        Args:
            among: The columns to choose from.
            likeness: How much their names resemble usual ones; the more, the better.
        """
        fits = [place for place in among if self._holds_labels(place)]
        return min(
            fits,
            key=lambda p: (is_key(self._names[p]), -likeness.get(p, 0), len(set(self._columns[p]))),
            default=None,
        )

    def _holds_labels(self, place: int) -> bool:
        """Whether a column can be one of labels: short values that repeat, no objects."""
        if place in self.objects:
            return False
        values = [value for each in _spread(self._cells[place]) if (value := str(each).strip())]
        few = len(set(values)) <= max(2, MAX_LABEL_SHARE * len(values))
        short = all(len(value.split()) <= MAX_LABEL_WORDS for value in values)
        differ = len(set(values)) > 1 or self.num_rows == len(values) == 1
        return differ and few and short

    def holds_known(self, place: int, known: Collection[str]) -> bool:
        """Whether nearly all labels in a column are training labels, in some form."""
        keys = {label_key(label) for label in known}
        cells = [str(plain_number(cell)).strip() for cell in self._cells[place]]
        cells = [cell for cell in cells if cell and cell != HIDDEN]
        found = [all(each in keys for each in _label_keys(cell, keys)) for cell in cells]
        return bool(found) and sum(found) >= MIN_KNOWN_SHARE * len(found)

    def _text_score(self, place: int) -> float:
        values = self._columns[place]
        if any(isinstance(cell, dict | list) for cell in self._cells[place]):
            return 0.0
        written = [value for value in values if not _is_number(value) and "://" not in value]
        if not values or 2 * len(written) < len(values):
            return 0.0
        length = sum(map(len, written)) / len(written)
        several = sum(len(value.split()) > 1 for value in written) / len(written)
        return length * (0.1 + several) * len(set(written)) / len(written)

    def _sign(self, place: int) -> str:
        """Return what tells that a name is a value of its column, or that it is not."""
        name = self._names[place]
        values = [value for value in self._columns[place] if value]
        if not name:
            return ""
        if name in values:
            return "value"
        form = _form(name)
        alike = sum(_form(value) == form for value in values)
        if 10 * alike < len(values):
            return "unlike"
        return "form" if form in {"number", "sentence"} and 2 * alike >= len(values) else ""


def _spread(cells: Iterable[object]) -> Iterator[object]:
    """Yield cells, and the elements of those that are lists."""
    for cell in cells:
        yield from cell if isinstance(cell, list) else [cell]


def _form(value: str) -> str:
    if _is_number(value):
        return "number"
    num_words = len(value.split())
    return "sentence" if num_words > MAX_LABEL_WORDS else "words" if num_words > 1 else "word"


def _label_keys(cell: str, keys: Collection[str]) -> list[str]:
    """Return the key of a label, or those of several labels in a cell."""
    if label_key(cell) in keys:
        return [label_key(cell)]
    return [label_key(each.strip(" '\"")) for each in re.split(r"[;,|]", cell.strip("[]"))]


def _is_chat(value: object) -> bool:
    """Whether a cell is a list of messages, one of them of a user."""
    return (
        isinstance(value, list)
        and all(isinstance(turn, dict) for turn in value)
        and any(str(turn.get("role", turn.get("from"))).lower() in _ASKERS for turn in value)
    )


def _is_number(value: str) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return True

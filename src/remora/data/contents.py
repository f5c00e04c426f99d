"""What a table's columns hold, by their first rows: texts, labels, numbers, flags."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property

MAX_LABEL_WORDS = 5
MAX_LABEL_SHARE = 0.5
"""Most values that differ among the rows of a column of labels."""


class Contents:
    """The first rows of a table, by columns."""

    def __init__(self, names: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        self._names = list(names)
        columns = list(zip(*rows, strict=False)) or [()] * len(self._names)
        self._columns = [
            [str(value).strip() for value in column if value is not None] for column in columns
        ]

    @cached_property
    def binary(self) -> list[int]:
        """The columns that hold 0 and 1 only, both of them or one, in more than one row."""
        wanted = {"0", "1", "0.0", "1.0", "True", "False"}
        return [
            place
            for place, values in enumerate(self._columns)
            if len(values) > 1 and set(values) <= wanted
        ]

    @property
    def lacks_header(self) -> bool:
        """Whether the first line reads like a row: a value of its column, a sentence, a number."""
        return any(
            name in values or len(name.split()) > MAX_LABEL_WORDS or _is_number(name)
            for name, values in zip(self._names, self._columns, strict=False)
        )

    def text(self, among: Iterable[int], close: Sequence[int]) -> int | None:
        """Return the likeliest column of texts: long, of several words, hardly ever the same.

        Args:
            among: The columns to choose from.
            close: Those whose names resemble usual ones; such a one wins unless it holds far
                shorter texts.
        """
        score = {place: self._text_score(place) for place in among}
        if not score:
            return None
        best = max(score, key=lambda place: score[place])
        near = [place for place in close if place in score]
        if near and score[near[0]] * 4 >= score[best]:
            return near[0]
        return best if score[best] > 0 else None

    def label(self, among: Iterable[int], close: Sequence[int]) -> int | None:
        """Return the likeliest column of labels: a few values, each of a few words."""
        among = list(among)
        if near := [place for place in close if place in among and not self._is_key(place)]:
            return near[0]
        fits = [place for place in among if self._holds_labels(place)]
        if not fits:
            return None
        return min(fits, key=lambda p: (self._is_key(p), len(set(self._columns[p]))))

    def _text_score(self, place: int) -> float:
        values = self._columns[place]
        words = [value for value in values if not _is_number(value) and "://" not in value]
        if not values or 2 * len(words) < len(values):
            return 0.0
        length = sum(map(len, words)) / len(words)
        several = sum(len(value.split()) > 1 for value in words) / len(words)
        return length * (0.1 + several) * len(set(words)) / len(words)

    def _holds_labels(self, place: int) -> bool:
        values = [value for value in self._columns[place] if value]
        few = len(set(values)) <= max(2, MAX_LABEL_SHARE * len(values))
        short = all(len(value.split()) <= MAX_LABEL_WORDS for value in values)
        return len(set(values)) > 1 and few and short

    def _is_key(self, place: int) -> bool:
        """Whether a column's name tells that it holds keys, such as SentenceId."""
        return self._names[place].casefold().rstrip("s").endswith(("id", "_id", "index", "idx"))


def _is_number(value: str) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return True

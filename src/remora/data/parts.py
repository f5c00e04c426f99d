"""What readers and the checks of rows share: rows with their places, parts, and remarks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, Generic, TypeAlias, TypeVar

from remora.errors import DataError

PEEKED_ROWS = 200
"""Rows that are looked at where the names of the columns do not tell what they hold."""

Row: TypeAlias = "tuple[int, int, Sequence[object]]"
"""A row counted from 1 without the header, its line in an editor, the values that were picked."""

Peek: TypeAlias = "Callable[[], list[Sequence[object]]]"
"""Returns the first rows, all columns of them; they are read again afterwards."""

Pick: TypeAlias = "Callable[[Sequence[str], Peek], list[int]]"
"""Takes a table's columns, and returns the indices of those wanted."""

Item = TypeVar("Item")


@dataclass(frozen=True)
class ReadOptions:
    """How a file is read where its name and its first line do not tell."""

    format: str | None = None  # one of `readers.FORMATS`
    columns: tuple[str, ...] = ()  # names for a table without a header


class Remarks:
    """What is worth a line but no error, counted, with the first place of each."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, str], list[Any]] = {}  # -> count, first place
        self._told: list[str] = []

    def add(self, name: str, what: str, row: int, line: int) -> None:
        """Count a row of a table that `what` is true of, such as "with a blank text, skipped"."""
        self._found.setdefault((name, what), [0, row_place(row, line)])[0] += 1

    def tell(self, line: str) -> None:
        """Keep a sentence that is true of a whole table."""
        self._told.append(line)

    def lines(self) -> list[str]:
        """Return a sentence for each finding."""
        return self._told + [
            f"{name}: {count:,} row{'' if count == 1 else 's'} {what}"
            + (f"; {place}" if count == 1 else f"; the first is {place}")
            for (name, what), (count, place) in self._found.items()
        ]


@dataclass(frozen=True)
class Part:
    """A table, or a part of one: a name for messages, and a reader."""

    name: str
    read: Callable[[Pick, Remarks], Iterator[Row]]
    schema: Callable[[], Any] | None = None  # returns that of Arrow, for a format that has one
    is_text: bool = False  # whether it has one text a line, and no columns


class Ahead(Generic[Item]):
    """An iterator whose next items can be looked at."""

    def __init__(self, items: Iterator[Item]) -> None:
        self._items = items

    def __iter__(self) -> Iterator[Item]:
        return self

    def __next__(self) -> Item:
        return next(self._items)

    def peek(self, number: int) -> list[Item]:
        """Return up to `number` next items, which stay; an error after the first stays too."""
        items: list[Item] = []
        try:
            items.extend(islice(self._items, number))  # keeps those before an error
        except DataError as error:
            if not items:
                raise
            self._items = _raising(error)
        self.put_back(items)
        return items

    def rest(self) -> Iterator[Item]:
        """Return all items that are left, without looking ahead any more."""
        return self._items

    def put_back(self, items: Sequence[Item]) -> None:
        """Make items the next ones."""
        if items:
            self._items = chain(items, self._items)


def _raising(error: DataError) -> Iterator[Any]:
    raise error
    yield


def row_place(row: int, line: int) -> str:
    """Return the row, with its line if that differs."""
    return f"row {row}" if row == line else f"row {row} (line {line})"

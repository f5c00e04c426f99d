"""Messages that are too long for the model: the part that is kept, or the windows that are read."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

Kept = Literal["head", "tail", "both", "windows"]

GAP = " ... "
"""Between head and tail of a message whose middle was cut out."""

OVERLAP = 1 / 4
"""Share of a window that the next one repeats, so that most sentences are whole in one of them."""


def part(message: str, length: int, kept: Kept) -> str:
    """Return the part of a message that is kept, of at most `length` characters of its own.

    Half from each end follows Sun et al., "How to Fine-Tune BERT for Text Classification?", 2019.
    """
    if length >= len(message):
        return message
    head = (length + 1) // 2 if kept == "both" else 0 if kept == "tail" else length
    tail = message[len(message) - (length - head) :] if length > head else ""
    return f"{message[:head]}{GAP if head and tail else ''}{tail}"


def windows(
    message: str, cut: Callable[[int, int], Sequence[int]], room: int
) -> Iterator[tuple[int, int]]:
    """Yield windows that cover a message as spans of its characters, cut between words.

    Each but the last is as long as fits, and repeats the end of the one before.

    Args:
        message: The message, without space around it.
        cut: Returns the tokens of a span with those around it.
        room: Most tokens that fit.
    """
    begin, num_windows = 0, 0
    while begin < len(message):
        length = longest(functools.partial(_from, cut, begin), room, len(message) - begin)
        if length == 0:  # one character may be more tokens than fit
            begin += 1
            continue
        end = begin + length
        if end < len(message):
            border = _last_space(message, (begin + end) // 2, end)
            end = border if len(cut(begin, border)) <= room else end
        yield begin, end
        num_windows += 1
        if end == len(message):
            break
        begin = _first_word(message, max(begin + 1, end - int(OVERLAP * (end - begin))), end)
    if not num_windows:
        yield 0, 0


def _from(cut: Callable[[int, int], Sequence[int]], begin: int, length: int) -> Sequence[int]:
    return cut(begin, begin + length)


def longest(cut: Callable[[int], Sequence[int]], room: int, most: int) -> int:
    """Return the largest length, at most `most`, of which a cut has no more than `room` tokens."""
    low, high = 0, min(most, 4 * room)  # a whole book takes long to tokenize
    while high < most and len(cut(high)) <= room:
        low, high = high, min(most, 2 * high)
    while low < high:  # the length that fits is in [low, high]
        middle = (low + high + 1) // 2
        low, high = (middle, high) if len(cut(middle)) <= room else (low, middle - 1)
    return low


def _last_space(message: str, low: int, high: int) -> int:
    """Return the place of the last space from `low` to `high`, or `high` if there is none."""
    return next((i for i in range(high, low, -1) if message[i].isspace()), high)


def _first_word(message: str, low: int, high: int) -> int:
    """Return where the first word begins between `low` and `high`, or `low` if none does."""
    return next((i + 1 for i in range(low, high) if message[i].isspace()), low)

"""Windows cover a message that is too long, overlap, fit, and are cut between words."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest

from conftest import WORDS
from remora.data import cutting
from remora.data.class_prompt import ClassPrompt
from remora.data.prompt import Prompt

LABELS = list(WORDS)


def make(tokenizer: Any, kind: type[Prompt] = Prompt, **settings: Any) -> Prompt:
    return kind(tokenizer, LABELS, instruction="", **{"max_length": 60, **settings})


def texts_of(tokenizer: Any, stems: list[list[int]]) -> list[str]:
    """Return the messages in some stems of the test's own chat template."""
    decoded = (tokenizer.decode(stem) for stem in stems)
    return [text.split("user\n")[1].split("<|im_end|>")[0] for text in decoded]


def test_every_word_is_in_a_window_and_each_window_fits(tokenizer: Any) -> None:
    words = [f"w{place:03d}" for place in range(200)]
    message = " ".join(words)
    prompt = make(tokenizer, kept="windows")
    (stems,) = prompt.windows([message])
    room = 60 - max(map(len, prompt.answers))
    assert all(len(stem) <= room for stem in stems)
    windows = [text.split() for text in texts_of(tokenizer, stems)]
    assert all(word in words for window in windows for word in window)  # none is cut
    begins = [words.index(window[0]) for window in windows]
    ends = [words.index(window[-1]) + 1 for window in windows]
    assert (begins[0], ends[-1]) == (0, 200)
    for begin, end, following in zip(begins, ends, begins[1:], strict=False):
        assert begin < following < end  # the next one repeats some words
        assert (end - following) / (end - begin) == pytest.approx(cutting.OVERLAP, abs=0.15)
        assert end - begin >= max(e - b for b, e in zip(begins, ends, strict=True)) - 1


def test_any_text_is_covered(tokenizer: Any) -> None:
    """Texts without spaces, of characters that are several tokens, and of spaces alone."""
    draw = random.Random(0)
    prompt = make(tokenizer, kept="windows")
    room = 60 - max(map(len, prompt.answers))
    for alphabet in ("abc ", "中文字", "\U0001f600é \n", "a" * 30 + " "):
        for length in (1, 80, 333):
            message = "".join(draw.choices(alphabet, k=length)).strip() or "x"

            def cut(begin: int, end: int, message: str = message) -> list[int]:
                return prompt._stem_ids([message[begin:end]])[0]

            spans = list(cutting.windows(message, cut, room))
            assert (spans[0][0], spans[-1][1]) == (0, len(message))
            for (begin, end), (following, _) in itertools.pairwise(spans):
                assert begin < following <= end
            assert all(len(cut(*span)) <= room for span in spans)


def test_a_character_that_does_not_fit_is_left_out() -> None:
    sizes = {"a": 1, "B": 5}

    def cut(begin: int, end: int) -> list[int]:
        return [0] * sum(sizes[each] for each in "aaaBaa"[begin:end])

    assert list(cutting.windows("aaaBaa", cut, 3)) == [(0, 3), (4, 6)]
    assert list(cutting.windows("B", lambda begin, end: [0] * 5 * (end - begin), 3)) == [(0, 0)]


@pytest.mark.parametrize("kind", [Prompt, ClassPrompt])
def test_the_windows_of_a_message_weigh_one_row(tokenizer: Any, kind: type[Prompt]) -> None:
    prompt = make(tokenizer, kind, kept="windows")
    messages = ["where is my card", "where is my card " * 30]
    first, second = prompt.rows_by_message(messages, [LABELS[0], LABELS[1]])
    assert [row.weight for row in first] == [1.0]
    assert len(second) > 2
    assert [row.weight for row in second] == [1 / len(second)] * len(second)
    assert {tuple(row.targets) for row in second} == {prompt.answers[1]}
    assert prompt.rows(messages, [LABELS[0], LABELS[1]]) == [*first, *second]
    assert prompt.count_windows(messages) == (1, len(second))
    head = make(tokenizer, kind)
    assert head.windows(messages[:1]) == prompt.windows(messages[:1])
    assert len(head.windows(messages[1:])[0]) == 1
    assert prompt.stems(messages) == [prompt.windows([each])[0][0] for each in messages]

"""The prompt of a model that scores classes: a linear head at the last token of the prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from remora.config.checks import Answer
from remora.data.prompt import Prompt, TokenSequence


class ClassPrompt(Prompt):
    """The prompt for a message; the answer is the label's index, which the head predicts.

    The labels are the vocabulary of the head, so the answer to each is one token that is never
    computed. Labels need no tokens of their own, and leave the whole context to the message.
    """

    @property
    def classes(self) -> tuple[str, ...]:
        """The labels in the order of the head's rows."""
        return self.labels

    @property
    def num_answer_tokens(self) -> int:
        """None: a sequence ends with its prompt."""
        return 0

    def _row(self, stem: list[int], label: int, weight: float) -> TokenSequence:
        return TokenSequence(stem, len(stem), weight, class_index=label)

    def _find_answers(
        self, opening: str, ending: str, written: Sequence[str]
    ) -> tuple[tuple[tuple[int, ...], ...], int]:
        """Return each label's index as its answer, which takes no token from the prompt."""
        return tuple((index,) for index in range(len(written))), 0

    def _respell(self) -> dict[str, str]:
        """Return nothing: no label is written."""
        return {}

    @property
    def _shorter(self) -> str:
        return "leave out --list-labels" if self.list_labels else "shorten the instruction"


PROMPTS: Mapping[Answer, type[Prompt]] = {"words": Prompt, "classes": ClassPrompt}
"""The prompt of each kind of answer."""

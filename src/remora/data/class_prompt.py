"""The prompt of a model that scores classes: a linear head at the last token of the prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from remora.config.checks import Answer
from remora.data.label_sets import labels_in
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

    def _row(
        self, stem: list[int], label: str, place: Mapping[str, int], weight: float
    ) -> TokenSequence:
        return TokenSequence(stem, len(stem), weight, class_index=place[label])

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


class LabelSetPrompt(ClassPrompt):
    """The same where a row has several labels, or none: the head scores each label by itself.

    The label of a row is a set as `label_sets` writes it.
    """

    @property
    def multi_label(self) -> bool:
        """Whether each label is scored by itself."""
        return True

    def _row(
        self, stem: list[int], label: str, place: Mapping[str, int], weight: float
    ) -> TokenSequence:
        classes = tuple(place[each] for each in labels_in(label))
        return TokenSequence(stem, len(stem), weight, class_set=classes)


def prompt_class(answer: Answer | None, *, multi_label: bool) -> type[Prompt]:
    """Return the prompt of a kind of answer; words by default."""
    if multi_label:
        return LabelSetPrompt
    return ClassPrompt if answer == "classes" else Prompt

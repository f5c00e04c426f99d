"""Messages and labels as token sequences: chat template, answer, and truncation.

The token ids are those of the whole rendered conversation, so that training, scoring and any other
engine that renders the same conversation see the same ids. A sequence is a *stem* (the template,
the instruction and the message, up to where the answer begins) and an *answer* (the label's text
and the end token). The loss covers the answer only.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from remora.data import chat_template, cutting
from remora.data.cutting import Kept
from remora.errors import ConfigError, ModelError

PROBES = ("where is it", "7 days ago?", "(no)", "Ünknown fee on my card!")
"""Messages that begin and end differently: the tokens that they share, all messages share."""

MAX_REMEMBERED = 1 << 16
"""Messages whose windows are remembered, since training cuts them again in each epoch."""


class TokenSequence(NamedTuple):
    """One row for the model, which learns to predict its targets, one at each of its predictors.

    The targets are the tokens from `answer_start` on, or a class that follows the whole row, or
    several.
    """

    token_ids: list[int]
    answer_start: int
    weight: float = 1.0  # of the row in the loss
    class_index: int | None = None  # the class that follows the row, which then has no answer
    class_set: tuple[int, ...] | None = None  # the same where several classes follow, or none

    @property
    def targets(self) -> list[int]:
        """What is predicted: the tokens of the answer, the class, or the classes of a set."""
        if self.class_set is not None:
            return list(self.class_set)
        if self.class_index is not None:
            return [self.class_index]
        return self.token_ids[self.answer_start :]

    @property
    def num_targets(self) -> int:
        """How many predictions the row is supervised on; a set of classes is one."""
        if self.class_index is not None or self.class_set is not None:
            return 1
        return len(self.token_ids) - self.answer_start

    @property
    def predictors(self) -> range:
        """The places of the tokens that each target is predicted from."""
        return range(self.answer_start - 1, self.answer_start - 1 + self.num_targets)


class Rendered(NamedTuple):
    """A prompt as it was rendered for training: its text, and its tokens.

    A template may hold today's date, and may be edited; what a model was trained with stays.
    """

    head: str  # before the message
    tail: str  # after the message, up to where the answer begins
    opening: str  # between message and answer in a whole conversation
    ending: str  # after the answer
    prefix: list[int]  # tokens that all conversations begin with
    answers: list[list[int]]  # tokens of each label, in their order


class Prompt:
    """The prompt for a message and the answer for a label, for one tokenizer and label set.

    The model writes the label's words; `class_prompt.ClassPrompt` has a head score classes instead.

    Attributes:
        tokenizer: The Hugging Face tokenizer.
        labels: The closed label set, in the order of the scores.
        label_texts: The text written for a label, if other than the label: given by the user, or
            respelled because the tokenizer has no tokens for the label.
        answers: The token ids of each label, the end token last.
        head: The text before the message, template included.
        tail: The text between the message and its answer.
        prefix: The token ids that every conversation begins with.
        rendered: The prompt as text and tokens, to be kept with what is trained.
        changed: What the tokenizer would render otherwise than `rendered`, as a line for the user;
            "" if nothing.
        max_length: The longest sequence, in tokens, answer included.
        kept: The part of a longer message that is kept: its head, its tail, half from each, or all
            of it in windows.
    """

    def __init__(
        self,
        tokenizer: Any,
        labels: Sequence[str],
        *,
        instruction: str,
        list_labels: bool = False,
        label_texts: Mapping[str, str] | None = None,
        max_length: int,
        kept: Kept = "head",
        rendered: Rendered | None = None,
    ) -> None:
        """Render the template and find where answers begin.

        Args:
            tokenizer: A Hugging Face tokenizer; its chat template is used where it has one.
            labels: The closed label set.
            instruction: Text before the message; may be empty.
            list_labels: Whether the instruction ends with the list of labels.
            label_texts: The text that the model writes for a label, if other than the label.
            max_length: The longest sequence in tokens; longer messages are truncated.
            kept: The part of a longer message that is kept.
            rendered: The prompt that a model was trained with, which is used instead.

        Raises:
            ConfigError: If `label_texts` names a label that does not exist.
            ModelError: If the template cannot be used, two labels have the same tokens, or the
                longest label leaves no room for a message.
        """
        self.labels = tuple(labels)
        self.instruction = instruction
        self.list_labels = list_labels
        self.label_texts = dict(label_texts or {})
        self.max_length = max_length
        self.kept = kept
        self.tokenizer = tokenizer
        self._control = chat_template.control_tokens(tokenizer)
        self._spans: dict[str, list[tuple[int, int]]] = {}  # of the windows of long messages
        if unknown := [label for label in self.label_texts if label not in self.labels]:
            raise ConfigError(
                f"label_texts has the label {unknown[0]!r}, which is not in the data; "
                "remove it or correct its name"
            )
        self.label_texts |= self._respell()

        # The prompt around the message
        written = [self.label_texts.get(label, label) for label in self.labels]
        asked = instruction
        if list_labels:
            asked = f"{instruction} Labels: {', '.join(written)}.".strip()
        content = (
            f"{asked}\n\n{chat_template.MESSAGE_MARK}" if asked else chat_template.MESSAGE_MARK
        )
        self._asked = content.removesuffix(chat_template.MESSAGE_MARK)
        now = _texts(tokenizer, content, rendered)
        self.head, self.tail, self._opening, self._ending = (
            now if rendered is None else (rendered[:4])
        )
        self._refuse_long_template()
        self._other_prefix: list[int] = []  # of this tokenizer, in place of which `prefix` stands

        # Tokens of the answers and of the common prefix
        self.answers, self._num_dropped = self._find_answers(self._opening, self._ending, written)
        self.prefix = self._find_prefix()
        self.changed = ""
        if rendered is not None:
            self.changed = self._find_change(now, rendered)
            if (prefix := tuple(rendered.prefix)) != self.prefix:
                self._other_prefix, self.prefix = list(self.prefix), prefix
            self.answers = tuple(tuple(answer) for answer in rendered.answers)
        self._refuse_equal_answers()
        self._refuse_short_context()

    @property
    def rendered(self) -> Rendered:
        """The prompt as text and tokens."""
        texts = self.head, self.tail, self._opening, self._ending
        return Rendered(*texts, list(self.prefix), [list(answer) for answer in self.answers])

    def pinned(self, rendered: Rendered) -> Prompt:
        """Return the same prompt as it was rendered before."""
        return type(self)(
            self.tokenizer,
            self.labels,
            instruction=self.instruction,
            list_labels=self.list_labels,
            label_texts=self.label_texts,
            max_length=self.max_length,
            kept=self.kept,
            rendered=rendered,
        )

    @property
    def chat_template(self) -> str:
        """A chat template that renders this very prompt for a message, whatever the day.

        The message may have the instruction before it or not. With an assistant's answer it renders
        the whole conversation.
        """
        asked = json.dumps(self._asked, ensure_ascii=False)
        texts = self.head.removesuffix(self._asked), self._asking, self._opening, self._ending
        before, tail, opening, ending = (json.dumps(text, ensure_ascii=False) for text in texts)
        return (
            "{%- if messages[0]['role'] != 'user' or messages | length > 2 -%}"
            "{{- raise_exception('this model labels one message of a user') -}}{%- endif -%}"
            "{%- set content = messages[0]['content'] -%}"
            f"{{%- set asked = {asked} -%}}"
            "{%- if asked and content.startswith(asked) -%}"
            "{%- set content = content[asked | length:] -%}{%- endif -%}"
            f"{{{{- {before} + asked + content | trim -}}}}"
            "{%- if messages | length == 2 -%}"
            f"{{{{- {opening} + messages[1]['content'] + {ending} -}}}}"
            f"{{%- elif add_generation_prompt -%}}{{{{- {tail} -}}}}{{%- endif -%}}"
        )

    @property
    def _asking(self) -> str:
        """The text after the message in stems: `tail` without what belongs to the answer."""
        if self._num_dropped == 0:
            return self.tail
        (whole,) = self._encode([f"{self.head}{PROBES[0]}{self.tail}"])
        text = self.tail.removesuffix(self.tokenizer.decode(whole[-self._num_dropped :]))
        same = self._encode([f"{self.head}{PROBES[0]}{text}"]) == [whole[: -self._num_dropped]]
        return text if same else self.tail

    @property
    def classes(self) -> tuple[str, ...]:
        """The labels that a linear head scores; () where the model writes their words."""
        return ()

    @property
    def multi_label(self) -> bool:
        """Whether each label is scored by itself, since a row may have several or none."""
        return False

    @property
    def num_answer_tokens(self) -> int:
        """Tokens of the longest answer in a sequence."""
        return max(map(len, self.answers))

    @property
    def num_fixed_tokens(self) -> int:
        """Tokens of a sequence that are not its message: the template and the longest answer."""
        return len(self._stem_ids([""])[0]) + self.num_answer_tokens

    def stems(self, messages: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each conversation up to its answer, messages truncated to fit.

        Of a message that is read in windows it is the first one.
        """
        return [windows[0] for windows in self.windows(messages, most=1)]

    def windows(self, messages: Sequence[str], most: int | None = None) -> list[list[list[int]]]:
        """Return the stems of each message: one, or several where it is read in windows.

        Args:
            messages: The messages.
            most: Windows of a message that are wanted; None for all.
        """
        found = [[stem] for stem in self._stem_ids(messages)]
        room = self.max_length - self.num_answer_tokens
        for index, (stem,) in enumerate(found):
            if len(stem) > room:
                message = messages[index].strip()
                if self.kept == "windows":
                    found[index] = self._windows(message, room, most)
                else:
                    found[index] = [self._cut(message, room)]
        return found

    def rows(self, messages: Sequence[str], labels: Sequence[str]) -> list[TokenSequence]:
        """Return the sequences to train on, one for each message and its label.

        Those of a message that is read in windows weigh 1 together.
        """
        return [row for rows in self.rows_by_message(messages, labels) for row in rows]

    def rows_by_message(
        self, messages: Sequence[str], labels: Sequence[str]
    ) -> list[list[TokenSequence]]:
        """Return the same as `rows`, those of each message together."""
        place = {label: index for index, label in enumerate(self.labels)}
        return [
            [self._row(stem, label, place, 1 / len(stems)) for stem in stems]
            for stems, label in zip(self.windows(messages), labels, strict=True)
        ]

    def _row(
        self, stem: list[int], label: str, place: Mapping[str, int], weight: float
    ) -> TokenSequence:
        return TokenSequence([*stem, *self.answers[place[label]]], len(stem), weight)

    def count_cut(self, messages: Sequence[str], batch_size: int = 1024) -> int:
        """Return how many messages are too long and will be truncated."""
        return len(self._too_long(messages, batch_size))

    def count_windows(self, messages: Sequence[str]) -> tuple[int, int]:
        """Return how many messages are read in several windows, and in how many together."""
        cut = self._too_long(messages)
        return len(cut), sum(len(windows) for message in cut for windows in self.windows([message]))

    def _too_long(self, messages: Sequence[str], batch_size: int = 1024) -> list[str]:
        room = self.max_length - self.num_answer_tokens
        # A token covers at least one byte, so short messages need not be tokenized.
        spare = room - len(self._stem_ids([""])[0])
        doubtful = [m for m in messages if 4 * len(m) > spare and len(m.encode()) > spare]
        return [
            message
            for batch in _batches(doubtful, batch_size)
            for message, stem in zip(batch, self._stem_ids(batch), strict=True)
            if len(stem) > room
        ]

    def is_plain(self, message: str) -> bool:
        """Whether a message stands in its conversation as it is, not truncated or respelled."""
        stem = self._stem_ids([message])[0]
        fits = len(stem) + self.num_answer_tokens <= self.max_length
        return fits and self._without_control_tokens(message) == message

    def _stem_ids(self, messages: Sequence[str]) -> list[list[int]]:
        texts = [
            f"{self.head}{self._without_control_tokens(message.strip())}{self.tail}"
            for message in messages
        ]
        stems = self._encode(texts)
        stems = [stem[: len(stem) - self._num_dropped] for stem in stems]
        if other := self._other_prefix:
            stems = [
                [*self.prefix, *stem[len(other) :]] if stem[: len(other)] == other else stem
                for stem in stems
            ]
        return stems

    def _without_control_tokens(self, message: str) -> str:
        """Break control tokens in a message into text, so that none can end its turn."""
        if self._control is None:
            return message
        return self._control.sub(lambda match: f"{match[0][0]} {match[0][1:]}", message)

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        encoded = self.tokenizer(
            list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False
        )
        ids: list[list[int]] = encoded["input_ids"]
        return ids

    def _cut(self, message: str, room: int) -> list[int]:
        """Return the stem of the longest part of `message` that fits into `room` tokens."""

        def cut(length: int) -> list[int]:
            return self._stem_ids([cutting.part(message, length, self.kept)])[0]

        return cut(cutting.longest(cut, room, len(message)))

    def _windows(self, message: str, room: int, most: int | None) -> list[list[int]]:
        """Return the stems of a message's windows; where they are is remembered."""
        if message not in self._spans:
            if len(self._spans) >= MAX_REMEMBERED:
                self._spans.clear()

            def cut(begin: int, end: int) -> list[int]:
                return self._stem_ids([message[begin:end]])[0]

            self._spans[message] = list(cutting.windows(message, cut, room))
        return self._stem_ids([message[a:b] for a, b in self._spans[message][:most]])

    def _find_answers(
        self, opening: str, ending: str, written: Sequence[str]
    ) -> tuple[tuple[tuple[int, ...], ...], int]:
        """Return each label's tokens, and how many tokens of a stem belong to the answer."""
        splits: set[tuple[tuple[tuple[int, ...], ...], int]] = set()
        for probe in PROBES:
            (stem,) = self._encode([f"{self.head}{probe}{self.tail}"])
            wholes = self._encode(
                [f"{self.head}{probe}{opening}{text}{ending}" for text in written]
            )
            # A tokenizer may merge the end of the prompt with the label; the answer begins before.
            start = min(common_prefix_length(stem, whole) for whole in wholes)
            splits.add((tuple(tuple(whole[start:]) for whole in wholes), len(stem) - start))
        if len(splits) > 1:
            raise ModelError(
                "the tokenizer merges the message and the label into one token, so the answer has "
                "no start of its own; use a chat template with a separator between them"
            )
        return splits.pop()

    def _find_prefix(self) -> tuple[int, ...]:
        prefix: Sequence[int]
        prefix, *others = self._stem_ids(PROBES)
        for other in others:
            prefix = prefix[: common_prefix_length(prefix, other)]
        return tuple(prefix)

    def _find_change(self, now: tuple[str, ...], rendered: Rendered) -> str:
        """Return a line on what this tokenizer renders otherwise, "" if nothing."""
        for text, trained in zip(now, rendered[:4], strict=True):
            if text != trained:
                start = max(0, common_prefix_length(text, trained) - 12)
                return (
                    f"the chat template now renders {text[start : start + 40]!r} where the model "
                    f"was trained with {trained[start : start + 40]!r}; what was trained is used"
                )
        own = list(self.prefix), [list(answer) for answer in self.answers]
        if own != (rendered.prefix, rendered.answers):
            return (
                "the tokenizer now gives other tokens for the prompt than in training; those of "
                "training are used"
            )
        return ""

    def _respell(self) -> dict[str, str]:
        """Return texts for labels with characters that the tokenizer has no tokens for.

        A small vocabulary may lack the underscore of `card_arrival`. Such a label is written with
        spaces if that helps, since unknown tokens do not tell labels apart.
        """
        unknown = self.tokenizer.unk_token_id
        plain = [label for label in self.labels if label not in self.label_texts]
        if unknown is None or not plain:
            return {}
        respelled: dict[str, str] = {}
        for label, ids in zip(plain, self._encode(plain), strict=True):
            if unknown in ids:
                respelled[label] = " ".join(re.split(r"[\W_]+", label)).strip()
        for (label, text), ids in zip(
            respelled.items(), self._encode(list(respelled.values()) or [""]), strict=False
        ):
            if not text or unknown in ids:
                raise ModelError(
                    f"this model's tokenizer has no tokens for the label {label!r}; "
                    f"give it another text with {_flag(label)}"
                )
        return respelled

    def _refuse_equal_answers(self) -> None:
        seen: dict[tuple[int, ...], str] = {}
        for label, answer in zip(self.labels, self.answers, strict=True):
            if answer in seen:
                raise ModelError(
                    f"this model's tokenizer encodes the labels {seen[answer]!r} and {label!r} as "
                    f"the same tokens; give one another text with {_flag(label)}"
                )
            seen[answer] = label

    def _refuse_long_template(self) -> None:
        """Refuse a template that fills the context, before each label is tokenized in it."""
        length = len(self._encode([f"{self.head}{self.tail}"])[0])
        if length >= self.max_length:
            raise ModelError(
                f"the template takes {length:,} of the {self.max_length:,} tokens of the context, "
                f"leaving no room for a message; {self._shorter}"
            )

    @property
    def _shorter(self) -> str:
        if self.list_labels:
            return "leave out --list-labels, or shorten the labels with --label-texts"
        return "shorten the instruction, or the labels with --label-texts"

    def _refuse_short_context(self) -> None:
        if self.num_fixed_tokens < self.max_length:
            return
        longest = max(range(len(self.labels)), key=lambda i: len(self.answers[i]))
        raise ModelError(
            f"the template and the longest label ({self.labels[longest]!r}, "
            f"{len(self.answers[longest])} tokens) take {self.num_fixed_tokens} of the "
            f"{self.max_length} tokens of the context, leaving no room for a message; "
            f"{self._shorter}"
        )


def _texts(tokenizer: Any, content: str, rendered: Rendered | None) -> tuple[str, ...]:
    """Return head, tail, opening and ending as a tokenizer renders them now."""
    try:
        return (*chat_template.ask(tokenizer, content), *chat_template.answer(tokenizer, content))
    except ModelError:
        if rendered is None:
            raise
        return ("", "", "", "")  # the template was broken since


def common_prefix_length(first: Sequence[Any], second: Sequence[Any]) -> int:
    """Return the number of leading elements in which two sequences agree."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


def _batches(items: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    return (items[i : i + size] for i in range(0, len(items), size))


def _flag(label: str) -> str:
    """Return the flag that gives a label another text, quoted for the shell whatever the label."""
    return f"--label-texts {shlex.quote(json.dumps({label: 'TEXT'}, ensure_ascii=False))}"

"""The search of label probabilities by rows: each message, then each path of the label trie.

The prefix that all messages share is computed once, each message once behind it, and the model's
own cache is kept. Paths of the label trie continue copies of it, and their states are thrown away:
a deeper path begins at the end of its message again, since answers are short. So paths of any
length can be padded on the right. Messages cannot, for they are continued: those of one length are
computed together.

Some models forget their state if they get several tokens at once: they compute a message from its
beginning, and each path token by token. A model whose cache cannot be continued or copied computes
each path behind its whole row. Both are slower, and exact as well. A first comparison decides.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from remora.runtime import memory
from remora.tree.check import same_logits
from remora.tree.label_search import Asked, Chosen, LabelSearch, Search, look_below
from remora.tree.row_states import RowStates, cache_argument
from remora.tree.rows import head_at, padded

CACHED = 4
"""Tokens whose keys and values are copied in a pass, for each token that may be computed in it."""

Tokens = tuple[int, ...]


class RowSearch(LabelSearch):
    """Searches the labels of messages with a model whose rows cannot branch."""

    _prefix: RowStates | None = None

    def groups(self, asked: Sequence[Asked]) -> Iterator[list[Asked]]:
        """Cut stems into groups: of one length and one beginning, where states are kept."""
        group: list[Asked] = []
        before = (0, 0)
        for each in sorted(asked, key=lambda each: (self._kind(each[0]), each[0])):
            past, length = self._kind(each[0])
            size = len(group) + 1
            fits = size * (length - past) <= self.max_tokens and size <= self.most_kept
            fits &= size * length <= CACHED * self.max_tokens
            if group and not (fits and (before == (past, length) or not self.is_cached)):
                yield group
                group = []
            group.append(each)
            before = past, length
        if group:
            yield group

    def search(self, asked: Sequence[Asked]) -> list[Search]:
        """Search the label trie behind each stem of a group, one pass or a few per round."""
        searches = [self.begin(true) for _, true in asked]
        paths = _Paths(self, [stem for stem, _ in asked], searches)
        answers = [() if true is None else self.prompt.answers[true][:-1] for _, true in asked]
        paths.begin(searches, [tuple(answer) for answer in answers])
        while chosen := self.choose(searches):
            for part in self.passes(chosen):
                paths.extend(part)
        return searches

    @property
    def remark(self) -> str | None:
        """Why labels take longer than they could; None if they do not."""
        if self.continued == "in steps":
            return "scoring is slow: this model continues a row token by token only"
        if self.continued is None:
            return "scoring is slow: this model keeps no states, so each label takes its whole row"
        return None

    @property
    def is_cached(self) -> bool:
        """Whether the states of a message can be kept."""
        return self.continued is not None

    @functools.cached_property
    def continued(self) -> Literal["at once", "in steps"] | None:
        """How the model continues rows from its cache, up to rounding; None if it cannot."""
        if cache_argument(self.model) is None:
            return None
        was_training = self.model.training
        self.model.eval()
        ways: tuple[Literal["at once", "in steps"], ...] = ("at once", "in steps")
        found = next((way for way in ways if self._continues(in_steps=way == "in steps")), None)
        self.model.train(was_training)
        return found

    def _continues(self, *, in_steps: bool) -> bool:
        """Return whether a row computed in parts, beside another one, is as the whole row."""
        try:
            with torch.inference_mode():
                return self._same_in_parts(in_steps=in_steps)
        except (
            *(RuntimeError, TypeError, ValueError, LookupError, AttributeError, ImportError),
        ) as error:
            if memory.is_exhausted(error):
                raise
            return False

    def _same_in_parts(self, *, in_steps: bool) -> bool:
        (stem,), answer = self.prompt.stems([""]), max(self.prompt.answers, key=len)[:-1]
        half = 0 if in_steps else len(stem) // 2
        ends = range(len(stem) - 1, len(stem) + len(answer))
        whole = whole_rows(self.model, [[*stem, *answer]], ends)
        states = RowStates(self.model, in_steps=in_steps)
        if half:
            states.extend([stem[:half]], [0])
            states = states.select([0, 0])
        found = [states.extend([stem[half:], stem[half:][::-1]], [len(stem) - half - 1])]
        same = same_logits(self.model, found[0], whole[:1])
        for _ in range(2 if answer else 0):  # the second time shows whether a copy is one
            ends = range(len(answer), 2 * len(answer))
            found = [states.select([1, 0]).extend([answer, answer], ends)]
            same &= same_logits(self.model, found[0], whole[1:])
        return same

    def _kind(self, stem: Tokens) -> tuple[int, int]:
        """Return how many tokens of a stem are in the states of the prefix, and its length."""
        prefix = self.prompt.prefix
        # A message may, rarely, be tokenized together with the prefix's end.
        begins = (
            self.continued == "at once"
            and len(stem) > len(prefix)
            and stem[: len(prefix)] == prefix
        )
        return (len(prefix) if begins else 0), len(stem)

    def states(self, stems: Sequence[Tokens]) -> tuple[RowStates, Tensor]:
        """Return the states of stems of one kind, and the logits at their ends, [R, V]."""
        past, length = self._kind(stems[0])
        before = RowStates(self.model, in_steps=self.continued == "in steps")
        if past:
            if self._prefix is None:
                self._prefix = RowStates(self.model)
                self._prefix.extend([self.prompt.prefix], [past - 1])
            before = self._prefix
        states = before.select([0] * len(stems))
        width = length - past
        ends = range(width - 1, len(stems) * width, width)
        return states, states.extend([stem[past:] for stem in stems], ends)


class _Paths:
    """The paths of the label trie that have been computed behind the stems of a group."""

    def __init__(
        self, searching: RowSearch, stems: Sequence[Tokens], searches: Sequence[Search]
    ) -> None:
        self._searching, self._stems = searching, stems
        self._row_of = {id(search): row for row, search in enumerate(searches)}
        self._states: RowStates | None = None
        self._tokens: list[Tokens] = [()]  # that lead to each position; position 0 is the root

    def begin(self, searches: Sequence[Search], answers: Sequence[Tokens]) -> None:
        """Compute the stems, and behind each the beginning of its true answer, where known."""
        rows = range(len(searches))
        if self._searching.is_cached:
            self._states, ends = self._searching.states(self._stems)
        else:
            ends = self._logits([(row, (), 1) for row in rows])
        known = [row for row in rows if answers[row]]
        below = self._logits([(row, answers[row], len(answers[row])) for row in known])
        parts = dict(
            zip(known, torch.split(below, [len(answers[row]) for row in known]), strict=True)
        )
        chains = []
        for search, answer in zip(searches, answers, strict=True):
            positions = [0, *self._positions([answer[: end + 1] for end in range(len(answer))])]
            chains.append((search, self._searching.nodes(answer), 0.0, positions))
        pieces = [x for row in rows for x in (ends[row, None], parts.get(row, ends[:0]))]
        look_below(chains, torch.cat(pieces))

    def extend(self, chosen: Sequence[Chosen]) -> None:
        """Compute paths below open nodes."""
        self._searching.before_pass()
        wanted, chains = [], []
        for search, opened, nodes in chosen:
            first = (*self._tokens[opened.parent], opened.token)
            rest = [next(iter(node.children)) for node in nodes[:-1]]
            tokens = [(*first, *rest[:end]) for end in range(len(nodes))]
            wanted.append((self._row_of[id(search)], tokens[-1], len(nodes)))
            chains.append((search, nodes, opened.log_probability, self._positions(tokens)))
        look_below(chains, self._logits(wanted))

    def _positions(self, paths: Sequence[Tokens]) -> list[int]:
        """Return positions for some paths, by which deeper ones find them."""
        self._tokens.extend(paths)
        return list(range(len(self._tokens) - len(paths), len(self._tokens)))

    def _logits(self, wanted: Sequence[tuple[int, Tokens, int]]) -> Tensor:
        """Compute tokens behind stems; return logits at the ends of each, one after the other.

        Args:
            wanted: For each: the row of its stem, the tokens, and at how many of the last of them
                logits are wanted. Without states the stem is computed as well.
        """
        parts: dict[int, Tensor] = {}
        states, limit = self._states, self._searching.max_tokens
        rows = [tokens if states else (*self._stems[row], *tokens) for row, tokens, _ in wanted]
        waiting = sorted(range(len(rows)), key=lambda index: len(rows[index]), reverse=True)
        while waiting:
            # Those of about one length together
            width = len(rows[waiting[0]])
            past = states.length if states else 0
            most = max(1, min(limit // width, CACHED * limit // (past + width)))
            now, waiting = waiting[:most], waiting[most:]
            places = [
                line * width + place
                for line, index in enumerate(now)
                for place in range(len(rows[index]) - wanted[index][2], len(rows[index]))
            ]
            tokens = [rows[index] for index in now]
            if states:
                logits = states.select([wanted[index][0] for index in now]).extend(tokens, places)
            else:
                logits = whole_rows(self._searching.model, tokens, places)
            parts |= zip(now, torch.split(logits, [wanted[index][2] for index in now]), strict=True)
        found = [parts[index] for index in range(len(rows))]
        return torch.cat(found) if found else torch.empty(0)


def whole_rows(model: Any, rows: Sequence[Sequence[int]], places: Sequence[int]) -> Tensor:
    """Return logits at some places of padded rows, flattened, [places, vocabulary]."""
    device = next(model.parameters()).device
    with head_at(model, torch.tensor(places, device=device)):
        logits: Tensor = model(input_ids=padded(rows).to(device), use_cache=False).logits[0]
    return logits

"""Closed-set scoring: the probability of each label as the answer to a message.

A label's probability is that of its whole token sequence, end token included. The prefix that all
messages share is computed once and kept, and each message once; `tree_search` and `row_search` say
how, in either layout.

Most labels need not be explored. Probabilities only fall along a path, so the probability of a node
bounds every label below it, and also their sum. Best-first search with this bound finds the exact
argmax; it continues until unexplored labels hold less than `tolerance` of the probability.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from remora.data.prompt import Prompt
from remora.data.table import Table
from remora.evaluation.multi_label import indicators
from remora.evaluation.predictions import DEFAULT_THRESHOLD, Scored, ScoredSets
from remora.runtime import memory, sharding, threads
from remora.runtime.process_group import ProcessGroup
from remora.runtime.reporter import Reporter
from remora.runtime.stop import Stop
from remora.tree import layouts
from remora.tree.label_search import Asked, Search, TrueLabelSearch
from remora.tree.layouts import Layout
from remora.tree.row_search import RowSearch
from remora.tree.stems import Stem
from remora.tree.tree_search import TreeSearch

LOGIT_ELEMENTS = 1 << 25
"""Most logits that a scoring pass computes: 220 positions of a 151,936-word vocabulary."""

BATCH_ROWS = 256
"""Messages that are scored at a time."""

WINDOWS_TOLERANCE = 1e-2
"""Most tolerance of the windows of one message. What is averaged over them is the probability of
each label, so that of the likeliest one alone would not tell the likeliest of the mean."""

Advance: TypeAlias = Callable[[int], object]
"""Takes the number of messages that are done now."""


def ignore(num_done: int) -> None:
    """Do nothing with the number of messages that are done."""


def pooled(of_windows: NDArray[Any], num_windows: Sequence[int]) -> NDArray[Any]:
    """Return the means over the windows of each message, [messages, ...].

    Of probabilities, the mean is as near to its value with every label explored as they are, and a
    window without a clue, whose labels are about equally likely, changes no order of labels.

    Args:
        of_windows: What is found for each window, [windows, ...].
        num_windows: Windows of each message.
    """
    if len(num_windows) == len(of_windows):
        return of_windows
    begin = np.cumsum([0, *num_windows[:-1]])
    sums = np.add.reduceat(of_windows, begin, axis=0, dtype=np.float64)
    count = np.array(num_windows).reshape(-1, *[1] * (of_windows.ndim - 1))
    result: NDArray[Any] = (sums / count).astype(of_windows.dtype)
    return result


def most_kept(vocabulary: int) -> int:
    """Return the most positions at which a scoring pass computes logits."""
    return max(1, LOGIT_ELEMENTS // vocabulary)


Row = TypeVar("Row")


class Scorer:
    """Scores messages against a closed set of labels with one model."""

    def __init__(
        self,
        model: Any,
        prompt: Prompt,
        *,
        max_tokens: int = 2048,
        tolerance: float = 1e-2,
        autocast: torch.dtype | None = None,
        limit_bytes: int | None = None,
        layout: Layout | None = None,
    ) -> None:
        """Prepare the trie of labels; the prefix is computed with the first batch.

        Args:
            model: A causal language model, with an adapter or without; its weights must not change.
            prompt: How messages are asked and labels are answered.
            max_tokens: Most tokens in one packed row, unless one message needs more.
            tolerance: Maximum total probability left on unexplored labels. 0 explores every label;
                1 stops as soon as the most probable label is certain. A message that is read in
                windows gets at most `WINDOWS_TOLERANCE`.
            autocast: 16-bit type to compute in.
            limit_bytes: Memory of the process above which freed CPU memory is given back.
            layout: How messages are computed together; by default in the model's layout.
        """
        self.model = model
        self.prompt = prompt
        self.max_tokens = max_tokens
        self.tolerance = tolerance
        self.autocast = autocast
        self.limit_bytes = limit_bytes
        self.num_cut = self.num_windows = 0  # messages too long for one row, and their windows
        kind = TreeSearch if (layout or layouts.of(model)) == "tree" else RowSearch
        self._searching = kind(
            model=model,
            prompt=prompt,
            max_tokens=max_tokens,
            tolerance=tolerance,
            autocast=autocast,
            limit_bytes=limit_bytes,
            most_kept=most_kept(layouts.num_outputs(model)),
        )

    @property
    def remark(self) -> str | None:
        """What a user should know of how this model is scored; None if it is the usual way."""
        return self._searching.remark

    def probabilities(
        self, messages: Sequence[str], advance: Advance = ignore
    ) -> NDArray[np.float64]:
        """Return the probability of each label for each message, [messages, labels], rows sum to 1.

        Each is within `tolerance` of its value with every label explored, and the largest is the
        exact argmax; of a message that is read in windows, if it leads by more than the tolerance.

        Args:
            messages: The messages.
            advance: Called with the number of messages that are done now.
        """
        parts = [part for _, part in self.stream(messages, advance=advance)]
        return np.concatenate(parts) if parts else np.empty((0, len(self.prompt.labels)))

    def stream(
        self,
        messages: Iterable[str],
        batch_rows: int = BATCH_ROWS,
        advance: Advance = ignore,
    ) -> Iterator[tuple[list[str], NDArray[np.float64]]]:
        """Yield batches of messages with their probabilities, holding one batch at a time."""
        batch: list[str] = []
        for message in messages:
            batch.append(message)
            if len(batch) == batch_rows:
                yield batch, self._score(batch, advance)
                batch = []
        if batch:
            yield batch, self._score(batch, advance)

    def _score(self, messages: Sequence[str], advance: Advance) -> NDArray[np.float64]:
        windows = self._windows(messages)
        asked = [(stem, None) for stems in windows for stem in stems]
        searches = self._searched(asked, self._tolerances(windows), advance)
        found = np.stack([search.probabilities() for search in searches])
        return pooled(found, list(map(len, windows)))

    def evaluate(
        self, messages: Sequence[str], labels: Sequence[int], advance: Advance = ignore
    ) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
        """Return whether each message is classified correctly, and its loss in nats, [messages].

        Exact, for about the tokens of the messages with their labels. The loss is the cross entropy
        of the label's tokens, as in training, summed. A message that is read in windows is judged
        by its averaged probabilities, within its tolerance as those are, and so is its loss.

        Args:
            messages: The messages.
            labels: The true labels, as indices into the label set.
            advance: Called with the number of messages that are done now.
        """
        windows = self._windows(messages)
        asked = [
            (stem, None if len(stems) > 1 else label)
            for stems, label in zip(windows, labels, strict=True)
            for stem in stems
        ]
        searches = iter(self._searched(asked, self._tolerances(windows), advance))
        correct, losses = [], []
        for stems, label in zip(windows, labels, strict=True):
            own = [next(searches) for _ in stems]
            if isinstance(own[0], TrueLabelSearch):
                correct.append(own[0].is_correct)
                losses.append(own[0].loss)
                continue
            (row,) = pooled(np.stack([search.probabilities() for search in own]), [len(own)])
            correct.append(int(row.argmax()) == label)
            losses.append(-float(np.log(max(row[label], np.finfo(np.float64).tiny))))
        return np.array(correct, dtype=np.bool_), np.array(losses)

    def _windows(self, messages: Sequence[str]) -> list[list[Stem]]:
        """Return the stems of each message, and count those that are too long for one row."""
        windows = [[tuple(stem) for stem in stems] for stems in self.prompt.windows(messages)]
        if self.prompt.kept == "windows":
            several = [len(stems) for stems in windows if len(stems) > 1]
            self.num_cut += len(several)
            self.num_windows += sum(several)
        else:
            self.num_cut += self.prompt.count_cut(messages)
        return windows

    def _tolerances(self, windows: Sequence[Sequence[Stem]]) -> list[float]:
        """Return the tolerance of each window; a head knows all labels at once, whatever it is."""
        most = self.tolerance if self.prompt.classes else min(self.tolerance, WINDOWS_TOLERANCE)
        return [self.tolerance if len(own) == 1 else most for own in windows for _ in own]

    @property
    def told_cut(self) -> str | None:
        """A sentence on the messages that were too long so far; None if none were."""
        if not self.num_cut:
            return None
        are, were = ("message is", "was") if self.num_cut == 1 else ("messages are", "were")
        longer = f"{self.num_cut:,} {are} longer than {self.prompt.max_length:,} tokens and {were} "
        if self.prompt.kept == "windows":
            each = self.num_windows / self.num_cut
            return f"{longer}read in {self.num_windows:,} windows, {each:.1f} each"
        return f"{longer}truncated as in training (--truncate {self.prompt.kept})"

    @torch.inference_mode()
    def _searched(
        self, asked: Sequence[Asked], tolerances: Sequence[float], advance: Advance
    ) -> list[Search]:
        """Return the finished search of each message; equal ones are computed once.

        Those of one tolerance are searched together, so that no answer depends on the others.
        """
        was_training = self.model.training
        self.model.eval()
        found: dict[tuple[Asked, float], Search] = {}
        device = next(self.model.parameters()).device
        self._searching.check = functools.partial(advance, 0)
        with self._arithmetic():
            for tolerance in sorted(set(tolerances)):
                self._searching.tolerance = tolerance
                own = zip(asked, tolerances, strict=True)
                counts = Counter(each for each, wanted in own if wanted == tolerance)
                for group in self._searching.groups(sorted(counts)):
                    threads.adapt(device)
                    keys = [(each, tolerance) for each in group]
                    found |= zip(keys, self._searching.search(group), strict=True)
                    advance(sum(counts[each] for each in group))
        self.model.train(was_training)
        return [found[key] for key in zip(asked, tolerances, strict=True)]

    def _arithmetic(self) -> AbstractContextManager[Any]:
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(next(self.model.parameters()).device.type, self.autocast)


def evaluate_rows(
    scorer: Scorer,
    table: Table,
    what: str,
    reporter: Reporter,
    stop: Stop | None = None,
    group: ProcessGroup | None = None,
) -> tuple[float, float]:
    """Return the accuracy on a table, and the loss: the mean over answer tokens, in nats.

    Both are exact, see `Scorer.evaluate`; processes share the work as in `score_table`.

    Raises:
        Stopped: If the run was asked to stop.
    """
    place = {label: index for index, label in enumerate(scorer.prompt.labels)}
    true = [place[label] for label in table.labels]
    rows = list(zip(table.texts, true, strict=True))

    def evaluate(part: Sequence[tuple[str, int]], advance: Advance) -> NDArray[np.float64]:
        correct, losses = scorer.evaluate([t for t, _ in part], [i for _, i in part], advance)
        return np.stack([correct, losses], axis=1)

    correct, losses = _by_parts(scorer, rows, evaluate, what, reporter, stop, group).T
    num_tokens = sum(len(scorer.prompt.answers[index]) for index in true)
    return float(correct.mean()), float(losses.sum()) / num_tokens


def score_rows(
    scorer: Scorer,
    table: Table,
    what: str,
    reporter: Reporter,
    stop: Stop | None = None,
    group: ProcessGroup | None = None,
) -> Scored:
    """Return the probabilities of a table's rows beside their labels, or sets of labels.

    Raises:
        Stopped: If the run was asked to stop.
    """
    labels = scorer.prompt.labels
    place = {label: index for index, label in enumerate(labels)}
    if scorer.prompt.multi_label:
        return ScoredSets(
            probabilities=score_table(scorer, table.texts, what, reporter, stop, group),
            true=indicators(table.labels, labels),
            thresholds=np.full(len(labels), DEFAULT_THRESHOLD),
        )
    return Scored(
        probabilities=score_table(scorer, table.texts, what, reporter, stop, group),
        true=np.array([place[label] for label in table.labels], dtype=np.int64),
    )


def score_table(
    scorer: Scorer,
    texts: Sequence[str],
    what: str,
    reporter: Reporter,
    stop: Stop | None = None,
    group: ProcessGroup | None = None,
) -> NDArray[np.float64]:
    """Return probabilities [texts, labels] and report the progress.

    Of several processes each scores a part, and all get the whole result. With sharded weights a
    process that needs fewer passes joins those of the others, see `sharding.in_step`.

    Raises:
        Stopped: If the run was asked to stop.
    """
    return _by_parts(scorer, texts, scorer.probabilities, what, reporter, stop, group)


def _by_parts(
    scorer: Scorer,
    rows: Sequence[Row],
    compute: Callable[[Sequence[Row], Advance], NDArray[np.float64]],
    what: str,
    reporter: Reporter,
    stop: Stop | None,
    group: ProcessGroup | None,
) -> NDArray[np.float64]:
    """Return what is computed for each row, of several processes each computing a part."""
    group = group or ProcessGroup()
    parts, done, end = [], 0, 0

    def advance(num_done: int) -> None:
        """Tell the progress, taking the other processes to be as far as this one."""
        nonlocal done
        num_done = min(num_done * group.size, end - done)
        if num_done:
            done += num_done
            reporter.scoring(what, done, len(rows))
        if stop and group.size == 1:  # several processes stop together, after a batch
            stop.check()

    reporter.scoring(what, 0, len(rows))
    advance(0)
    for start in range(0, len(rows), BATCH_ROWS * group.size):
        memory.trim()  # training and scoring in turns fragment the heap
        batch = rows[start : start + BATCH_ROWS * group.size]
        end = start + len(batch)
        with sharding.in_step(scorer.model, group):
            own = compute(group.part(batch), advance)
        parts += group.gather_arrays(own)
        advance(len(batch))
        if stop:
            stop.check()
    memory.trim()
    return np.concatenate(parts)

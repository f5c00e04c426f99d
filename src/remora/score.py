"""Closed-set scoring: how probable each label is as the answer to a message.

A label's probability is that of its whole token sequence, end token included. All messages of a
batch, and below each of them the trie of the labels, form one packed row; what all messages begin
with is computed once and kept as a key-value cache.

Most labels need not be looked at. Probabilities only fall along a path, so the probability of a
node bounds every label below it, and also their sum. Best-first search with this bound finds the
exact argmax; it goes on until the labels not looked at hold less than `tolerance` of the
probability.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from remora import attention, memory, shard, tree
from remora.calibration import Scored
from remora.data import Table
from remora.progress import Reporter
from remora.prompt import Prompt, common_prefix_length
from remora.ranks import Ranks
from remora.stop import Stop

BATCH_ROWS = 256
"""Messages that are scored at a time."""


@dataclass(slots=True)
class _Node:
    """A node of the trie of the labels' token sequences."""

    children: dict[int, _Node] = field(default_factory=dict)  # by token
    label: int | None = None  # set where a label is complete
    labels_below: list[int] = field(default_factory=list)


@dataclass(slots=True)
class _Open:
    """A node that one message's search has reached and not yet looked below."""

    node: _Node
    token: int
    log_probability: float
    parent: int  # position of the token before in the packed row


@dataclass(slots=True)
class _Search:
    """What is known of one message: complete labels, and the open nodes that bound the others."""

    log_probabilities: NDArray[np.float64]  # [labels], -inf where not complete
    frontier: list[_Open] = field(default_factory=list)

    def choose(self, tolerance: float) -> list[_Open]:
        """Take from the frontier what must be looked below before the result is good enough."""
        best = float(self.log_probabilities.max())
        self.frontier.sort(key=lambda opened: opened.log_probability)
        bounds = np.array([opened.log_probability for opened in self.frontier])
        largest = max(best, bounds[-1] if len(bounds) else best)
        known = np.exp(self.log_probabilities - largest).sum()
        unknown = np.exp(bounds - largest)
        spare = unknown.cumsum() <= tolerance * (known + unknown.sum())
        if best > -math.inf:
            spare &= bounds < best
        elif len(spare):
            spare[-1] = False
        num_spare = int(spare.sum())  # the least probable ones, since the frontier is sorted
        chosen = self.frontier[num_spare:]
        del self.frontier[num_spare:]
        return chosen

    def probabilities(self) -> NDArray[np.float64]:
        """Return the labels' probabilities, summing to 1; an open node's is spread below it."""
        logs = self.log_probabilities.copy()
        for opened in self.frontier:
            below = opened.node.labels_below
            logs[below] = opened.log_probability - math.log(len(below))
        scaled = np.exp(logs - logs.max())
        result: NDArray[np.float64] = scaled / scaled.sum()
        return result


_Chosen: TypeAlias = tuple[_Search, _Open, list[_Node]]
"""A search, an open node of it, and the path below that is computed with it."""


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
    ) -> None:
        """Prepare the trie of labels; the prefix is computed with the first batch.

        Args:
            model: A causal language model, adapted or not; its weights must not change any more.
            prompt: How messages are asked and labels are answered.
            max_tokens: Most tokens in one packed row, unless one message needs more.
            tolerance: Most probability that the labels not looked at may hold together. 0 looks at
                every label; 1 stops as soon as the likeliest label is certain.
            autocast: 16-bit arithmetic to compute in.
            limit_bytes: Of the process on a processor; what it holds above and has freed is given
                back.
        """
        self.model = model
        self.prompt = prompt
        self.max_tokens = max_tokens
        self.tolerance = tolerance
        self.autocast = autocast
        self.limit_bytes = limit_bytes
        self._root = _trie(prompt.answers)
        self._most_kept = memory.most_kept(tree.text_config(model).vocab_size)
        self._prefix: tuple[tuple[int, ...], _PackedRow] | None = None

    def probabilities(self, messages: Sequence[str]) -> NDArray[np.float64]:
        """Return the probability of each label for each message, [messages, labels], rows sum to 1.

        Each is within `tolerance` of what looking at every label gives, and the largest is the
        exact argmax.
        """
        parts = [part for _, part in self.stream(messages)]
        return np.concatenate(parts) if parts else np.empty((0, len(self.prompt.labels)))

    def stream(
        self, messages: Iterable[str], batch_rows: int = BATCH_ROWS
    ) -> Iterator[tuple[list[str], NDArray[np.float64]]]:
        """Yield batches of messages with their probabilities, holding one batch at a time."""
        batch: list[str] = []
        for message in messages:
            batch.append(message)
            if len(batch) == batch_rows:
                yield batch, self._score(batch)
                batch = []
        if batch:
            yield batch, self._score(batch)

    @torch.inference_mode()
    def _score(self, messages: Sequence[str]) -> NDArray[np.float64]:
        was_training = self.model.training
        self.model.eval()
        stems = [tuple(stem) for stem in self.prompt.stems(messages)]
        found: dict[tuple[int, ...], NDArray[np.float64]] = {}
        with self._arithmetic():
            for group in self._groups(sorted(set(stems))):
                for stem, search in zip(group, self._search(group), strict=True):
                    found[stem] = search.probabilities()
        self.model.train(was_training)
        return np.stack([found[stem] for stem in stems])

    def _arithmetic(self) -> AbstractContextManager[Any]:
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(next(self.model.parameters()).device.type, self.autocast)

    def _groups(self, stems: Sequence[tuple[int, ...]]) -> Iterator[list[tuple[int, ...]]]:
        """Cut sorted stems into groups of at most `max_tokens` computed tokens.

        After each stem logits are computed, so their number is limited too.
        """
        group: list[tuple[int, ...]] = []
        num_tokens = 0
        for stem in stems:
            added = len(stem) - common_prefix_length(
                group[-1] if group else self.prompt.prefix, stem
            )
            if group and (num_tokens + added > self.max_tokens or len(group) == self._most_kept):
                yield group
                group, num_tokens = [], 0
                added = len(stem) - common_prefix_length(self.prompt.prefix, stem)
            group.append(stem)
            num_tokens += added
        if group:
            yield group

    def _search(self, stems: Sequence[tuple[int, ...]]) -> list[_Search]:
        """Search the label trie below each of some sorted stems, one forward pass a round."""
        prefix, row = self._start(stems)
        searches = [_Search(np.full(len(self.prompt.labels), -np.inf)) for _ in stems]
        new: list[tuple[int, int]] = []
        ends: list[int] = []
        path, before = list(range(len(prefix))), prefix
        for stem in stems:
            del path[common_prefix_length(before, stem) :]
            for token in stem[len(path) :]:
                new.append((token, path[-1] if path else -1))
                path.append(row.length + len(new) - 1)
            ends.append(path[-1])
            before = stem
        logits = row.extend(new, ends)
        chains = [
            (search, [self._root], 0.0, [end]) for search, end in zip(searches, ends, strict=True)
        ]
        _look_below(chains, logits)
        waiting: list[tuple[_PackedRow, Sequence[_Search]]] = [(row, searches)]
        del row
        self._descend(waiting)
        return searches

    def _descend(self, waiting: list[tuple[_PackedRow, Sequence[_Search]]]) -> None:
        """Carry searches on, a forward pass or few a round, until all are good enough.

        Each row is taken off the list before it is parted, so that it is freed and its parts stay.
        """
        while waiting:
            row, searches = waiting.pop()
            chosen = [
                (search, opened, _chain(opened.node))
                for search in searches
                for opened in search.choose(self.tolerance)
            ]
            num_new = sum(len(nodes) for _, _, nodes in chosen)
            if row.length + num_new > self.max_tokens and len(searches) > 1:
                # Messages do not see each other: part them, so that no row grows too long.
                for search, opened, _ in chosen:
                    search.frontier.append(opened)
                halves = (searches[1::2], searches[::2])
                waiting += [(row.keep_only(half), half) for half in halves]
            elif chosen:
                for paths in self._passes(chosen):
                    self._extend(row, paths)
                waiting.append((row, searches))

    def _passes(self, chosen: Sequence[_Chosen]) -> Iterator[list[_Chosen]]:
        """Part the paths to compute so that no pass has too many logits."""
        part: list[_Chosen] = []
        num_kept = 0
        for found in chosen:
            num_new = len(found[2])
            if part and num_kept + num_new > self._most_kept:
                yield part
                part, num_kept = [], 0
            part.append(found)
            num_kept += num_new
        yield part

    def _extend(self, row: _PackedRow, chosen: Sequence[_Chosen]) -> None:
        """Compute paths below open nodes, in one pass."""
        if self.limit_bytes is not None:
            memory.keep_within(next(self.model.parameters()).device, self.limit_bytes)
        new: list[tuple[int, int]] = []
        chains = []
        for search, opened, nodes in chosen:
            start = row.length + len(new)
            tokens = [opened.token, *(next(iter(node.children)) for node in nodes[:-1])]
            parents = [opened.parent, *range(start, start + len(nodes) - 1)]
            new.extend(zip(tokens, parents, strict=True))
            positions = list(range(start, start + len(nodes)))
            chains.append((search, nodes, opened.log_probability, positions))
        logits = row.extend(new, [position for chain in chains for position in chain[3]])
        _look_below(chains, logits)

    def _start(self, stems: Sequence[tuple[int, ...]]) -> tuple[tuple[int, ...], _PackedRow]:
        """Return what the stems all begin with, of the prompt's prefix, and its packed row."""
        prefix = self.prompt.prefix
        for stem in stems:  # a message may, rarely, be tokenized together with the prefix's end
            prefix = prefix[: min(common_prefix_length(prefix, stem), len(stem) - 1)]
        if self._prefix is None or self._prefix[0] != prefix:
            row = _PackedRow(self.model, self.autocast)
            if prefix:
                row.extend([(token, i - 1) for i, token in enumerate(prefix)], [len(prefix) - 1])
            self._prefix = prefix, row
        return prefix, self._prefix[1].fork()


class _PackedRow:
    """One packed row of tokens that grows, its keys and values cached.

    A token sees what its parent sees, and itself.
    """

    def __init__(self, model: Any, autocast: torch.dtype | None) -> None:
        from transformers import DynamicCache

        self._model = model
        self._config = tree.text_config(model)
        first = next(model.parameters())
        self._device = first.device
        self._dtype = autocast or first.dtype
        self._cache = DynamicCache()
        self._depths: list[int] = []
        self._visible: list[NDArray[np.bool_]] = []  # for each token, over itself and those before

    @property
    def length(self) -> int:
        """Number of tokens in the row."""
        return len(self._depths)

    def fork(self) -> _PackedRow:
        """Return a copy that grows on its own."""
        other = _PackedRow(self._model, None)
        other._dtype = self._dtype
        for index, layer in enumerate(self._cache.layers):
            other._cache.update(layer.keys, layer.values, index)  # type: ignore[union-attr,arg-type]
        other._depths = list(self._depths)
        other._visible = list(self._visible)
        return other

    def keep_only(self, searches: Sequence[_Search]) -> _PackedRow:
        """Return a copy with only the tokens that some searches may still look at.

        The positions that their open nodes hold are made those of the copy.
        """
        seen = np.zeros(self.length, dtype=bool)
        frontier = [opened for search in searches for opened in search.frontier]
        for opened in frontier:
            seen[: opened.parent + 1] |= self._visible[opened.parent]
        places = np.cumsum(seen) - 1
        kept = torch.from_numpy(np.flatnonzero(seen)).to(self._device)
        other = _PackedRow(self._model, None)
        other._dtype = self._dtype
        for index, layer in enumerate(self._cache.layers):
            keys, values = (x.index_select(2, kept) for x in (layer.keys, layer.values))  # type: ignore[union-attr]
            other._cache.update(keys, values, index)
        other._depths = [self._depths[i] for i in kept.tolist()]
        other._visible = [self._visible[i][seen[: i + 1]] for i in kept.tolist()]
        for opened in frontier:
            opened.parent = int(places[opened.parent])
        return other

    def extend(self, new: Sequence[tuple[int, int]], keep: Sequence[int]) -> Tensor:
        """Compute new tokens.

        Args:
            new: Pairs of a token and the position of its parent in the row, -1 for none.
            keep: Positions of new tokens to return logits for.

        Returns:
            Logits [len(keep), vocabulary].
        """
        start, end = self.length, self.length + len(new)
        visible = np.zeros((len(new), end), dtype=bool)
        for index, (_, parent) in enumerate(new):
            if parent >= 0:
                visible[index, : parent + 1] = self._visible[parent]
            visible[index, start + index] = True
            self._visible.append(visible[index, : start + index + 1])
            self._depths.append(self._depths[parent] + 1 if parent >= 0 else 0)
        mask = torch.from_numpy(visible).to(self._device)
        depths = torch.tensor(self._depths, device=self._device)

        def within(window: int | None) -> Tensor:
            if window is None:
                return mask
            return mask & (depths[start:, None] - depths[None, :] < window)

        output = self._model(
            input_ids=torch.tensor([[token for token, _ in new]], device=self._device),
            position_ids=depths[None, start:],
            **attention.inputs(self._config, within, self._dtype),
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=torch.tensor(keep, device=self._device) - start,
        )
        logits: Tensor = output.logits[0]
        return logits


def _look_below(
    chains: Sequence[tuple[_Search, list[_Node], float, list[int]]], logits: Tensor
) -> None:
    """Score the children of the nodes of each chain; complete labels and open nodes are noted.

    Args:
        chains: A message's search, the nodes of a path in it, the log-probability of the first and
            the nodes' positions in the packed row.
        logits: [nodes of all chains, vocabulary], in the same order.
    """
    edges = [list(node.children) for _, nodes, _, _ in chains for node in nodes]
    rows = [index for index, tokens in enumerate(edges) for _ in tokens]
    targets = [token for tokens in edges for token in tokens]
    scores = iter(_log_probabilities(logits, rows, targets))
    for search, nodes, log_probability, positions in chains:
        total = log_probability
        for index, (node, position) in enumerate(zip(nodes, positions, strict=True)):
            following = nodes[index + 1] if index + 1 < len(nodes) else None
            before = total
            for token, child in node.children.items():
                reached = before + next(scores)
                if child is following:
                    total = reached
                elif child.label is not None:
                    search.log_probabilities[child.label] = reached
                else:
                    search.frontier.append(_Open(child, token, reached, position))


def _log_probabilities(logits: Tensor, rows: Sequence[int], targets: Sequence[int]) -> list[float]:
    """Return log softmax(logits)[rows, targets], in nats, the normalizer in float32 at least."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    step = max(1, (1 << 21) // logits.shape[-1])
    normalizers = [part.to(wide).logsumexp(-1) for part in torch.split(logits, step)]
    normalizer = torch.cat(normalizers)
    row_index = torch.tensor(rows, device=logits.device)
    target_index = torch.tensor(targets, device=logits.device)
    chosen = logits[row_index, target_index].to(wide) - normalizer[row_index]
    result: list[float] = chosen.tolist()
    return result


def _chain(node: _Node) -> list[_Node]:
    """Return the path from a node on, for as long as it does not branch or complete a label."""
    nodes = [node]
    while len(node.children) == 1:
        (node,) = node.children.values()
        if node.label is not None:
            break
        nodes.append(node)
    return nodes


def _trie(answers: Sequence[Sequence[int]]) -> _Node:
    root = _Node()
    for label, answer in enumerate(answers):
        node = root
        for token in answer:
            node = node.children.setdefault(token, _Node())
            node.labels_below.append(label)
        node.label = label
    return root


def score_rows(
    scorer: Scorer,
    table: Table,
    what: str,
    reporter: Reporter,
    stop: Stop | None = None,
    ranks: Ranks | None = None,
) -> Scored:
    """Return the probabilities of a table's rows beside their labels; raises Stopped."""
    place = {label: index for index, label in enumerate(scorer.prompt.labels)}
    return Scored(
        probabilities=score_table(scorer, table.texts, what, reporter, stop, ranks),
        true=np.array([place[label] for label in table.labels], dtype=np.int64),
    )


def score_table(
    scorer: Scorer,
    texts: Sequence[str],
    what: str,
    reporter: Reporter,
    stop: Stop | None = None,
    ranks: Ranks | None = None,
) -> NDArray[np.float64]:
    """Return probabilities [texts, labels] and report the progress; raises Stopped.

    With several processes each scores a part, and all get all. Where their weights are sharded, who
    needs fewer passes computes along until all have done theirs.
    """
    ranks = ranks or Ranks()
    parts = []
    for start in range(0, len(texts), BATCH_ROWS * ranks.size):
        memory.trim()  # training and scoring, taking turns, leave free memory in pieces
        batch = texts[start : start + BATCH_ROWS * ranks.size]
        with shard.in_step(scorer.model, ranks):
            own = scorer.probabilities(ranks.part(batch))
        parts += ranks.gather_arrays(own)
        reporter.scoring(what, start + len(batch), len(texts))
        if stop:
            stop.check()
    memory.trim()
    return np.concatenate(parts)

"""Best-first search over the trie of the labels' token sequences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(slots=True)
class Node:
    """A node of the trie of the labels' token sequences."""

    children: dict[int, Node] = field(default_factory=dict)  # by token
    label: int | None = None  # set where a label is complete
    labels_below: list[int] = field(default_factory=list)


@dataclass(slots=True)
class Open:
    """A node that one message's search has reached but not expanded."""

    node: Node
    token: int
    log_probability: float
    parent: int  # position of the token before in the packed row


@dataclass(slots=True)
class Search:
    """The search of one message: complete labels, and open nodes that bound the others."""

    log_probabilities: NDArray[np.float64]  # [labels], -inf where not complete
    frontier: list[Open] = field(default_factory=list)

    def choose(self, tolerance: float) -> list[Open]:
        """Take from the frontier the nodes to expand before the result is within tolerance."""
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


@dataclass(slots=True)
class TrueLabelSearch(Search):
    """The search for a label more probable than the true one, whose own path is computed first.

    It ends as soon as there is one, or there can be none. A full search goes on until it knows how
    probable the other labels are, which takes a model that is unsure many times the tokens.
    """

    true: int = 0
    width: int = 1  # nodes that are expanded next; doubled each round, so that rounds are few

    @property
    def is_correct(self) -> bool:
        """Whether the true label is the most probable one, once nothing is left to choose."""
        return int(self.log_probabilities.argmax()) == self.true

    @property
    def loss(self) -> float:
        """Cross entropy of the true label's tokens, summed, in nats."""
        return -float(self.log_probabilities[self.true])

    def choose(self, tolerance: float) -> list[Open]:
        """Take from the frontier the most probable nodes that may lead to a better label."""
        bound = self.log_probabilities[self.true]
        self.frontier = [opened for opened in self.frontier if opened.log_probability > bound]
        if not self.is_correct:
            self.frontier.clear()
        self.frontier.sort(key=lambda opened: -opened.log_probability)
        chosen = self.frontier[: self.width]
        del self.frontier[: self.width]
        self.width *= 2
        return chosen


Chosen: TypeAlias = tuple[Search, Open, list[Node]]
"""A search, one of its open nodes, and the path below that is computed with it."""


def look_below(
    chains: Sequence[tuple[Search, list[Node], float, list[int]]], logits: Tensor
) -> None:
    """Score the children of the nodes of each chain; record complete labels and open nodes.

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
                    search.frontier.append(Open(child, token, reached, position))


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


def chain(node: Node) -> list[Node]:
    """Return the path from a node to the next branch or complete label."""
    nodes = [node]
    while len(node.children) == 1:
        (node,) = node.children.values()
        if node.label is not None:
            break
        nodes.append(node)
    return nodes


def trie(answers: Sequence[Sequence[int]]) -> Node:
    """Return the trie of the labels' token sequences."""
    root = Node()
    for label, answer in enumerate(answers):
        node = root
        for token in answer:
            node = node.children.setdefault(token, Node())
            node.labels_below.append(label)
        node.label = label
    return root

"""Best-first search over the trie of the labels' token sequences."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from remora.data.levels import Hierarchy
from remora.data.prompt import Prompt
from remora.runtime import memory


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
    parent: int  # position of the token before, in the packed row or among the paths of a group


@dataclass(slots=True)
class Search:
    """The search of one message: complete labels, and open nodes that bound the others."""

    log_probabilities: NDArray[np.float64]  # [labels], -inf where not complete
    each_by_itself: ClassVar[bool] = False  # whether scores are logits of independent labels
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
class LabelSetSearch(Search):
    """The scores of labels that exclude none of each other; one pass completes all of them."""

    each_by_itself: ClassVar[bool] = True

    def probabilities(self) -> NDArray[np.float64]:
        """Return the probability of each label by itself: the logistic function of its logit."""
        from scipy.special import expit

        result: NDArray[np.float64] = expit(self.log_probabilities)
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
    by_itself = chains[0][0].each_by_itself
    scores = iter(_log_probabilities(logits, rows, targets, normalized=not by_itself))
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


def _log_probabilities(
    logits: Tensor, rows: Sequence[int], targets: Sequence[int], *, normalized: bool
) -> list[float]:
    """Return log softmax(logits)[rows, targets], in nats, the normalizer in float32 at least.

    Not normalized they are the logits.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    if not normalized:
        plain: list[float] = logits[rows, targets].to(wide).tolist()
        return plain
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


def nodes_not_in_trie(answers: Sequence[Sequence[int]], hierarchy: Hierarchy) -> list[str]:
    """Return the nodes of a hierarchy whose labels are not all those below a node of the trie.

    None are where a token ends between the parts of each label, as with ` > ` in byte-level
    tokenizers. Then the search bounds and prunes whole levels at once. Elsewhere labels share fewer
    tokens; probabilities stay as exact. A label that is itself the parent of others ends above.
    """
    found = {frozenset(range(len(answers)))}
    open_nodes = [trie(answers)]
    while open_nodes:
        node = open_nodes.pop()
        found.add(frozenset(node.labels_below))
        open_nodes += node.children.values()
    missing = []
    for level in range(1, hierarchy.depth):
        places = hierarchy.places(level)
        for node_place, name in enumerate(hierarchy.names(level)):
            labels = np.flatnonzero(places == node_place).tolist()
            below = frozenset(i for i in labels if len(hierarchy.paths[i]) > level)
            if len(below) > 1 and below not in found:
                missing.append(name)
    return missing


Asked: TypeAlias = "tuple[tuple[int, ...], int | None]"
"""A stem, and its true label to evaluate it, None for the probabilities of all labels."""


@dataclass(kw_only=True)
class LabelSearch(ABC):
    """Searches the labels of messages with one model, in one of the layouts.

    Attributes:
        model: A causal language model, in evaluation mode while it is searched.
        prompt: How messages are asked and labels are answered.
        max_tokens: Most tokens computed at once, unless one message needs more.
        tolerance: Maximum total probability left on unexplored labels.
        autocast: 16-bit type to compute in.
        limit_bytes: Memory of the process above which freed CPU memory is given back.
        most_kept: Most positions at which a pass computes logits.
        check: Called before each pass below the stems; raises where a search is to end at once.
    """

    model: Any
    prompt: Prompt
    max_tokens: int
    tolerance: float
    autocast: torch.dtype | None
    limit_bytes: int | None
    most_kept: int
    check: Callable[[], object] = lambda: None

    def __post_init__(self) -> None:
        """Prepare the trie of the labels."""
        self._root = trie(self.prompt.answers)

    @abstractmethod
    def groups(self, asked: Sequence[Asked]) -> Iterator[list[Asked]]:
        """Cut sorted stems into groups that are searched together."""

    @abstractmethod
    def search(self, asked: Sequence[Asked]) -> list[Search]:
        """Return the finished searches of a group."""

    @property
    def remark(self) -> str | None:
        """What a user should know of this search; None if it is the usual one."""
        return None

    def begin(self, true: int | None) -> Search:
        """Return a new search: of all labels, or whether the true one is the most probable."""
        unknown = np.full(len(self.prompt.labels), -np.inf)
        if self.prompt.multi_label:
            return LabelSetSearch(unknown)
        return Search(unknown) if true is None else TrueLabelSearch(unknown, true=true)

    def nodes(self, tokens: Sequence[int]) -> list[Node]:
        """Return the nodes of the label trie from its root along some tokens."""
        nodes = [self._root]
        for token in tokens:
            nodes.append(nodes[-1].children[token])
        return nodes

    def choose(self, searches: Sequence[Search]) -> list[Chosen]:
        """Return the paths that some searches need next."""
        return [
            (search, opened, chain(opened.node))
            for search in searches
            for opened in search.choose(self.tolerance)
        ]

    def passes(self, chosen: Sequence[Chosen]) -> Iterator[list[Chosen]]:
        """Split the paths to compute so that no pass has too many logits."""
        part: list[Chosen] = []
        num_kept = 0
        for path in chosen:
            num_new = len(path[2])
            if part and num_kept + num_new > self.most_kept:
                yield part
                part, num_kept = [], 0
            part.append(path)
            num_kept += num_new
        yield part

    def before_pass(self) -> None:
        """Stop if that was asked for; give freed memory back if there is more than the limit."""
        self.check()
        if self.limit_bytes is not None:
            memory.keep_within(next(self.model.parameters()).device, self.limit_bytes)

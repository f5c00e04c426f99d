"""The token tree: a batch of token sequences as one trie, every shared token computed once.

The rows of a classification batch share their beginning: the chat template, the instruction, often
the list of labels. The trie of a batch, laid out in depth-first preorder, is ONE row of N tokens:

    token_ids     [N]
    position_ids  [N]  depth in the trie: rotary and learned positions are those of the unpacked row
    subtree_end   [N]  exclusive end of the node's subtree, in preorder

    query q may see key k  iff  k <= q < subtree_end[k]     (k is an ancestor of q, or q itself)

The head is computed only at `predictors`, the nodes below which an answer token is predicted. The
loss is sum(weight * cross entropy) / sum(weight) over the edges of the trie, where the weight of an
edge counts the rows that are supervised on it. The edge of a class leads to no node. Where a row
has a set of classes, its loss is the mean binary cross entropy of all classes at its last token.
Gradients flow through the shared nodes, so they equal those of padded rows, up to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from remora.data.prompt import TokenSequence, common_prefix_length

if TYPE_CHECKING:  # typing has it from Python 3.11 on
    from typing_extensions import Self


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Sequences that are computed at once, in either layout. P predictors, E supervised edges."""

    token_ids: Tensor  # int64, [N] in a tree, [B, S] in padded rows
    predictors: Tensor  # [P] int64, places among all tokens where the head is computed
    edge_predictors: Tensor  # [E] int64, indices into `predictors`
    edge_targets: Tensor  # [E] int64, the token that the edge leads to, or the class
    edge_weights: Tensor  # [E] float32, the sum over the rows supervised on the edge
    num_rows: int
    num_row_tokens: int  # tokens of all rows before packing, without padding
    row_weights: Tensor | None = None
    """[P] float32, the sum over the rows that end there, where each class is a question of its own:
    the edges lead to the classes that are true, and all others are false. None where one is."""

    @property
    def num_tokens(self) -> int:
        """The number of tokens that are computed, padding included."""
        return self.token_ids.numel()

    @property
    def num_supervised_tokens(self) -> int:
        """Answer tokens or classes of all rows: the sum of the edge weights; a set counts once."""
        weights = self.edge_weights if self.row_weights is None else self.row_weights
        return int(weights.sum())

    def to(self, device: torch.device | str) -> Self:
        """Return the same with its tensors on `device`."""
        tensors = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **tensors)  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class TokenTree(MicroBatch):
    """A batch of sequences, packed. N nodes."""

    position_ids: Tensor  # [N] int64
    subtree_end: Tensor  # [N] int64

    def path(self, row: TokenSequence) -> list[int]:
        """Return the nodes of a row from the root down, [] if the row is not in this tree."""
        nodes: list[int] = []
        start, end = 0, self.num_tokens
        for depth, token in enumerate(row.token_ids):
            here = (self.position_ids[start:end] == depth) & (self.token_ids[start:end] == token)
            found = here.nonzero()
            if not len(found):
                return []
            nodes.append(start + int(found[0]))
            start, end = nodes[-1] + 1, int(self.subtree_end[nodes[-1]])
        return nodes


def build(rows: Sequence[TokenSequence]) -> TokenTree:
    """Pack rows into one token tree.

    Args:
        rows: Token sequences with a prompt and an answer.
    """
    token_ids: list[int] = []
    position_ids: list[int] = []
    subtree_end: list[int] = []
    parents: list[int] = []
    weights: list[float] = []
    classes: dict[tuple[int, int], float] = {}  # weights by predictor and class
    ends: dict[int, float] = {}  # weights by predictor, where classes are sets
    path: list[int] = []  # nodes of the row before, from the root down
    before: list[int] = []
    # The trie in preorder: each sorted row adds its tokens below those that it shares.
    for row in sorted(rows, key=lambda row: row.token_ids):
        assert row.answer_start > 0 < row.num_targets, "a row needs a prompt and an answer"
        shared = common_prefix_length(before, row.token_ids)
        for node in path[shared:]:
            subtree_end[node] = len(token_ids)
        del path[shared:]
        for depth in range(shared, len(row.token_ids)):
            parents.append(path[-1] if path else -1)
            path.append(len(token_ids))
            token_ids.append(row.token_ids[depth])
            position_ids.append(depth)
            subtree_end.append(-1)
            weights.append(0.0)
        for node in path[row.answer_start :]:
            weights[node] += row.weight
        if row.class_index is not None or row.class_set is not None:
            for target in row.targets:
                edge = path[-1], target
                classes[edge] = classes.get(edge, 0.0) + row.weight
        if row.class_set is not None:
            ends[path[-1]] = ends.get(path[-1], 0.0) + row.weight
        before = row.token_ids
    for node in path:
        subtree_end[node] = len(token_ids)

    # The supervised edges, each from its predictor.
    edges = [(parents[i], token_ids[i], weight) for i, weight in enumerate(weights) if weight]
    edges += [(*edge, weight) for edge, weight in classes.items()]
    predictors = sorted(ends or {node for node, _, _ in edges})
    place = {node: index for index, node in enumerate(predictors)}
    return TokenTree(
        token_ids=torch.tensor(token_ids),
        position_ids=torch.tensor(position_ids),
        subtree_end=torch.tensor(subtree_end),
        predictors=torch.tensor(predictors),
        edge_predictors=torch.tensor([place[node] for node, _, _ in edges], dtype=torch.int64),
        edge_targets=torch.tensor([target for _, target, _ in edges], dtype=torch.int64),
        edge_weights=torch.tensor([weight for _, _, weight in edges], dtype=torch.float32),
        num_rows=len(rows),
        num_row_tokens=sum(len(row.token_ids) for row in rows),
        row_weights=torch.tensor([ends[node] for node in predictors]) if ends else None,
    )


def split(rows: Sequence[TokenSequence], max_tokens: int) -> list[TokenTree]:
    """Cut rows into trees of at most `max_tokens` computed tokens; a longer row is alone.

    Rows are sorted by their tokens first, so that rows which share most are in one tree. The order
    within an effective batch does not change sums over it.
    """
    trees: list[TokenTree] = []
    group: list[TokenSequence] = []
    num_tokens = 0
    for row in sorted(rows, key=lambda row: row.token_ids):
        added = len(row.token_ids)
        if group:
            added -= common_prefix_length(group[-1].token_ids, row.token_ids)
        if group and num_tokens + added > max_tokens:
            trees.append(build(group))
            group, num_tokens, added = [], 0, len(row.token_ids)
        group.append(row)
        num_tokens += added
    if group:
        trees.append(build(group))
    return trees


def filled(tree: TokenTree) -> TokenTree:
    """Return a tree padded to sizes that many trees share; the loss stays the same.

    Each size becomes a multiple of an eighth of the power of two below it. An added token sees only
    itself, an added predictor has only added edges, and those have weight 0.
    """
    num_tokens = _full_size(tree.num_tokens)
    # At least one predictor is added, for the added edges to start from.
    size = _full_size(1 + max(len(tree.predictors), len(tree.edge_weights)))
    own = torch.arange(tree.num_tokens, num_tokens)

    def fill(tensor: Tensor, size: int, value: int = 0) -> Tensor:
        return functional.pad(tensor, (0, size - len(tensor)), value=value)

    return replace(
        tree,
        token_ids=fill(tree.token_ids, num_tokens),
        position_ids=fill(tree.position_ids, num_tokens),
        subtree_end=torch.cat([tree.subtree_end, own + 1]),
        predictors=fill(tree.predictors, size),
        edge_predictors=fill(tree.edge_predictors, size, size - 1),
        edge_targets=fill(tree.edge_targets, size),
        edge_weights=fill(tree.edge_weights, size),
        row_weights=None if tree.row_weights is None else fill(tree.row_weights, size),
    )


def _full_size(size: int) -> int:
    step = max(32, (1 << size.bit_length()) // 16)
    return -(-size // step) * step

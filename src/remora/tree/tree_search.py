"""The search of label probabilities in packed rows: messages, and the label trie below each.

All messages of a group, and below each of them the trie of the labels, form one packed row; the
prefix that all messages share is computed once and kept as a key-value cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from remora.tree.label_search import Asked, Chosen, LabelSearch, Node, Search, look_below
from remora.tree.packed_row import PackedRow
from remora.tree.stems import Stem, StemPacker


class TreeSearch(LabelSearch):
    """Searches the labels of messages with a model whose attention follows the tree."""

    def __post_init__(self) -> None:
        """Prepare to pack."""
        super().__post_init__()
        self._packer = StemPacker(
            self.model, self.prompt, max_tokens=self.max_tokens, autocast=self.autocast
        )

    def groups(self, asked: Sequence[Asked]) -> Iterator[list[Asked]]:
        """Cut sorted stems into groups that are searched together."""
        return self._packer.groups(asked, self._size, self.most_kept)

    def _path(self, asked: Asked) -> tuple[tuple[int, ...], list[Node]]:
        """Return the tokens to compute first, and the nodes of the label trie among them.

        Those are the conversation up to its answer, and the true label where it is known.
        """
        stem, true = asked
        answer = () if true is None else self.prompt.answers[true][:-1]
        return (*stem, *answer), self.nodes(answer)

    def _size(self, asked: Asked) -> tuple[Stem, int]:
        """Return the tokens to compute first, and at how many of them logits are."""
        tokens, nodes = self._path(asked)
        return tokens, len(nodes)

    def search(self, asked: Sequence[Asked]) -> list[Search]:
        """Search the label trie below each stem of a group, one forward pass per round."""
        paths = [self._path(each) for each in asked]
        row, new, positions = self._packer.pack(
            [stem for stem, _ in asked], [tokens for tokens, _ in paths]
        )
        chains: list[tuple[Search, list[Node], float, list[int]]] = []
        for (stem, true), (_, nodes), places in zip(asked, paths, positions, strict=True):
            chains.append((self.begin(true), nodes, 0.0, places[len(stem) - 1 :]))
        logits = row.extend(new, [position for chain in chains for position in chain[3]])
        look_below(chains, logits)
        searches = [chain[0] for chain in chains]
        waiting: list[tuple[PackedRow, Sequence[Search]]] = [(row, searches)]
        del row
        self._descend(waiting)
        return searches

    def _descend(self, waiting: list[tuple[PackedRow, Sequence[Search]]]) -> None:
        """Continue searches, one forward pass or a few per round, until all are within tolerance.

        Each row leaves the list before it is split, so that it is freed while its parts stay.
        """
        while waiting:
            row, searches = waiting.pop()
            chosen = self.choose(searches)
            num_new = sum(len(nodes) for _, _, nodes in chosen)
            if row.length + num_new > self.max_tokens and len(searches) > 1:
                # Messages do not see each other: split them, so that no row grows too long.
                for search, opened, _ in chosen:
                    search.frontier.append(opened)
                halves = (searches[1::2], searches[::2])
                waiting += [(row.keep_only(half), half) for half in halves]
            elif chosen:
                for paths in self.passes(chosen):
                    self._extend(row, paths)
                waiting.append((row, searches))

    def _extend(self, row: PackedRow, chosen: Sequence[Chosen]) -> None:
        """Compute paths below open nodes, in one pass."""
        self.before_pass()
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
        look_below(chains, logits)

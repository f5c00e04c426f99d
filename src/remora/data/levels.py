"""Labels as a hierarchy: with the separator ` > `, `card > arrival` is a label below `card`.

The first level has the first part of each label, the second the first two parts, and so on. A label
of fewer parts stands for itself at the levels that it does not reach, and a label may be the parent
of others.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from remora.errors import DataError
from remora.formatting import listed, quote


@dataclass(frozen=True)
class Hierarchy:
    """The nodes of each level of a label set.

    Attributes:
        labels: The closed label set, in the order of the scores.
        separator: What stands between the parts of a label. Spaces around parts are no part of it.
    """

    labels: tuple[str, ...]
    separator: str

    @functools.cached_property
    def paths(self) -> tuple[tuple[str, ...], ...]:
        """The parts of each label."""
        return tuple(
            tuple(part.strip() for part in label.split(self.separator)) for label in self.labels
        )

    @property
    def depth(self) -> int:
        """The number of levels: the parts of the longest label."""
        return max(map(len, self.paths))

    def names(self, level: int) -> tuple[str, ...]:
        """Return the nodes of a level, from 1, as the first label below each writes them."""
        return self._levels[level - 1][0]

    def places(self, level: int) -> NDArray[np.int64]:
        """Return the place of each label's node among the names of a level, [labels]."""
        return self._levels[level - 1][1]

    def probabilities(self, level: int, of_labels: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the probability of each node, the sum over the labels below, [rows, nodes]."""
        places = self.places(level)
        below = np.zeros((len(places), len(self.names(level))))  # [labels, nodes]
        below[np.arange(len(places)), places] = 1.0
        result: NDArray[np.float64] = of_labels @ below
        return result

    @functools.cached_property
    def _levels(self) -> list[tuple[tuple[str, ...], NDArray[np.int64]]]:
        levels = []
        for level in range(1, self.depth + 1):
            names: dict[tuple[str, ...], str] = {}
            for label, path in zip(self.labels, self.paths, strict=True):
                parts = label.split(self.separator)[:level]
                names.setdefault(path[:level], self.separator.join(parts).strip())
            order = {node: place for place, node in enumerate(names)}
            places = np.array([order[path[:level]] for path in self.paths], dtype=np.int64)
            levels.append((tuple(names.values()), places))
        return levels

    def refuse_broken(self) -> None:
        """Refuse labels that are no hierarchy.

        Raises:
            DataError: If no label has the separator, one has an empty part, or two differ in the
                spaces around their parts only.
        """
        if self.depth == 1:
            raise DataError(
                f"no label has the separator {quote(self.separator)}, they are such as "
                f"{listed(self.labels)}; correct --label-separator, or leave it out"
            )
        seen: dict[tuple[str, ...], str] = {}
        for label, path in zip(self.labels, self.paths, strict=True):
            if not all(path):
                raise DataError(
                    f"the label {quote(label)} has an empty part beside a separator "
                    f"{quote(self.separator)}; correct it, or give it a name with --rename-labels"
                )
            if path in seen:
                raise DataError(
                    f"the labels {quote(seen[path])} and {quote(label)} differ only in the spaces "
                    "around their parts; make them one with --rename-labels"
                )
            seen[path] = label

    def lines(self) -> Iterator[str]:
        """Yield sentences on the levels."""
        counts = [f"{len(self.names(level)):,}" for level in range(1, self.depth + 1)]
        yield f"labels of {self.depth} levels: {', then '.join(counts)} by level"
        if num_short := sum(len(path) < self.depth for path in self.paths):
            yield (
                f"{num_short:,} of {len(self.labels):,} labels have fewer levels, and stand for "
                "themselves at those below"
            )
        parents = {path[:end] for path in self.paths for end in range(1, len(path))}
        own = zip(self.labels, self.paths, strict=True)
        if both := [label for label, path in own if path in parents]:
            yield f"also the parents of other labels: {listed(both)}"


def hierarchy_of(labels: Sequence[str], separator: str | None) -> Hierarchy | None:
    """Return the hierarchy of some labels, None without a separator."""
    return Hierarchy(tuple(labels), separator) if separator else None

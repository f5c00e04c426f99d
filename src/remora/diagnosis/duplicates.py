"""Near-duplicate texts: nearest neighbours, and test rows that are in training too."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from remora.data.dataset import Dataset
from remora.evaluation.neighbours import character_ngrams

NUM_NEIGHBOURS = 5
NEAR = 0.9
"""Cosine of character n-grams from which texts are near-duplicates."""


def nearest(
    texts: Sequence[str], count: int, block: int = 512
) -> tuple[NDArray[np.int64], list[tuple[int, int]]]:
    """Return the nearest other texts of each, [texts, count], and the near-duplicate pairs."""
    _, matrix = character_ngrams(texts)
    count = min(count, len(texts) - 1)
    found = np.empty((len(texts), count), dtype=np.int64)
    near: list[tuple[int, int]] = []
    for start in range(0, len(texts), block):
        cosine = (matrix[start : start + block] @ matrix.T).toarray()
        rows = np.arange(len(cosine))
        cosine[rows, start + rows] = -1
        found[start + rows] = np.argsort(-cosine, axis=1, kind="stable")[:, :count]
        near += [(start + int(i), int(j)) for i, j in np.argwhere(cosine >= NEAR) if start + i < j]
    return found, near


def nearest_to(
    texts: Sequence[str], places: Sequence[int], count: int, block: int = 64
) -> list[list[tuple[int, float]]]:
    """Return for some of the texts the nearest others, as their places and cosines."""
    if not places:
        return []
    _, matrix = character_ngrams(texts)
    found = []
    for start in range(0, len(places), block):
        part = np.array(places[start : start + block])
        cosine = (matrix[part] @ matrix.T).toarray()
        cosine[np.arange(len(part)), part] = -1
        order = np.argsort(-cosine, axis=1, kind="stable")[:, : min(count, len(texts) - 1)]
        found += [
            [(int(i), float(row[i])) for i in near] for row, near in zip(cosine, order, strict=True)
        ]
    return found


def same(texts: Sequence[str]) -> list[tuple[int, int]]:
    """Return pairs of texts that are the same but for case and spaces, each with the next one."""
    last: dict[str, int] = {}
    pairs = []
    for place, text in enumerate(map(_plain, texts)):
        if text in last:
            pairs.append((last[text], place))
        last[text] = place
    return pairs


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def num_exact(dataset: Dataset) -> int:
    """Return how many test texts are training texts, ignoring case and spaces."""
    known = {_plain(text) for text in dataset.train.texts}
    return sum(_plain(text) in known for text in (dataset.test.texts if dataset.test else ()))


def num_near(dataset: Dataset, block: int = 512) -> int:
    """Return how many test texts are near-duplicates of a training text, exact ones included."""
    if dataset.test is None or not len(dataset.test):
        return 0
    vectorizer, matrix = character_ngrams(dataset.train.texts)
    test = vectorizer.transform(dataset.test.texts)
    blocks = (test[i : i + block] @ matrix.T for i in range(0, len(dataset.test), block))
    return sum(int((part.max(1).toarray() >= NEAR).sum()) for part in blocks)

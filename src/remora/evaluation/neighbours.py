"""The training texts nearest to the messages that a run gets wrong, kept for its report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from remora.data import splits
from remora.data.table import Table
from remora.errors import DataError
from remora.evaluation import results
from remora.formatting import cut
from remora.runtime import files

FILE = "neighbours.json"
NUM_NEIGHBOURS = 5
EXCERPT_CHARS = 200
"""Characters of a training text that are kept."""

MAX_MISTAKES = 1_000
MAX_TRAIN_CHARS = 2_000_000
"""Characters of the training texts that are looked at: 1,000 messages of Banking77 among so many,
33,628 rows, took 3.6 s on one core, 600 among its 10,003 rows 1.0 s."""


@dataclass(frozen=True, kw_only=True)
class TrainingText:
    """A training row."""

    row: int  # in the table that was trained on, from 1
    text: str  # cut
    label: str


@dataclass(frozen=True, kw_only=True)
class Neighbours:
    """The nearest training texts of some messages, the nearest first."""

    num_rows: int  # training rows that were looked at
    num_all_rows: int
    texts: tuple[TrainingText, ...]
    nearest: dict[int, tuple[int, ...]]  # row in predictions.csv, from 1, to places in `texts`


NONE = Neighbours(num_rows=0, num_all_rows=0, texts=(), nearest={})


def character_ngrams(texts: Sequence[str]) -> tuple[Any, Any]:
    """Return a fitted vectorizer of counted character n-grams and its matrix, rows of length 1."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 5), use_idf=False)
    return vectorizer, vectorizer.fit_transform(texts)


def find(
    train: Table, texts: Sequence[str], rows: Sequence[int], seed: int, block: int = 64
) -> Neighbours:
    """Find the training texts nearest to some messages, by the cosine of character n-grams.

    Of a large table rows are sampled, stratified by label, so that it takes a few seconds at most.

    Args:
        train: The training rows.
        texts: The messages.
        rows: Their rows in predictions.csv, from 1; the first `MAX_MISTAKES` are looked at.
        seed: Of the sample.
        block: Messages that are compared at once.
    """
    rows, texts = rows[:MAX_MISTAKES], [cut(text) for text in texts[:MAX_MISTAKES]]
    num_chars = sum(map(len, train.texts))
    fitting = len(train) * MAX_TRAIN_CHARS // max(num_chars, MAX_TRAIN_CHARS)
    places = splits.sample_rows(train.labels, max(fitting, NUM_NEIGHBOURS), seed)
    known = [train.texts[place] for place in places]
    try:
        vectorizer, matrix = character_ngrams(known)
    except ValueError:  # no text has a character that is no space
        return NONE
    found: list[list[int]] = []
    for start in range(0, len(texts), block):
        cosines = (vectorizer.transform(texts[start : start + block]) @ matrix.T).toarray()
        found += [_largest(cosine) for cosine in cosines]
    used = sorted({place for near in found for place in near})
    number = {place: index for index, place in enumerate(used)}
    return Neighbours(
        num_rows=len(places),
        num_all_rows=len(train),
        texts=tuple(
            TrainingText(
                row=train.places[places[place]] + 1,
                text=cut(known[place], EXCERPT_CHARS),
                label=train.labels[places[place]],
            )
            for place in used
        ),
        nearest={
            row: tuple(number[place] for place in near)
            for row, near in zip(rows, found, strict=True)
        },
    )


def _largest(cosine: NDArray[np.float64]) -> list[int]:
    """Return the places of the largest cosines above 0, the largest first; of equals, the first."""
    count = min(NUM_NEIGHBOURS, len(cosine))
    least = np.partition(cosine, -count)[-count]
    places = np.flatnonzero(cosine >= max(least, np.finfo(np.float64).tiny))
    return [int(place) for place in places[np.argsort(-cosine[places], kind="stable")][:count]]


def write(directory: Path, neighbours: Neighbours) -> None:
    """Keep neighbours in a run directory.

    Raises:
        ResourceError: If the disk is full.
    """
    files.write_json(directory / FILE, asdict(neighbours))


def read(directory: Path) -> Neighbours:
    """Return the neighbours that a run has kept; none if it has not, or someone broke the file."""
    try:
        kept = results.read_json(directory / FILE)
        if kept is None:
            return NONE
        texts = tuple(TrainingText(**each) for each in kept["texts"])
        nearest = {int(row): tuple(near) for row, near in kept["nearest"].items()}
        assert all(0 <= place < len(texts) for near in nearest.values() for place in near)
        return Neighbours(
            num_rows=int(kept["num_rows"]),
            num_all_rows=int(kept["num_all_rows"]),
            texts=texts,
            nearest=nearest,
        )
    except (DataError, AssertionError, AttributeError, KeyError, TypeError, ValueError):
        return NONE

"""Rare words that occur with one label only: a model may learn them instead of the meaning."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from dataclasses import dataclass

from remora.data.table import Table

LEAST_ROWS = 5
MOST_ROWS = 0.01
"""A word in more than this share of the rows is not rare."""


@dataclass(frozen=True, kw_only=True)
class TiedToken:
    """A rare word that occurs with one label only."""

    token: str
    label: str
    num_rows: int  # that have the word, all with this label
    share: float  # of the label's rows


def tied(rows: Table) -> tuple[TiedToken, ...]:
    """Return the rare words of one label, the most frequent first.

    With many labels, a word in five rows hardly ever occurs with one label by chance. Names of
    senders, order numbers and signatures are such words, and so are words of the subject: a person
    has to tell them apart.
    """
    labels: dict[str, Counter[str]] = defaultdict(Counter)
    for text, label in zip(rows.texts, rows.labels, strict=True):
        for token in set(re.findall(r"\w+", text.casefold())):
            labels[token][label] += 1
    sizes = Counter(rows.labels)
    most = max(LEAST_ROWS, MOST_ROWS * len(rows))
    found = [
        TiedToken(token=token, label=label, num_rows=count, share=count / sizes[label])
        for token, counts in labels.items()
        if len(counts) == 1
        for label, count in counts.items()
        if LEAST_ROWS <= count <= most
    ]
    return tuple(sorted(found, key=lambda each: (-each.num_rows, each.token)))

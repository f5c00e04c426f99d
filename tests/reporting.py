"""A run to report on, one whose every word is hostile, and a page read back."""

from __future__ import annotations

from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import finished
import hostile

LABELS = ["card arrival", "refund", "top up", "pin", "limit"]
TRUE = [i % 5 for i in range(100)]
PREDICTED = [*TRUE]
for row in (8, 28, 48, 68, 88):  # pins that are taken for refunds
    PREDICTED[row] = 1
for row in (0, 40, 80, 1, 41, 81):  # card arrivals and refunds that are taken for limits
    PREDICTED[row] = 4


def write(path: Path) -> Path:
    texts = [f"message {i}" for i in range(100)]
    return finished.write(path, labels=LABELS, texts=texts, true=TRUE, predicted=PREDICTED)


def write_hostile(path: Path) -> tuple[Path, Path]:
    """A run whose every word is hostile, and one of the same shape whose words are harmless."""
    count, num_labels = len(hostile.TEXTS), len(hostile.LABELS)
    true = [i % num_labels for i in range(count)]
    predicted = [(t + i % 3) % num_labels for i, t in enumerate(true)]
    runs = []
    for name, texts, labels, note in (
        (hostile.ATTACKS[1].replace("/", ""), hostile.TEXTS, hostile.LABELS, hostile.ATTACKS[0]),
        (
            "harmless",
            [f"text {i}" for i in range(count)],
            [f"label {i}" for i in range(num_labels)],
            "note",
        ),
    ):
        shape = {"true": true, "predicted": predicted}
        run = finished.write(path / name, labels=labels, texts=texts, note=note, **shape)
        finished.diagnose(run, labels, note)
        runs.append(run)
    return runs[0], runs[1]


class Read(HTMLParser):
    """What a page holds: tags, attributes, the contents of scripts, and the rows of tables."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str | None]] = []
        self.code: list[str] = []
        self.tables: dict[str, list[list[str]]] = {}
        self._open: list[str] = []
        self._rows: list[list[str]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        self.attributes += attrs
        self._open.append(tag)
        match tag:
            case "table":
                self._rows = []
            case "caption":
                self._caption = ""
            case "tr":
                self._rows.append([])
            case "td" | "th":
                self._rows[-1].append("")

    def handle_endtag(self, tag):
        if tag == "table":
            self.tables[self._caption] = self._rows
        if tag in self._open:
            del self._open[len(self._open) - 1 - self._open[::-1].index(tag) :]

    def handle_data(self, data):
        inside = self._open[-1] if self._open else ""
        if inside in {"script", "style"}:
            self.code.append(data)
        elif "caption" in self._open:
            self._caption += data
        elif {"td", "th"} & set(self._open):
            self._rows[-1][-1] += data
        else:
            self.text += data


def table(read: Read, caption: str) -> list[list[str]]:
    (name,) = (name for name in read.tables if name.startswith(caption))
    return read.tables[name]

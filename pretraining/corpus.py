"""The texts that the model is pretrained on, and the many tasks that are made of them.

CLINC150 and SNIPS with their intents, and one-line messages to booking, hotel and bank services
without any. No text of Banking77 and none of the sample table is among them: whatever occurs there
too is dropped and counted.
"""

from __future__ import annotations

import csv
import os
import random
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).parents[1]
SHARED = Path(os.environ.get("REMORA_SHARED", ROOT.parent / "shared")) / "data"
SAMPLE = ROOT / "src" / "remora" / "samples" / "support"

INSTRUCTIONS = (
    "Classify the message.",
    "Classify this message.",
    "What is the intent of the message?",
    "Choose the label that fits the message.",
    "Sort the message into one of the classes.",
    "Write the intent of the customer.",
    "What does the customer want?",
    "Read the message and answer with one label.",
    "Which topic is this about?",
    "Label the text.",
    "",
)
"""Said before a message. The first is Remora's own, and is taken half of the time."""


@dataclass(frozen=True)
class Task:
    """One way to label texts: a label's name, and the texts that carry it."""

    name: str
    members: dict[str, list[int]]  # by label, indices into the texts


def read() -> tuple[list[str], list[Task], list[str]]:
    """Return all texts without repeats, the tasks that people have labelled, and our own texts."""
    refused = _held_out()
    texts: list[str] = []
    place: dict[str, int] = {}
    tasks: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    dropped = 0
    for source, text, label in _rows():
        key = normalized(text)
        if not key:
            continue
        if key in refused:
            dropped += 1
            continue
        if key not in place:
            place[key] = len(texts)
            texts.append(text)
        if label is not None:
            tasks[source][label].append(place[key])
    print(f"{len(texts):,} texts; {dropped} left out, being in Banking77 or the sample table too")
    own = [texts[place[k]] for k in map(normalized, _own_texts()) if k in place]
    return texts, [Task(name, dict(members)) for name, members in tasks.items()], own


def spliced(texts: Sequence[str], count: int, seed: int) -> list[str]:
    """Return new texts: two to four in a row, or the beginning of one with the end of another."""
    rng = random.Random(seed)
    result = []
    while len(result) < count:
        if rng.random() < 0.6:
            parts = rng.sample(texts, rng.choice((2, 2, 2, 3, 3, 4)))
            text = rng.choice((" ", ". ", ", ")).join(parts)
            if len(text.split()) <= 70:
                result.append(text)
            continue
        first, second = rng.choice(texts).split(), rng.choice(texts).split()
        if len(first) > 3 < len(second) and len(first) + len(second) <= 40:
            left, right = rng.randint(2, len(first) - 1), rng.randint(1, len(second) - 2)
            result.append(" ".join([*first[:left], *second[right:]]))
    return result


def exchanged(texts: Sequence[str], words: Sequence[str], count: int, seed: int) -> list[str]:
    """Return new texts: one or two words of a text exchanged for any of the teacher's words.

    So words that the corpus lacks get a meaning too.
    """
    rng = random.Random(seed)
    result = []
    while len(result) < count:
        text = rng.choice(texts).split()
        if 2 < len(text) <= 40:
            for at in rng.sample(range(len(text)), rng.randint(1, 2)):
                text[at] = rng.choice(words)
            result.append(" ".join(text))
    return result


def unseen(texts: Sequence[str]) -> list[str]:
    """Return the texts that are not in Banking77 or the sample table."""
    refused = _held_out()
    kept = [text for text in texts if normalized(text) not in refused]
    print(f"{len(texts) - len(kept)} of {len(texts):,} made texts left out for the same reason")
    return kept


def normalized(text: str) -> str:
    """Return a text without case, punctuation and spacing."""
    return " ".join(re.findall(r"\w+", text.casefold()))


def _rows() -> list[tuple[str, str, str | None]]:
    rows: list[tuple[str, str, str | None]] = []
    for source, names in (
        ("clinc150", ("train", "val", "test", "oos_train", "oos_val", "oos_test")),
        ("snips", ("train", "test")),
    ):
        for name in names:
            for row in _csv(SHARED / source / f"{name}.csv"):
                label = None if name.startswith("oos") else row["category"]
                rows.append((source, row["text"], label))
    lines = (SHARED / "service_utterances" / "utterances.txt").read_text("utf-8").splitlines()
    rows += [("service_utterances", line.strip(), None) for line in lines]
    return rows + [("own", text, None) for text in _own_texts()]


def _own_texts() -> list[str]:
    """Return the messages written for this project, one by one, to services of many kinds."""
    paths = sorted((Path(__file__).parent / "texts").glob("*.txt"))
    return [line.strip() for path in paths for line in path.read_text("utf-8").splitlines()]


def _held_out() -> set[str]:
    paths = [SHARED / "banking77" / "train.csv", SHARED / "banking77" / "test.csv"]
    paths += [SAMPLE / "train.csv", SAMPLE / "test.csv"]
    return {normalized(row["text"]) for path in paths for row in _csv(path)}


def _csv(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def clustered(
    texts: Sequence[str], embeddings: NDArray[np.float32], sizes: Sequence[int]
) -> list[Task]:
    """Return tasks nobody has labelled: clusters of alike texts, named by their telling words.

    They make the label sets many and the borders between labels fine, and use the unlabelled texts.
    """
    from sklearn.cluster import MiniBatchKMeans
    from sklearn.feature_extraction.text import TfidfVectorizer

    tasks = []
    for size in sizes:
        found = MiniBatchKMeans(
            size, init="random", n_init=1, max_iter=5, batch_size=4_096, random_state=0
        ).fit_predict(embeddings)
        groups: dict[int, list[int]] = defaultdict(list)
        for index, cluster in enumerate(found.tolist()):
            groups[cluster].append(index)
        groups = {k: v for k, v in groups.items() if len(v) >= 4}
        vectorizer = TfidfVectorizer(
            stop_words="english", token_pattern=r"[a-z]{3,}", sublinear_tf=True, max_df=0.2
        )
        weights = vectorizer.fit_transform(" ".join(texts[i] for i in v) for v in groups.values())
        words = vectorizer.get_feature_names_out()
        members: dict[str, list[int]] = {}
        for row, rows in zip(weights, groups.values(), strict=True):
            order = row.indices[np.argsort(-row.data)]
            for count in (2, 3, 4, 5):
                name = "_".join(words[i] for i in order[:count])
                if name and name not in members:
                    members[name] = rows
                    break
        tasks.append(Task(f"clusters-{size}", members))
    return tasks


def respelled(label: str, style: int) -> str:
    """Write a label's name in one of the ways that people write names."""
    words = re.findall(r"[A-Z]?[a-z]+|\d+|[A-Z]+", label)
    match style:
        case 0:
            return "_".join(words).lower()
        case 1:
            return " ".join(words).lower()
        case 2:
            return "-".join(words).lower()
        case 3:
            return "".join(word.capitalize() for word in words)
        case 4:
            return " ".join(words).capitalize()
        case 5:
            return "_".join(words).upper()
    return label


def roughened(text: str, rng: random.Random) -> str:
    """Return a text as somebody in a hurry may write it; most are left as they are."""
    draw = rng.random()
    if draw < 0.2:
        text = text.lower()
    elif draw < 0.3:
        text = re.sub(r"[^\w\s]", "", text)
    elif draw < 0.35:
        text = text.capitalize()
    words = text.split()
    if len(words) > 4 and rng.random() < 0.2:
        words.pop(rng.randrange(len(words)))
        text = " ".join(words)
    if len(text) > 12 and rng.random() < 0.15:
        for _ in range(1 + len(text) // 60):
            at = rng.randrange(1, len(text) - 1)
            kind = rng.randrange(3)
            if kind == 0:
                text = text[:at] + text[at + 1] + text[at] + text[at + 2 :]
            elif kind == 1:
                text = text[:at] + text[at + 1 :]
            else:
                text = text[:at] + text[at] + text[at:]
    return text

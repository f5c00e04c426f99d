"""Labels of messages by ONNX Runtime, without torch; needs onnxruntime and tokenizers.

Give messages as arguments, or lines on standard input: python client.py "where is my card"
Each gets a line, a blank one an empty line.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

PROVIDERS = ("CUDAExecutionProvider", "CPUExecutionProvider")


class Classifier:
    """The classifier in a folder; `threads` of 0 takes all cores."""

    def __init__(self, folder: str | Path, threads: int = 0) -> None:
        folder = Path(folder)
        told = json.loads((folder / "classifier.json").read_text(encoding="utf-8"))
        self.labels: list[str] = told["labels"]
        self.thresholds: list[float] = told["thresholds"]  # if a message may have several labels
        self.head, self.tail, self.max_length = told["head"], told["tail"], told["max_length"]
        self.control = re.compile(told["control_tokens"]) if told["control_tokens"] else None
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.session = onnxruntime.InferenceSession(
            str(folder / "model.onnx"),
            options,
            providers=[name for name in PROVIDERS if name in onnxruntime.get_available_providers()],
        )

    def token_ids(self, messages: list[str]) -> list[list[int]]:
        """Return the prompts as tokens; a message that does not fit loses its end."""
        texts = [message.strip() for message in messages]
        if self.control:  # a control token in a message is broken into text
            texts = [self.control.sub(lambda m: f"{m[0][0]} {m[0][1:]}", text) for text in texts]
        prompts = [f"{self.head}{text}{self.tail}" for text in texts]
        ids = [each.ids for each in self.tokenizer.encode_batch(prompts, add_special_tokens=False)]
        end = len(self.tokenizer.encode(self.tail, add_special_tokens=False).ids)
        room = self.max_length - end
        return [
            row if len(row) <= self.max_length else [*row[:room], *row[len(row) - end :]]
            for row in ids
        ]

    def probabilities(self, messages: list[str]) -> np.ndarray:
        """Return the probabilities, [messages, labels], in the order of `labels`."""
        rows = self.token_ids(messages)
        ids = np.zeros((len(rows), max(map(len, rows))), np.int64)
        mask = np.zeros_like(ids)
        for index, row in enumerate(rows):
            ids[index, : len(row)], mask[index, : len(row)] = row, 1
        (logits,) = self.session.run(None, {"input_ids": ids, "attention_mask": mask})
        if self.thresholds:
            each: np.ndarray = 1 / (1 + np.exp(-logits))
            return each
        odds = np.exp(logits - logits.max(axis=1, keepdims=True))
        shares: np.ndarray = odds / odds.sum(axis=1, keepdims=True)
        return shares

    def answers(self, messages: list[str]) -> list[list[tuple[str, float]]]:
        """Return the labels of each message, the most probable first, with their probabilities.

        A blank message has none.
        """
        found: list[list[tuple[str, float]]] = [[] for _ in messages]
        asked = [place for place, message in enumerate(messages) if message.strip()]
        rows = self.probabilities([messages[place] for place in asked]) if asked else ()
        for place, row in zip(asked, rows, strict=True):
            given = (
                [row.argmax()] if not self.thresholds else np.flatnonzero(row >= self.thresholds)
            )
            ranked = sorted(given, key=lambda index: -row[index])
            found[place] = [(self.labels[index], float(row[index])) for index in ranked]
        return found


def batches(messages: Iterable[str], size: int = 16) -> Iterator[list[str]]:
    """Yield lists of at most `size` messages."""
    waiting = iter(messages)
    while batch := list(islice(waiting, size)):
        yield batch


if __name__ == "__main__":
    classifier = Classifier(Path(__file__).parent)
    given = sys.argv[1:]
    for batch in batches(given or sys.stdin, len(given) or 1):
        for answer in classifier.answers(batch):
            sys.stdout.write("\t".join(f"{label}\t{p:.4f}" for label, p in answer) + "\n")
        sys.stdout.flush()

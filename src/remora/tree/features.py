"""Hidden states of a frozen base model for messages: what probes and the judges of a diagnosis see.

They are computed without labels, in one forward pass over packed rows. A run keeps those that it
has computed, so that a diagnosis need not compute them again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn import functional

from remora.data.prompt import Prompt
from remora.runtime import files, memory, threads
from remora.tree import layouts, rows
from remora.tree.stems import Stem, StemPacker

FEATURES = "features.safetensors"
"""The features that a run has computed, in its directory."""

NUM_PARTS = 5
LARGEST = float(np.finfo(np.float16).max)

Key = Mapping[str, str]
"""What features depend on beside the tokens of a message, by name."""


def key(base_sha256: str, method: str) -> Key:
    """Return the key of a base: its hash, and whether it is quantized."""
    return {"base": base_sha256, "quantized": str(method == "qlora")}


class Extractor:
    """Computes the features of messages with one model.

    Args:
        model: A causal language model as it was before training.
        prompt: How messages are asked.
        max_tokens: Most tokens in one packed row, unless one message needs more.
        autocast: 16-bit type to compute in.
        limit_bytes: Memory of the process above which freed CPU memory is given back.
    """

    def __init__(
        self,
        model: Any,
        prompt: Prompt,
        *,
        max_tokens: int = 2048,
        autocast: torch.dtype | None = None,
        limit_bytes: int | None = None,
    ) -> None:
        self._model, self._autocast, self._limit_bytes = model, autocast, limit_bytes
        self._device = next(model.parameters()).device
        self._packer = StemPacker(model, prompt, max_tokens=max_tokens, autocast=autocast)
        self._start, self._max_tokens = len(prompt.prefix), max_tokens

    @torch.inference_mode()
    def features(self, stems: Sequence[Stem]) -> NDArray[np.float16]:
        """Return the features of some stems, [stems, 5, H].

        The last two layers where the answer would begin, the very last one first; and the means of
        the embeddings, the middle layer and the last one over the tokens that messages do not
        share. docs/log.md compares choices.
        """
        was_training = self._model.training
        self._model.eval()
        found: dict[Stem, NDArray[np.float16]] = {}
        with torch.autocast(self._device.type, self._autocast, enabled=self._autocast is not None):
            for group in self._groups(sorted(set(stems))):
                if self._limit_bytes is not None:
                    memory.keep_within(self._device, self._limit_bytes)
                threads.adapt(self._device)
                found |= zip(group, self._of_group(group), strict=True)
        self._model.train(was_training)
        wanted = [found[stem] for stem in stems]
        return np.stack(wanted) if wanted else np.empty((0, NUM_PARTS, 0), np.float16)

    def _groups(self, stems: Sequence[Stem]) -> Iterator[list[Stem]]:
        """Cut sorted stems into groups that are computed together."""
        if layouts.of(self._model) == "rows":
            by_length = sorted(stems, key=len)
            return rows.groups(by_length, lambda stem: stem, self._max_tokens)
        return self._packer.groups(stems, lambda stem: (stem, 1), self._max_tokens)

    def _computed(self, group: Sequence[Stem]) -> tuple[Sequence[Tensor], list[list[int]]]:
        """Return the hidden states of all layers, [tokens, H] each, and the places of each stem.

        Of a prefix that was computed before there are none, and its places are negative.
        """
        if layouts.of(self._model) == "rows":
            return rows.hidden_states(self._model, group)
        row, new, paths = self._packer.pack(group, group)
        begin = row.length  # the positions of new tokens follow those of the prefix
        states = row.extend_states(new)
        return states, [[place - begin for place in path] for path in paths]

    def _of_group(self, group: Sequence[Stem]) -> NDArray[np.float16]:
        states, paths = self._computed(group)
        ends = torch.tensor([path[-1] for path in paths], device=self._device)
        parts = [states[-1][ends].float(), states[-2][ends].float()]  # [group, H]
        own = [path[min(self._start, len(path) - 1) :] for path in paths]
        places = torch.tensor(list(chain(*own)), device=self._device)
        starts = torch.tensor([0, *accumulate(map(len, own))][:-1], device=self._device)
        parts += [
            functional.embedding_bag(places, layer.float(), starts, mode="mean")
            for layer in (states[0], states[len(states) // 2], states[-1])
        ]
        together = torch.stack(parts, 1).clamp(-LARGEST, LARGEST)  # [group, 5, H]
        features: NDArray[np.float16] = together.half().cpu().numpy()
        return features


def digest(stem: Sequence[int]) -> int:
    """Return 64 bits that stand for a stem's tokens."""
    content = np.asarray(stem, dtype=np.int64).tobytes()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Features that a run has kept, and the seconds that they took."""

    features: dict[Stem, NDArray[np.float16]]  # [5, H] each
    seconds: float


NONE = Kept(features={}, seconds=0.0)


def write(
    path: Path, stems: Sequence[Stem], features: NDArray[np.float16], key: Key, seconds: float
) -> None:
    """Write features [stems, 5, H] with the digests of their stems, whole or not at all.

    Raises:
        ResourceError: If the disk is full.
    """
    digests = np.array([digest(stem) for stem in stems], dtype=np.uint64)
    about = {"key": json.dumps(dict(key), sort_keys=True), "seconds": str(seconds)}
    files.write_arrays(path, {"digests": digests, "features": features}, about)


def read(path: Path, stems: Sequence[Stem], key: Key) -> Kept:
    """Return the features in a file of those stems that it has.

    There are none if the file is missing, broken, or of another base: they are computed then.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            about = file.metadata()
            if json.loads(about["key"]) != dict(key):
                return NONE
            digests, features = file.get_tensor("digests"), file.get_tensor("features")
            seconds = float(about["seconds"])
    except (SafetensorError, OSError, ValueError, KeyError, TypeError):
        return NONE
    if features.ndim != 3 or features.shape[:2] != (len(digests), NUM_PARTS):
        return NONE
    places = {int(value): place for place, value in enumerate(digests)}
    found = ((stem, places.get(digest(stem))) for stem in set(stems))
    rows = {stem: features[place] for stem, place in found if place is not None}
    return Kept(features=rows, seconds=seconds)

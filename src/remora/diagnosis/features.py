"""Features that judges are trained on: TF-IDF, and hidden states of the frozen base model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from remora.config import TrainConfig
from remora.models import loading
from remora.runtime.device import choose_device, choose_precision
from remora.runtime.reporter import Reporter

BATCH_ROWS = 32


def tfidf(texts: Sequence[str], pairs: bool) -> Any:
    """Return TF-IDF of words, or of words and bigrams, sparse [texts, terms], rows normalized.

    The weights of terms need no labels, so they may be fitted on all rows.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    settings: dict[str, Any] = {"ngram_range": (1, 2 if pairs else 1), "sublinear_tf": True}
    if not any(re.search(r"\w\w", text) for text in texts):  # no words: characters then
        settings["analyzer"] = "char"
    return TfidfVectorizer(**settings).fit_transform(texts)


def frozen_features(
    texts: Sequence[str], labels: Sequence[str], settings: TrainConfig, reporter: Reporter
) -> NDArray[np.float32]:
    """Return hidden states of the untrained base model for each message, normalized, [texts, 5 H].

    Those of the last two layers where the answer would begin, and the means of the embeddings, the
    middle layer and the last one over the tokens that messages do not share. docs/log.md compares
    choices.
    """
    from sklearn.preprocessing import StandardScaler, normalize

    device = choose_device(settings.device)
    precision = choose_precision(device, settings.precision)
    base, prompt, _ = loading.load_base_and_prompt(settings, labels, precision.base, device)
    stems = prompt.stems(texts)
    order = sorted(range(len(stems)), key=lambda i: len(stems[i]))
    features: dict[int, NDArray[np.float32]] = {}
    start = len(prompt.prefix)
    for begin in range(0, len(order), BATCH_ROWS):
        rows = order[begin : begin + BATCH_ROWS]
        longest = max(len(stems[i]) for i in rows)
        # Padded on the right, where no token of a causal model sees the padding.
        ids = torch.tensor([stems[i] + [0] * (longest - len(stems[i])) for i in rows])
        with torch.inference_mode():
            states = base(ids.to(device), output_hidden_states=True, use_cache=False).hidden_states
        last = [states[-1], states[-2]]
        meant = [states[0], states[len(states) // 2], states[-1]]
        for row, i in enumerate(rows):
            end = len(stems[i])
            parts = [layer[row, end - 1] for layer in last]
            parts += [layer[row, min(start, end - 1) : end].mean(0) for layer in meant]
            features[i] = torch.cat(parts).float().cpu().numpy()
        reporter.scoring("features", begin + len(rows), len(order))
    stacked = np.stack([features[i] for i in range(len(stems))])
    result: NDArray[np.float32] = normalize(StandardScaler().fit_transform(stacked))
    return result

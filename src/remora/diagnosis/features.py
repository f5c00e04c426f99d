"""Features that judges are trained on: TF-IDF, and hidden states of the frozen base model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from remora.config import TrainConfig
from remora.models import hub, loading, metadata
from remora.runtime import files
from remora.runtime.device import choose_device, choose_precision
from remora.runtime.reporter import Reporter
from remora.tree import features, layouts, scoring
from remora.tree.stems import Stem

BATCH_ROWS = 256


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
    texts: Sequence[str],
    labels: Sequence[str],
    settings: TrainConfig,
    reporter: Reporter,
    kept: Path | None = None,
) -> NDArray[np.float32]:
    """Return features of the untrained base model for each message, normalized, [texts, 5 H].

    `tree.features` says which. Those that the run has kept in the file `kept` are not computed
    again; if it has all, the model is not loaded.
    """
    from sklearn.preprocessing import StandardScaler, normalize

    card = metadata.card_of_run(kept.parent) if kept else None
    if card and kept:
        moved = settings.model if settings.model != card.base_model else None
        folder = metadata.find_base(card, moved, kept.parent)
    else:
        folder = hub.find(settings.model)
    prompt = loading.load_prompt(settings, labels, folder)
    if kept is not None:
        prompt = metadata.as_trained(prompt, kept.parent)
    windows = prompt.windows(texts)
    stems = [tuple(stem) for own in windows for stem in own]
    found: dict[Stem, NDArray[np.float16]] = {}
    if kept is not None and kept.is_file():
        key = features.key(files.weights_sha256(folder), settings.method)
        found |= features.read(kept, stems, key).features
    missing = sorted(set(stems) - found.keys())
    if found:
        reporter.say(f"{len(stems) - len(missing):,} of {len(stems):,} rows have them from the run")
    if missing:
        device = choose_device(settings.device)
        precision = choose_precision(device, settings.precision)
        base = loading.load_base(folder, settings.method, precision.base, device)
        if settings.layout == "rows":
            layouts.assign(base, "rows")
        extractor = features.Extractor(base, prompt)
        for start in range(0, len(missing), BATCH_ROWS):
            batch = missing[start : start + BATCH_ROWS]
            found |= zip(batch, extractor.features(batch), strict=True)
            reporter.scoring("features", start + len(batch), len(missing))
    stacked = np.stack([found[stem].reshape(-1) for stem in stems]).astype(np.float32)
    stacked = scoring.pooled(stacked, list(map(len, windows)))
    result: NDArray[np.float32] = normalize(StandardScaler().fit_transform(stacked))
    return result

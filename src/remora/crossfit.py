"""Out-of-sample probabilities for training rows: each row is judged by what never saw its label."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from remora import model, plan, run, score, train
from remora.config import TrainConfig
from remora.data import Dataset, Table
from remora.progress import Reporter
from remora.score import Scorer

Method = Literal["fast", "frozen", "tfidf", "adapters"]

DESCRIPTIONS = {
    "fast": "fast mode: logistic regression on frozen features of the base model, pooled with one "
    "on TF-IDF; the adapter took no part",
    "frozen": "fast mode: logistic regression on frozen features of the base model; the adapter "
    "took no part",
    "tfidf": "fast mode: logistic regression on TF-IDF; neither base model nor adapter took part",
    "adapters": "adapters trained anew, each on the rows outside its fold",
}
BATCH_ROWS = 32


def probabilities(
    dataset: Dataset, settings: TrainConfig, method: Method, num_folds: int, reporter: Reporter
) -> NDArray[np.float64]:
    """Return a probability for each label of each training row, [rows, labels].

    Each fold is predicted by a classifier that was trained on the other folds. Folds are stratified
    by label; a label of one row is then unknown to the classifier that judges it.

    Args:
        dataset: Its training rows are judged.
        settings: Those of the run: base model, prompt, and for `adapters` how to train.
        method: What is trained on the folds.
        num_folds: In how many parts the rows are cut.
        reporter: Told how it goes.
    """
    labels = dataset.labels
    place = {label: index for index, label in enumerate(labels)}
    true = np.array([place[label] for label in dataset.train.labels])
    folds = _folds(true, num_folds, settings.seed)
    if method == "adapters":
        return _adapters(dataset, settings, folds, reporter)
    parts = []
    if method != "frozen":
        reporter.say("cross-validating a logistic regression on TF-IDF")
        parts.append(_regressions(tfidf(dataset.train.texts), true, len(labels), folds, C=30.0))
    if method != "tfidf":
        reporter.say("computing frozen features of the base model")
        features = frozen_features(dataset.train.texts, labels, settings, reporter)
        parts.append(_regressions(features, true, len(labels), folds, C=0.003))
    return pool(parts, true)


def pool(parts: Sequence[NDArray[np.float64]], true: NDArray[np.int64]) -> NDArray[np.float64]:
    """Pool probabilities: softmax(sum of weight * log p), [rows, labels].

    The weights are the ones with the least log-loss, so a judge that knows little counts little and
    the result is calibrated. One weight a judge, fitted on all rows, leaves them out of sample for
    practical purposes. Logarithmic pool: Genest and Zidek 1986, https://doi.org/10.1214/ss/1177013825
    """
    from scipy.optimize import minimize

    logs = np.stack([np.log(np.maximum(part, 1e-12)) for part in parts])  # [judges, rows, labels]

    def pooled(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        total = np.tensordot(weights, logs, axes=1)
        scaled = np.exp(total - total.max(1, keepdims=True))
        result: NDArray[np.float64] = scaled / scaled.sum(1, keepdims=True)
        return result

    def log_loss(weights: NDArray[np.float64]) -> float:
        chosen = pooled(weights)[np.arange(len(true)), true]
        return float(-np.log(np.maximum(chosen, 1e-12)).mean())

    start = np.full(len(parts), 1 / len(parts))
    found = minimize(log_loss, start, bounds=[(0.0, 10.0)] * len(parts), method="L-BFGS-B")
    return pooled(found.x)


def tfidf(texts: Sequence[str]) -> Any:
    """Return TF-IDF of words and pairs of words, sparse [texts, terms], rows of length 1.

    The weights of terms are learned without labels, so they may be learned on all rows.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    settings: dict[str, Any] = {"ngram_range": (1, 2), "sublinear_tf": True}
    if not any(re.search(r"\w\w", text) for text in texts):  # no words: characters then
        settings["analyzer"] = "char"
    return TfidfVectorizer(**settings).fit_transform(texts)


def frozen_features(
    texts: Sequence[str], labels: Sequence[str], settings: TrainConfig, reporter: Reporter
) -> NDArray[np.float32]:
    """Return what the untrained base model makes of each message, standardized, [texts, 2 H].

    The last layer's hidden state where the answer would begin, and the mean of a middle layer's
    over the tokens that are not the same for all messages.
    """
    from sklearn.preprocessing import StandardScaler

    device = plan.choose_device(settings.device)
    precision = plan.choose_precision(device, settings.precision)
    folder = model.find(settings.model)
    prompt = plan.load_prompt(settings, labels, folder)
    base = run.load_base(folder, settings.method, precision.base, device)
    stems = prompt.stems(texts)
    order = sorted(range(len(stems)), key=lambda i: len(stems[i]))
    found: dict[int, NDArray[np.float32]] = {}
    start = len(prompt.prefix)
    for begin in range(0, len(order), BATCH_ROWS):
        rows = order[begin : begin + BATCH_ROWS]
        longest = max(len(stems[i]) for i in rows)
        # Padded on the right, where no token of a causal model sees the padding.
        ids = torch.tensor([stems[i] + [0] * (longest - len(stems[i])) for i in rows])
        with torch.inference_mode():
            states = base(ids.to(device), output_hidden_states=True, use_cache=False).hidden_states
            last, middle = states[-1].float().cpu(), states[len(states) // 2].float().cpu()
        for row, i in enumerate(rows):
            own = middle[row, min(start, len(stems[i]) - 1) : len(stems[i])].mean(0)
            found[i] = torch.cat([last[row, len(stems[i]) - 1], own]).numpy()
        reporter.scoring("features", begin + len(rows), len(order))
    stacked = np.stack([found[i] for i in range(len(stems))])
    result: NDArray[np.float32] = StandardScaler().fit_transform(stacked)
    return result


def _folds(
    true: NDArray[np.int64], num_folds: int, seed: int
) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Deal the rows of each label to the folds in turn; return pairs of other and own rows."""
    shuffled = np.random.default_rng(seed).permutation(len(true))
    by_label = shuffled[np.argsort(true[shuffled], kind="stable")]
    fold = np.empty(len(true), dtype=np.int64)
    fold[by_label] = np.arange(len(true)) % num_folds
    return [(np.flatnonzero(fold != k), np.flatnonzero(fold == k)) for k in range(num_folds)]


def _regressions(
    features: Any,
    true: NDArray[np.int64],
    num_labels: int,
    folds: Sequence[tuple[NDArray[np.int64], NDArray[np.int64]]],
    C: float,
) -> NDArray[np.float64]:
    """Return what logistic regressions say of each fold, [rows, labels]."""
    import warnings

    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    result = np.full((len(true), num_labels), 1e-6)
    for others, own in folds:
        known = np.unique(true[others])
        if len(known) == 1:
            result[own, known[0]] = 1
            continue
        regression = LogisticRegression(C=C, max_iter=300)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            regression.fit(features[others], true[others])
        result[np.ix_(own, regression.classes_)] = regression.predict_proba(features[own])
    normalized: NDArray[np.float64] = result / result.sum(1, keepdims=True)
    return normalized


def _adapters(
    dataset: Dataset,
    settings: TrainConfig,
    folds: Sequence[tuple[NDArray[np.int64], NDArray[np.int64]]],
    reporter: Reporter,
) -> NDArray[np.float64]:
    """Return what adapters, each trained on all folds but one, say of that one."""
    rows = dataset.train
    result = np.zeros((len(rows), len(dataset.labels)))
    device = plan.choose_device(settings.device)
    precision = plan.choose_precision(
        device, settings.precision, trains_base=settings.method == "full"
    )
    for number, (others, own) in enumerate(folds, 1):
        reporter.say(f"training adapter {number} of {len(folds)}, on {len(others):,} rows")
        part = Table([rows.texts[i] for i in others], [rows.labels[i] for i in others])
        with torch.random.fork_rng():
            torch.manual_seed(settings.seed)
            adapted, prompt, _, _ = train.prepare(settings, dataset.labels, precision, device)
            with train.accelerator_for(precision, device) as accelerator:
                train.fit(
                    adapted,
                    prompt,
                    replace(dataset, train=part),
                    settings,
                    accelerator=accelerator,
                    precision=precision,
                    reporter=reporter,
                )
        scorer = Scorer(adapted, prompt, tolerance=1e-3, autocast=precision.autocast)
        texts = [rows.texts[i] for i in own]
        result[own] = score.score_table(scorer, texts, f"fold {number}", reporter)
    return result

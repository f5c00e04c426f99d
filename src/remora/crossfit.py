"""Out-of-sample probabilities for training rows: each row is judged by what never saw its label."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from remora import checkpoint, model, planner, resume, run, score, store, train, tree
from remora.calibration import Scored
from remora.config import TrainConfig
from remora.data import Dataset, Table
from remora.device import choose_device, choose_precision
from remora.prepare import accelerator_for, plan_run, prepare, short_rows
from remora.progress import Reporter
from remora.score import Scorer
from remora.stop import Stop

Method = Literal["fast", "frozen", "tfidf", "adapters"]

DESCRIPTIONS = {
    "fast": "fast mode: regressions on frozen features of the base model, pooled with others on "
    "TF-IDF; the adapter took no part",
    "frozen": "fast mode: regressions on frozen features of the base model; the adapter took no "
    "part",
    "tfidf": "fast mode: regressions on TF-IDF; neither base model nor adapter took part",
    "adapters": "adapters trained anew, each on the rows outside its fold, pooled with regressions "
    "on TF-IDF",
}
MANY_ROWS = 5_000
"""Up to so many rows, regressions are trained on nine tenths of them, beyond on four fifths."""
BATCH_ROWS = 32


@dataclass(frozen=True)
class Judgement:
    """What classifiers say of rows that they were not trained on."""

    probabilities: NDArray[np.float64]  # [rows, labels], of all judges pooled
    judges: tuple[NDArray[np.int64], ...]  # the likeliest labels by each view of the texts, [rows]
    by_half: NDArray[np.int64]  # the likeliest labels by ridge regressions on half the rows, [rows]
    by_most: NDArray[np.int64]  # the same regressions on all rows but a fold's

    def first(self, count: int) -> Judgement:
        """Return what was said of the first rows."""
        return Judgement(
            self.probabilities[:count],
            tuple(each[:count] for each in self.judges),
            self.by_half[:count],
            self.by_most[:count],
        )


def judge(
    dataset: Dataset,
    settings: TrainConfig,
    method: Method,
    num_folds: int | None,
    reporter: Reporter,
    *,
    folder: Path | None = None,
) -> Judgement:
    """Judge each row by classifiers that were trained on others.

    Each fold is predicted by a classifier that was trained on the other folds. Folds are stratified
    by label; a label of one row is then unknown to the classifier that judges it.

    Args:
        dataset: Its training rows are judged.
        settings: Those of the run: base model, prompt, and for `adapters` how to train.
        method: What is trained on the folds.
        num_folds: In how many parts the rows are cut; None for what suits the method.
        reporter: Told how it goes.
        folder: Where `adapters` keeps each fold, so that what was stopped goes on there.

    Raises:
        Stopped: If a signal asked `adapters` to stop; what was done is kept.
    """
    labels, rows = dataset.labels, dataset.train
    place = {label: index for index, label in enumerate(labels)}
    true = np.array([place[label] for label in rows.labels])
    if num_folds is None:
        num_folds = 5 if method == "adapters" or len(rows) > MANY_ROWS else 10
    folds = _folds(true, num_folds, settings.seed)
    views: list[tuple[Any, Any, float]] = []  # features of ridge and logistic regression, penalty
    if method != "frozen":
        words = (tfidf(rows.texts, pairs) for pairs in (True, False))
        views.append((*words, 1.0))
    if method in ("fast", "frozen"):
        reporter.say("computing frozen features of the base model")
        features = frozen_features(rows.texts, labels, settings, reporter)
        views.append((features, features, 0.2))
    reporter.say("cross-validating regressions")
    ridges = [_ridge(x, penalty, true, len(labels), folds) for x, _, penalty in views]
    halves = _folds(true, 2, settings.seed)
    by_half = [_ridge(x, penalty, true, len(labels), halves) for x, _, penalty in views]
    logistic = [_logistic(x, true, len(labels), folds) for _, x, _ in views]
    parts = [list(view) for view in zip(ridges, logistic, strict=True)]
    if method == "adapters":
        assert folder is not None
        adapters = _adapters(dataset, settings, true, folds, folder, reporter)
        parts.append([np.log(np.maximum(adapters, 1e-12))])
    return Judgement(
        pool([each for view in parts for each in view], true),
        tuple(pool(view, true).argmax(1) for view in parts),
        pool(by_half, true).argmax(1),
        pool(ridges, true).argmax(1),
    )


def pool(parts: Sequence[NDArray[np.float64]], true: NDArray[np.int64]) -> NDArray[np.float64]:
    """Pool the scores of judges: softmax(sum of weight * score), [rows, labels].

    The weights are the ones with the least log-loss, so a judge that knows little counts little and
    the result is calibrated. One weight a judge, fitted on all rows, leaves them out of sample for
    practical purposes. With log-probabilities as scores it is a logarithmic pool: Genest and Zidek
    1986, https://doi.org/10.1214/ss/1177013825
    """
    from scipy.optimize import minimize

    scores = np.stack(parts)  # [judges, rows, labels]

    def pooled(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        total = np.tensordot(weights, scores, axes=1)
        scaled = np.exp(total - total.max(1, keepdims=True))
        result: NDArray[np.float64] = scaled / scaled.sum(1, keepdims=True)
        return result

    def log_loss(weights: NDArray[np.float64]) -> float:
        chosen = pooled(weights)[np.arange(len(true)), true]
        return float(-np.log(np.maximum(chosen, 1e-12)).mean())

    start = np.full(len(parts), 1 / len(parts))
    found = minimize(log_loss, start, bounds=[(0.0, 100.0)] * len(parts), method="L-BFGS-B")
    return pooled(found.x)


def tfidf(texts: Sequence[str], pairs: bool) -> Any:
    """Return TF-IDF of words and maybe pairs of words, sparse [texts, terms], rows of length 1.

    The weights of terms are learned without labels, so they may be learned on all rows.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    settings: dict[str, Any] = {"ngram_range": (1, 2 if pairs else 1), "sublinear_tf": True}
    if not any(re.search(r"\w\w", text) for text in texts):  # no words: characters then
        settings["analyzer"] = "char"
    return TfidfVectorizer(**settings).fit_transform(texts)


def frozen_features(
    texts: Sequence[str], labels: Sequence[str], settings: TrainConfig, reporter: Reporter
) -> NDArray[np.float32]:
    """Return what the untrained base model makes of each message, rows of length 1, [texts, 5 H].

    The hidden states of the last two layers where the answer would begin, and the means of the
    embeddings, the middle layer and the last one over the tokens that are not the same for all
    messages. docs/log.md compares choices.
    """
    from sklearn.preprocessing import StandardScaler, normalize

    device = choose_device(settings.device)
    precision = choose_precision(device, settings.precision)
    folder = model.find(settings.model)
    prompt = planner.load_prompt(settings, labels, folder)
    base = store.load_base(folder, settings.method, precision.base, device)
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
        last = [states[-1], states[-2]]
        meant = [states[0], states[len(states) // 2], states[-1]]
        for row, i in enumerate(rows):
            end = len(stems[i])
            parts = [layer[row, end - 1] for layer in last]
            parts += [layer[row, min(start, end - 1) : end].mean(0) for layer in meant]
            found[i] = torch.cat(parts).float().cpu().numpy()
        reporter.scoring("features", begin + len(rows), len(order))
    stacked = np.stack([found[i] for i in range(len(stems))])
    result: NDArray[np.float32] = normalize(StandardScaler().fit_transform(stacked))
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


def _ridge(
    features: Any,
    penalty: float,
    true: NDArray[np.int64],
    num_labels: int,
    folds: Sequence[tuple[NDArray[np.int64], NDArray[np.int64]]],
) -> NDArray[np.float64]:
    """Return the scores that ridge regressions give each fold, about 1 for its label, else 0."""
    from sklearn.linear_model import Ridge

    targets = np.eye(num_labels, dtype=np.float32)[true]
    result = np.empty((len(true), num_labels))
    solver = "cholesky" if isinstance(features, np.ndarray) else "sparse_cg"
    for others, own in folds:
        regression = Ridge(alpha=penalty, solver=solver, tol=1e-2)
        regression.fit(features[others], targets[others])
        result[own] = regression.predict(features[own])
    return result


def _logistic(
    features: Any,
    true: NDArray[np.int64],
    num_labels: int,
    folds: Sequence[tuple[NDArray[np.int64], NDArray[np.int64]]],
) -> NDArray[np.float64]:
    """Return log-probabilities that logistic regressions give each fold, [rows, labels]."""
    import warnings

    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    result = np.full((len(true), num_labels), 1e-9)
    for others, own in folds:
        known = np.unique(true[others])
        if len(known) == 1:
            result[own, known[0]] = 1
            continue
        regression = LogisticRegression(C=10.0, max_iter=100)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            regression.fit(features[others], true[others])
        result[np.ix_(own, regression.classes_)] = regression.predict_proba(features[own])
    logs: NDArray[np.float64] = np.log(np.maximum(result, 1e-12))
    return logs


def _adapters(
    dataset: Dataset,
    settings: TrainConfig,
    true: NDArray[np.int64],
    folds: Sequence[tuple[NDArray[np.int64], NDArray[np.int64]]],
    folder: Path,
    reporter: Reporter,
) -> NDArray[np.float64]:
    """Return what adapters, each trained on all folds but one, say of that one."""
    _begin(folder, dataset.train, settings, len(folds))
    result = np.zeros((len(true), len(dataset.labels)))
    stop = Stop()
    with stop.listening():
        for number, (others, own) in enumerate(folds, 1):
            place = folder / f"fold-{number}"
            kept = place / run.PROBABILITIES
            told = f"adapter {number} of {len(folds)}, trained on {len(others):,} rows"
            if kept.is_file():
                reporter.say(f"{told}: it is finished")
            else:
                reporter.say(told)
                place.mkdir(exist_ok=True)
                found = _fold(dataset, settings, others, own, place, stop, reporter)
                run.write_probabilities(
                    kept, dataset.labels, {"fold": Scored(probabilities=found, true=true[own])}
                )
                shutil.rmtree(place / resume.CHECKPOINTS, ignore_errors=True)
            scored = run.read_probabilities(kept, dataset.labels, "fold")
            assert scored is not None
            result[own] = scored.probabilities
    return result


def _begin(folder: Path, rows: Table, settings: TrainConfig, num_folds: int) -> None:
    """Make the folder, or leave what is in it if it is of the same rows, settings and folds."""
    sha256 = hashlib.sha256(json.dumps([rows.texts, rows.labels]).encode()).hexdigest()
    wanted = {"rows": sha256, "folds": num_folds, "model": settings.model, **resume.fixed(settings)}
    key, text = folder / "settings.json", json.dumps(wanted, indent=2) + "\n"
    if not key.is_file() or key.read_text(encoding="utf-8") != text:
        shutil.rmtree(folder, ignore_errors=True)
        with run.disk_errors(folder):
            folder.mkdir()
        run.write_text(key, text)


def _fold(
    dataset: Dataset,
    settings: TrainConfig,
    others: NDArray[np.int64],
    own: NDArray[np.int64],
    place: Path,
    stop: Stop,
    reporter: Reporter,
) -> NDArray[np.float64]:
    """Return what an adapter that was trained on other rows says of a fold's own, [own, labels]."""
    rows = dataset.train
    part = Table([rows.texts[i] for i in others], [rows.labels[i] for i in others])
    device = choose_device(settings.device)
    precision = choose_precision(device, settings.precision, trains_base=settings.method == "full")
    resumed = checkpoint.newest(place / resume.CHECKPOINTS, reporter.say)
    planned, heaviest = plan_run(
        resume.as_before(settings, resumed),
        replace(dataset, train=part),
        precision,
        device,
        reporter,
    )
    with torch.random.fork_rng(), accelerator_for(precision, device) as accelerator:
        torch.manual_seed(settings.seed)
        adapted, prompt, _, _ = prepare(settings, dataset.labels, precision, device)
        with accelerator.autocast():
            tree.check(adapted, short_rows(part, prompt))
        model.set_checkpointing(adapted, planned.checkpointing)
        with stop.deferred():
            train.fit(
                adapted,
                prompt,
                replace(dataset, train=part),
                planned.applied_to(settings),
                accelerator=accelerator,
                precision=precision,
                heaviest=heaviest,
                checkpoints=place / resume.CHECKPOINTS,
                resumed=resumed,
                stop=stop,
                reporter=reporter,
            )
            scorer = Scorer(adapted, prompt, tolerance=1e-3, autocast=precision.autocast)
            texts = [rows.texts[i] for i in own]
            return score.score_table(scorer, texts, "fold", reporter, stop)

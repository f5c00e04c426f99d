"""Out-of-sample probabilities of training rows: no row is judged by a model that saw its label."""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from remora.config import TrainConfig
from remora.data.dataset import Dataset
from remora.data.prompt import Prompt
from remora.data.splits import deal_folds
from remora.data.table import Table
from remora.diagnosis.features import frozen_features, tfidf
from remora.diagnosis.regressions import logistic, logistic_of_each, pool, pool_each, ridge
from remora.evaluation.multi_label import indicators
from remora.evaluation.predictions import (
    PROBABILITIES,
    Scored,
    read_probabilities,
    write_probabilities,
)
from remora.models import metadata
from remora.runtime import files
from remora.runtime.reporter import Reporter, SayOnce
from remora.runtime.stop import Stop
from remora.training import checkpoint, resume
from remora.training.loop import fit
from remora.training.session import open_session
from remora.training.trainable import load_trainable
from remora.tree import scoring

Method = Literal["fast", "frozen", "tfidf", "adapters"]

DESCRIPTIONS = {
    "fast": "fast mode: regressions on frozen features of the base model, pooled with others on "
    "TF-IDF; the trained model is not used",
    "frozen": "fast mode: regressions on frozen features of the base model; the trained model is "
    "not used",
    "tfidf": "fast mode: regressions on TF-IDF; neither base nor trained model is used",
    "adapters": "adapters trained again, each on the rows outside its fold, pooled with "
    "regressions on TF-IDF",
}
FOLDS = "folds"
"""Folds finished so far, in the run directory until the diagnosis is written."""
MANY_ROWS = 5_000
"""Up to this many rows there are ten folds, above it five."""


@dataclass(frozen=True)
class Judgement:
    """Predictions of classifiers for rows that they were not trained on."""

    probabilities: NDArray[np.float64]  # [rows, labels], of all judges pooled
    judges: tuple[NDArray[np.int64], ...]  # the likeliest labels by each view, [rows]
    by_half: NDArray[np.int64]  # the likeliest labels by ridge regressions on half the rows, [rows]
    by_most: NDArray[np.int64]  # the same regressions on all rows but a fold's

    def first(self, count: int) -> Judgement:
        """Return the predictions for the first rows."""
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
    kept: Path | None = None,
) -> Judgement:
    """Judge each row by classifiers that were trained on others.

    Each fold is predicted by a classifier trained on the other folds. Folds are stratified by
    label; the label of a single row is unknown to the classifier that judges it.

    Args:
        dataset: Its training rows are judged.
        settings: The run's: base model, prompt, and for `adapters` how to train.
        method: What is trained on the folds.
        num_folds: Number of folds; None for a default by method and number of rows.
        reporter: Told the progress.
        folder: Where `adapters` keeps finished folds, so that it can resume.
        kept: File of features that the run may have kept.

    Raises:
        Stopped: If a signal asked `adapters` to stop; finished folds are kept.
    """
    labels, rows = dataset.labels, dataset.train
    place = {label: index for index, label in enumerate(labels)}
    true = np.array([place[label] for label in rows.labels])
    targets = np.eye(len(labels), dtype=np.float32)[true]
    folds = deal_folds(true, num_folds or _num_folds(method, len(rows)), settings.seed)
    views = _views(dataset, settings, method, reporter, kept)
    reporter.say("cross-validating regressions")
    advance = _counting(reporter, 3 * len(views) * len(rows))
    ridges = [ridge(x, penalty, targets, folds, advance) for x, _, penalty in views]
    halves = deal_folds(true, 2, settings.seed)
    by_half = [ridge(x, penalty, targets, halves, advance) for x, _, penalty in views]
    logistics = [logistic(x, true, len(labels), folds, advance) for _, x, _ in views]
    parts = [list(view) for view in zip(ridges, logistics, strict=True)]
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


def judge_sets(
    dataset: Dataset,
    settings: TrainConfig,
    method: Method,
    num_folds: int | None,
    reporter: Reporter,
    *,
    folder: Path | None = None,
) -> tuple[NDArray[np.float64], tuple[NDArray[np.float64], ...]]:
    """Judge each label of each row, one against the rest, by classifiers trained on other rows.

    Folds are stratified by the rarest label of a row. The arguments are those of `judge`.

    Returns:
        The probability of each label, of all judges pooled, and of each view by itself; each
        [rows, labels].

    Raises:
        Stopped: If a signal asked `adapters` to stop; finished folds are kept.
    """
    rows = dataset.train
    given = indicators(rows.labels, dataset.labels)
    _, strata = np.unique(np.array(rows.strata), return_inverse=True)
    folds = deal_folds(strata, num_folds or _num_folds(method, len(rows)), settings.seed)
    views = _views(dataset, settings, method, reporter, None)
    reporter.say("cross-validating regressions, one for each label")
    advance = _counting(reporter, 2 * len(views) * len(rows))
    targets = given.astype(np.float32)
    parts = [
        [ridge(x, penalty, targets, folds, advance), logistic_of_each(y, given, folds, advance)]
        for x, y, penalty in views
    ]
    if method == "adapters":
        assert folder is not None
        found = _adapters(dataset, settings, given, folds, folder, reporter).clip(1e-6, 1 - 1e-6)
        parts.append([np.log(found / (1 - found))])
    pooled = pool_each([each for view in parts for each in view], given)
    return pooled, tuple(pool_each(view, given) for view in parts)


def _counting(reporter: Reporter, total: int) -> Callable[[int], None]:
    """Return what tells the rows that regressions have judged, each regression's counted."""
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        reporter.scoring("regressions", done, total)

    return advance


def _num_folds(method: Method, num_rows: int) -> int:
    return 5 if method == "adapters" or num_rows > MANY_ROWS else 10


def _views(
    dataset: Dataset, settings: TrainConfig, method: Method, reporter: Reporter, kept: Path | None
) -> list[tuple[Any, Any, float]]:
    """Return what each view sees: features of ridge and of logistic regression, and the penalty."""
    texts, views = dataset.train.texts, []
    if method != "frozen":
        views.append((tfidf(texts, pairs=True), tfidf(texts, pairs=False), 1.0))
    if method in ("fast", "frozen"):
        reporter.say("computing frozen features of the base model")
        features = frozen_features(texts, dataset.labels, settings, reporter, kept)
        views.append((features, features, 0.2))
    return views


def _adapters(
    dataset: Dataset,
    settings: TrainConfig,
    true: NDArray[np.int64],
    folds: Sequence[tuple[NDArray[np.int64], NDArray[np.int64]]],
    folder: Path,
    reporter: Reporter,
) -> NDArray[np.float64]:
    """Return the probabilities that adapters, each trained on all folds but one, give that one."""
    _begin(folder, dataset.train, settings, len(folds))
    result = np.zeros((len(true), len(dataset.labels)))
    stop, once = Stop(), SayOnce(reporter)
    with stop.listening():
        for number, (others, own) in enumerate(folds, 1):
            place = folder / f"fold-{number}"
            kept = place / PROBABILITIES
            told = f"adapter {number} of {len(folds)}, trained on {len(others):,} rows"
            if kept.is_file():
                reporter.say(f"{told}: finished already")
            else:
                reporter.say(told)
                place.mkdir(exist_ok=True)
                probabilities = _fold(dataset, settings, others, own, place, stop, once)
                fold = Scored(probabilities=probabilities, true=true[own])
                write_probabilities(kept, dataset.labels, {"fold": fold})
                shutil.rmtree(place / resume.CHECKPOINTS, ignore_errors=True)
            scored = read_probabilities(kept, dataset.labels, "fold")
            assert scored is not None
            result[own] = scored.probabilities
    return result


def _begin(folder: Path, rows: Table, settings: TrainConfig, num_folds: int) -> None:
    """Make the folder, or keep its contents if they are of the same rows, settings and folds."""
    sha256 = hashlib.sha256(json.dumps([rows.texts, rows.labels]).encode()).hexdigest()
    wanted = {"rows": sha256, "folds": num_folds, "model": settings.model, **resume.fixed(settings)}
    key, text = folder / "settings.json", json.dumps(wanted, indent=2) + "\n"
    if not key.is_file() or key.read_text(encoding="utf-8") != text:
        shutil.rmtree(folder, ignore_errors=True)
        with files.disk_errors(folder):
            folder.mkdir()
        files.write_text(key, text)


def _load_as_trained(
    run: Path, config: TrainConfig, *rest: Any
) -> tuple[Any, Prompt, metadata.AdapterCard, Path]:
    """Load as training does, with the prompt as it was rendered for a run."""
    model, prompt, card, base = load_trainable(config, *rest)
    prompt = metadata.as_trained(prompt, run)
    return model, prompt, replace(card, rendered=prompt.rendered._asdict()), base


def _fold(
    dataset: Dataset,
    settings: TrainConfig,
    others: NDArray[np.int64],
    own: NDArray[np.int64],
    place: Path,
    stop: Stop,
    reporter: Reporter,
) -> NDArray[np.float64]:
    """Train on the rows outside a fold; return the probabilities of its own, [own, labels]."""
    part = dataset.train.take(others.tolist())
    settings = replace(settings, start_from=None)  # that adapter has seen the fold's rows
    checkpoints = place / resume.CHECKPOINTS
    resumed = checkpoint.newest(checkpoints, reporter.say)
    with (
        open_session(
            settings,
            replace(dataset, train=part),
            resumed=resumed,
            load=functools.partial(_load_as_trained, place.parents[1]),
            stop=stop,
            reporter=reporter,
        ) as session,
        stop.deferred(),
    ):
        fit(session, checkpoints=checkpoints, resumed=resumed, num_scored=len(own))
        texts = [dataset.train.texts[i] for i in own]
        scorer = session.scorer(tolerance=1e-3)
        return scoring.score_table(scorer, texts, "fold", reporter, stop)

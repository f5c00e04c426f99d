"""Why a classifier errs: overlapping classes, mislabelled rows, too few rows, undertraining."""

from __future__ import annotations

import shutil
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from remora.config import DiagnoseConfig, TrainConfig
from remora.config.train import CORRECTIONS
from remora.data import sources
from remora.data.corrections import Corrections, Decisions, read_corrections
from remora.data.dataset import Dataset, load_again, source_rows
from remora.data.table import Table
from remora.diagnosis import (
    corrected_table,
    duplicates,
    label_noise,
    out_of_sample,
    rare_tokens,
    suspect_list,
    verdicts,
)
from remora.diagnosis.label_noise import LabelNoise
from remora.diagnosis.out_of_sample import Judgement
from remora.diagnosis.rare_tokens import TiedToken
from remora.diagnosis.several_labels import SetDiagnosis, diagnose_sets
from remora.diagnosis.suspect_list import Suspect
from remora.diagnosis.verdicts import HeldOut, PairDiagnosis, confused
from remora.errors import DataError
from remora.evaluation.predictions import PREDICTIONS, Predictions, read_predictions
from remora.formatting import escape_formula
from remora.models import metadata
from remora.runtime import files, run_directory
from remora.runtime.reporter import Reporter
from remora.tree.features import FEATURES

LIST_FROM = suspect_list.WORTH_A_LOOK
"""Rows that are mislabelled with at least this probability are listed."""
NUM_TOKENS = 20


@dataclass(frozen=True, kw_only=True)
class Planted:
    """How many of the labels that are wrong on purpose in a sample were found."""

    num_wrong: int
    num_listed: int  # rows in relabel.csv
    num_found: int  # mislabelled rows among them
    num_suggested: int  # of those, how many come with the right label

    @property
    def precision(self) -> float:
        """Share of the listed rows that are mislabelled."""
        return self.num_found / max(1, self.num_listed)

    @property
    def recall(self) -> float:
        """Share of the mislabelled rows that are listed."""
        return self.num_found / self.num_wrong


@dataclass(frozen=True, kw_only=True)
class Ceiling:
    """The accuracy that no model is expected to exceed on the held-out rows."""

    accuracy: float
    interval: tuple[float, float]  # 95 %
    wrong: float  # estimated share of mislabelled rows
    overlapping: float  # share of rows that run and judges confuse in overlapping classes
    alike: float  # share of other rows to which run, judges and baseline give the same wrong label


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """Why a run errs."""

    method: str
    num_rows: int
    out_of_sample_accuracy: float  # against the labels as given
    wrong: float  # estimated share of mislabelled training rows
    wrong_interval: tuple[float, float]  # 95 %
    suspects: tuple[Suspect, ...]  # the most suspicious first
    pairs: tuple[PairDiagnosis, ...]
    ceiling: Ceiling
    num_test_exact: int  # test rows whose text is a training text, but for case and spaces
    num_test_near: int  # test rows that are nearly a training text, those included
    num_conflicting: int  # training rows with a nearly identical text under another label
    num_conflicts: int  # pairs of such rows
    num_covered: int  # of those, with a listed row or with overlapping labels
    tied_tokens: tuple[TiedToken, ...]
    accuracy: float  # of the run
    planted: Planted | None  # for a sample, whose wrong labels are known
    num_decided: int = 0  # rows that a person decided before, which are no suspects

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as JSON holds them; the suspects are in relabel.csv."""
        return asdict(self) | {"suspects": len(self.suspects), "bands": self.bands}

    @property
    def bands(self) -> dict[str, int]:
        """How many suspects there are in each band."""
        return suspect_list.in_bands(self.suspects)


def diagnose_run(
    config: DiagnoseConfig, *, reporter: Reporter | None = None
) -> Diagnosis | SetDiagnosis:
    """Find out why a run errs; leaves diagnosis.json and relabel.csv in its directory.

    Rows that a person decided before are not listed again; their decisions stay in relabel.csv.

    Raises:
        ConfigError: If the run is being reviewed.
        DataError: If the run is not finished, or its rows have changed.
        Stopped: If a signal asked to stop while adapters were trained.
    """
    _need_file(config.run, PREDICTIONS)
    with suspect_list.hold(config.run):
        return _diagnose(config, reporter or Reporter())


def _diagnose(config: DiagnoseConfig, reporter: Reporter) -> Diagnosis | SetDiagnosis:
    settings, dataset, everything = load(config)
    given = rows_as_given(settings, everything)
    before = decided_before(config.run, given)
    decided = before.decisions if before else {}
    labels, rows = dataset.labels, _used(everything.train, dataset, settings)
    if dataset.multi_label:
        return diagnose_sets(config, settings, dataset, everything, rows, before, reporter)
    run = read_predictions(config.run / PREDICTIONS, labels)
    place = {label: index for index, label in enumerate(labels)}

    # Every row, training and held out, judged out of sample
    table, held_rows = _with_held_out(rows, run, given)
    true = np.array([place[label] for label in table.labels])
    reporter.say(out_of_sample.DESCRIPTIONS[config.method])
    judged = out_of_sample.judge(
        replace(everything, train=table),
        settings,
        config.method,
        config.folds,
        reporter,
        folder=config.run / out_of_sample.FOLDS,
        kept=config.run / FEATURES,
    )

    # The held-out rows, and the ceiling
    measured = np.array([place[label] for label in run.true])  # as given, before any correction
    held_out_noise = label_noise.estimate(judged.probabilities[held_rows], measured)
    held_out = HeldOut(
        true=np.array(run.true),
        by_run=np.array(run.predicted),
        by_baseline=None if run.baseline is None else np.array(run.baseline),
        by_judges=np.array(labels)[judged.probabilities[held_rows].argmax(1)],
    )

    # The training rows: mislabelled ones, and confused pairs of labels
    true, judged = true[: len(rows)], judged.first(len(rows))
    noise = label_noise.estimate(judged.probabilities, true)
    neighbours, near = duplicates.nearest(rows.texts, duplicates.NUM_NEIGHBOURS)
    conflicts = [(i, j) for i, j in near if true[i] != true[j]]
    listed = list_rows(judged, true, noise, conflicts)
    is_open = np.array([row not in decided for row in rows.places])
    suspects = _suspects(
        rows, labels, true, judged.probabilities, noise, listed & is_open, neighbours
    )
    pairs = verdicts.diagnose_pairs(labels, true, judged, noise.p_wrong >= 0.5, conflicts, held_out)
    overlapping = {
        frozenset((place[pair.first], place[pair.second]))
        for pair in pairs
        if pair.verdict == "labels overlap"
    }
    diagnosis = Diagnosis(
        method=out_of_sample.DESCRIPTIONS[config.method],
        num_rows=len(rows),
        out_of_sample_accuracy=float((judged.probabilities.argmax(1) == true).mean()),
        wrong=noise.rate,
        wrong_interval=noise.interval,
        suspects=suspects,
        pairs=pairs,
        ceiling=ceiling(held_out_noise, held_out, pairs),
        num_test_exact=duplicates.num_exact(dataset),
        num_test_near=duplicates.num_near(dataset),
        num_conflicting=len({row for conflict in conflicts for row in conflict}),
        num_conflicts=len(conflicts),
        num_covered=sum(
            bool(listed[[i, j]].any()) or frozenset((true[i], true[j])) in overlapping
            for i, j in conflicts
        ),
        tied_tokens=rare_tokens.tied(rows)[:NUM_TOKENS],
        accuracy=float((held_out.true == held_out.by_run).mean()),
        planted=_planted(sources.planted_errors(settings.data), rows, suspects, decided),
        num_decided=len(decided),
    )

    # Files
    suspect_list.write(config.run / suspect_list.FILE, suspects, before.sheet if before else None)
    files.write_json(config.run / "diagnosis.json", diagnosis.to_dict())
    if config.method == "adapters":
        shutil.rmtree(config.run / out_of_sample.FOLDS, ignore_errors=True)
    return diagnosis


def apply_corrections(
    config: DiagnoseConfig, *, reporter: Reporter | None = None
) -> tuple[Path, int, int]:
    """Write the training table with a person's decisions.

    Returns:
        Its path, and how many rows were corrected and deleted.

    Raises:
        ConfigError: If that is the training table itself or a folder, or is not named as CSV.
        DataError: If the decisions do not fit the table.
        ResourceError: If it cannot be written.
    """
    assert config.apply is not None
    if config.output is not None:
        files.check_output(config.output, "--output", suffix=".csv")
    settings, _, everything = load(config)
    path = config.output or config.run / "cleaned.csv"
    files.refuse_source(path, settings.data, "--output")
    given = rows_as_given(settings, everything)
    cleaned, num_corrected, num_deleted = suspect_list.apply(config.apply, given)
    labels = dict(zip(cleaned.places, cleaned.labels, strict=True))
    decisions = {
        place: labels.get(place)
        for place, label in zip(given.places, given.labels, strict=True)
        if labels.get(place) != label
    }
    columns = everything.summary.text_columns
    say = (reporter or Reporter()).say
    corrected_table.write_corrected(path, settings, columns, decisions, say)
    return path, num_corrected, num_deleted


def load(config: DiagnoseConfig) -> tuple[TrainConfig, Dataset, Dataset]:
    """Return a run's settings, its splits, and all rows of its training table in order.

    The rows are as a person has corrected them, without those deleted.

    Raises:
        DataError: If the rows are not those that the run was trained on.
    """
    _need_file(config.run, "config.toml")
    settings = run_directory.read_settings(config.run)
    card = metadata.card_of_run(config.run)
    model = config.model or (card.base_model if card else settings.model)  # no relative path
    # In the layout that it was trained in, so that it is not found out again
    layout = "rows" if card and card.layout == "rows" else settings.layout
    settings = replace(settings, model=model, layout=layout)

    dataset = load_again(settings)
    run_directory.refuse_changed_rows(config.run, settings.data, dataset.summary.sha256)
    return settings, dataset, load_again(_whole(settings))


def rows_as_given(settings: TrainConfig, everything: Dataset) -> Table:
    """Return all rows of a run's training table with the labels that they have there."""
    if settings.corrections is None:
        return everything.train
    return load_again(_whole(replace(settings, corrections=None))).train


def decided_before(run: Path, given: Table) -> Corrections | None:
    """Return the decisions on a run's rows that were made so far, None if there are none.

    They are in relabel.csv, and if the run was not diagnosed yet in what it was corrected by.

    Raises:
        DataError: If the file is broken or not for these rows.
    """
    for name in (suspect_list.FILE, CORRECTIONS):
        if (run / name).is_file():
            return read_corrections(run / name, given)
    return None


def _whole(settings: TrainConfig) -> TrainConfig:
    """Return settings that hold no rows out."""
    whole = replace(settings, validation_fraction=0.0, test_fraction=0.0)
    return replace(whole, rows_per_class=None, learning_curve=None)


def _used(rows: Table, dataset: Dataset, settings: TrainConfig) -> Table:
    """Return those rows of a table that a run was trained or measured on."""
    if settings.num_per_class is None:
        return rows
    used = set(source_rows(dataset).places)
    return rows.take([i for i, place in enumerate(rows.places) if place in used])


def _need_file(directory: Path, name: str) -> None:
    advice = "give the directory of a finished run"
    if not directory.is_dir():
        raise DataError(f"there is no folder {directory}; {advice}")
    if not (directory / name).is_file():
        raise DataError(f"{directory} has no {name}; {advice}")


def _with_held_out(
    rows: Table, run: Predictions, given: Table | None = None
) -> tuple[Table, NDArray[np.int64]]:
    """Return the rows with the run's held-out ones added, and the places of those.

    Held-out rows that were split from the table are there already, found by the labels that it
    gives them.
    """
    waiting = defaultdict[tuple[str, str], deque[int]](deque)
    names = dict(zip(given.places, given.labels, strict=True)) if given else {}
    for row, (text, label) in enumerate(zip(rows.texts, rows.labels, strict=True)):
        waiting[escape_formula(text), names.get(rows.places[row], label)].append(row)
    texts, labels, places = list(rows.texts), list(rows.labels), []
    for text, label in zip(run.texts, run.true, strict=True):
        # Escaped, since predictions.csv does not tell '=1 from an escaped =1
        same = waiting[escape_formula(text), label]
        if same:
            places.append(same.popleft())
        else:
            places.append(len(texts))
            texts.append(text)
            labels.append(label)
    return Table(texts, labels), np.array(places)


def ceiling(noise: LabelNoise, held_out: HeldOut, pairs: Sequence[PairDiagnosis]) -> Ceiling:
    """Estimate the accuracy that no model is expected to exceed on the held-out rows.

    Two things cannot be learned: mislabelled rows, whose share `label_noise` estimates, and the
    side of an overlap that a row was put on. In overlapping classes the rows count that both run
    and judges confuse; guessing would err on as many. Assumed: mislabelling does not follow the
    message, and the two sets of rows are disjoint. A model that has learned the habits of the
    annotators may do better. The interval is the sum of the two shares' intervals (the second by
    Wilson).

    The ceiling is too high where annotators err on hard rows: predictions cannot tell such
    mistakes from hard rows. They are among the rows to which run, judges and baseline give the
    same wrong label; the share of those is reported beside it.
    """
    from scipy.stats import binomtest

    overlapping = np.zeros(len(held_out.true), dtype=bool)
    for pair in pairs:
        if pair.verdict == "labels overlap":
            overlapping |= confused(
                held_out.true, held_out.by_run, pair.first, pair.second
            ) & confused(held_out.true, held_out.by_judges, pair.first, pair.second)
    overlapping &= noise.p_wrong < 0.5
    alike = (held_out.by_run != held_out.true) & ~overlapping & (noise.p_wrong < 0.5)
    for given in (held_out.by_judges, held_out.by_baseline):
        if given is not None:
            alike &= given == held_out.by_run
    share = float(overlapping.mean())
    low, high = (0.0, 0.0)
    if share:
        test = binomtest(int(overlapping.sum()), len(overlapping))
        low, high = test.proportion_ci(method="wilson")
    return Ceiling(
        accuracy=max(0.0, 1 - noise.rate - share),
        interval=(max(0.0, 1 - noise.interval[1] - high), max(0.0, 1 - noise.interval[0] - low)),
        wrong=noise.rate,
        overlapping=share,
        alike=float(alike.mean()),
    )


def list_rows(
    judged: Judgement,
    true: NDArray[np.int64],
    noise: LabelNoise,
    conflicts: Sequence[tuple[int, int]],
) -> NDArray[np.bool_]:
    """Choose the rows that a person should look at, [rows].

    Rows that are probably mislabelled. Others only if there is evidence that the probability does
    not know: judges that are sure of another label, which mistakes that resemble the right label
    leave; and, of two near-duplicates with different labels, the one that is more likely
    mislabelled.
    """
    best = judged.probabilities.argmax(1)
    agreed = np.logical_and.reduce([given == best for given in judged.judges])
    sure = agreed & (best != true) & (judged.probabilities.max(1) >= suspect_list.SURE)
    listed: NDArray[np.bool_] = (noise.p_wrong >= LIST_FROM) | sure
    for i, j in conflicts:
        listed[i if noise.scores[i] >= noise.scores[j] else j] = True
    return listed


def _suspects(
    rows: Table,
    labels: Sequence[str],
    true: NDArray[np.int64],
    probabilities: NDArray[np.float64],
    noise: LabelNoise,
    listed: NDArray[np.bool_],
    neighbours: NDArray[np.int64],
) -> tuple[Suspect, ...]:
    others = probabilities.copy()
    others[np.arange(len(true)), true] = -1
    best = others.argmax(1)
    return tuple(
        Suspect(
            row=rows.places[i] + 1,
            text=rows.texts[i],
            label=rows.labels[i],
            suggested=labels[best[i]],
            p_wrong=float(noise.p_wrong[i]),
            p_label=float(probabilities[i, true[i]]),
            p_suggested=float(probabilities[i, best[i]]),
            neighbours=int((true[neighbours[i]] == best[i]).sum()),
        )
        for i in np.argsort(-noise.scores, kind="stable")
        if listed[i]
    )


def _planted(
    wrong: Mapping[int, str],
    rows: Table,
    suspects: Sequence[Suspect],
    decided: Decisions | None = None,
) -> Planted | None:
    """Count the planted errors of some rows among the suspects.

    Those that a person has decided do not count.
    """
    open_rows = set(rows.places) - set(decided or {})
    wrong = {row: label for row, label in wrong.items() if row - 1 in open_rows}
    if not wrong:
        return None
    listed = [suspect for suspect in suspects if suspect.row in wrong]
    return Planted(
        num_wrong=len(wrong),
        num_listed=len(suspects),
        num_found=len(listed),
        num_suggested=sum(suspect.suggested == wrong[suspect.row] for suspect in listed),
    )

"""A diagnosis where rows have several labels: which are probably wrong, and which are missing.

Each label is judged by itself, one against the rest. What a diagnosis says of rows with one label
beyond that is left out; `NOT_JUDGED` has the reasons.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from remora.config import DiagnoseConfig, TrainConfig
from remora.data.corrections import Corrections
from remora.data.dataset import Dataset
from remora.data.table import Table
from remora.diagnosis import duplicates, label_noise, out_of_sample, suspect_list
from remora.diagnosis.label_noise import SetNoise
from remora.diagnosis.suspect_list import Suspect
from remora.evaluation import results
from remora.evaluation.multi_label import as_sets, at_best_threshold, f1_scores, indicators
from remora.evaluation.predictions import DEFAULT_THRESHOLD, ScoredSets
from remora.runtime import files
from remora.runtime.reporter import Reporter

NOT_JUDGED = (
    "not judged with several labels a row: pairs of labels, since a row may rightly have both; the "
    "ceiling, which needs the one right label of a row; rare words of one label"
)


@dataclass(frozen=True, kw_only=True)
class LabelDoubts:
    """The doubts about a label."""

    label: str
    num_rows: int  # that have it
    num_wrong: int  # of those, listed to lose it
    num_missing: int  # rows listed to get it


@dataclass(frozen=True, kw_only=True)
class SetDiagnosis:
    """Which labels of a run's rows are probably wrong, and which are missing."""

    method: str
    num_rows: int
    num_labels: int  # given to the rows, in total
    out_of_sample_micro_f1: float  # of the judges, against the labels as given
    micro_f1: float  # of the run on its held-out rows
    wrong: float  # estimated share of the given labels that are wrong
    wrong_interval: tuple[float, float]  # 95 %
    missing: float  # estimated number of missing labels, as a share of the given ones
    missing_interval: tuple[float, float]  # 95 %
    suspects: tuple[Suspect, ...]  # the most suspicious first
    labels: tuple[LabelDoubts, ...]  # the most doubtful first
    num_test_exact: int  # test rows whose text is a training text, but for case and spaces
    num_test_near: int  # test rows that are nearly a training text, those included
    num_conflicting: int  # training rows whose text occurs with other labels too
    num_decided: int  # rows that a person decided before, which are no suspects
    not_judged: str = NOT_JUDGED

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as JSON holds them; the suspects are in relabel.csv."""
        found = asdict(self) | {"suspects": len(self.suspects), "bands": self.bands}
        return found | {"multi_label": True}

    @property
    def bands(self) -> dict[str, int]:
        """How many suspects there are in each band."""
        return suspect_list.in_bands(self.suspects)


def diagnose_sets(
    config: DiagnoseConfig,
    settings: TrainConfig,
    dataset: Dataset,
    everything: Dataset,
    rows: Table,
    before: Corrections | None,
    reporter: Reporter,
) -> SetDiagnosis:
    """Find the labels that are probably wrong or missing; write diagnosis.json and relabel.csv.

    Args:
        config: The settings of the diagnosis.
        settings: The run's.
        dataset: Its splits.
        everything: All rows of its training table.
        rows: Those of them that are judged.
        before: What a person has decided so far.
        reporter: Told the progress.

    Raises:
        Stopped: If a signal asked to stop while adapters were trained.
    """
    labels = dataset.labels
    reporter.say(out_of_sample.DESCRIPTIONS[config.method])
    probabilities, judges = out_of_sample.judge_sets(
        replace(everything, train=rows),
        settings,
        config.method,
        config.folds,
        reporter,
        folder=config.run / out_of_sample.FOLDS,
    )
    given = indicators(rows.labels, labels)
    noise = label_noise.estimate_sets(probabilities, given)
    neighbours, _ = duplicates.nearest(rows.texts, duplicates.NUM_NEIGHBOURS)
    same = duplicates.same(rows.texts)
    conflicts = [(i, j) for i, j in same if rows.labels[i] != rows.labels[j]]
    doubted = list_labels(probabilities, judges, given, noise, conflicts)
    decided = before.decisions if before else {}
    doubted &= np.array([row not in decided for row in rows.places])[:, None]

    num_given = max(1, int(given.sum()))
    low, high = noise.missing_interval
    diagnosis = SetDiagnosis(
        method=out_of_sample.DESCRIPTIONS[config.method],
        num_rows=len(rows),
        num_labels=int(given.sum()),
        out_of_sample_micro_f1=_micro_f1(probabilities, given),
        micro_f1=results.read(config.run).figures["metrics"]["micro_f1"],
        wrong=noise.rate,
        wrong_interval=noise.interval,
        missing=noise.num_missing / num_given,
        missing_interval=(low / num_given, high / num_given),
        suspects=find_suspects(rows, labels, probabilities, given, noise, doubted, neighbours),
        labels=_by_label(labels, given, doubted),
        num_test_exact=duplicates.num_exact(dataset),
        num_test_near=duplicates.num_near(dataset),
        num_conflicting=len({row for conflict in conflicts for row in conflict}),
        num_decided=len(decided),
    )
    sheet = before.sheet if before else None
    suspect_list.write(config.run / suspect_list.FILE, diagnosis.suspects, sheet)
    files.write_json(config.run / "diagnosis.json", diagnosis.to_dict())
    if config.method == "adapters":
        shutil.rmtree(config.run / out_of_sample.FOLDS, ignore_errors=True)
    return diagnosis


def list_labels(
    probabilities: NDArray[np.float64],
    judges: Sequence[NDArray[np.float64]],
    given: NDArray[np.int64],
    noise: SetNoise,
    conflicts: Sequence[tuple[int, int]],
) -> NDArray[np.bool_]:
    """Choose the labels that a person should look at, [rows, labels].

    Those that are probably wrong or missing. Others only if there is evidence that the probability
    does not know: judges that are all sure of a label that is missing, and, where a text occurs
    with different labels, the one that is most likely wrong or missing. Texts that are nearly the
    same are no such evidence, since one may have a concern more than the other.
    """
    agreed = np.logical_and.reduce([each >= DEFAULT_THRESHOLD for each in judges])
    sure = agreed & (given == 0) & (probabilities >= suspect_list.SURE)
    doubted: NDArray[np.bool_] = (noise.p_wrong >= suspect_list.WORTH_A_LOOK) | sure
    for pair in conflicts:
        different = given[pair[0]] != given[pair[1]]
        doubts = np.where(different, noise.p_wrong[list(pair)], -1)  # [2, labels]
        place, label = np.unravel_index(doubts.argmax(), doubts.shape)
        doubted[pair[place], label] = True
    return doubted


def find_suspects(
    rows: Table,
    labels: Sequence[str],
    probabilities: NDArray[np.float64],
    given: NDArray[np.int64],
    noise: SetNoise,
    doubted: NDArray[np.bool_],
    neighbours: NDArray[np.int64],
) -> tuple[Suspect, ...]:
    """Return the rows with a doubted label, the one with the most doubtful label first.

    The suggestion is the given set with every doubted label taken away or added. Its probability,
    as that of the given set, is the product over labels, as if they were independent.
    """
    suggested = np.where(doubted, 1 - given, given)
    sets = as_sets(suggested.astype(bool), labels)
    plausible = np.where(given == 1, probabilities, 1 - probabilities)
    p_suggested = np.where(suggested == 1, probabilities, 1 - probabilities).prod(1)
    p_wrong = np.where(doubted, noise.p_wrong, 0).max(1)
    least = np.where(doubted, plausible, 1).min(1)  # cleanlab's order: the least self-confidence
    return tuple(
        Suspect(
            row=rows.places[i] + 1,
            text=rows.texts[i],
            label=rows.written(rows.labels[i]),
            suggested=rows.written(sets[i]),
            p_wrong=float(p_wrong[i]),
            p_label=float(plausible[i].prod()),
            p_suggested=float(p_suggested[i]),
            neighbours=int((given[neighbours[i]] == suggested[i])[:, doubted[i]].all(1).sum()),
        )
        for i in np.lexsort((least, -p_wrong))
        if doubted[i].any()
    )


def _micro_f1(probabilities: NDArray[np.float64], given: NDArray[np.int64]) -> float:
    """Return the micro-F1 of the judges at the one threshold that is best."""
    scored = ScoredSets(
        probabilities=probabilities,
        true=given,
        thresholds=np.full(given.shape[1], DEFAULT_THRESHOLD),
    )
    return f1_scores(at_best_threshold(scored))[0]


def _by_label(
    labels: Sequence[str], given: NDArray[np.int64], doubted: NDArray[np.bool_]
) -> tuple[LabelDoubts, ...]:
    """Return the labels that are doubted in some row, the most often doubted first."""
    found = [
        LabelDoubts(
            label=label,
            num_rows=int(given[:, place].sum()),
            num_wrong=int((doubted[:, place] & (given[:, place] == 1)).sum()),
            num_missing=int((doubted[:, place] & (given[:, place] == 0)).sum()),
        )
        for place, label in enumerate(labels)
    ]
    doubts = [each for each in found if each.num_wrong or each.num_missing]
    return tuple(sorted(doubts, key=lambda each: (-each.num_wrong - each.num_missing, each.label)))

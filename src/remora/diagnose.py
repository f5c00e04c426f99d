"""Why a classifier errs: labels that overlap, wrong labels, too few rows, too little training."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from remora import crossfit, data, duplicates, relabel, run
from remora.config import DiagnoseConfig, TrainConfig
from remora.data import Dataset, Table
from remora.errors import ConfigError, DataError
from remora.progress import Reporter
from remora.relabel import Suspect
from remora.table import one_line

Verdict = Literal[
    "labels overlap", "rows mislabelled", "too few examples", "undertrained", "undecided"
]
FEW_ROWS = 15
MIN_BOTH = 3
"""Fewer held-out rows that run and baseline both confuse say nothing, whatever their p-value."""
SIGNIFICANT = 0.05
NUM_PAIRS = 10
NUM_NEIGHBOURS = 5


@dataclass(frozen=True, kw_only=True)
class PairDiagnosis:
    """Two labels that are taken for each other, why, and the evidence."""

    first: str
    second: str
    verdict: Verdict
    reason: str
    num_first: int  # training rows
    num_second: int
    first_as_second: int  # training rows, judged out of sample
    second_as_first: int
    num_suspects: int  # of those, rows whose label is suspected to be wrong
    num_conflicting: int  # rows with a nearly identical text under the other label
    held_out_rows: int  # of either label
    held_out_by_run: int  # of those, taken for the other label by the run
    held_out_by_baseline: int
    held_out_by_both: int
    accuracy_if_merged: float  # of the run on the held-out rows, if the two were one label


@dataclass(frozen=True, kw_only=True)
class Planted:
    """How many of a sample's labels that are wrong on purpose were found."""

    num_wrong: int
    num_listed: int  # rows in relabel.csv
    num_found: int  # wrong ones among them
    num_suggested: int  # of those found, how many come with the right label

    @property
    def precision(self) -> float:
        """Share of the rows listed that are wrong."""
        return self.num_found / max(1, self.num_listed)

    @property
    def recall(self) -> float:
        """Share of the wrong rows that are listed."""
        return self.num_found / self.num_wrong


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """What was found."""

    method: str
    num_rows: int
    out_of_sample_accuracy: float  # against the labels as given
    suspects: tuple[Suspect, ...]  # the most suspicious first
    pairs: tuple[PairDiagnosis, ...]
    num_test_exact: int  # test rows whose text is a training text, but for case and spaces
    num_test_near: int  # test rows that are nearly a training text, those included
    num_conflicting: int  # training rows with a nearly identical text under another label
    accuracy: float  # of the run
    planted: Planted | None  # for a sample, whose wrong labels are known

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as JSON holds them; the suspects are in relabel.csv."""
        return asdict(self) | {"suspects": len(self.suspects)}


@dataclass(frozen=True)
class _HeldOut:
    """What the run and the baseline said of the held-out rows."""

    true: NDArray[np.str_]
    by_run: NDArray[np.str_]
    by_baseline: NDArray[np.str_] | None


def diagnose(config: DiagnoseConfig, *, reporter: Reporter | None = None) -> Diagnosis:
    """Find out why a run errs; leaves diagnosis.json and relabel.csv in its directory.

    Raises:
        ConfigError: If cleanlab is not installed.
        DataError: If the run is not finished, or its rows have changed.
    """
    reporter = reporter or Reporter()
    _need_cleanlab()
    held_out = _held_out(config.run)
    settings, dataset, everything = load(config)
    labels, rows = dataset.labels, everything.train
    place = {label: index for index, label in enumerate(labels)}
    true = np.array([place[label] for label in rows.labels])
    reporter.say(crossfit.DESCRIPTIONS[config.method])
    probabilities = crossfit.probabilities(
        everything, settings, config.method, config.folds, reporter
    )
    from cleanlab.filter import find_label_issues

    suspected = find_label_issues(true, probabilities, n_jobs=1)
    neighbours, near = duplicates.nearest(rows.texts, NUM_NEIGHBOURS)
    conflicting = np.zeros(len(rows), dtype=bool)
    conflicts = [(i, j) for i, j in near if true[i] != true[j]]
    conflicting[[row for pair in conflicts for row in pair]] = True
    suspects = _suspects(rows, labels, true, probabilities, suspected, neighbours)
    found = Diagnosis(
        method=crossfit.DESCRIPTIONS[config.method],
        num_rows=len(rows),
        out_of_sample_accuracy=float((probabilities.argmax(1) == true).mean()),
        suspects=suspects,
        pairs=_pairs(labels, true, probabilities, suspected, conflicts, held_out),
        num_test_exact=duplicates.num_exact(dataset),
        num_test_near=duplicates.num_near(dataset),
        num_conflicting=int(conflicting.sum()),
        accuracy=float((held_out.true == held_out.by_run).mean()),
        planted=_planted(data.planted_errors(settings.data), suspects),
    )
    relabel.write(config.run / "relabel.csv", found.suspects)
    run.write_json(config.run / "diagnosis.json", found.to_dict())
    return found


def apply(config: DiagnoseConfig) -> tuple[Path, int, int]:
    """Write the training table with a person's decisions; return where, corrected and deleted.

    Raises:
        DataError: If the decisions do not fit the table.
    """
    assert config.apply is not None
    _, _, everything = load(config)
    cleaned, num_corrected, num_deleted = relabel.apply(config.apply, everything.train)
    path = config.output or config.run / "cleaned.csv"
    relabel.write_table(path, cleaned)
    return path, num_corrected, num_deleted


def load(config: DiagnoseConfig) -> tuple[TrainConfig, Dataset, Dataset]:
    """Return a run's settings, its splits, and all rows of its training table in their order.

    Raises:
        DataError: If the rows are not those that the run was trained on.
    """
    _need_file(config.run, "config.toml")
    settings = run.read_settings(config.run)
    if config.model is not None:
        settings = replace(settings, model=config.model)

    dataset = data.load(settings)
    try:
        wanted = json.loads((config.run / "data.json").read_text(encoding="utf-8"))["sha256"]
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{config.run} has no readable data.json; train it again") from error
    if wanted != dataset.summary.sha256:
        raise DataError(
            f"the rows of {settings.data} are not those that {config.run} was trained on; "
            "restore them, or train again"
        )
    whole = data.load(replace(settings, validation_fraction=0.0, test_fraction=0.0))
    return settings, dataset, whole


def _need_cleanlab() -> None:
    try:
        import cleanlab.filter  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "diagnose needs cleanlab, which is not installed; pip install 'remora[diagnose]'"
        ) from error


def _need_file(directory: Path, name: str) -> None:
    advice = "give the directory of a finished run"
    if not directory.is_dir():
        raise DataError(f"there is no folder {directory}; {advice}")
    if not (directory / name).is_file():
        raise DataError(f"{directory} has no {name}; {advice}")


def _held_out(directory: Path) -> _HeldOut:
    path = directory / "predictions.csv"
    _need_file(directory, path.name)
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        true, by_run = (np.array([row[name] for row in rows]) for name in ("label", "predicted"))
        baseline = np.array([row["baseline"] for row in rows]) if "baseline" in rows[0] else None
    except (ValueError, KeyError, IndexError, csv.Error) as error:
        raise DataError(f"{path} is broken ({one_line(error)}); train the run again") from error
    return _HeldOut(true, by_run, baseline)


# Suspects


def suspicion(probabilities: NDArray[np.float64], true: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return log(p of the likeliest other label / p of the given one) for each row, [rows].

    Unlike the difference of the two, it does not flatten where an unsure model spreads its
    probability over many labels. docs/log.md compares the rankings.
    """
    rows = np.arange(len(true))
    others = probabilities.copy()
    others[rows, true] = 0
    ratio: NDArray[np.float64] = np.log(np.maximum(others.max(1), 1e-12)) - np.log(
        np.maximum(probabilities[rows, true], 1e-12)
    )
    return ratio


def _suspects(
    rows: Table,
    labels: Sequence[str],
    true: NDArray[np.int64],
    probabilities: NDArray[np.float64],
    suspected: NDArray[np.bool_],
    neighbours: NDArray[np.int64],
) -> tuple[Suspect, ...]:
    ranked = np.argsort(-suspicion(probabilities, true), kind="stable")
    return tuple(
        Suspect(
            row=int(i) + 1,
            text=rows.texts[i],
            label=rows.labels[i],
            suggested=labels[best],
            p_label=float(probabilities[i, true[i]]),
            p_suggested=float(probabilities[i, best]),
            neighbours=int((true[neighbours[i]] == best).sum()),
        )
        for i in ranked
        if suspected[i] and (best := int(probabilities[i].argmax())) != true[i]
    )


def _planted(wrong: Mapping[int, str], suspects: Sequence[Suspect]) -> Planted | None:
    if not wrong:
        return None
    listed = [suspect for suspect in suspects if suspect.row in wrong]
    return Planted(
        num_wrong=len(wrong),
        num_listed=len(suspects),
        num_found=len(listed),
        num_suggested=sum(suspect.suggested == wrong[suspect.row] for suspect in listed),
    )


# Pairs of labels


def _pairs(
    labels: Sequence[str],
    true: NDArray[np.int64],
    probabilities: NDArray[np.float64],
    suspected: NDArray[np.bool_],
    conflicts: Sequence[tuple[int, int]],
    held_out: _HeldOut,
) -> tuple[PairDiagnosis, ...]:
    """Judge the pairs that are confused most, out of sample or by the run."""
    predicted = probabilities.argmax(1)
    place = {run.defused(label): index for index, label in enumerate(labels)}
    confused = np.zeros((len(labels), len(labels)), dtype=np.int64)
    np.add.at(confused, (true, predicted), 1)
    for answer, given in zip(held_out.true, held_out.by_run, strict=True):
        confused[place[answer], place[given]] += 1
    both = np.triu(confused + confused.T, 1)
    ranked = sorted(np.argwhere(both >= 3).tolist(), key=lambda pair: -both[pair[0], pair[1]])
    return tuple(
        _pair(labels, a, b, true, predicted, suspected, conflicts, held_out)
        for a, b in ranked[:NUM_PAIRS]
    )


def _pair(
    labels: Sequence[str],
    a: int,
    b: int,
    true: NDArray[np.int64],
    predicted: NDArray[np.int64],
    suspected: NDArray[np.bool_],
    conflicts: Sequence[tuple[int, int]],
    held_out: _HeldOut,
) -> PairDiagnosis:
    taken = ((true == a) & (predicted == b)) | ((true == b) & (predicted == a))
    first, second = run.defused(labels[a]), run.defused(labels[b])
    own = np.isin(held_out.true, (first, second))
    by_run = _taken(held_out.true, held_out.by_run, first, second)[own]
    by_baseline = np.zeros_like(by_run)
    if held_out.by_baseline is not None:
        by_baseline = _taken(held_out.true, held_out.by_baseline, first, second)[own]
    rows = {row for i, j in conflicts if {true[i], true[j]} == {a, b} for row in (i, j)}
    counts = {
        "num_first": int((true == a).sum()),
        "num_second": int((true == b).sum()),
        "first_as_second": int((taken & (true == a)).sum()),
        "second_as_first": int((taken & (true == b)).sum()),
        "num_suspects": int((taken & suspected).sum()),
        "num_conflicting": len(rows),
        "held_out_rows": int(own.sum()),
        "held_out_by_run": int(by_run.sum()),
        "held_out_by_baseline": int(by_baseline.sum()),
        "held_out_by_both": int((by_run & by_baseline).sum()),
    }
    verdict, reason = judge(**counts)
    right = (held_out.true == held_out.by_run).sum() + by_run.sum()
    return PairDiagnosis(
        first=labels[a],
        second=labels[b],
        verdict=verdict,
        reason=reason,
        accuracy_if_merged=float(right / len(held_out.true)),
        **counts,
    )


def _taken(
    true: NDArray[np.str_], given: NDArray[np.str_], first: str, second: str
) -> NDArray[np.bool_]:
    """Tell which rows of one label were taken for the other."""
    result: NDArray[np.bool_] = ((true == first) & (given == second)) | (
        (true == second) & (given == first)
    )
    return result


def judge(
    *,
    num_first: int,
    num_second: int,
    first_as_second: int,
    second_as_first: int,
    num_suspects: int,
    num_conflicting: int,
    held_out_rows: int,
    held_out_by_run: int,
    held_out_by_baseline: int,
    held_out_by_both: int,
) -> tuple[Verdict, str]:
    """Say why two labels are confused, from counts as in `PairDiagnosis`.

    A verdict needs evidence that another cause would not leave; else it is `undecided`. A model
    that has not learned enough errs more often than the baseline on the same rows. Labels that
    overlap make models of different kinds err on the same rows.
    """
    from scipy.stats import binomtest, fisher_exact

    if min(num_first, num_second) < FEW_ROWS:
        return "too few examples", f"a label has {min(num_first, num_second)} training rows"
    taken, num_rows = first_as_second + second_as_first, num_first + num_second
    only_run = held_out_by_run - held_out_by_both
    only_baseline = held_out_by_baseline - held_out_by_both
    if only_run + only_baseline:
        test = binomtest(only_run, only_run + only_baseline, alternative="greater")
        if test.pvalue < SIGNIFICANT:
            return "undertrained", (
                f"the run confuses {held_out_by_run} of {held_out_rows} held-out rows, "
                f"the baseline {held_out_by_baseline} (p = {test.pvalue:.2g})"
            )
    if num_conflicting >= max(4, 0.02 * num_rows):
        return "labels overlap", (
            f"{num_conflicting} rows have a nearly identical text under the other label"
        )
    table = [
        [held_out_by_both, only_run],
        [only_baseline, held_out_rows - held_out_by_run - only_baseline],
    ]
    alike = fisher_exact(table, alternative="greater").pvalue
    both_ways = min(first_as_second, second_as_first) >= 2
    if both_ways and held_out_by_both >= MIN_BOTH and alike < SIGNIFICANT:
        chance = held_out_by_run * held_out_by_baseline / held_out_rows
        return "labels overlap", (
            f"{taken} of {num_rows} training rows are confused out of sample, in both directions, "
            f"and run and baseline confuse the same {held_out_by_both} held-out rows, "
            f"{chance:.1f} by chance (p = {alike:.2g})"
        )
    most = max(held_out_by_run, held_out_by_baseline)
    table = [[taken, num_rows - taken], [most, held_out_rows - most]]
    rarer = fisher_exact(table, alternative="greater").pvalue
    if num_suspects > taken / 2 and rarer < SIGNIFICANT:
        return "rows mislabelled", (
            f"{num_suspects} of the {taken} training rows confused out of sample have a suspect "
            f"label, and held-out rows are confused less often ({most} of {held_out_rows}, "
            f"p = {rarer:.2g})"
        )
    return "undecided", (
        f"{taken} of {num_rows} training rows and {held_out_by_run} of {held_out_rows} held-out "
        "rows are confused, but nothing tells why"
    )

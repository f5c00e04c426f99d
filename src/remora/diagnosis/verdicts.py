"""Pairs of labels that are confused: why, and the evidence."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from remora.diagnosis.out_of_sample import Judgement

Verdict = Literal[
    "labels overlap", "rows mislabelled", "too few examples", "undertrained", "undecided"
]
FEW_ROWS = 15
MIN_BOTH = 3
"""Fewer rows confused by both of two judges are no evidence, whatever their p-value."""
SIGNIFICANT = 0.05
NUM_PAIRS = 10


@dataclass(frozen=True)
class HeldOut:
    """The predictions of the run and of others on the held-out rows."""

    true: NDArray[np.str_]
    by_run: NDArray[np.str_]
    by_baseline: NDArray[np.str_] | None
    by_judges: NDArray[np.str_]  # out of sample, of all judges pooled


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """Counts and p-values by which a pair of labels is judged."""

    num_first: int  # training rows
    num_second: int
    first_as_second: int  # training rows, judged out of sample
    second_as_first: int
    num_suspects: int  # of those, rows suspected to be mislabelled
    num_conflicting: int  # rows with a nearly identical text under the other label
    first_by_all: int  # training rows, without suspects, that every judge alone confuses
    second_by_all: int
    by_all_by_chance: float  # how many if the judges erred independently
    p_alike: float  # probability of so many by chance
    by_half: int  # training rows without suspects confused by regressions on half of the rows
    by_most: int  # the same regressions on most rows
    p_half: float  # probability of such a fall by chance
    held_out_rows: int  # of either label
    held_out_by_run: int  # of those, confused by the run
    held_out_by_baseline: int | None  # None if the run was not measured beside one
    held_out_by_both: int | None
    held_out_by_judges: int
    held_out_by_judges_too: int  # of those that the run confuses


@dataclass(frozen=True, kw_only=True)
class PairDiagnosis(Evidence):
    """Two labels that are confused, why, and the evidence."""

    first: str
    second: str
    verdict: Verdict
    reason: str
    accuracy_if_merged: float  # of the run on the held-out rows, with the two labels merged
    accuracy_if_redefined: float  # with the boundary between the two drawn by the judges


def diagnose_pairs(
    labels: Sequence[str],
    true: NDArray[np.int64],
    judged: Judgement,
    suspected: NDArray[np.bool_],
    conflicts: Sequence[tuple[int, int]],
    held_out: HeldOut,
) -> tuple[PairDiagnosis, ...]:
    """Judge the most confused pairs of labels, out of sample or by the run.

    Args:
        labels: All labels.
        true: Labels of the training rows as given, [rows].
        judged: Predictions for the training rows, out of sample.
        suspected: Which of them are probably mislabelled, [rows].
        conflicts: Pairs of rows with nearly identical texts and different labels.
        held_out: Predictions for the held-out rows.
    """
    place = {label: index for index, label in enumerate(labels)}
    counts = np.zeros((len(labels), len(labels)), dtype=np.int64)  # [true, predicted]
    np.add.at(counts, (true, judged.probabilities.argmax(1)), 1)
    for answer, given in zip(held_out.true, held_out.by_run, strict=True):
        counts[place[answer], place[given]] += 1
    both = np.triu(counts + counts.T, 1)
    ranked = sorted(np.argwhere(both >= 3).tolist(), key=lambda pair: -both[pair[0], pair[1]])
    return tuple(
        _pair(labels, a, b, true, judged, suspected, conflicts, held_out)
        for a, b in ranked[:NUM_PAIRS]
    )


def _pair(
    labels: Sequence[str],
    a: int,
    b: int,
    true: NDArray[np.int64],
    judged: Judgement,
    suspected: NDArray[np.bool_],
    conflicts: Sequence[tuple[int, int]],
    held_out: HeldOut,
) -> PairDiagnosis:
    from scipy.stats import binomtest, fisher_exact

    # Training rows, out of sample
    by_pool = confused(true, judged.probabilities.argmax(1), a, b)
    counted = np.isin(true, (a, b)) & ~suspected
    alone = [confused(true, given, a, b) & counted for given in judged.judges]
    by_all, by_chance, p_alike = np.logical_and.reduce(alone), float(counted.sum()), 1.0
    for each in alone:
        by_chance *= each.sum() / max(1, counted.sum())
    if len(alone) > 1:
        x, y = alone
        table = [[(x & y).sum(), (x & ~y).sum()], [(y & ~x).sum(), (counted & ~x & ~y).sum()]]
        p_alike = float(fisher_exact(table, alternative="greater").pvalue)
    half, most = (confused(true, each, a, b) & counted for each in (judged.by_half, judged.by_most))
    cured, spoilt = int((half & ~most).sum()), int((most & ~half).sum())
    p_half = 1.0
    if cured + spoilt:
        p_half = float(binomtest(cured, cured + spoilt, alternative="greater").pvalue)

    # Held-out rows
    first, second = labels[a], labels[b]
    own = np.isin(held_out.true, (first, second))
    by_run = confused(held_out.true, held_out.by_run, first, second)
    by_judges = confused(held_out.true, held_out.by_judges, first, second)
    by_baseline = None
    if held_out.by_baseline is not None:
        by_baseline = confused(held_out.true, held_out.by_baseline, first, second)
    rows = {row for i, j in conflicts if {true[i], true[j]} == {a, b} for row in (i, j)}
    evidence: dict[str, Any] = {
        "num_first": int((true == a).sum()),
        "num_second": int((true == b).sum()),
        "first_as_second": int((by_pool & (true == a)).sum()),
        "second_as_first": int((by_pool & (true == b)).sum()),
        "num_suspects": int((by_pool & suspected).sum()),
        "num_conflicting": len(rows),
        "first_by_all": int((by_all & (true == a)).sum()),
        "second_by_all": int((by_all & (true == b)).sum()),
        "by_all_by_chance": by_chance,
        "p_alike": p_alike,
        "by_half": int(half.sum()),
        "by_most": int(most.sum()),
        "p_half": p_half,
        "held_out_rows": int(own.sum()),
        "held_out_by_run": int(by_run.sum()),
        "held_out_by_baseline": None if by_baseline is None else int(by_baseline.sum()),
        "held_out_by_both": None if by_baseline is None else int((by_run & by_baseline).sum()),
        "held_out_by_judges": int(by_judges.sum()),
        "held_out_by_judges_too": int((by_run & by_judges).sum()),
    }
    # The verdict, and what merging or redefining the labels would give
    verdict, reason = judge(Evidence(**evidence))
    right = (held_out.true == held_out.by_run).sum() + by_run.sum()
    # No other boundary between the two gains more than merging them.
    anew = np.where(own & np.isin(held_out.by_judges, (first, second)), held_out.by_judges, "")
    redefined = np.where(anew == "", held_out.true, anew)
    return PairDiagnosis(
        first=labels[a],
        second=labels[b],
        verdict=verdict,
        reason=reason,
        accuracy_if_merged=float(right / len(held_out.true)),
        accuracy_if_redefined=float((redefined == held_out.by_run).mean()),
        **evidence,
    )


def confused(true: NDArray[Any], given: NDArray[Any], first: Any, second: Any) -> NDArray[np.bool_]:
    """Return which rows of one label were predicted as the other, [rows]."""
    result: NDArray[np.bool_] = ((true == first) & (given == second)) | (
        (true == second) & (given == first)
    )
    return result


def judge(evidence: Evidence) -> tuple[Verdict, str]:  # noqa: PLR0911 - one verdict after the other
    """Say why two labels are confused.

    A verdict needs evidence that another cause would not leave; otherwise it is `undecided`. An
    undertrained model errs more often than cheap classifiers on the same rows. Overlapping labels
    make classifiers of different kinds err on the same rows, in both directions, the run among
    them, and more rows do not help.
    """
    each = evidence
    num_confused = each.first_as_second + each.second_as_first
    num_rows = each.num_first + each.num_second
    if min(each.num_first, each.num_second) < FEW_ROWS:
        rows = min(each.num_first, each.num_second)
        return "too few examples", f"a label has {rows} training rows"
    if reason := _undertrained(each):
        return "undertrained", reason
    if each.num_conflicting >= max(4, 0.02 * num_rows):
        return "labels overlap", (
            f"{each.num_conflicting} rows have a near-duplicate under the other label"
        )
    if (
        min(each.first_by_all, each.second_by_all) >= 2 and each.p_alike < SIGNIFICANT / NUM_PAIRS
    ):  # all judges err on the same rows
        if each.p_half < SIGNIFICANT:
            return "too few examples", (
                f"regressions trained on most rows confuse {each.by_most}, on half of them "
                f"{each.by_half} (p = {each.p_half:.2g}); more rows would help"
            )
        if reason := _overlapping(each):
            return "labels overlap", reason
    if reason := _mislabelled(each, num_confused, num_rows):
        return "rows mislabelled", reason
    return "undecided", (
        f"{num_confused} of {num_rows} training rows and {each.held_out_by_run} of "
        f"{each.held_out_rows} held-out rows are confused; there is no evidence for one cause"
    )


def _others(evidence: Evidence) -> Iterator[tuple[str, int, int]]:
    """Yield the rivals on the held-out rows: name, rows confused, and confused by the run too."""
    if evidence.held_out_by_baseline is not None and evidence.held_out_by_both is not None:
        yield "baseline", evidence.held_out_by_baseline, evidence.held_out_by_both
    yield "judges", evidence.held_out_by_judges, evidence.held_out_by_judges_too


def _undertrained(evidence: Evidence) -> str | None:
    """Say how a rival confuses fewer of the held-out rows than the run, if one does."""
    from scipy.stats import binomtest

    by_run = evidence.held_out_by_run
    for name, count, both in _others(evidence):
        only_run, only_other = by_run - both, count - both
        if only_run + only_other:
            test = binomtest(only_run, only_run + only_other, alternative="greater")
            if test.pvalue < SIGNIFICANT:
                return (
                    f"the run confuses {by_run} of {evidence.held_out_rows} held-out rows, "
                    f"the {name} {count} (p = {test.pvalue:.2g})"
                )
    return None


def _overlapping(evidence: Evidence) -> str | None:
    """Say how the run confuses the same held-out rows as a rival, if it does."""
    from scipy.stats import fisher_exact

    by_run, num_rows = evidence.held_out_by_run, evidence.held_out_rows
    for name, count, both in _others(evidence):
        table = [[both, by_run - both], [count - both, num_rows - by_run - count + both]]
        p_both = fisher_exact(table, alternative="greater").pvalue
        if both >= MIN_BOTH and p_both < SIGNIFICANT:
            return (
                f"{evidence.first_by_all + evidence.second_by_all} training rows are confused by "
                "all judges, in both directions, where "
                f"{evidence.by_all_by_chance:.1f} are expected by chance "
                f"(p = {evidence.p_alike:.2g}); half of the rows would do as well; run and {name} "
                f"confuse the same {both} of {num_rows} held-out rows, "
                f"{by_run * count / num_rows:.1f} expected by chance (p = {p_both:.2g})"
            )
    return None


def _mislabelled(evidence: Evidence, num_confused: int, num_rows: int) -> str | None:
    """Say how many confused rows are suspects, if held-out rows are confused less often."""
    from scipy.stats import fisher_exact

    most = max(evidence.held_out_by_run, *(count for _, count, _ in _others(evidence)))
    table = [[num_confused, num_rows - num_confused], [most, evidence.held_out_rows - most]]
    rarer = fisher_exact(table, alternative="greater").pvalue
    if evidence.num_suspects <= num_confused / 2 or rarer >= SIGNIFICANT:
        return None
    return (
        f"{evidence.num_suspects} of the {num_confused} training rows confused out of sample are "
        f"probably mislabelled, and held-out rows are confused less often ({most} of "
        f"{evidence.held_out_rows}, p = {rarer:.2g})"
    )

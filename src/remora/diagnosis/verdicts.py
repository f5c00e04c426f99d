"""Pairs of labels that are confused: why, and the evidence."""

from __future__ import annotations

from collections.abc import Sequence
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
class PairDiagnosis:
    """Two labels that are confused, why, and the evidence."""

    first: str
    second: str
    verdict: Verdict
    reason: str
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
    held_out_by_baseline: int
    held_out_by_both: int
    held_out_by_judges: int
    held_out_by_judges_too: int  # of those that the run confuses
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
    by_baseline = np.zeros_like(by_run)
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
        "held_out_by_baseline": int(by_baseline.sum()),
        "held_out_by_both": int((by_run & by_baseline).sum()),
        "held_out_by_judges": int(by_judges.sum()),
        "held_out_by_judges_too": int((by_run & by_judges).sum()),
    }
    # The verdict, and what merging or redefining the labels would give
    verdict, reason = judge(**evidence)
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


def judge(  # noqa: PLR0911 - a verdict after the other
    *,
    num_first: int,
    num_second: int,
    first_as_second: int,
    second_as_first: int,
    num_suspects: int,
    num_conflicting: int,
    first_by_all: int,
    second_by_all: int,
    by_all_by_chance: float,
    p_alike: float,
    by_half: int,
    by_most: int,
    p_half: float,
    held_out_rows: int,
    held_out_by_run: int,
    held_out_by_baseline: int,
    held_out_by_both: int,
    held_out_by_judges: int,
    held_out_by_judges_too: int,
) -> tuple[Verdict, str]:
    """Say why two labels are confused, from evidence as in `PairDiagnosis`.

    A verdict needs evidence that another cause would not leave; otherwise it is `undecided`. An
    undertrained model errs more often than cheap classifiers on the same rows. Overlapping labels
    make classifiers of different kinds err on the same rows, in both directions, the run among
    them, and more rows do not help.
    """
    from scipy.stats import binomtest, fisher_exact

    if min(num_first, num_second) < FEW_ROWS:
        return "too few examples", f"a label has {min(num_first, num_second)} training rows"
    num_confused, num_rows = first_as_second + second_as_first, num_first + num_second
    others = (
        ("the baseline", held_out_by_baseline, held_out_by_both),
        ("the judges", held_out_by_judges, held_out_by_judges_too),
    )
    for name, count, both in others:
        only_run, only_other = held_out_by_run - both, count - both
        if only_run + only_other:
            test = binomtest(only_run, only_run + only_other, alternative="greater")
            if test.pvalue < SIGNIFICANT:
                return "undertrained", (
                    f"the run confuses {held_out_by_run} of {held_out_rows} held-out rows, "
                    f"{name} {count} (p = {test.pvalue:.2g})"
                )
    if num_conflicting >= max(4, 0.02 * num_rows):
        return "labels overlap", (
            f"{num_conflicting} rows have a near-duplicate under the other label"
        )
    alike = min(first_by_all, second_by_all) >= 2 and p_alike < SIGNIFICANT / NUM_PAIRS
    by_all = first_by_all + second_by_all
    if alike and p_half < SIGNIFICANT:
        return "too few examples", (
            f"regressions trained on most rows confuse {by_most}, on half of them {by_half} "
            f"(p = {p_half:.2g}); more rows would help"
        )
    for name, count, both in others:
        table = [
            [both, held_out_by_run - both],
            [count - both, held_out_rows - held_out_by_run - count + both],
        ]
        p_both = fisher_exact(table, alternative="greater").pvalue
        if alike and both >= MIN_BOTH and p_both < SIGNIFICANT:
            chance = held_out_by_run * count / held_out_rows
            return "labels overlap", (
                f"{by_all} training rows are confused by all judges, in both directions, where "
                f"{by_all_by_chance:.1f} are expected by chance (p = {p_alike:.2g}); half of the "
                f"rows would do as well; run and {name.removeprefix('the ')} confuse the same "
                f"{both} of {held_out_rows} held-out rows, {chance:.1f} expected by chance "
                f"(p = {p_both:.2g})"
            )
    most = max(held_out_by_run, held_out_by_baseline, held_out_by_judges)
    table = [[num_confused, num_rows - num_confused], [most, held_out_rows - most]]
    rarer = fisher_exact(table, alternative="greater").pvalue
    if num_suspects > num_confused / 2 and rarer < SIGNIFICANT:
        return "rows mislabelled", (
            f"{num_suspects} of the {num_confused} training rows confused out of sample are "
            f"probably mislabelled, and held-out rows are confused less often ({most} of "
            f"{held_out_rows}, p = {rarer:.2g})"
        )
    return "undecided", (
        f"{num_confused} of {num_rows} training rows and {held_out_by_run} of {held_out_rows} "
        "held-out rows are confused; there is no evidence for one cause"
    )

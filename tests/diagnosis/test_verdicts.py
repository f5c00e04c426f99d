"""What confuses a pair of labels, and the evidence that it takes to say so."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from remora.diagnosis import out_of_sample, verdicts

COUNTS = {
    "num_first": 80,
    "num_second": 80,
    "first_as_second": 8,
    "second_as_first": 8,
    "num_suspects": 2,
    "num_conflicting": 0,
    "first_by_all": 4,
    "second_by_all": 4,
    "by_all_by_chance": 1.0,
    "p_alike": 1e-4,
    "by_half": 16,
    "by_most": 16,
    "p_half": 0.6,
    "held_out_rows": 50,
    "held_out_by_run": 10,
    "held_out_by_baseline": 10,
    "held_out_by_both": 8,
    "held_out_by_judges": 10,
    "held_out_by_judges_too": 2,
}


ALONE = {"held_out_by_baseline": None, "held_out_by_both": None}  # run without a baseline
APART = {"held_out_by_both": 2}  # run and baseline confuse different rows
MISLABELLED = {
    "num_suspects": 14,
    "held_out_by_run": 0,
    "held_out_by_baseline": 0,
    "held_out_by_both": 0,
    "held_out_by_judges": 0,
    "held_out_by_judges_too": 0,
}


@pytest.mark.parametrize(
    ("changed", "verdict"),
    [
        ({}, "labels overlap"),
        ({"num_second": 9}, "too few examples"),
        (APART, "undecided"),
        (APART | {"held_out_by_judges_too": 8}, "labels overlap"),
        (
            {"held_out_by_run": 2, "held_out_by_baseline": 2, "held_out_by_both": 2},
            "undecided",
        ),
        ({"second_by_all": 1}, "undecided"),
        ({"p_alike": 0.02}, "undecided"),  # one of ten pairs looks so by chance
        ({"by_half": 30, "p_half": 0.01}, "too few examples"),
        (APART | {"num_conflicting": 6}, "labels overlap"),
        ({"held_out_by_run": 20, "held_out_by_baseline": 3, "held_out_by_both": 2}, "undertrained"),
        ({"held_out_by_run": 20, "held_out_by_baseline": 8, "held_out_by_both": 8}, "undertrained"),
        ({"held_out_by_run": 20, "held_out_by_judges": 2}, "undertrained"),
        (ALONE, "undecided"),
        (ALONE | {"held_out_by_judges_too": 8}, "labels overlap"),
        (ALONE | {"held_out_by_run": 20, "held_out_by_judges": 2}, "undertrained"),
        (MISLABELLED | ALONE, "rows mislabelled"),
        (MISLABELLED, "rows mislabelled"),
        (MISLABELLED | {"num_suspects": 7}, "undecided"),
        (MISLABELLED | {"held_out_by_baseline": 5}, "undecided"),
    ],
)
def test_a_verdict_needs_its_evidence(changed: dict[str, float | None], verdict: str) -> None:
    found, reason = verdicts.judge(verdicts.Evidence(**COUNTS | changed))
    assert found == verdict
    assert reason


def test_the_evidence_behind_a_verdict() -> None:
    """Two labels: 3 rows confused out of sample, 2 held-out rows by the run, 1 of them by both."""
    true = np.array([0] * 5 + [1] * 5)
    predicted = np.array([0, 0, 0, 1, 1, 0, 1, 1, 1, 1])
    other = np.array([0, 0, 0, 1, 0, 0, 1, 1, 1, 0])
    suspected = np.array([False] * 5 + [True] + [False] * 4)
    judged = out_of_sample.Judgement(np.eye(3)[predicted], (predicted, other), predicted, other)
    held_out = verdicts.HeldOut(
        np.array(["a", "a", "b", "c"]),
        np.array(["b", "a", "a", "c"]),
        np.array(["b", "a", "b", "c"]),
        np.array(["b", "a", "b", "b"]),
    )
    (pair,) = verdicts.diagnose_pairs(["a", "b", "c"], true, judged, suspected, [(0, 9)], held_out)
    assert (pair.first_as_second, pair.second_as_first, pair.num_suspects) == (2, 1, 1)
    assert (pair.first_by_all, pair.second_by_all) == (1, 0)  # row 5 is suspected
    assert pair.by_all_by_chance == pytest.approx(2 * 2 / 9)
    assert pair.p_alike == pytest.approx(1 - (7 * 6) / (9 * 8))  # hypergeometric
    assert (pair.by_half, pair.by_most, pair.p_half) == (2, 2, 0.75)
    assert (pair.held_out_rows, pair.held_out_by_run, pair.held_out_by_both) == (3, 2, 1)
    assert (pair.held_out_by_judges, pair.held_out_by_judges_too) == (1, 1)
    assert (pair.num_conflicting, pair.accuracy_if_merged) == (2, 1.0)
    given = (["a", "b", "c"], true, judged, suspected, [(0, 9)])
    (alone,) = verdicts.diagnose_pairs(*given, replace(held_out, by_baseline=None))
    assert (alone.held_out_by_baseline, alone.held_out_by_both) == (None, None)
    # By the judges' border, the rows are b, a, b and, of another label, c: the run gets 3 right.
    assert pair.accuracy_if_redefined == 0.75

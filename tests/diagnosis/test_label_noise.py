"""The share of wrong labels, and the ceiling that they leave, against tables of known noise."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from diagnosis.test_verdicts import COUNTS
from remora.diagnosis import diagnose, label_noise, out_of_sample, verdicts


def made(num_rows: int, share_wrong: float, num_labels: int = 20):
    """Out-of-sample probabilities of a fair judge, labels a share of which is wrong, and which."""
    generator = np.random.default_rng(1)
    right = generator.integers(0, num_labels, num_rows)
    scores = generator.normal(size=(num_rows, num_labels)) + 6 * np.eye(num_labels)[right]
    probabilities = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    wrong = generator.random(num_rows) < share_wrong
    given = np.where(
        wrong, (right + generator.integers(1, num_labels, num_rows)) % num_labels, right
    )
    return probabilities, given, wrong


def test_the_share_of_wrong_labels_is_told() -> None:
    for share in (0.05, 0.15):
        probabilities, given, wrong = made(3000, share)
        found = label_noise.estimate(probabilities, given)
        assert found.rate == pytest.approx(wrong.mean(), abs=0.02)
        assert found.interval[0] <= wrong.mean() <= found.interval[1]
        listed = found.p_wrong >= diagnose.LIST_FROM
        assert wrong[listed].mean() > 0.8
        assert wrong[listed].sum() > 0.9 * wrong.sum()
        assert found.p_wrong.sum() == pytest.approx(wrong.sum(), rel=0.2)
    probabilities, given, _ = made(3000, 0.0)
    found = label_noise.estimate(probabilities, given)
    assert found.rate < 0.01
    assert (found.p_wrong < diagnose.LIST_FROM).all()


def test_the_ceiling_is_what_wrong_labels_and_overlap_leave() -> None:
    """Of 2,000 rows 10 % are wrong; of 400 rows of two labels that overlap a coin decided 200."""
    generator = np.random.default_rng(2)
    probabilities, given, wrong = made(2000, 0.1)
    noise = label_noise.estimate(probabilities, given)
    names = np.array([f"label {i}" for i in given])
    guess = np.array([f"label {i}" for i in probabilities.argmax(1)])
    rows = np.flatnonzero(~wrong)[:200]
    names[rows] = np.where(generator.random(200) < 0.5, "label 0", "label 1")
    guess[rows] = "label 0"  # the likelier of two; half of these rows are wrong for any model
    held_out = verdicts.HeldOut(names, guess, guess, guess)
    overlap = verdicts.PairDiagnosis(
        first="label 0",
        second="label 1",
        verdict="labels overlap",
        reason="",
        accuracy_if_merged=0.9,
        accuracy_if_redefined=0.9,
        **COUNTS,
    )
    found = diagnose.ceiling(noise, held_out, [overlap])
    best = (names == guess).mean()  # what the best model gets
    assert found.interval[0] <= best <= found.interval[1]
    assert found.accuracy == pytest.approx(best, abs=0.02)
    assert found.overlapping == pytest.approx(0.05, abs=0.01)
    assert found.alike == 0  # all that they get wrong alike is counted already
    without = diagnose.ceiling(noise, held_out, [replace(overlap, verdict="undecided")])
    assert without.overlapping == 0
    assert without.alike == found.overlapping
    apart = replace(held_out, by_baseline=names)  # the baseline is right everywhere
    assert diagnose.ceiling(noise, apart, [replace(overlap, verdict="undecided")]).alike == 0
    assert without.accuracy == pytest.approx(0.9, abs=0.02)


def test_rows_that_a_person_should_look_at() -> None:
    probabilities = np.array([[0.95, 0.05], [0.95, 0.05], [0.5, 0.5], [0.6, 0.4]])
    best = np.array([0, 0, 0, 0])
    other = np.array([0, 1, 0, 0])
    judged = out_of_sample.Judgement(probabilities, (best, other), best, best)
    scores = np.array([3.0, 3.0, 1.0, 2.0])
    noise = label_noise.LabelNoise(scores, np.array([0.1, 0.1, 0.5, 0.49]), 0.1, (0.0, 0.2))
    true = np.array([1, 1, 0, 0])
    assert diagnose.list_rows(judged, true, noise, []).tolist() == [True, False, True, False]
    conflicts = diagnose.list_rows(judged, true, noise, [(1, 3)])
    assert conflicts.tolist() == [True, True, True, False]

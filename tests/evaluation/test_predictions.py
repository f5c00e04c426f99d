"""Predictions and probabilities, written and read back."""

from __future__ import annotations

import csv

import numpy as np
import pytest

from remora.errors import DataError, ModelError
from remora.evaluation.predictions import (
    PROBABILITIES,
    Scored,
    read_predictions,
    read_probabilities,
    write_predictions,
    write_probabilities,
)


def test_formulas_are_escaped_for_spreadsheets_and_read_back(tmp_path):
    texts = ["=1+1", "+49", "-1", "@SUM(A1)", "\t=1", "\r=1", "a=1", 'say "hi",\nthen', ""]
    path = tmp_path / "p.csv"
    write_predictions(path, texts, ["=a"] * 9, ["@b"] * 9, [0.25] * 9)
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["text"] for row in rows] == [*(f"'{t}" for t in texts[:6]), *texts[6:]]
    assert {(r["label"], r["predicted"], r["probability"]) for r in rows} == {
        ("'=a", "'@b", "0.250000")
    }
    assert [p.name for p in tmp_path.iterdir()] == ["p.csv"]
    back = read_predictions(path, ["=a", "@b"])
    assert back.texts == texts
    assert (set(back.true), set(back.predicted)) == ({"=a"}, {"@b"})
    assert (back.probability[0], back.baseline) == (0.25, None)


def test_probabilities_come_back_and_broken_ones_are_refused(tmp_path) -> None:
    path = tmp_path / PROBABILITIES
    scored = Scored(probabilities=np.array([[0.25, 0.75], [1.0, 0.0]]), true=np.array([1, 1]))
    write_probabilities(path, ["a", "b"], {"validation": scored})
    back = read_probabilities(path, ["a", "b"], "validation")
    np.testing.assert_array_equal(back.probabilities, scored.probabilities)
    np.testing.assert_array_equal(back.correct, [True, False])
    assert read_probabilities(path, ["a", "b"], "test") is None
    assert read_probabilities(tmp_path / "none", ["a", "b"], "test") is None
    with pytest.raises(ModelError, match="has other labels than the model"):
        read_probabilities(path, ["b", "a"], "validation")
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(ModelError, match=r"is broken .*; restore or delete it"):
        read_probabilities(path, ["a", "b"], "validation")


def test_a_label_that_looks_escaped_comes_back_as_it_is(tmp_path) -> None:
    """Labels are looked up in the closed set, so nothing is guessed about an apostrophe."""
    labels = ["'=a", "b"]
    write_predictions(tmp_path / "p.csv", ["x", "y"], labels, labels, [0.5, 1], labels)
    back = read_predictions(tmp_path / "p.csv", labels)
    assert back.true == back.predicted == back.baseline == labels


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("text,label,predicted,probability\n", "it has no rows"),
        ("text,label,predicted\nx,a,a\n", "no 'probability'"),
        ("text,label,predicted,probability\nx,a,c,0.5\n", "no 'c'"),
        ("text,label,predicted,probability\nx,a\n", "no None"),
        ("text,label,predicted,probability\nx,a,a,much\n", "could not convert"),
    ],
)
def test_broken_predictions_are_refused(tmp_path, content: str, reason: str) -> None:
    path = tmp_path / "predictions.csv"
    path.write_text(content)
    with pytest.raises(DataError, match=rf"predictions.csv is broken \({reason}.*train the run"):
        read_predictions(path, ["a", "b"])

"""What a change of a run was worth: on the same rows with the same labels, and as decided."""

from __future__ import annotations

from pathlib import Path

import pytest
from scipy.stats import binomtest

import finished
from remora.errors import DataError
from remora.evaluation import results
from remora.evaluation.change import measure_change
from remora.evaluation.results import Results

LABELS = ["a", "b", "c"]
TEXTS = [f"text {i}" for i in range(10)]
TRUE = [0] * 5 + [1] * 5
BEFORE = [0, 0, 0, 1, 1, 1, 1, 1, 1, 0]  # 7 right
AFTER = [0, 0, 0, 0, 0, 1, 1, 1, 2, 1]  # 9 right: 3 more, 1 fewer


def run(path: Path, predicted: list[int], texts: list[str] = TEXTS) -> Results:
    finished.write(path, labels=LABELS, texts=texts, true=TRUE, predicted=predicted)
    return results.read(path)


def test_what_changed_on_the_same_rows(tmp_path: Path) -> None:
    change = measure_change(run(tmp_path / "old", BEFORE), run(tmp_path / "new", AFTER))
    found = change.figures
    assert (found.num_rows, found.before, found.after) == (10, 0.7, 0.9)
    assert (found.num_now_right, found.num_now_wrong) == (3, 1)
    assert found.p_value == pytest.approx(binomtest(3, 4).pvalue)
    assert found.may_be_chance
    assert found.difference == pytest.approx(0.2)
    assert found.interval[0] < 0 < 0.2 < found.interval[1]
    assert [(each.text, each.before, each.after) for each in change.now_right] == [
        *(("text 3", "b", "a"), ("text 4", "b", "a")),
        ("text 9", "a", "b"),
    ]
    assert [(each.text, each.true, each.after) for each in change.now_wrong] == [
        ("text 8", "b", "c")
    ]
    assert change.corrected is None
    (svm,) = change.baselines  # of both runs, which gets a third of the rows wrong
    assert (svm.description, svm.before, svm.after) == ("TF-IDF + linear SVM", 0.6, 0.6)
    assert (change.before, change.after) == (str(tmp_path / "old"), str(tmp_path / "new"))


def test_labels_that_were_corrected_give_figures_of_their_own(tmp_path: Path) -> None:
    old, new = run(tmp_path / "old", BEFORE), run(tmp_path / "new", AFTER)
    given = list(old.true)
    assert measure_change(old, new, given).corrected is None
    decided = [*given[:8], "c", None]  # text 8 was mislabelled, text 9 is deleted
    change = measure_change(old, new, decided)
    assert change.figures == measure_change(old, new).figures
    assert (change.num_corrected, change.num_deleted) == (1, 1)
    assert change.corrected is not None
    assert change.corrected.num_rows == 9
    assert change.corrected.before == pytest.approx(6 / 9)
    assert change.corrected.after == 1.0
    assert (change.corrected.num_now_right, change.corrected.num_now_wrong) == (3, 0)


def test_other_rows_are_refused(tmp_path: Path) -> None:
    old = run(tmp_path / "old", BEFORE)
    with pytest.raises(DataError, match="differ, first in row 1"):
        measure_change(old, run(tmp_path / "new", AFTER, TEXTS[::-1]))
    other = run(tmp_path / "other", AFTER)
    other.figures["measured_on"] = "validation"
    with pytest.raises(DataError, match="compare runs on the same"):
        measure_change(old, other)

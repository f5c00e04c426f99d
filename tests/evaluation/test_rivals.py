"""Rivals beside a trained model: their figures, and the sentence on the best of them."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from scipy.stats import binomtest

from remora.data.label_sets import set_text
from remora.evaluation.baselines import train_baseline
from remora.evaluation.rivals import Answers, Rival, of_baseline, of_figures, rate, verdict

TRUE = ["a", "b"] * 50


def wrong(*rows: int) -> list[str]:
    return ["ab"[("ab".index(t) + (i in rows)) % 2] for i, t in enumerate(TRUE)]


def answers(predicted: list[str], rows=None, **others) -> Answers:
    rows = range(len(TRUE)) if rows is None else rows
    given = {"name": "probe", "description": "the probe", "seconds": 40.0}
    return Answers(rows=rows, predicted=[predicted[i] for i in rows], **given | others)


def test_a_rival_is_measured_on_its_rows_and_tested_on_the_same() -> None:
    """The trained model errs on rows 0 to 19, the rival on 10 to 13 and 30."""
    ours, theirs = wrong(*range(20)), wrong(*range(10, 14), 30)
    found = rate(answers(theirs), ["a", "b"], TRUE, ours)
    assert (found.num_rows, found.num_correct, found.accuracy) == (100, 95, 0.95)
    assert found.difference == pytest.approx(0.15)
    assert found.p_value == pytest.approx(binomtest(1, 17).pvalue)
    low, high = found.difference_interval
    assert low < 0.15 < high
    assert found.rows == ""
    # On every second of the first forty rows: one of five mistakes left, ten of twenty
    some = range(0, 40, 2)
    part = rate(
        answers(theirs, some, num_train_rows=5, num_all_train_rows=9), ["a", "b"], TRUE, ours
    )
    assert (part.num_rows, part.num_all_rows, part.num_correct) == (20, 100, 17)
    assert part.difference == pytest.approx((17 - 10) / 20)
    assert part.p_value == pytest.approx(binomtest(1, 9).pvalue)
    assert part.rows == "trained on 5 of 9 rows, measured on 20 of 100 rows"


def test_json_brings_a_rival_back() -> None:
    found = rate(answers(wrong(1)), ["a", "b"], TRUE, wrong(2))
    (back,) = of_figures(json.loads(json.dumps({"rivals": [found.to_dict()]})))
    as_before = replace(
        back,
        accuracy_interval=tuple(back.accuracy_interval),
        difference_interval=tuple(back.difference_interval),
    )
    assert as_before == found


def test_an_older_run_has_its_baseline_as_its_only_rival() -> None:
    labels = ["a", "b"]
    baseline = train_baseline(["red", "blue"], labels, TRUE, TRUE, labels)
    ours = rate(answers(wrong(2)), labels, TRUE, wrong(2))
    theirs = baseline.metrics.to_dict()
    figures = {
        "metrics": {"num_rows": 100, "accuracy": ours.accuracy},
        "p_value": 0.03,
        "baseline": {
            "description": baseline.description,
            "num_train_rows": 2,
            "seconds": 0.5,
            "metrics": theirs,
        },
    }
    (found,) = of_figures(figures)
    assert (found.name, found.description, found.p_value) == ("svm", "TF-IDF + linear SVM", 0.03)
    assert found.difference == pytest.approx(theirs["accuracy"] - 0.99)
    assert (found.difference_interval, found.rows) == (None, "")
    assert "as good" not in verdict([found], "adapter", 60.0)
    assert of_figures({**figures, "baseline": None}) == []
    assert of_baseline(baseline).predicted == baseline.predictions


def rival(difference: float, p_value: float, **others) -> Rival:
    given = {
        "name": "probe",
        "description": "the probe",
        "num_rows": 100,
        "num_all_rows": 100,
        "num_correct": 85,
        "accuracy": 0.852,
        "accuracy_interval": (0.8, 0.9),
        "macro_f1": 0.8,
        "difference": difference,
        "difference_interval": (difference - 0.02, difference + 0.02),
        "p_value": p_value,
        "num_train_rows": 9,
        "num_all_train_rows": 9,
        "seconds": 40.0,
        "num_bytes": 0,
    }
    return Rival(**given | others)


def test_a_better_rival_is_preferred() -> None:
    assert verdict([rival(0.12, 0.0001)], "adapter", 600) == (
        "the probe reaches 85.2% in 40 s, 12.0 points above the adapter (p = 0.0001, exact "
        "McNemar test): prefer it, or give the adapter more rows or epochs"
    )


def test_one_that_cannot_be_told_apart_is_as_good_and_cheaper() -> None:
    assert verdict([rival(-0.01, 0.4)], "model", 600) == (
        "the probe may be as good: it is 1.0 points below the model, which 100 rows do not tell "
        "from chance (95% interval -3.0 to +1.0, p = 0.4, exact McNemar test), and 15 times cheaper"
    )
    level = verdict([rival(0.0, 1.0, difference_interval=(-0.01, 0.01))], "model", 600)
    assert level.startswith("the probe is as good: it is level with the model, which 100 rows")
    assert "cheaper" not in verdict([rival(-0.01, 0.4, seconds=500.0)], "model", 600)


def test_one_that_is_worse_is_named_without_advice() -> None:
    assert verdict([rival(-0.12, 0.0001)], "adapter", 600) == (
        "the adapter is 12.0 points better than the probe (p = 0.0001, exact McNemar test)"
    )


def rival_of_sets(lead: float, low: float, high: float, **others) -> Rival:
    """Return a rival that is level in exact matches."""
    measured = {"micro_f1": 0.8, "micro_f1_interval": (0.7, 0.9), "micro_f1_difference": lead}
    measured |= {"micro_f1_difference_interval": (low, high), "difference_interval": (0.0, 0.0)}
    return rival(0.0, 1.0, **measured | others)


def test_micro_f1_decides_where_rows_have_several_labels() -> None:
    """Both give the same 30 % of the sets; of the others, one misses a label, the other gives none.

    Of three labels a row micro-F1 is 2 * 2.3 / (2.3 + 3) of the one, 2 * 0.9 / (0.9 + 3) of the
    other.
    """
    labels = list("abc")
    true = [set_text(labels)] * 2_000
    ours = [set_text(labels if i < 600 else labels[:2]) for i in range(2_000)]
    theirs = [set_text(labels if i < 600 else []) for i in range(2_000)]
    given = Answers(
        name="svm", description="SVMs", rows=range(2_000), predicted=theirs, seconds=1.0
    )
    found = rate(given, labels, true, ours, multi_label=True)
    assert found.difference == 0
    told = verdict([found], "adapter", 60.0)
    assert told.startswith("SVMs is 40.6 points of micro-F1 below the adapter (95% interval -42.")
    assert told.endswith(", paired bootstrap)")
    assert not any(word in told for word in ("as good", "McNemar", "cheaper"))
    assert found.lead == pytest.approx(1.8 / 3.9 - 4.6 / 5.3)


def test_every_sentence_on_sets_names_micro_f1() -> None:
    assert verdict([rival_of_sets(0.12, 0.1, 0.14)], "adapter", 600) == (
        "the probe reaches 80.0% micro-F1 in 40 s, 12.0 points above the adapter (95% interval "
        "+10.0 to +14.0, paired bootstrap): prefer it, or give the adapter more rows or epochs"
    )
    assert verdict([rival_of_sets(-0.01, -0.03, 0.01)], "model", 600) == (
        "the probe may be as good: it is 1.0 points of micro-F1 below the model, which 100 rows do "
        "not tell from chance (95% interval -3.0 to +1.0, paired bootstrap), and 15 times cheaper"
    )
    assert verdict([rival_of_sets(0.0, -0.01, 0.01)], "model", 60).startswith(
        "the probe is as good: it is level in micro-F1 with the model, which 100 rows do not"
    )
    # Exact matches decide nothing
    exact = {"difference": 0.3, "difference_interval": (0.2, 0.4), "p_value": 1e-9}
    assert verdict([replace(rival_of_sets(-0.1, -0.2, 0.0), **exact)], "model", 60).startswith(
        "the probe may be as good: it is 10.0 points of micro-F1 below the model"
    )


def test_the_best_of_several_is_named_and_its_p_value_adjusted() -> None:
    """Holm: the smallest of three p-values counts three times."""
    others = [rival(-0.3, 0.5), rival(-0.2, 0.9)]
    best = rival(0.05, 0.02, description="the best")
    told = verdict([others[0], best, others[1]], "adapter", 600)
    assert told.startswith("the best is as good: it is 5.0 points above the adapter, which")
    assert "p = 0.06, exact McNemar test, adjusted for 3 baselines" in told
    assert verdict([best], "adapter", 600).startswith("the best reaches")
    worse = [replace(each, p_value=1e-6) for each in (others[0], rival(-0.1, 0, description="B"))]
    assert verdict(worse, "adapter", 600).startswith(
        "the adapter is 10.0 points better than the best baseline, B (p = 2e-06"
    )

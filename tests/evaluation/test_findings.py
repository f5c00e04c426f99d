"""Findings where rows have several labels: micro-F1 decides, as it selects the weights.

Of one label a row: test_next_steps.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from constructed import construct
from remora.evaluation import findings
from remora.evaluation.findings import NextStep
from remora.evaluation.run_facts import read_facts
from remora.runtime import files


def facts_of(
    path: Path, lead: float, interval: tuple[float, float], *, wrong: int = 150, exact: float = 0.0
) -> Any:
    """Return facts on a run whose baseline has a lead in micro-F1, and another in exact matches."""
    by_rival = wrong - round(1_000 * exact)
    run = construct(path, wrong=wrong, wrong_by_rival=by_rival, alike=min(wrong, by_rival))
    figures = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
    figures["train_seconds"] = 1_000.0
    figures["rivals"][0] |= {
        "micro_f1": 0.8,
        "micro_f1_interval": [0.79, 0.81],
        "micro_f1_difference": lead,
        "micro_f1_difference_interval": list(interval),
    }
    files.write_json(run / "evaluation.json", figures)
    return read_facts(run)


def found(step: NextStep | None) -> NextStep:
    assert step is not None
    return step


def test_a_baseline_far_below_in_micro_f1_is_not_as_good(tmp_path: Path) -> None:
    """It is level in exact matches."""
    facts = facts_of(tmp_path / "below", -0.41, (-0.43, -0.39))
    assert facts.rivals[0][0].difference_interval[0] >= -0.01
    assert findings.better_rival(facts) is None
    level = facts_of(tmp_path / "level", -0.001, (-0.004, 0.002))
    step = found(findings.better_rival(level))
    assert "it is as good" in step.sentence
    assert step.evidence[0] == (
        "TF-IDF + linear SVM is 0.1 points of micro-F1 below the adapter (95% interval -0.4 to "
        "+0.2, paired bootstrap)"
    )


def test_a_baseline_is_better_by_micro_f1(tmp_path: Path) -> None:
    """Whatever it is in exact matches."""
    facts = facts_of(tmp_path / "above", 0.05, (0.03, 0.07), exact=-0.1)
    rival, _ = facts.better_rival
    assert rival.difference < 0
    step = found(findings.better_rival(facts))
    assert step.sentence.startswith("Use TF-IDF + linear SVM")
    assert step.worth == pytest.approx(0.05)
    assert "5.0 points of micro-F1 above the adapter" in step.evidence[0]
    below = facts_of(tmp_path / "below", -0.05, (-0.07, -0.03), exact=0.1)
    assert below.rivals[0][1] < 0.05
    assert below.better_rival is None


def test_a_model_may_be_smaller_or_larger_where_a_baseline_is_level_in_micro_f1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(findings.run_commands, "smaller_model", lambda _: "some/smaller")
    easy, hard = (
        facts_of(tmp_path / name, lead, (lead - 0.005, lead + 0.005), wrong=20)
        for name, lead in (("easy", -0.004), ("hard", -0.41))
    )
    assert "0.4 points of micro-F1 below" in found(findings.smaller_model(easy)).evidence[1]
    assert findings.smaller_model(hard) is None
    level, far = (
        facts_of(tmp_path / name, lead, (lead - 0.02, lead + 0.02))
        for name, lead in (("level", -0.01), ("far", -0.41))
    )
    assert "1.0 points of micro-F1 below" in found(findings.larger_model(level)).evidence[0]
    assert findings.larger_model(far) is None

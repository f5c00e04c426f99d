"""Labels that are merged: what they are called, and what else their command has to say.

What a run says of its labels otherwise: test_next_steps.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from constructed import LABELS, construct, diagnose, pair
from remora.evaluation import label_findings
from remora.evaluation.findings import NextStep
from remora.evaluation.run_facts import read_facts


def merging(path: Path, **settings: Any) -> NextStep | None:
    """Return what is said of a run with these settings, two labels of which overlap."""
    run = construct(path, wrong=140, wrong_by_rival=200, settings=settings)
    diagnose(run, overlapping=0.1, pairs=[pair(0, 1, "labels overlap", 0.92)])
    return label_findings.overlapping_labels(read_facts(run))


@pytest.mark.parametrize(
    ("first", "second", "separator", "merged"),
    [
        (LABELS[0], LABELS[1], None, "label 0 or label 1"),
        ("card > late", "card > lost", " > ", "card > late or lost"),
        ("card>late>home", "card>lost", ">", "card>late home or lost"),
        ("card > late", "loan > late", " > ", "card late or loan late"),
        ("card", "card > late", " > ", "card"),
    ],
)
def test_labels_of_a_hierarchy_merge_below_their_parent(
    first: str, second: str, separator: str | None, merged: str
) -> None:
    assert label_findings._merged_name(first, second, separator) == merged


def test_labels_that_are_gone_have_no_texts(tmp_path: Path) -> None:
    step = merging(tmp_path / "run", label_texts={LABELS[0]: "nought", LABELS[2]: "two"})
    assert step is not None
    given = shlex.split(step.command)
    assert json.loads(given[given.index("--label-texts") + 1]) == {LABELS[2]: "two"}


def test_labels_with_weights_in_a_table_are_not_merged(tmp_path: Path) -> None:
    assert merging(tmp_path / "balanced", class_weights="balanced") is not None
    assert merging(tmp_path / "table", class_weights="weights.csv") is None

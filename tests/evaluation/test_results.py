"""A finished run read back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import finished
from remora.errors import DataError
from remora.evaluation import results

LABELS = ["=sum", "plain"]
TEXTS = ["=1+1", "'quoted'", "-3 degrees", "two\nlines, a comma", '"', "\tstarts with a tab"] * 2


@pytest.fixture
def run(tmp_path: Path) -> Path:
    true = [i % 2 for i in range(12)]
    return finished.write(
        tmp_path / "run", labels=LABELS, texts=TEXTS, true=true, predicted=[1] * 12
    )


def test_cells_are_what_they_were_before_the_spreadsheet(run: Path) -> None:
    assert "'=1+1" in (run / "predictions.csv").read_text()
    found = results.read(run)
    assert found.texts == TEXTS
    assert found.labels == LABELS
    assert found.true[:2] == LABELS
    assert set(found.predicted) == {"plain"}
    assert found.baseline is not None
    assert len(found.probability) == 12


def test_what_does_not_fit_together_is_refused(run: Path) -> None:
    figures = json.loads((run / "evaluation.json").read_text())
    figures["metrics"]["num_rows"] += 1
    (run / "evaluation.json").write_text(json.dumps(figures))
    with pytest.raises(DataError, match=r"evaluation.json and predictions.csv in .* differ"):
        results.read(run)
    figures["metrics"]["per_class"] = figures["metrics"]["per_class"][:1]
    (run / "evaluation.json").write_text(json.dumps(figures))
    with pytest.raises(DataError, match=r"predictions.csv is broken \(no 'plain'\); train the run"):
        results.read(run)


@pytest.mark.parametrize("text", ["{", "[]", "\xff"])
def test_a_broken_file_is_named(run: Path, text: str) -> None:
    (run / "plan.json").write_text(text, encoding="latin-1")
    with pytest.raises(DataError, match=r"plan.json is broken .*; restore or delete it"):
        results.read_json(run / "plan.json")
    assert results.read_json(run / "nothing.json") is None
    (run / "config.toml").write_text(text, encoding="latin-1")
    with pytest.raises(DataError, match=r"config.toml cannot be read"):
        results.read_settings(run)

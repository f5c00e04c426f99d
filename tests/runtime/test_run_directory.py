"""The run directory: names and whole files."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest

from remora.errors import ConfigError, ModelError
from remora.evaluation.predictions import (
    PROBABILITIES,
    Scored,
    read_probabilities,
    write_predictions,
    write_probabilities,
)
from remora.runtime import files, run_directory


def test_a_run_is_named_after_data_and_model_and_finds_a_free_name(tmp_path):
    parent = tmp_path / "a" / "runs"
    names = [
        run_directory.create(parent, None, "x/My data.csv", "Qwen/Qwen2.5-0.5B").name
        for _ in range(3)
    ]
    assert names == [f"my-data-qwen2.5-0.5b{end}" for end in ("", "-2", "-3")]
    assert run_directory.create(parent, None, "hf:own/bank77", "/m/base/").name == "bank77-base"


def test_a_wanted_name_that_is_taken_is_refused(tmp_path):
    assert run_directory.create(tmp_path, "mine", "d", "m") == tmp_path / "mine"
    with pytest.raises(ConfigError, match="mine exists already; give another --name or remove it"):
        run_directory.create(tmp_path, "mine", "d", "m")


def test_json_is_written_whole_and_leaves_nothing_beside_it(tmp_path):
    path = tmp_path / "x.json"
    for value in ({"a": "é"}, {"a": [1, None]}):
        files.write_json(path, value)
        assert json.loads(path.read_text(encoding="utf-8")) == value
    with pytest.raises(TypeError):
        files.write_json(path, {"a": object()})
    assert json.loads(path.read_text(encoding="utf-8")) == value
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_cells_that_would_run_as_formulas_are_defused(tmp_path):
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


def test_probabilities_come_back_and_broken_ones_are_refused(tmp_path) -> None:
    path = tmp_path / PROBABILITIES
    scored = Scored(probabilities=np.array([[0.25, 0.75], [1.0, 0.0]]), true=np.array([1, 1]))
    write_probabilities(path, ["a", "b"], {"validation": scored})
    back = read_probabilities(path, ["a", "b"], "validation")
    np.testing.assert_array_equal(back.probabilities, scored.probabilities)
    np.testing.assert_array_equal(back.correct, [True, False])
    assert read_probabilities(path, ["a", "b"], "test") is None
    assert read_probabilities(tmp_path / "none", ["a", "b"], "test") is None
    with pytest.raises(ModelError, match="is of other labels than the adapter"):
        read_probabilities(path, ["b", "a"], "validation")
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(ModelError, match=r"is broken .*; restore it, or delete it"):
        read_probabilities(path, ["a", "b"], "validation")

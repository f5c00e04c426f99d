"""The run directory: names and whole files."""

from __future__ import annotations

import json

import pytest

from remora.errors import ConfigError
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

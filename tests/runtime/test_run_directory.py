"""The run directory: its name, and the settings that it keeps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from remora.config import TrainConfig
from remora.errors import ConfigError, ResourceError
from remora.runtime import run_directory


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


@pytest.mark.parametrize(
    ("system", "source", "name"),
    [
        ("posix", "data/My table.csv", "my-table"),
        ("posix", "data\\table.csv", "data-table"),  # a name with a backslash in it
        ("nt", r"C:\data\My table.csv", "my-table"),
        ("nt", "C:\\models\\base\\", "base"),
        ("nt", "hf:own/bank77", "bank77"),
    ],
)
def test_a_path_gives_its_last_part_to_the_name(monkeypatch, system, source, name):
    with monkeypatch.context() as patch:
        patch.setattr(run_directory.os, "name", system)
        found = run_directory.slug(source)
    assert found == name


def test_a_file_in_the_way_is_the_same_error_on_all_systems(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")

    def exists(*_, **__):  # as Windows says
        raise FileExistsError

    monkeypatch.setattr(Path, "mkdir", exists)
    for parent in (tmp_path / "file", tmp_path / "file" / "runs", tmp_path / "link"):
        for wanted in (None, "mine"):
            with pytest.raises(ResourceError, match=r"cannot write to .*Not a directory.*--output"):
                run_directory.create(parent, wanted, "d", "m")


def test_settings_come_back_and_broken_ones_are_refused(tmp_path):
    settings = TrainConfig("d.csv", model="nano", target_modules=("q_proj",), output=tmp_path)
    (tmp_path / "config.toml").write_text(settings.to_toml(), encoding="utf-8")
    assert run_directory.read_settings(tmp_path) == settings
    (tmp_path / "config.toml").write_text("data = 1\n[", encoding="utf-8")
    with pytest.raises(ConfigError, match="give the directory of a finished run"):
        run_directory.read_settings(tmp_path)


def test_tables_are_found_from_where_the_run_was_trained(monkeypatch, tmp_path):
    project, elsewhere, run = (tmp_path / name for name in ("project", "elsewhere", "run"))
    for folder in (project, elsewhere, run):
        folder.mkdir()
    (project / "t.csv").touch()
    (project / "part-1.csv").touch()
    (elsewhere / "own.csv").touch()
    settings = TrainConfig("t.csv", test="part-*.csv", validation="own.csv", model="nano")
    (run / "config.toml").write_text(settings.to_toml())
    monkeypatch.chdir(elsewhere)
    for damaged in ("{", "{}", "[]", '{"folder": 3}'):
        (run / "environment.json").write_text(damaged)
        assert run_directory.read_settings(run) == settings
    (run / "environment.json").write_text(json.dumps({"folder": str(project)}))
    found = run_directory.read_settings(run)
    assert (found.data, found.test) == (str(project / "t.csv"), str(project / "part-*.csv"))
    assert found.validation == "own.csv"  # what is here comes first
    monkeypatch.chdir(project)
    assert run_directory.read_settings(run).data == "t.csv"
    assert run_directory.environment(torch.device("cpu"))["folder"] == str(project)

"""Files: whole or not at all, the same bytes on every system."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
from pathlib import Path

import pytest

from remora.errors import RemoraError, ResourceError
from remora.evaluation.predictions import write_predictions
from remora.formatting import escape_formula, unescape_formula
from remora.runtime import files


def test_json_is_written_whole_and_leaves_nothing_beside_it(tmp_path):
    path = tmp_path / "x.json"
    for value in ({"a": "é"}, {"a": [1, None]}):
        files.write_json(path, value)
        assert json.loads(path.read_text(encoding="utf-8")) == value
    with pytest.raises(TypeError):
        files.write_json(path, {"a": object()})
    assert json.loads(path.read_text(encoding="utf-8")) == value
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_cells_that_would_run_as_formulas_are_escaped(tmp_path):
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


def test_escaped_cells_come_back():
    for cell in ("=1+1", "'quoted", "plain", "", "'"):
        assert unescape_formula(escape_formula(cell)) == cell


def test_text_has_the_same_bytes_on_windows(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "linesep", "\r\n")
    opened = []
    real = io.open
    monkeypatch.setattr(io, "open", lambda *args: opened.append(args) or real(*args))
    files.write_text(tmp_path / "x", "a\nb\n")
    assert (tmp_path / "x").read_bytes() == b"a\nb\n"
    files.write_synced(tmp_path / "y", "é\n")
    assert (tmp_path / "y").read_bytes() == "é\n".encode()
    newlines = [args[5] for args in opened if "w" in args[1]]
    assert newlines == ["\n", "\n"]  # None would write os.linesep


def test_a_failed_write_leaves_the_old_file_alone(monkeypatch, tmp_path):
    path = tmp_path / "x.csv"
    files.write_csv(path, ["a"], [["1"]])
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    for write in (
        lambda: files.write_csv(path, ["a"], [["2"]]),
        lambda: files.write_text(path, "2"),
    ):
        with pytest.raises(ResourceError, match=r"cannot write to .*No space left on device"):
            write()
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["x.csv"]


def test_a_file_that_cannot_be_written_is_refused_before_the_work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.csv").write_text("text")
    (tmp_path / "folder.csv").mkdir()
    for name, code, told in (
        ("./a.csv", 2, "is the table that is read; name another file with --to"),
        ("folder.csv", 2, "folder.csv is a folder; give a file with --to"),
        ("b.parquet", 2, "b.parquet is written as CSV; end its name with .csv"),
        ("b", 2, "b is written as CSV; end its name with .csv"),
        ("no/b.csv", 5, "no/b.csv: there is no folder no; make it, or give another file with --to"),
        ("a.csv/b.csv", 5, "there is no folder a.csv"),
    ):
        with pytest.raises(RemoraError, match=re.escape(told)) as caught:
            files.check_output(Path(name), "--to", source="a.csv", suffix=".csv")
        assert caught.value.exit_code == code
    files.check_output(Path("b.CSV"), "--to", source="a.csv", suffix=".csv")
    files.check_output(Path("b"), "--to")


def test_the_flag_that_names_a_file_is_in_the_advice(tmp_path):
    path, advice = tmp_path / "no" / "a", "give another file with --to"
    for write in (
        lambda: files.write_text(path, "", advice),
        lambda: files.write_csv(path, [], [], advice),
    ):
        with pytest.raises(ResourceError, match=f"free space, or {advice}$"):
            write()


def test_folders_are_not_opened_on_windows(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    files.sync(tmp_path)
    monkeypatch.setattr(files, "os", FakeOs())
    files.sync(tmp_path)
    assert FakeOs.opened == []
    files.sync(tmp_path / "file")
    assert FakeOs.opened == [(tmp_path / "file", os.O_RDWR)]  # it syncs only what may be written


class FakeOs:
    """The module os of Windows."""

    name, O_RDWR, O_RDONLY, fsync, close = "nt", os.O_RDWR, os.O_RDONLY, os.fsync, os.close
    opened: list[tuple[Path, int]] = []  # noqa: RUF012

    def open(self, path: Path, flags: int) -> int:
        self.opened.append((path, flags))
        return os.open(path, flags)


def test_one_hash_goes_over_files_in_their_order(tmp_path):
    (tmp_path / "b.safetensors").write_bytes(b"second")
    (tmp_path / "a.safetensors").write_bytes(b"first")
    assert files.weights_sha256(tmp_path) == hashlib.sha256(b"firstsecond").hexdigest()
    assert files.sha256([tmp_path / "a.safetensors"]) == hashlib.sha256(b"first").hexdigest()
    assert files.folder_bytes(tmp_path, "a*") == 5


def test_an_optional_file_that_fails_is_reported():
    said = []
    with files.optional("report.html", said.append):
        raise ValueError("no chart\nfor this")
    assert said == [
        "report.html could not be written (no chart for this); the rest of the run is complete"
    ]


def test_a_file_that_bears_a_temporary_name_is_not_touched(tmp_path):
    (tmp_path / "out.csv.tmp").write_text("a table of someone else")
    files.write_text(tmp_path / "out.csv", "new")
    assert (tmp_path / "out.csv.tmp").read_text() == "a table of someone else"
    with files.replacing(tmp_path / "out.csv") as temporary:
        assert files.final_name(temporary.name) == "out.csv"
        temporary.write_text("newer")
    assert files.final_name("out.csv.tmp") == "out.csv.tmp"
    assert (tmp_path / "out.csv").read_text() == "newer"

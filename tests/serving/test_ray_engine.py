"""`predict --engine ray`: every row exactly once, whoever dies, in the forms of `predict`.

The stand-in for Ray computes in this process, and its workers die where a test wants it;
test_ray_workers.py has Ray itself.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow.parquet
import pytest

from conftest import WAYS, call
from on_ray import NUM_ROWS, StandIn, journal, plain, read_parts, write_rows
from remora.config import PredictConfig
from remora.data import locations
from remora.errors import ConfigError, DataError, ModelError, ResourceError, Stopped
from remora.models import metadata
from remora.runtime.reporter import Reporter
from remora.serving import ray_engine, ray_workers
from remora.serving.part_files import JOURNAL
from remora.serving.predictor import Predictor
from service import write_adapter


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(tmp_path_factory.mktemp("runs") / "a", base, 1)


class Told(Reporter):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    ray = StandIn()

    @contextlib.contextmanager
    def connected(address: str | None) -> Iterator[Any]:
        yield ray

    monkeypatch.setattr(ray_workers, "connected", connected)
    monkeypatch.setattr(ray_workers, "require", lambda: None)
    monkeypatch.setattr(ray_engine, "CHUNK_ROWS", 64)
    monkeypatch.setattr(ray_workers, "QUEUED_SECONDS", 0.0)  # the clock would decide who gets what
    return ray


def settings(run: Path, source: object, output: object, **more: Any) -> PredictConfig:
    common = {"engine": "ray", "device": "cpu", "worker_cores": 1, "part_rows": 200}
    return PredictConfig(run, str(source), output=str(output), **{**common, **more})


def write(*given: Any, **more: Any) -> list[str]:
    told = Told()
    ray_engine.write_parts(settings(*given, **more), told)
    return told.lines


def test_the_rows_are_those_of_predict(run: Path, tmp_path: Path, ray: StandIn) -> None:
    source, out = write_rows(tmp_path / "a.csv"), tmp_path / "out.csv"
    lines = write(run, source, out)
    assert read_parts(out) == plain(run, source, tmp_path)
    parts = journal(out)["parts"]
    assert [part["rows"] for part in parts] == [256, 256, 88]  # whole batches of 64
    assert lines[0] == "1 file; 2 workers, each with 1 core"
    assert "7 rows with a blank text, without a label; the first is row 6" in lines[2]
    assert lines[3].startswith(f"600 rows in 3 parts in {out}")
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert write(run, source, out) == ["all 600 rows in 3 parts are there already"]
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_a_dead_worker_is_replaced_and_no_row_is_lost_or_repeated(
    run: Path, tmp_path: Path, ray: StandIn
) -> None:
    source = write_rows(tmp_path / "a.csv")
    expected = plain(run, source, tmp_path)
    for number, deaths in enumerate(({1}, {2}, {4, 5}, {3, 6, 9, 12}, set(range(3, 40, 4)))):
        ray.num_calls, ray.num_actors, ray.dies = 0, 0, deaths.__contains__
        out = tmp_path / f"{number}.csv"
        lines = write(run, source, out)
        assert read_parts(out) == expected
        num_dead = ray.num_actors - 2
        assert num_dead
        assert lines.count("a worker died; another takes over its rows") == num_dead


def test_quick_workers_have_more_batches_before_them(
    run: Path, tmp_path: Path, ray: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, wait = write_rows(tmp_path / "a.csv"), ray.wait
    waited, most = list[int](), list[int]()

    def noted(references: list[Any], **given: Any) -> Any:
        waited.append(len(references))
        return wait(references, **given)

    monkeypatch.setattr(ray, "wait", noted)
    for seconds in (0.0, 1e6):
        monkeypatch.setattr(ray_workers, "QUEUED_SECONDS", seconds)
        waited.clear()
        write(run, source, tmp_path / f"{seconds}.csv")
        most.append(max(waited))
    assert most[0] == 2 * ray_workers.QUEUED < most[1]


def test_workers_that_die_again_and_again_end_the_run_and_its_parts_stay(
    run: Path, tmp_path: Path, ray: StandIn
) -> None:
    source, out = write_rows(tmp_path / "a.csv"), tmp_path / "out.csv"
    ray.dies = lambda number: number > 9
    with pytest.raises(ResourceError, match=r"3 workers died .*; they may be out of memory"):
        write(run, source, out)
    kept = read_parts(out)
    assert 64 < len(kept) < NUM_ROWS
    ray.dies = lambda number: False
    num_parts = len(journal(out)["parts"])
    there = f"{len(kept) - 1} rows in {num_parts} part{'s' * (num_parts > 1)} are there already"
    assert f"{there}; resuming" in write(run, source, out)[0]
    assert read_parts(out) == plain(run, source, tmp_path)


@pytest.mark.skipif(os.name == "nt", reason="Windows ends a process at once")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_stops_it_and_nothing_is_lost(
    run: Path, tmp_path: Path, ray: StandIn, name: str
) -> None:
    source, out = write_rows(tmp_path / "a.csv", num_rows=300), tmp_path / "out.csv"

    def asked(number: int) -> bool:
        if number == 6:
            os.kill(os.getpid(), getattr(signal, name))
        return False

    ray.dies = asked
    with pytest.raises(Stopped, match=rf"stopped \({name}\); run the same command again to resume"):
        write(run, source, out)
    kept = read_parts(out)
    assert len(kept) > 64
    told = write(run, source, out)
    assert told[0].startswith(f"{len(kept) - 1} rows in 1 part are there already; resuming")
    assert read_parts(out) == plain(run, source, tmp_path)


@pytest.mark.parametrize("stage", ["part", "journal"])
def test_a_process_that_ends_anywhere_resumes_there(
    run: Path, tmp_path: Path, ray: StandIn, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """It ends before each file is in its place, and so between a part and the journal."""
    source, out = write_rows(tmp_path / "a.csv", num_rows=300), tmp_path / "out.csv"
    replace, dice = os.replace, random.Random(0)

    class Killed(BaseException): ...

    def killing(place: Path, target: Path) -> None:
        is_journal = Path(target).name == JOURNAL
        if is_journal == (stage == "journal") and dice.random() < 0.5:
            raise Killed
        replace(place, target)

    monkeypatch.setattr(os, "replace", killing)
    num_starts = 0
    while not (out / JOURNAL).exists() or not journal(out)["finished"]:
        num_starts += 1
        assert num_starts < 50
        with contextlib.suppress(Killed):
            write(run, source, out, part_rows=64)
    assert num_starts > 2
    monkeypatch.undo()
    assert read_parts(out) == plain(run, source, tmp_path)
    assert [part["rows"] for part in journal(out)["parts"]] == [64, 64, 64, 64, 44]


@pytest.mark.parametrize("left", [f"{JOURNAL}.tmp", f".{JOURNAL}.4711.tmp"])
def test_a_process_killed_within_its_first_write_resumes(
    run: Path, tmp_path: Path, ray: StandIn, left: str
) -> None:
    source, out = write_rows(tmp_path / "a.csv", num_rows=130), tmp_path / "out.csv"
    out.mkdir()
    (out / left).write_text('{"schema": ')
    (out / "_remora.lock").touch()
    write(run, source, out)
    assert read_parts(out) == plain(run, source, tmp_path)


def test_parts_of_another_alpha_are_not_resumed(run: Path, tmp_path: Path, ray: StandIn) -> None:
    source, out = write_rows(tmp_path / "a.csv", num_rows=70), tmp_path / "out.csv"
    copied = shutil.copytree(run, tmp_path / "run")
    write(copied, source, out)
    path = metadata.adapter_folder(copied) / "adapter_config.json"
    described = json.loads(path.read_text())
    path.write_text(json.dumps(described | {"lora_alpha": 2 * described["lora_alpha"]}))
    with pytest.raises(ConfigError, match=r"of another run, with adapter '.*; give another"):
        write(copied, source, out)


def test_several_files_of_a_glob_a_folder_or_a_url(run: Path, tmp_path: Path, ray: StandIn) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "_SUCCESS").write_text("")
    (folder / "notes.md").write_text("none of them")
    both = [write_rows(folder / f"{n}.csv", first=n * 130, num_rows=130) for n in range(2)]
    expected = [row for path in both for row in plain(run, path, tmp_path)[1:]]
    memory = fsspec.filesystem("memory")
    for path in both:
        memory.pipe_file(f"/in/{path.name}", path.read_bytes())
    sources = [folder / "*.csv", folder, "memory://in/*.csv"]
    for number, source in enumerate(sources):
        out = tmp_path / f"{number}.csv"
        write(run, source, out, part_rows=100)
        assert read_parts(out)[1:] == expected
        assert [part["source"] for part in journal(out)["parts"]] == [0, 0, 1, 1]
    write(run, "memory://in/*.csv", "memory://out.csv", part_rows=100)
    names = sorted(Path(each).name for each in memory.ls("/out.csv", detail=False))
    assert names == [JOURNAL, *(f"part-0000{n}.csv" for n in range(4))]
    for name in names[1:]:
        assert memory.cat_file(f"/out.csv/{name}") == (tmp_path / "0.csv" / name).read_bytes()
    assert "are there already" in write(run, "memory://in/*.csv", "memory://out.csv")[0]
    memory.rm("/in", recursive=True)
    memory.rm("/out.csv", recursive=True)


def test_parts_of_parquet_have_one_schema(run: Path, tmp_path: Path, ray: StandIn) -> None:
    records = [{"n": None if i < 70 else i, "text": WAYS[i % 5].format(i)} for i in range(150)]
    source = tmp_path / "a.jsonl"
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    write(run, source, tmp_path / "out.parquet", part_rows=64, top_k=2, threshold=0.5)
    schemas = {pyarrow.parquet.read_schema(p) for p in (tmp_path / "out.parquet").glob("part-*")}
    assert len(schemas) == 1
    found = pyarrow.parquet.read_table(tmp_path / "out.parquet")  # as a stranger reads it
    assert found.select(["n", "text"]).to_pylist() == records
    args = ("--output", tmp_path / "plain.parquet", "--top-k", 2, "--threshold", 0.5)
    assert call("predict", run, source, "--device", "cpu", *args) == 0
    assert found.equals(pyarrow.parquet.read_table(tmp_path / "plain.parquet"))
    lines = write(run, source, tmp_path / "out.jsonl", threshold=1.0)
    assert "150 of 150 rows are below the threshold 1.0000 and have no label" in lines


def test_an_error_of_a_row_or_a_model_comes_as_it_is(
    run: Path, tmp_path: Path, ray: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = tmp_path / "a.jsonl", tmp_path / "out.csv"
    source.write_text("".join(f'{{"text": "a {i}"}}\n' for i in range(200)) + "{\n")
    with pytest.raises(DataError, match=r"a.jsonl: row 201 is not valid JSON"):
        write(run, source, out)
    assert len(read_parts(out)) == 201  # what was right before it is kept
    assert not journal(out)["finished"]

    def fail(self: Predictor) -> None:
        raise ModelError("the base is not here; copy it")

    monkeypatch.setattr(Predictor, "open", fail)
    with pytest.raises(ModelError, match="the base is not here; copy it"):
        write(run, write_rows(tmp_path / "b.csv"), tmp_path / "b_out.csv")


def test_a_source_or_a_folder_of_another_run_is_refused(
    run: Path, tmp_path: Path, ray: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = write_rows(tmp_path / "a.csv", num_rows=130), tmp_path / "out.csv"
    write(run, source, out, part_rows=64)
    kept = read_parts(out)
    with pytest.raises(ConfigError, match="another run, with top_k 1 where this has 2; give"):
        write(run, source, out, top_k=2)
    os.utime(source, ns=(1, 1))
    with pytest.raises(DataError, match=r"a.csv has changed since .*out.csv was begun; give"):
        write(run, source, out)
    write_rows(tmp_path / "b.csv", num_rows=130)
    with pytest.raises(DataError, match=r"b.csv was not there when .* was begun; give"):
        write(run, tmp_path / "b.csv", out)
    assert read_parts(out) == kept
    write(run, tmp_path / "[ab].csv", tmp_path / "both.csv")
    (tmp_path / "b.csv").unlink()
    with pytest.raises(DataError, match=r"b.csv is gone since .*both.csv was begun; give another"):
        write(run, tmp_path / "[ab].csv", tmp_path / "both.csv")
    (tmp_path / "photos.csv").mkdir()
    (tmp_path / "photos.csv" / "me.png").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"holds 'me.png', and no predictions in parts; give"):
        write(run, source, tmp_path / "photos.csv")
    with pytest.raises(ConfigError, match=r"is a file, and the parts need a folder; give"):
        write(run, source, write_rows(tmp_path / "b.csv"))
    # A part that is lost, while the run is not finished
    write(run, source, tmp_path / "c.csv", part_rows=64)
    (tmp_path / "c.csv" / "part-00001.csv").unlink()
    with pytest.raises(DataError, match=r"lacks part-00001.csv, which was finished; re"):
        write(run, source, tmp_path / "c.csv")
    (tmp_path / "c.csv" / JOURNAL).write_text("{")
    with pytest.raises(ConfigError, match=r"_remora.json cannot be read .*; give another --output"):
        write(run, source, tmp_path / "c.csv")
    # While it is read
    changed = locations.changed
    monkeypatch.setattr(locations, "changed", lambda each: source.write_text("") or changed(each))
    with pytest.raises(DataError, match=r"a.csv changed while it was read; give another --output"):
        write(run, source, tmp_path / "d.csv")
    assert not journal(tmp_path / "d.csv")["finished"]


def test_two_processes_do_not_write_to_one_folder(run: Path, tmp_path: Path, ray: StandIn) -> None:
    from filelock import FileLock

    source, out = write_rows(tmp_path / "a.csv", num_rows=70), tmp_path / "out.csv"
    out.mkdir()
    refused = pytest.raises(ConfigError, match=r"another process writes to .*out.csv; wait for it")
    with FileLock(out / "_remora.lock"), refused:
        write(run, source, out)
    write(run, source, out)
    assert not (out / "_remora.lock").exists()


def test_files_that_are_missing_or_differ_are_refused(
    run: Path, tmp_path: Path, ray: StandIn
) -> None:
    out = tmp_path / "out.csv"
    for source, error, match in (
        (tmp_path / "none.csv", DataError, "there is no file or folder"),
        (tmp_path / "*.csv", DataError, "there are no tables at"),
        ("memory://none/*.csv", DataError, "there are no tables at memory://none/"),
        ("nowhere://a/b.csv", ConfigError, "cannot be opened by fsspec .*; correct the URL"),
        ("-", ConfigError, "engine ray does not read standard input; name files"),
    ):
        with pytest.raises(error, match=match):
            write(run, source, out)
    write_rows(tmp_path / "a.csv", num_rows=3)
    (tmp_path / "b.csv").write_text("text,id\na,b\n")
    with pytest.raises(DataError, match=r"b.csv has the columns 'text', 'id', where .*a.csv has"):
        write(run, tmp_path / "?.csv", out)
    assert not out.exists()
    (tmp_path / "twice.csv").write_text("id,id,text\n1,2,fee\n")
    with pytest.raises(DataError, match="has 2 columns called 'id', and parquet holds one of a"):
        write(run, tmp_path / "twice.csv", tmp_path / "out.parquet")
    assert not (tmp_path / "out.parquet").exists()

"""GGUF files as base models: found, converted once, and nothing left half done."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import gguf_files
from conftest import tiny_model
from remora.errors import ConfigError, ModelError, RemoraError, ResourceError
from remora.models import gguf, gguf_conversion, hub, metadata
from remora.runtime import files, memory


@pytest.fixture(scope="module")
def written(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny_model("llama", torch.float32, vocabulary=len(tokenizer))
    return gguf_files.write(tmp_path_factory.mktemp("gguf") / "m.gguf", model, tokenizer)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv(gguf.CACHE, str(tmp_path / "cache"))
    gguf._folder_of.cache_clear()
    yield tmp_path / "cache" / "gguf"
    gguf._folder_of.cache_clear()


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Conversions in this process, which take no time to start; the folders that they write."""
    folders = []

    def convert(path: Path, folder: Path) -> None:
        folders.append(folder)
        gguf_conversion.convert(path, folder)

    monkeypatch.setattr(gguf, "_convert_apart", convert)
    return folders


def names(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir() if path.suffix != ".lock")


def again(path: Path) -> Path:
    """Ask as another process would."""
    gguf._folder_of.cache_clear()
    return hub.find(str(path))


def test_a_file_is_converted_once_by_a_process_of_its_own(
    written: Path, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = hub.find(str(written))
    digest = files.sha256([written])
    assert folder == cache / digest
    assert names(cache) == [digest]
    said = capsys.readouterr().err.splitlines()
    said = [line for line in said if not line.endswith("% converted")]  # on a busy machine
    assert len(said) == 2, said
    first, second = said
    assert first.startswith("converting m.gguf (")
    assert first.endswith("weights are stored in float32")
    assert str(folder) in first
    assert second.startswith("converted in ")
    about = json.loads((folder / "gguf.json").read_text())
    assert (about["file"], about["sha256"]) == ("m.gguf", digest)
    assert about["weights_sha256"] == files.weights_sha256(folder)
    # The same file elsewhere, under another name
    moved = shutil.copy(written, tmp_path / "other.gguf")
    assert again(moved) == folder
    assert capsys.readouterr().err == ""


def test_another_file_at_the_same_place_is_another_model(
    written: Path, here: list[Path], tokenizer: Any, tmp_path: Path
) -> None:
    path = Path(shutil.copy(written, tmp_path / "m.gguf"))
    first = hub.find(str(path))
    assert hub.find(str(path)) == first
    os.utime(path, (1, 1))
    assert hub.find(str(path)) == first  # it was touched only
    model = tiny_model("qwen2", torch.float32, vocabulary=len(tokenizer))
    gguf_files.write(path, model, tokenizer)
    assert hub.find(str(path)) != first
    assert len(here) == 2


def test_processes_at_once_convert_it_once(
    written: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    started, found = [], []

    def convert(path: Path, folder: Path) -> None:
        started.append(folder)
        time.sleep(0.5)
        gguf_conversion.convert(path, folder)

    monkeypatch.setattr(gguf, "_convert_apart", convert)
    threads = [threading.Thread(target=lambda: found.append(again(written))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(started) == 1
    assert len(found) == 3
    assert len(set(found)) == 1
    assert "waiting for another process, which converts m.gguf" in capsys.readouterr().err


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_a_conversion_that_is_cut_off_leaves_nothing(
    error: BaseException,
    written: Path,
    cache: Path,
    here: list[Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = gguf._convert_apart

    def convert(path: Path, folder: Path) -> None:
        whole(path, folder)
        raise error

    monkeypatch.setattr(gguf, "_convert_apart", convert)
    with pytest.raises((KeyboardInterrupt, ResourceError)) as caught:
        hub.find(str(written))
    if isinstance(error, OSError):
        assert "No space left on device" in str(caught.value)
        assert "set REMORA_CACHE to a folder on another disk" in str(caught.value)
    assert names(cache) == []
    monkeypatch.setattr(gguf, "_convert_apart", whole)
    assert again(written).is_dir()


def test_what_a_killed_process_left_is_removed(
    written: Path, cache: Path, here: list[Path]
) -> None:
    digest = files.sha256([written])
    half = cache / f"{digest}.0a1b.tmp"
    half.mkdir(parents=True)
    (half / "config.json").write_text("{}")
    other = cache / f"{'0' * 64}.0a1b.tmp"  # may be written to right now
    other.mkdir()
    hub.find(str(written))
    assert names(cache) == sorted([digest, other.name])


@pytest.mark.parametrize("name", ["gguf.json", "model.safetensors", "tokenizer.json"])
def test_a_folder_that_was_cleaned_up_is_made_again(
    name: str, written: Path, here: list[Path]
) -> None:
    folder = hub.find(str(written))
    (folder / name).unlink()
    assert again(written) == folder
    assert (folder / name).is_file()


def test_a_file_that_changes_meanwhile_is_not_taken(
    written: Path, here: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(shutil.copy(written, tmp_path / "m.gguf"))
    whole = gguf._convert_apart

    def convert(path: Path, folder: Path) -> None:
        whole(path, folder)
        os.utime(path, (1, 1))

    monkeypatch.setattr(gguf, "_convert_apart", convert)
    with pytest.raises(ModelError, match="was changed while it was converted"):
        hub.find(str(path))


def test_it_is_refused_where_memory_or_disk_do_not_suffice(
    written: Path, cache: Path, here: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(memory, "free_bytes", lambda device, is_shared: 400_000_000)
        with pytest.raises(ResourceError, match=r"needs \d+ MB of memory, 400 MB are free; "):
            hub.find(str(written))
    with monkeypatch.context() as patch:
        usage = shutil.disk_usage("/")._replace(free=1_000)
        patch.setattr(shutil, "disk_usage", lambda path: usage)
        with pytest.raises(ResourceError, match=r"needs \d+ kB of disk, 1 kB are free in .*CACHE"):
            hub.find(str(written))
    assert not here
    assert names(cache) == []
    assert ResourceError.exit_code == 5


def test_processes_that_train_together_do_not_share_its_memory(
    written: Path, here: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of them converts, and the others wait."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000000")
    assert hub.find(str(written)).is_dir()


@pytest.mark.parametrize(
    ("body", "kind", "told"),
    [
        (
            "import os; os.kill(os.getpid(), 9)",
            ResourceError,
            "ended by SIGKILL, probably as memory",
        ),
        ("import os; os.kill(os.getpid(), 6)", ModelError, r"cannot be converted \(signal 6\)"),
        ("raise SystemExit('sorry')", ModelError, r"cannot be converted \(sorry\)"),
        ("raise SystemExit(3)", ModelError, r"cannot be converted \(exit code 3\)"),
        ("pass", ModelError, r"cannot be converted \(exit code 0\)"),
        ('print("noise"); print("""{"exit_code": 5, "message": "a; b"}""")', ResourceError, "a; b"),
        ('print("""{"exit_code": 4, "message": "a; b"}""")', ModelError, "a; b"),
        ('print("""{"exit_code": 2, "message": "a; b"}""")', ConfigError, "a; b"),
    ],
)
@pytest.mark.skipif(os.name == "nt", reason="Windows has no signals")
def test_however_its_process_ends_it_is_one_line(
    body: str,
    kind: type[RemoraError],
    told: str,
    written: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gguf, "_CONVERT", body)
    with pytest.raises(kind, match=told) as caught:
        hub.find(str(written))
    assert "\n" not in str(caught.value)
    assert names(cache) == []


def test_its_process_is_alone_and_without_a_network(
    written: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = """
import json, os
told = {name: os.environ.get(name) for name in ("WORLD_SIZE", "RANK", "HF_HUB_OFFLINE")}
print(json.dumps({"exit_code": 4, "message": repr(told)}))
"""
    monkeypatch.setattr(gguf, "_CONVERT", body)
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "1"), ("HF_HUB_OFFLINE", "0")):
        monkeypatch.setenv(name, value)
    with pytest.raises(ModelError) as caught:
        hub.find(str(written))
    assert str(caught.value) == repr({"WORLD_SIZE": None, "RANK": None, "HF_HUB_OFFLINE": "1"})


def test_its_process_ends_with_the_one_that_started_it() -> None:
    body = (
        "import threading, time; from remora.models import gguf_conversion as g; "
        "threading.Thread(target=g._end_with_parent, daemon=True).start(); "
        "print('up', flush=True); time.sleep(60)"
    )
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", body], stdin=pipe, stdout=pipe) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline().strip() == b"up"
        process.stdin.close()
        assert process.wait(10) == 1


def test_a_long_conversion_reports_its_progress(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(gguf, "TELL_SECONDS", 0.0)
    log = tmp_path / "stderr"
    log.write_text("de-quantizing...:   5%|#  | 3/60 [00:01]\rde-quantizing...:  45%|##  | 27/60\r")
    with log.open("rb") as stream:
        gguf._follow(stream)
    assert capsys.readouterr().err == "45 % converted\n"


def test_an_architecture_without_a_test_is_reported(
    written: Path,
    here: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(gguf, "TESTED", gguf.TESTED - {"llama"})
    hub.find(str(written))
    told = "the conversion of the architecture llama is transformers' own and has no test"
    assert told in capsys.readouterr().err


# Which file is meant


def test_a_folder_with_one_file_means_that_file(
    written: Path, here: list[Path], tmp_path: Path
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    assert gguf.file_of(str(folder)) is None
    (folder / "README.md").write_text("a model")
    shutil.copy(written, folder / "M.GGUF")
    assert gguf.file_of(str(folder)) == folder / "M.GGUF"
    assert hub.find(str(folder)) == hub.find(str(written))
    assert hub.lasting_name(str(folder), here[0]) == str(folder / "M.GGUF")
    # As repositories of GGUF files on the hub have it
    (folder / "config.json").write_text("{}")
    assert gguf.file_of(str(folder)) == folder / "M.GGUF"
    # Several
    shutil.copy(written, folder / "b.gguf")
    with pytest.raises(ModelError, match=r"holds 2 GGUF files, 'M.GGUF', 'b.gguf'; give the path"):
        hub.find(str(folder))
    # A model's folder that has GGUF files too
    (folder / "model.safetensors").write_bytes(b"")
    assert hub.find(str(folder)) == folder


def test_parts_in_a_folder_are_to_be_joined(tmp_path: Path) -> None:
    for part in (1, 2):
        (tmp_path / f"m-0000{part}-of-00002.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match="llama-gguf-split --merge"):
        hub.find(str(tmp_path))


def test_a_link_out_of_a_folder_is_refused_but_not_one_that_is_named(
    written: Path, here: list[Path], tmp_path: Path
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "m.gguf").symlink_to(written)
    with pytest.raises(ModelError, match="links to a file outside of its folder"):
        hub.find(str(folder))
    assert hub.find(str(folder / "m.gguf")).is_dir()
    assert hub.lasting_name(str(folder / "m.gguf"), here[0]) == str(folder / "m.gguf")


def test_names_of_files_that_are_not_there_are_no_hub_ids(tmp_path: Path) -> None:
    for name in ("models/none.gguf", "none.gguf", str(tmp_path / "none.GGUF")):
        with pytest.raises(ModelError, match=f"there is no file {name}; give the path"):
            hub.find(name)


def test_files_without_an_ending_are_known_by_their_content(
    written: Path, here: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blob = Path(shutil.copy(written, tmp_path / "sha256-0a"))
    monkeypatch.chdir(tmp_path)
    assert hub.find("sha256-0a") == hub.find(str(written))
    assert hub.lasting_name("sha256-0a", here[0]) == str(blob)


def test_where_the_cache_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert gguf.cache() == tmp_path / "cache" / "gguf"
    monkeypatch.delenv(gguf.CACHE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert gguf.cache() == tmp_path / "xdg" / "remora" / "gguf"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert gguf.cache() == tmp_path / ".cache" / "remora" / "gguf"


def test_a_cache_that_cannot_be_written_is_an_error_of_resources(
    written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(gguf.CACHE, str(tmp_path / "file"))
    with pytest.raises(ResourceError, match=r"cannot write to .*; free space, or set REMORA_CACHE"):
        hub.find(str(written))


def test_a_file_that_may_not_be_read_is_one_line(
    written: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(files, "sha256", forbidden)
    with pytest.raises(ModelError, match=r"cannot be read .*Permission denied.*; restore it"):
        hub.find(str(written))


def test_a_converted_file_needs_no_package(
    written: Path, here: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = hub.find(str(written))
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert again(written) == folder


# What a folder is recognized by


def card(**changes: Any) -> metadata.AdapterCard:
    values: dict[str, Any] = {
        "base_model": "m.gguf",
        "base_sha256": "1" * 64,
        "labels": ("a", "b"),
        "instruction": "",
        "list_labels": False,
        "label_texts": {},
        "max_length": 99,
    }
    return metadata.AdapterCard(**values | changes)


def test_a_base_is_recognized_by_its_weights_or_by_its_file(
    written: Path, here: list[Path], tmp_path: Path
) -> None:
    found = metadata.BaseHash.of(hub.find(str(written)))
    assert found.gguf_sha256 == files.sha256([written])
    assert found.is_base_of(card(base_sha256=found.weights_sha256))
    assert found.is_base_of(card(gguf_sha256=found.gguf_sha256))  # converted in another way
    assert not found.is_base_of(card())
    assert not found.is_base_of(card(gguf_sha256="2" * 64))
    # A copy whose weights were changed is no longer that file's
    copied = shutil.copytree(hub.find(str(written)), tmp_path / "copy")
    assert metadata.BaseHash.of(copied) == found
    with (copied / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    changed = metadata.BaseHash.of(copied)
    assert changed.gguf_sha256 == ""
    assert not changed.is_base_of(card(gguf_sha256=found.gguf_sha256))


def test_bases_of_no_file_are_not_the_same(base: Path) -> None:
    found = metadata.BaseHash.of(base)
    assert found.gguf_sha256 == ""
    assert not found.is_base_of(card())


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"file": 3}'])
def test_a_broken_gguf_json_is_one_line(content: str, tmp_path: Path) -> None:
    (tmp_path / "gguf.json").write_text(content)
    with pytest.raises(ModelError) as caught:
        gguf.origin(tmp_path)
    assert "\n" not in str(caught.value)
    assert "; " in str(caught.value)


def test_cards_of_other_bases_say_nothing_of_files() -> None:
    assert not [key for key in card().to_dict() if "gguf" in key]
    assert card(gguf_sha256="2" * 64).to_dict()["gguf_sha256"] == "2" * 64

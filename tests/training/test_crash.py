"""Processes that die in the middle of a save, at every system call that writes.

strace attaches to a process that is about to save, and kills it or lets the call fail.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from remora.errors import ResourceError
from remora.models import loading, lora, metadata, saved
from remora.runtime import files
from remora.training import checkpoint
from remora.training.checkpoint import Checkpoint

WRITING = (
    *("write", "pwrite64", "writev", "ftruncate", "fallocate", "fsync", "fdatasync", "msync"),
    *("openat", "mkdir", "mkdirat", "rename", "renameat", "renameat2"),
    *("unlink", "unlinkat", "rmdir", "fchmod", "close"),
)


def can_trace() -> bool:
    if shutil.which("strace") is None:
        return False
    done = subprocess.run(["strace", "-o", os.devnull, "true"], capture_output=True, check=False)
    return done.returncode == 0


needs_strace = pytest.mark.skipif(not can_trace(), reason="needs strace, allowed to trace")


def state(step: int) -> Checkpoint:
    tensors = {f"weights/{i}": torch.full((64, 64), float(step + i)) for i in range(3)}
    return Checkpoint(f"step-{step:08d}", tensors, {"progress": {"step": step}})


def save_naively(folder: Path, saved: Checkpoint) -> Path:
    """Do what trainers do: write into the final place."""
    from safetensors.torch import save_file

    path = folder / "last"
    path.mkdir(exist_ok=True)
    save_file(dict(saved.tensors), path / checkpoint.TENSORS)
    return path


def survives_naively(folder: Path) -> bool:
    from safetensors.torch import load_file

    try:
        return load_file(folder / "last" / checkpoint.TENSORS)["weights/0"][0, 0] in {1, 2}
    except Exception:
        return False


def survivor(folder: Path) -> int:
    """Return the step of the newest whole checkpoint, its tensors compared with those saved."""
    found = checkpoint.newest(folder, lambda line: None)
    assert found is not None
    step = int(found.state["progress"]["step"])
    for name, tensor in state(step).tensors.items():
        assert torch.equal(found.tensors[name], tensor)
    return step


def traced(
    save: Callable[[Path, Checkpoint], Path], folder: Path, log: Path, *injection: str
) -> tuple[int, str]:
    """Save the second checkpoint in a process under strace; return how it ended, and its calls."""
    child = os.fork()
    if child == 0:
        code = 99
        try:
            os.kill(os.getpid(), signal.SIGSTOP)
            save(folder, state(2))
            code = 0
        except ResourceError:
            code = ResourceError.exit_code
        except BaseException:
            code = 98
        finally:
            os._exit(code)
    os.waitpid(child, os.WUNTRACED)
    command = ["strace", "-y", "-o", str(log), "-p", str(child)]
    command += ["-e", f"trace={','.join(WRITING)}", *injection]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as tracer:
        assert tracer.stderr is not None
        assert "attached" in tracer.stderr.readline()
        os.kill(child, signal.SIGCONT)
        _, status = os.waitpid(child, 0)
        tracer.stderr.read()
    ended = -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
    return ended, log.read_text(encoding="utf-8")


def calls(
    save: Callable[[Path, Checkpoint], Path], folder: Path, tmp_path: Path
) -> tuple[list[tuple[str, int]], str]:
    """Return each writing call of a save as its name and its number among those of the name."""
    ended, log = traced(save, fresh(save, folder), tmp_path / "log")
    assert ended == 0
    count: Counter[str] = Counter()
    found = []
    for line in log.splitlines():
        if match := re.match(r"(\w+)\(", line):
            count[match[1]] += 1
            found.append((match[1], count[match[1]]))
    return found, log


def fresh(save: Callable[[Path, Checkpoint], Path], folder: Path) -> Path:
    """Return the folder with the first checkpoint only."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    save(folder, state(1))
    return folder


def deaths(
    save: Callable[[Path, Checkpoint], Path], tmp_path: Path, folder: Path
) -> Iterator[tuple[str, int]]:
    for name, number in calls(save, folder, tmp_path)[0]:
        fresh(save, folder)
        inject = f"inject={name}:signal=SIGKILL:when={number}"
        ended, _ = traced(save, folder, tmp_path / "log", "-e", inject)
        # Before the last calls' effects are seen, the process may have come to its end.
        assert ended == -signal.SIGKILL, (name, number, "the process did not die")
        yield name, number


@needs_strace
def test_whatever_call_a_save_dies_at_a_whole_checkpoint_is_left(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    steps: Counter[int] = Counter()
    for _ in deaths(checkpoint.save, tmp_path, folder):
        steps[survivor(folder)] += 1
        checkpoint.save(folder, state(3))
        assert survivor(folder) == 3
        assert [p.name for p in folder.iterdir()] == ["step-00000003"]
    assert steps[1] > 10
    assert steps[2] > 3


@needs_strace
def test_a_save_into_the_final_place_does_not_survive_the_same(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    lost = sum(not survives_naively(folder) for _ in deaths(save_naively, tmp_path, folder))
    assert lost > 0


@needs_strace
@pytest.mark.durability
def test_an_adapter_whose_save_died_is_saved_again(base: Path, tmp_path: Path) -> None:
    loaded = loading.load(base, torch.float32)
    adapted = lora.add_adapter(loaded, rank=4, alpha=8, dropout=0)
    card = metadata.AdapterCard(
        base_model=str(base),
        base_sha256=files.weights_sha256(base),
        labels=("a", "b"),
        instruction="",
        list_labels=False,
        label_texts={},
        max_length=64,
    )

    def save(folder: Path, _: Checkpoint) -> Path:
        saved.save_adapter(adapted, card, folder / "adapter")
        return folder

    folder = tmp_path / "run"
    kept = 0
    for _ in deaths(save, tmp_path, folder):
        kept += (folder / "adapter").is_dir()
        save(folder, state(3))
        saved.load_adapter(folder, base=None, dtype=torch.float32, device=torch.device("cpu"))
        assert [path.name for path in folder.iterdir()] == ["adapter"]
    assert kept > 20


@needs_strace
@pytest.mark.parametrize("error", ["ENOSPC", "EIO", "EDQUOT"])
def test_a_failing_disk_ends_with_5_and_leaves_the_checkpoint_before(
    tmp_path: Path, error: str
) -> None:
    folder = tmp_path / "checkpoints"
    found, _ = calls(checkpoint.save, folder, tmp_path)
    renamed = max(i for i, (name, _) in enumerate(found) if name.startswith("rename"))
    failed = 0
    for i, (name, number) in enumerate(found):
        if name == "close":  # nobody looks at what closing a file returns
            continue
        fresh(checkpoint.save, folder)
        inject = f"inject={name}:error={error}:when={number}"
        ended, _ = traced(checkpoint.save, folder, tmp_path / "log", "-e", inject)
        assert ended in {0, ResourceError.exit_code}, (name, number)
        failed += ended == ResourceError.exit_code
        if i <= renamed:
            assert ended == ResourceError.exit_code, (name, number, "the failure went unseen")
        assert survivor(folder) == (1 if i <= renamed else 2)
        assert not list(folder.glob("*.tmp"))
    assert failed > 10


@needs_strace
def test_all_is_synced_before_the_rename_and_nothing_deleted_before_the_next_sync(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "checkpoints"
    _, log = calls(checkpoint.save, folder, tmp_path)
    events = []
    for line in log.splitlines():
        if match := re.match(r"(fsync|fdatasync)\(\d+<([^>]*)>", line):
            events.append(("sync", Path(match[2]).name))
        elif line.startswith("rename") and '/step-00000002"' in line:
            events.append(("rename", ""))
        elif line.startswith(("unlink", "rmdir")) and "step-00000001" in line:
            events.append(("delete", ""))
    rename = events.index(("rename", ""))
    files = {checkpoint.TENSORS, checkpoint.STATE, checkpoint.MANIFEST, "step-00000002.tmp"}
    assert {name for kind, name in events[:rename] if kind == "sync"} == files
    assert events[rename - 1] == ("sync", "step-00000002.tmp")
    assert events[rename - 2] == ("sync", checkpoint.MANIFEST)
    assert events[rename + 1] == ("sync", "checkpoints")
    assert ("delete", "") in events[rename + 2 :]
    assert ("delete", "") not in events[:rename]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB, where the machine allows one to be made."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if (
        shutil.which("mount") is None
        or subprocess.run(mount, capture_output=True, check=False).returncode
    ):
        pytest.skip("needs the right to mount a file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_full_ends_with_5_and_keeps_the_checkpoint_before(small_disk: Path) -> None:
    folder = small_disk / "checkpoints"
    checkpoint.save(folder, state(1))
    (small_disk / "other").write_bytes(bytes(2_010_000))
    with pytest.raises(ResourceError, match=r"No space left on device.*; free space"):
        checkpoint.save(folder, state(2))
    assert survivor(folder) == 1
    assert [path.name for path in folder.iterdir()] == ["step-00000001"]
    (small_disk / "other").unlink()
    checkpoint.save(folder, state(2))
    assert survivor(folder) == 2


def test_what_an_interrupted_save_left_is_cleared_at_the_start(tmp_path: Path) -> None:
    folder = fresh(checkpoint.save, tmp_path / "checkpoints")
    (folder / "step-00000002.tmp").mkdir()
    (folder / "step-00000002.tmp" / checkpoint.STATE).write_text("{")
    assert survivor(folder) == 1
    assert not (folder / "step-00000002.tmp").exists()


@pytest.mark.parametrize("name", [checkpoint.TENSORS, checkpoint.STATE, checkpoint.MANIFEST])
@pytest.mark.parametrize("damage", ["gone", "flipped", "short", "empty"])
def test_the_checkpoint_before_is_used_where_the_newest_is_damaged(
    tmp_path: Path, name: str, damage: str
) -> None:
    folder = fresh(checkpoint.save, tmp_path / "checkpoints")
    older = shutil.copytree(folder / "step-00000001", tmp_path / "older")
    newest = checkpoint.save(folder, state(2))
    shutil.copytree(older, folder / "step-00000001")
    content = bytearray((newest / name).read_bytes())
    if damage == "gone":
        (newest / name).unlink()
    elif damage == "flipped":
        content[len(content) // 2] ^= 1
        (newest / name).write_bytes(content)
    else:
        (newest / name).write_bytes(content[: len(content) // 2] if damage == "short" else b"")
    told: list[str] = []
    found = checkpoint.newest(folder, told.append)
    assert found is not None
    assert found.state["progress"]["step"] == 1
    assert len(told) == 1
    assert "step-00000002 is damaged" in told[0]

"""Checkpoints: the state of a run, saved whole or not at all, and found again.

A checkpoint is a folder such as `step-00000120` with the tensors, the state and, written last, a
manifest of their SHA-256. It is made under another name, everything is synced, then it is renamed
and its parent synced, and only then is the one before deleted. So from the first checkpoint on
there is a whole one at any instant, whatever kills the process or the machine.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from remora.errors import ModelError
from remora.formatting import one_line
from remora.runtime import sharding
from remora.runtime.files import disk_errors, sha256, sync, write_synced
from remora.runtime.process_group import ProcessGroup

TENSORS, STATE, MANIFEST = "tensors.safetensors", "state.json", "manifest.json"
SCHEMA = 2
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.uint8: "U8",
}
_NAME = re.compile(r"step-\d{8,}(-evaluated)?")


@dataclass(frozen=True)
class Checkpoint:
    """What a run was between two steps.

    Its name tells the order: after a step, and after the evaluation that may follow it.
    """

    name: str  # step-00000120 or step-00000120-evaluated
    tensors: Mapping[str, Tensor]
    state: Mapping[str, Any]  # as JSON holds it


def save(folder: Path, checkpoint: Checkpoint, group: ProcessGroup | None = None) -> Path:
    """Write a checkpoint and delete those before it; return where it is.

    Args:
        folder: The folder of all checkpoints of the run.
        checkpoint: What to save.
        group: The processes, which call this together. The first one writes; of sharded tensors
            it gets one at a time.

    Raises:
        ResourceError: If the disk fails. The checkpoint before is still there then.
    """
    final, temporary = folder / checkpoint.name, folder / f"{checkpoint.name}.tmp"
    tensors = sharding.gathered(_in_file_order(checkpoint.tensors), group or ProcessGroup())
    if group and not group.is_first:
        for _ in tensors:
            pass
        return final
    with disk_errors(folder):
        if not folder.is_dir():
            folder.mkdir()
            sync(folder.parent)
        for path in (temporary, final):  # of an interrupted save, or a damaged one
            shutil.rmtree(path, ignore_errors=True)
        try:
            _write_all(temporary, checkpoint, tensors)
            temporary.rename(final)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        sync(folder)
        for path in folder.iterdir():
            if path != final:
                # What is half deleted must not look whole: the manifest goes first.
                with contextlib.suppress(OSError):
                    (path / MANIFEST).unlink()
                shutil.rmtree(path, ignore_errors=True)
    return final


def newest(folder: Path, say: Callable[[str], None]) -> Checkpoint | None:
    """Return the newest intact checkpoint, or None if there are none.

    Leftovers of interrupted saves are deleted.

    Args:
        folder: The folder of all checkpoints of the run.
        say: Told of each damaged one.

    Raises:
        ModelError: If there are checkpoints and all are damaged.
    """
    if not folder.is_dir():
        return None
    for path in folder.glob("*.tmp"):
        shutil.rmtree(path, ignore_errors=True)
    found = sorted((p for p in folder.iterdir() if _NAME.fullmatch(p.name)), reverse=True)
    for path in found:
        try:
            return load(path)
        except ModelError as error:
            say(str(error))
    if found:
        raise ModelError(
            f"every checkpoint in {folder} is damaged; restore one, or remove {folder.parent} to "
            "start over"
        )
    return None


def load(path: Path) -> Checkpoint:
    """Read one checkpoint and verify it.

    Raises:
        ModelError: If a file is missing, or is not what was written.
    """
    from safetensors.torch import load_file

    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        for name in (TENSORS, STATE):
            if sha256([path / name]) != manifest[name]:
                raise ValueError(f"{name} is not what was written")
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
        if state["schema"] != SCHEMA:
            raise ValueError(f"schema {state['schema']}, this version reads {SCHEMA}")
        # Copies: a file that is mapped into memory cannot be deleted on Windows.
        tensors = {name: tensor.clone() for name, tensor in load_file(path / TENSORS).items()}
        return Checkpoint(path.name, tensors, state)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"the checkpoint {path} is damaged ({one_line(error)})") from error


def _write_all(folder: Path, checkpoint: Checkpoint, tensors: Iterable[tuple[str, Tensor]]) -> None:
    folder.mkdir()
    _write_tensors(folder / TENSORS, checkpoint.tensors, tensors)
    sync(folder / TENSORS)
    _write(folder / STATE, {"schema": SCHEMA, **checkpoint.state})
    _write(folder / MANIFEST, {name: sha256([folder / name]) for name in (TENSORS, STATE)})
    sync(folder)


def _in_file_order(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors in the order in which each begins where its type may be mapped to."""
    return dict(sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])))


def _write_tensors(
    path: Path, described: Mapping[str, Tensor], tensors: Iterable[tuple[str, Tensor]]
) -> None:
    """Write a file in the form of safetensors, whose own functions want all tensors at once.

    Args:
        path: The file.
        described: Tensors by their names, looked at for their shapes and types.
        tensors: The same in the order of the file, one at a time in this process's memory.
    """
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in _in_file_order(described).items():
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    written = json.dumps(header).encode()
    written += b" " * (-len(written) % 8)
    with path.open("wb") as file:
        file.write(len(written).to_bytes(8, "little") + written)
        for _, tensor in tensors:
            file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)


def _write(path: Path, value: Mapping[str, Any]) -> None:
    write_synced(path, json.dumps(value, ensure_ascii=False) + "\n")


def capture(
    best: Sequence[Tensor] | None,
    parameters: Mapping[str, Tensor],
    optimizer: Any,
    scheduler: Any,
    scaler: Any,
    device: torch.device,
    group: ProcessGroup,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the state that a loop needs to resume with the same bits.

    All processes call it together. They differ only in their random numbers and in their parts of
    sharded tensors. The tensors are not copied.
    """
    tensors = {f"weights/{name}": p for name, p in parameters.items()}
    if best is not None:
        tensors |= {f"best/{n}": w for n, w in zip(parameters, best, strict=True)}
    saved = optimizer.state_dict()
    for index, entries in saved["state"].items():
        for key, value in entries.items():
            tensors[f"optimizer/{index}/{key}"] = torch.as_tensor(value)
    for i, own in enumerate(random_state(device)):
        for rank, found in enumerate(group.gather_arrays(own.numpy())):
            tensors[f"random/{rank}/{i}"] = torch.from_numpy(found)
    state = {
        "optimizer": saved["param_groups"],
        "scheduler": scheduler.state_dict(),
        "scaler": scaler.state_dict() if scaler is not None else None,
    }
    return tensors, state


@torch.no_grad()
def restore(
    saved: Checkpoint,
    parameters: Mapping[str, Tensor],
    optimizer: Any,
    scheduler: Any,
    scaler: Any,
    device: torch.device,
    group: ProcessGroup,
) -> list[Tensor] | None:
    """Restore what `capture` returned; return the best weights, if there are any.

    A process that did not exist then keeps its own random numbers.

    Raises:
        ModelError: If the checkpoint is of other parameters.
    """
    tensors, state = saved.tensors, saved.state
    for name, parameter in parameters.items():
        weight = tensors.get(f"weights/{name}")
        if weight is None or weight.shape != parameter.shape:
            raise ModelError(f"the checkpoint does not fit {name}; remove the run to start over")
        parameter.copy_(sharding.part(weight, parameter))
    optimized = [p for group in optimizer.param_groups for p in group["params"]]
    entries: dict[int, dict[str, Tensor]] = {}
    for path, value in tensors.items():
        if path.startswith("optimizer/"):
            _, index, key = path.split("/")
            trained = optimized[int(index)]
            own = sharding.part(value, trained) if value.shape == trained.shape else value
            entries.setdefault(int(index), {})[key] = own
    optimizer.load_state_dict({"state": entries, "param_groups": state["optimizer"]})
    scheduler.load_state_dict(state["scheduler"])
    if scaler is not None and state["scaler"]:
        scaler.load_state_dict(state["scaler"])
    random = f"random/{group.rank}/"
    if count := _count(tensors, random):
        set_random_state(device, [tensors[f"{random}{i}"] for i in range(count)])
    if not _count(tensors, "best/"):
        return None
    return [sharding.part(tensors[f"best/{name}"], p) for name, p in parameters.items()]


def random_state(device: torch.device) -> list[Tensor]:
    """Return the states of torch's random numbers: the CPU's, and the device's."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    elif device.type == "mps":
        states.append(torch.mps.get_rng_state())
    return states


def set_random_state(device: torch.device, states: Sequence[Tensor]) -> None:
    """Set the states that `random_state` returned."""
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
    elif device.type == "mps":
        torch.mps.set_rng_state(states[1])


def _count(tensors: Mapping[str, Tensor], prefix: str) -> int:
    return sum(name.startswith(prefix) for name in tensors)

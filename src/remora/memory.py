"""What a training step keeps in memory, counted without weights; and how much memory is free.

The model is built with fake tensors, which have shapes and no contents, and takes the training
loop's own path over a real token tree: forward, loss and backward. A ledger writes down every
storage while it is alive, so any architecture is counted and nothing is guessed.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import gc
import os
import re
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import flop_registry

from remora import attention, model, tree
from remora.errors import ModelError
from remora.tree import TokenTree

PRODUCTS = {"mm": 0, "bmm": 0, "addmm": 1, "addmm_": 1, "baddbmm": 1, "baddbmm_": 1}
"""Matrix products, by which argument is their first factor."""

LOGIT_ELEMENTS = 1 << 25
"""Most logits that a pass of scoring computes: 220 positions of a 151,936-word vocabulary."""

KEPT_KERNELS = 128
"""Kernels that a processor's library keeps compiled, one for each shape of a product; see below."""

KERNEL_BYTES = KEPT_KERNELS * 500_000
"""What they take, as measured; docs/log.md has the figures."""

MAPPED_BYTES = 1 << 25
"""Arrays from this size on are mapped by glibc each on its own, and given back when freed."""

FRAGMENT_BYTES = 140_000_000
FRAGMENTS = 0.3
LASTING_FRAGMENTS = 0.5
"""Smaller arrays lie in its heap, which keeps what it once needed. Micro-batches are of ever new
lengths, so what is freed fits what comes less and less: so many bytes are held in pieces of no use,
and this share of the most that a step has there, and of what came during training to stay there,
since that lies in between. Measured with glibc 2.36; docs/log.md has the figures."""

_MMAP_THRESHOLD = -3  # glibc's M_MMAP_THRESHOLD
MAPPED_FRAGMENT_BYTES = 60_000_000
"""What is held in pieces where arrays from a megabyte on are mapped, as measured."""

ADDRESS_BYTES = 400_000_000
"""Addresses, not memory, that a run takes: glibc reserves 64 MiB for each of three threads, and
the libraries of the baseline are mapped at the end. A limit on the address space counts them."""

# torch's 16-bit products on processors compile a kernel for each shape and keep 1,024 of them, half
# a megabyte each. Micro-batches are of ever new lengths, so none but those of the same length, in
# other layers, are of use again. Both caches look here when the first product is computed.
for _name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
    os.environ.setdefault(_name, str(KEPT_KERNELS))


@dataclass(frozen=True, kw_only=True)
class StepMemory:
    """Memory of one micro-batch at its peak, in bytes, and its operations.

    Attributes:
        gradients: Of what trains.
        saved: Activations that the forward pass keeps for the backward pass.
        logits: [predictors, vocabulary] and its gradient.
        workspace: Everything else that is alive at the peak.
        operations: Floating-point operations of forward and backward pass, recomputation included;
            a multiplication and an addition count as two.
        heap: Most bytes in arrays that lie in the allocator's heap, at any moment.
        mapped: Most bytes in larger arrays, at any moment.
        largest: Bytes of the largest array.
    """

    gradients: int
    saved: int
    logits: int
    workspace: int
    operations: int
    heap: int
    mapped: int
    largest: int = 0

    @property
    def peak(self) -> int:
        """All of it together."""
        return self.gradients + self.saved + self.logits + self.workspace


class Skeleton:
    """A model without weights, that can be run to see what it would need."""

    def __init__(self, adapted: nn.Module, *, autocast: torch.dtype | None, device: str) -> None:
        """Take a model whose parameters are on the device `meta`, for this use only.

        Args:
            adapted: The model, with its adapter if it gets one.
            autocast: 16-bit arithmetic to compute in, or None.
            device: What type of device it would run on, which computes attention in its own way.
        """
        self._model, self._autocast, self._device = adapted, autocast, device
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        with self._mode:
            _make_fake(adapted)
        adapted.train()

    def count(
        self, packed: TokenTree, *, checkpointing: bool = False, accumulates: bool = False
    ) -> StepMemory:
        """Run a micro-batch and return what it needs.

        Args:
            packed: The micro-batch.
            checkpointing: Whether layers are computed again in the backward pass.
            accumulates: Whether gradients of an earlier micro-batch are there already.

        Raises:
            ModelError: If the model looks at values while it computes, which fake tensors lack.
        """
        model.set_checkpointing(self._model, checkpointing)
        with _told():
            return self._count(packed, accumulates)

    def _count(self, packed: TokenTree, accumulates: bool) -> StepMemory:
        adapted = self._model
        is_whole = attention.prefers_whole(self._device, packed.num_tokens, packed.num_tokens)
        inputs = tree.inputs(adapted, packed, in_blocks=False if is_whole else None)
        if blocks := inputs.get("tree_blocks"):
            inputs["tree_blocks"] = dataclasses.replace(blocks, by_kernel=self._device != "cpu")
        trained = [p for p in adapted.parameters() if p.requires_grad]
        ledger = _Ledger([*adapted.parameters(), *adapted.buffers()])
        with self._mode, ledger:
            inputs, packed = self._faked(inputs), self._faked(packed)
            ledger.forget()
            for parameter in trained:
                parameter.grad = None
                if accumulates:
                    ledger.tag = "gradients"
                    parameter.grad = torch.zeros_like(parameter)
            hooks = [
                p.register_post_accumulate_grad_hook(ledger.add_gradient)  # type: ignore[no-untyped-call]
                for p in trained
            ]
            ledger.tag = "forward"
            with torch.autocast("cpu", self._autocast, enabled=self._autocast is not None):
                logits = adapted(**inputs).logits[0]
            logits_bytes = _bytes(logits)
            ledger.retag(lambda tag, size: "logits" if size == logits_bytes else tag)
            loss = tree.loss_sum(logits, packed)
            del logits
            ledger.retag(lambda tag, size: "logits" if size == logits_bytes else tag)
            kept = ledger.totals["forward"]
            ledger.retag(lambda tag, _: "saved" if tag == "forward" else tag)
            ledger.tag = "workspace"
            loss.backward()  # type: ignore[no-untyped-call]
            del loss
            for hook in hooks:
                hook.remove()
            for parameter in trained:
                parameter.grad = None
        at_peak = ledger.at_peak
        saved = at_peak["saved"] + min(kept, at_peak["forward"])
        return StepMemory(
            gradients=at_peak["gradients"],
            saved=saved,
            logits=at_peak["logits"],
            workspace=sum(at_peak.values()) - at_peak["gradients"] - saved - at_peak["logits"],
            operations=ledger.operations,
            heap=ledger.most_heap,
            mapped=ledger.most_mapped,
            largest=ledger.largest,
        )

    def count_scoring(self, num_tokens: int, num_kept: int) -> StepMemory:
        """Return what a pass of closed-set scoring needs at most, keys and values included.

        Args:
            num_tokens: Tokens of the packed row.
            num_kept: Positions that logits are computed for.

        Raises:
            ModelError: If the model looks at values while it computes, which fake tensors lack.
        """
        adapted = self._model.eval()
        with _told():
            found = self._count_scoring(num_tokens, num_kept)
        adapted.train()
        return found

    def _count_scoring(self, num_tokens: int, num_kept: int) -> StepMemory:
        from transformers import DynamicCache

        visible = torch.ones(num_tokens, num_tokens, dtype=torch.bool)
        config = tree.text_config(self._model)
        dtype = self._autocast or next(self._model.parameters()).dtype
        arguments = attention.inputs(config, lambda _: visible, dtype)
        ledger = _Ledger([*self._model.parameters(), *self._model.buffers()])
        with self._mode, ledger, torch.no_grad():
            arguments = self._faked(arguments)
            positions = torch.arange(num_tokens)
            with torch.autocast("cpu", self._autocast, enabled=self._autocast is not None):
                logits = self._model(
                    input_ids=positions[None],
                    position_ids=positions[None],
                    **arguments,
                    past_key_values=DynamicCache(),
                    use_cache=True,
                    logits_to_keep=positions[:num_kept],
                ).logits
            size = _bytes(logits)
            ledger.retag(lambda tag, found: "logits" if found == size else tag)
        peak = max(ledger.peak, sum(ledger.totals.values()))
        return StepMemory(
            gradients=0,
            saved=0,
            logits=ledger.totals["logits"],
            workspace=peak - ledger.totals["logits"],
            operations=ledger.operations,
            heap=ledger.most_heap,
            mapped=ledger.most_mapped,
            largest=ledger.largest,
        )

    def _faked(self, value: Any) -> Any:
        """Return a structure with its tensors replaced by fake ones."""
        if isinstance(value, Tensor):
            return self._mode.from_tensor(value)
        if isinstance(value, dict):
            return {key: self._faked(part) for key, part in value.items()}
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return dataclasses.replace(value, **self._faked(vars(value)))
        return value


def most_kept(vocabulary: int) -> int:
    """Return at how many positions a pass of scoring computes logits, at most."""
    return max(1, LOGIT_ELEMENTS // vocabulary)


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Make a ModelError of torch's errors for what depends on data."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise ModelError(
            f"the memory of this model cannot be counted ({reason}); "
            "train it with a --micro-batch-tokens of your choice"
        ) from error


class _Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Knows the storages that are alive, by tag, and counts operations."""

    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._known = {id(t.untyped_storage()) for t in known}
        self._keep = [t.untyped_storage() for t in known]  # an id holds as long as its storage
        self._live: dict[int, tuple[str, int, Any]] = {}
        self.tag = "forward"
        self.forget()

    def forget(self) -> None:
        """Take what is alive now as known, and begin to count."""
        self._known |= self._live.keys()
        self._keep += [storage for _, _, ref in self._live.values() if (storage := ref())]
        self._live.clear()
        tags = ("forward", "gradients", "logits", "saved", "workspace")
        self.totals = dict.fromkeys(tags, 0)
        self.at_peak, self.peak, self._total = dict(self.totals), 0, 0
        self.most_heap = self.most_mapped = self._heap = self.largest = 0
        self.operations = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._add, result)
        name = func._schema.name.removeprefix("aten::")
        if (place := PRODUCTS.get(name)) is not None:
            self.operations += 2 * args[place].numel() * args[place + 1].shape[-1]
        elif (count := flop_registry.get(func.overloadpacket)) is not None:
            self.operations += count(*args, **(kwargs or {}), out_val=result)
        return result

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._live or key in self._known:
            return
        reference = weakref.ref(storage, lambda _: self._remove(key))
        self._live[key] = (self.tag, storage.nbytes(), reference)
        self.totals[self.tag] += storage.nbytes()
        self._total += storage.nbytes()
        self._heap += storage.nbytes() if storage.nbytes() < MAPPED_BYTES else 0
        self.largest = max(self.largest, storage.nbytes())
        if self._total > self.peak:
            self.peak, self.at_peak = self._total, dict(self.totals)
        self.most_heap = max(self.most_heap, self._heap)
        self.most_mapped = max(self.most_mapped, self._total - self._heap)

    def _remove(self, key: int) -> None:
        if key in self._live:
            tag, size, _ = self._live.pop(key)
            self.totals[tag] -= size
            self._total -= size
            self._heap -= size if size < MAPPED_BYTES else 0

    def retag(self, rename: Callable[[str, int], str]) -> None:
        """Give what is alive another tag, by its tag and its bytes."""
        for key, (tag, size, reference) in self._live.items():
            self.totals[tag] -= size
            self._live[key] = (rename(tag, size), size, reference)
            self.totals[self._live[key][0]] += size

    def add_gradient(self, parameter: Tensor) -> None:
        """Tag a gradient that has arrived."""
        assert parameter.grad is not None
        key = id(parameter.grad.untyped_storage())
        if key in self._live:
            tag, size, reference = self._live[key]
            self.totals[tag] -= size
            self._live[key] = ("gradients", size, reference)
            self.totals["gradients"] += size


def _make_fake(module: nn.Module) -> None:
    """Replace parameters and buffers on `meta` by fake ones, tied weights once."""
    replaced: dict[int, Tensor] = {}
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in replaced:
                    empty: Tensor = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                    if isinstance(tensor, nn.Parameter):
                        empty = nn.Parameter(empty, requires_grad=tensor.requires_grad)
                    replaced[id(tensor)] = empty
                tensors[name] = replaced[id(tensor)]  # type: ignore[assignment]


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def peak_bytes(device: torch.device) -> int:
    """Return the most memory used so far: of the device, or of the process on a processor."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_reserved(device))
    if device.type == "mps":
        return int(torch.mps.driver_allocated_memory())
    own = _proc_bytes("/proc/self/status", "VmHWM")  # the one below begins with the parent's
    if own is not None:
        return own
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def used_bytes() -> int:
    """Return the memory that this process uses now; where that is not known, its peak."""
    resident = _proc_bytes("/proc/self/status", "VmRSS")
    return peak_bytes(torch.device("cpu")) if resident is None else resident


def free_bytes(device: torch.device) -> int | None:
    """Return how much more memory this process can take on a device, or None if nobody says.

    On a processor the least of what the machine has available, what the container's control group
    (versions 1 and 2) leaves, and what the limit of the address space leaves.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + int(unused)
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    limits = [_proc_bytes("/proc/meminfo", "MemAvailable"), _group_bytes(), _address_bytes()]
    known = [limit for limit in limits if limit is not None]
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # they share it
    return max(0, min(known)) // processes if known else None


def begin(device: torch.device) -> None:
    """Set up torch's allocator for CUDA for a run, and measure its peak from here on.

    Its segments may grow, so that it holds less that is of no use: micro-batches are of ever new
    lengths. What the user sets by torch's variables stays.
    """
    if device.type != "cuda":
        return
    set_by_user = {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys()
    if sys.platform == "linux" and not set_by_user:
        change = getattr(torch._C, "_accelerator_setAllocatorSettings", None)  # of newer versions
        with contextlib.suppress(AttributeError, RuntimeError):  # not of this build of torch
            (change or torch.cuda.memory._set_allocator_settings)("expandable_segments:True")
    release(device)
    torch.cuda.reset_peak_memory_stats(device)


def is_exhausted(error: BaseException) -> bool:
    """Whether an error says that memory ran out."""
    words = (
        "out of memory",
        "can't allocate memory",
        "bad_alloc",
        "not enough memory",
        "could not create a primitive",  # oneDNN's, where a kernel cannot be mapped
    )
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)
    )


def refuse_to_exhaust(device: torch.device, needed: int) -> None:
    """Fail before memory is taken that is not there.

    A processor has no error for it: the kernel kills the process. Devices report it themselves.

    Raises:
        torch.OutOfMemoryError: If a processor's memory does not suffice for so many bytes.
    """
    if device.type == "cpu" and needed > (free_bytes(device) or needed):
        release(device)
        free = free_bytes(device)
        if free is not None and needed > free:
            raise torch.OutOfMemoryError(f"not enough memory: {needed:,} of {free:,} bytes")


def release(device: torch.device) -> None:
    """Give cached memory back."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()
    else:
        trim()


def keep_within(device: torch.device, limit: int) -> None:
    """Give back what a processor's allocator holds, where the process has more than a limit."""
    if device.type == "cpu" and used_bytes() > limit:
        trim()


def map_arrays(device: torch.device) -> None:
    """Have a processor's arrays of a megabyte or more mapped each on its own, not in the heap.

    Then no pieces of them are held once they are freed. That takes time, since their pages are
    mapped and cleared again and again. What the user has set stays.
    """
    set_by_user = "MALLOC_MMAP_THRESHOLD_" in os.environ or "mmap_threshold" in os.environ.get(
        "GLIBC_TUNABLES", ""
    )
    if device.type == "cpu" and not set_by_user:
        with contextlib.suppress(AttributeError, OSError, TypeError):  # only glibc has it
            ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 1 << 20)


def trim() -> None:
    """Give back what the process has freed and its allocator holds on to, in pieces."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # only glibc has it
        ctypes.CDLL(None).malloc_trim(0)


def _proc_bytes(path: str, name: str) -> int | None:
    """Return a line such as `MemAvailable:   123 kB`, in bytes."""
    text = _read(Path(path)) or ""
    found = re.search(rf"^{name}:\s+(\d+) kB", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else None


CONTROL_GROUPS = Path("/sys/fs/cgroup")


def _group_bytes() -> int | None:
    """Return what the process's control groups leave: the tightest from its own up to the root."""
    free: list[int] = []
    for line in (_read(Path("/proc/self/cgroup")) or "").splitlines():
        _, controllers, own = line.split(":", 2)
        if controllers == "":
            root, limit, used = CONTROL_GROUPS, "memory.max", "memory.current"
        elif controllers == "memory":
            root, limit, used = (
                CONTROL_GROUPS / "memory",
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
            )
        else:
            continue
        folder = root / own.lstrip("/")
        # In a container the path may be the host's; the root is then the container's own group.
        for place in (folder, *folder.parents):
            maximum, current = _read(place / limit), _read(place / used)
            if maximum and current and maximum.strip().isdigit():
                cache = re.search(
                    r"^(?:total_)?inactive_file (\d+)", _read(place / "memory.stat") or "", re.M
                )
                free.append(int(maximum) - int(current) + (int(cache[1]) if cache else 0))
            if place == root:
                break
    return min(free, default=None)


def _address_bytes() -> int | None:
    """Return what the limit of the address space (ulimit -v) leaves."""
    import resource

    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    used = _proc_bytes("/proc/self/status", "VmSize")
    if limit == resource.RLIM_INFINITY or used is None:
        return None
    return max(0, limit - used - ADDRESS_BYTES)


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return None

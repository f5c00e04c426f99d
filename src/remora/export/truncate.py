"""Smaller adapters: each module's update cut to the rank that its singular values deserve.

A module's update is scaling * B A. Of all matrices of a rank, the one that keeps the largest
singular values is nearest to it (Eckart and Young 1936). The decomposition comes from the skinny
factors A and B alone, and no base model is needed.
"""

from __future__ import annotations

import copy
import json
import math
import warnings
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from remora.errors import ConfigError, ModelError
from remora.formatting import one_line
from remora.models import quantize

PREFIX = "base_model.model."
"""What PEFT writes before a module's path."""

WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class Update:
    """The singular value decomposition of a module's update: left * values @ right."""

    left: Tensor  # [out, r]
    values: Tensor  # [r], falling
    right: Tensor  # [r, in]

    @property
    def num_per_rank(self) -> int:
        """Numbers that one rank takes: a column of B and a row of A."""
        return self.left.shape[0] + self.right.shape[1]


@dataclass(frozen=True)
class Adapter:
    """An adapter's updates by their modules' paths, and PEFT's configuration of it."""

    config: Any
    updates: Mapping[str, Update]


@dataclass(frozen=True)
class Artifact:
    """The files of a compressed adapter by their names, and the rank of every module."""

    files: Mapping[str, bytes]
    ranks: Mapping[str, int]
    alpha: float
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes of all files together."""
        return sum(map(len, self.files.values()))

    @property
    def mean_rank(self) -> float:
        """The mean over all modules of the adapter, those without an update included."""
        return sum(self.ranks.values()) / len(self.ranks)


def decompose(a: Tensor, b: Tensor, scaling: float) -> Update:
    """Return the singular value decomposition of scaling * b @ a without forming the product.

    Args:
        a: [r, in]
        b: [out, r]
        scaling: The factor of the product.

    Returns:
        The decomposition in float64; the singular vectors of values that are 0 are arbitrary.
    """
    basis_b, core_b = torch.linalg.qr(b.double())
    basis_a, core_a = torch.linalg.qr(a.double().t())
    left, values, right = torch.linalg.svd(scaling * core_b @ core_a.t())  # [r, r], cheap
    return Update(basis_b @ left, values, right @ basis_a.t())


def read(folder: Path) -> Adapter:
    """Read an adapter from its folder and decompose it.

    Raises:
        ModelError: If it cannot be read or is no plain LoRA.
    """
    quantize.import_quietly()
    import peft
    from peft.utils.other import get_pattern_key

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # settings that this version of PEFT does not know
            config: Any = peft.PeftConfig.from_pretrained(str(folder))
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
    except (OSError, SafetensorError, ValueError, TypeError, KeyError) as error:
        raise ModelError(
            f"the adapter in {folder} cannot be read ({one_line(error)}); "
            "train it again or restore it"
        ) from error
    plain = isinstance(config, peft.LoraConfig) and not config.use_rslora
    names = {name.replace(".lora_B.", ".lora_A.") for name in tensors}
    if not plain or not names or 2 * len(names) != len(tensors):
        raise ModelError(
            f"the adapter in {folder} is no plain LoRA, which is all that can be compressed; "
            "use it as it is"
        )
    updates = {}
    for name in sorted(names):
        a, b = tensors[name], tensors[name.replace(".lora_A.", ".lora_B.")]
        module = name.removeprefix(PREFIX).removesuffix(".lora_A.weight")
        pattern = get_pattern_key(config.alpha_pattern.keys(), module)
        alpha = config.alpha_pattern.get(pattern, config.lora_alpha)
        updates[module] = decompose(a, b, alpha / a.shape[0])
    return Adapter(config, updates)


def fit(
    adapter: Adapter,
    budget_bytes: int,
    dtype: torch.dtype,
    others: Mapping[str, bytes],
    *,
    power: int = 2,
) -> Artifact:
    """Return the best adapter whose files take at most a budget together.

    Args:
        adapter: The full one.
        budget_bytes: Most bytes of all files.
        dtype: What its weights are stored in.
        others: Files that go with it, and count.
        power: As `allocate` takes it.

    Raises:
        ConfigError: If the budget does not suffice for one rank of one module.
    """
    for_weights = budget_bytes
    while any((ranks := allocate(adapter.updates, for_weights, dtype, power=power)).values()):
        artifact = pack(adapter, ranks, dtype, others)
        if artifact.num_bytes <= budget_bytes:
            return artifact
        for_weights -= artifact.num_bytes - budget_bytes  # names and shapes take bytes too
    smallest = pack(adapter, _cheapest(adapter.updates), dtype, others)
    if smallest.num_bytes <= budget_bytes:
        return smallest
    raise ConfigError(
        f"{budget_bytes:,} bytes do not suffice for any part of the adapter, whose smallest takes "
        f"{smallest.num_bytes:,}; give a larger --budget or a smaller --ratio"
    )


def allocate(
    updates: Mapping[str, Update], budget_bytes: int, dtype: torch.dtype, *, power: int = 2
) -> dict[str, int]:
    """Choose each module's rank: the singular values of all that are worth most per byte.

    A value is worth its square, its share of the squared Frobenius norm; with a `power` of 1
    itself, which spreads the ranks over more modules. What does not fit into the rest of the budget
    is passed over.
    """
    candidates = [
        (float(value) ** power / update.num_per_rank, module)
        for module, update in updates.items()
        for value in update.values
        if value > 1e-7 * update.values[0]  # below it is the rounding of float32
    ]
    candidates.sort(key=lambda candidate: -candidate[0])
    ranks = dict.fromkeys(updates, 0)
    for _, module in candidates:
        cost = updates[module].num_per_rank * dtype.itemsize
        if cost <= budget_bytes:
            ranks[module] += 1
            budget_bytes -= cost
    return ranks


def _cheapest(updates: Mapping[str, Update]) -> dict[str, int]:
    cheapest = min(updates, key=lambda module: updates[module].num_per_rank)
    return {module: int(module == cheapest) for module in updates}


def pack(
    adapter: Adapter,
    ranks: Mapping[str, int],
    dtype: torch.dtype,
    others: Mapping[str, bytes],
    alpha: float | None = None,
) -> Artifact:
    """Return the files of an adapter cut to some ranks, in PEFT's format.

    Each factor gets the root of the singular values, so that both are of one magnitude. One alpha
    is for all modules; what PEFT divides it by, a module's rank, is in the factors. In 8 bits there
    are no fine numbers near 0, so there alpha is small and the factors are large. Modules of rank 0
    are no targets.

    Args:
        adapter: The full one.
        ranks: The rank of each module.
        dtype: What the weights are stored in.
        others: Files that go with it.
        alpha: That of another artifact of the same ranks, to get one of the same size.

    Raises:
        ConfigError: If a number is too large for `dtype`.
    """
    kept = {module: rank for module, rank in ranks.items() if rank}
    usual = Counter(kept.values()).most_common(1)[0][0]
    tensors: dict[str, Tensor] = {}
    for module, rank in kept.items():
        update = adapter.updates[module]
        root = (rank * update.values[:rank]).sqrt()
        tensors[f"{PREFIX}{module}.lora_A.weight"] = root[:, None] * update.right[:rank]
        tensors[f"{PREFIX}{module}.lora_B.weight"] = update.left[:, :rank] * root
    if alpha is None:
        alpha = _alpha(tensors.values()) if dtype.itemsize == 1 else usual
    most = torch.finfo(dtype).max
    for name, tensor in tensors.items():
        scaled = tensor / alpha**0.5
        if dtype.itemsize == 1:
            scaled = scaled.clamp(-most, most)
        tensors[name] = scaled.to(dtype).contiguous()
    if not all(tensor.float().isfinite().all() for tensor in tensors.values()):
        raise ConfigError(f"the adapter has numbers too large for {dtype}; use --dtype bfloat16")
    config = copy.copy(adapter.config)
    config.r, config.lora_alpha = usual, alpha
    config.rank_pattern = {module: rank for module, rank in kept.items() if rank != usual}
    config.alpha_pattern = {}
    config.target_modules = list(kept)
    settings = {k: sorted(v) if isinstance(v, set) else v for k, v in config.to_dict().items()}
    files = {
        WEIGHTS: save(tensors, metadata={"format": "pt"}),
        "adapter_config.json": json.dumps(settings, sort_keys=True).encode(),
    }
    return Artifact({**files, **others}, dict(ranks), alpha, dtype)


def repack(artifact: Artifact, adapter: Adapter, updates: Mapping[str, Update]) -> Artifact:
    """Return an artifact of the same size with other updates in the modules that it has."""
    others = {
        name: content
        for name, content in artifact.files.items()
        if name not in (WEIGHTS, "adapter_config.json")
    }
    changed = Adapter(adapter.config, updates)
    return pack(changed, artifact.ranks, artifact.dtype, others, artifact.alpha)


def _alpha(tensors: Collection[Tensor]) -> float:
    """Return the power of 4 that makes the largest number 64 to 128: float8 goes up to 448."""
    largest = max(float(tensor.abs().max()) for tensor in tensors)
    return 4.0 ** math.ceil(math.log2(largest / 128)) if 0 < largest < math.inf else 1.0

"""Smaller adapters: the singular value decomposition of each module's update, truncated.

A module's update is scaling * B A. Of all matrices of a rank, the one that keeps its largest
singular values is nearest to it (Eckart and Young 1936). The decomposition is computed from the
thin factors A and B, without the base model.
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
"""PEFT's prefix of a module's path."""

WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class Update:
    """The singular value decomposition of a module's update: left * values @ right."""

    left: Tensor  # [out, r]
    values: Tensor  # [r], descending
    right: Tensor  # [r, in]

    @property
    def num_per_rank(self) -> int:
        """The numbers that one rank takes: a column of B and a row of A."""
        return self.left.shape[0] + self.right.shape[1]


@dataclass(frozen=True)
class Adapter:
    """An adapter's updates by module path, and its PEFT configuration."""

    config: Any
    updates: Mapping[str, Update]


@dataclass(frozen=True)
class Artifact:
    """The files of a compressed adapter by name, and the rank of every module."""

    files: Mapping[str, bytes]
    ranks: Mapping[str, int]
    alpha: float
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """The bytes of all files together."""
        return sum(map(len, self.files.values()))

    @property
    def mean_rank(self) -> float:
        """The mean rank over all modules of the adapter, those of rank 0 included."""
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
    """Read an adapter from its folder, and decompose its updates.

    Raises:
        ModelError: If it cannot be read or is not plain LoRA.
    """
    quantize.import_peft()
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

    # Only A and B of plain LoRA make up the whole update
    plain = isinstance(config, peft.LoraConfig) and not config.use_rslora
    plain = plain and not config.target_parameters  # of experts: many updates in one pair
    names = {name.replace(".lora_B.", ".lora_A.") for name in tensors}
    if not plain or not names or 2 * len(names) != len(tensors):
        raise ModelError(
            f"the adapter in {folder} is not plain LoRA, and nothing else can be compressed; "
            "use it as it is"
        )

    # Each module's update, with its own scaling
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
    """Return the best adapter whose files together fit into a budget.

    Args:
        adapter: The full one.
        budget_bytes: Most bytes of all files together.
        dtype: Storage type of its weights.
        others: Files that go with it, and count.
        power: See `allocate`.

    Raises:
        ConfigError: If the budget is too small for one rank of one module.
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
        f"the budget is {budget_bytes:,} bytes and the smallest part of the adapter takes "
        f"{smallest.num_bytes:,}; give a larger --budget or a smaller --ratio"
    )


def allocate(
    updates: Mapping[str, Update], budget_bytes: int, dtype: torch.dtype, *, power: int = 2
) -> dict[str, int]:
    """Return the rank of each module: of all singular values, those worth most per byte are kept.

    A value is worth its square, its share of the squared Frobenius norm. With a `power` of 1 it is
    worth itself, which spreads the ranks over more modules. A rank that does not fit into the rest
    of the budget is skipped.
    """
    candidates = [
        (float(value) ** power / update.num_per_rank, module)
        for module, update in updates.items()
        for value in update.values
        if value > 1e-7 * update.values[0]  # smaller ones are float32's rounding errors
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
    """Return the files of an adapter truncated to some ranks, in PEFT's format.

    Each factor gets the square root of the singular values, so that both are of one magnitude. All
    modules share one alpha; a module's rank, which PEFT divides it by, is multiplied into the
    factors. float8 is coarse near 0, so there alpha is small and the factors are large. Modules of
    rank 0 are no target modules.

    Args:
        adapter: The full one.
        ranks: The rank of each module.
        dtype: Storage type of the weights.
        others: Files that go with it.
        alpha: The alpha of another artifact of the same ranks, to get one of the same size.

    Raises:
        ConfigError: If a number is too large for `dtype`.
    """
    # The factors of each module
    kept = {module: rank for module, rank in ranks.items() if rank}
    usual = Counter(kept.values()).most_common(1)[0][0]
    tensors: dict[str, Tensor] = {}
    for module, rank in kept.items():
        update = adapter.updates[module]
        root = (rank * update.values[:rank]).sqrt()
        tensors[f"{PREFIX}{module}.lora_A.weight"] = root[:, None] * update.right[:rank]
        tensors[f"{PREFIX}{module}.lora_B.weight"] = update.left[:, :rank] * root

    # Scale and store them
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

    # PEFT's configuration for these ranks
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
    """Return an artifact of the same size with other updates in the same modules."""
    others = {
        name: content
        for name, content in artifact.files.items()
        if name not in (WEIGHTS, "adapter_config.json")
    }
    changed = Adapter(adapter.config, updates)
    return pack(changed, artifact.ranks, artifact.dtype, others, artifact.alpha)


def _alpha(tensors: Collection[Tensor]) -> float:
    """Return the power of 4 that makes the largest number 64 to 128; float8 ends at 448."""
    largest = max(float(tensor.abs().max()) for tensor in tensors)
    return 4.0 ** math.ceil(math.log2(largest / 128)) if 0 < largest < math.inf else 1.0

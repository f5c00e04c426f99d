"""Sharded weights: each process holds a part of every tensor (FSDP2).

Before a layer is computed, all processes gather its weights; after it they are freed. Gradients are
summed on the way to the process that holds their part (Zhao et al. 2023,
https://arxiv.org/abs/2304.11277). So each layer is a collective call, and all processes must
compute the model equally often: one without rows computes a dummy token.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from remora.errors import ConfigError
from remora.runtime.process_group import ProcessGroup


@dataclass(frozen=True)
class Sizes:
    """Bytes of the weights that would be sharded."""

    total: int
    rest: int  # outside of layers: gathered as long as the model computes
    largest_layer: int


def apply(model: Any, device: torch.device, group: ProcessGroup) -> None:
    """Shard a model: leave each process its part of the weights, on its device.

    An adapter's weights and gradients stay whole in each process. The model may lie on another
    device and be larger than this one: it is moved a layer at a time.

    Args:
        model: The same in each process: PEFT's, or a plain one whose weights all train.
        device: Where to compute.
        group: The processes.

    Raises:
        ConfigError: If the architecture does not name its layers.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    mesh = init_device_mesh(device.type, (group.size,))
    whole = _adapter(model)
    for part in [*layers(model), model]:
        # The root's weights are freed after a forward pass too: they may be changed before the next
        fully_shard(part, mesh=mesh, ignored_params=set(whole), reshard_after_forward=True)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # a sum, as of parts of one batch
            module.set_force_sum_reduction_for_comms(True)
    for parameter in whole:
        parameter.data = parameter.data.to(device)


def layers(model: Any) -> list[nn.Module]:
    """Return the layers of a model, which are gathered one after the other.

    Raises:
        ConfigError: If the architecture does not name them.
    """
    names = set(getattr(model, "_no_split_modules", None) or ())
    layers = [module for module in model.modules() if type(module).__name__ in names]
    if not layers:
        raise ConfigError(
            "this architecture does not name its layers, so its weights cannot be sharded; "
            "use --shard off"
        )
    return layers


def sizes(model: Any) -> Sizes:
    """Return the bytes of the weights that would be sharded; tied weights count once."""
    whole = {id(p) for p in _adapter(model)}

    def size(module: nn.Module) -> int:
        parameters = (p for p in module.parameters() if id(p) not in whole)
        return sum(p.nbytes for p in parameters)

    by_layer = [size(layer) for layer in layers(model)]
    total = size(model)
    return Sizes(total, total - sum(by_layer), max(by_layer))


def _adapter(model: nn.Module) -> list[nn.Parameter]:
    """Return the trainable parameters beside frozen ones; none if all parameters train."""
    parameters = list(model.parameters())
    if all(p.requires_grad for p in parameters):
        return []
    return [p for p in parameters if p.requires_grad]


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds only a part of a tensor."""
    loaded = sys.modules.get("torch.distributed.tensor")  # not every torch has it
    return loaded is not None and isinstance(tensor, loaded.DTensor)


def has_shards(model: nn.Module) -> bool:
    """Whether any weights of a model are sharded."""
    return any(is_sharded(parameter) for parameter in model.parameters())


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor gathered from all processes, which call this together."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def part(tensor: Tensor, like: Tensor) -> Tensor:
    """Return the part of a whole tensor that this process holds of `like`, on the same device."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    tensor = tensor.to(like.device)
    if not isinstance(like, DTensor):
        return tensor
    # Every process has the whole one, so nothing is sent; a copy, so that the whole one is freed.
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None).clone()


def gathered(tensors: Mapping[str, Tensor], group: ProcessGroup) -> Iterator[tuple[str, Tensor]]:
    """Yield whole tensors, one at a time, in the first process's memory.

    All processes iterate together; the others get empty tensors.
    """
    for name, tensor in tensors.items():
        full = whole(tensor.detach())
        yield name, full.cpu() if group.is_first else full.new_empty(0, device="cpu")


def weights(model: nn.Module, group: ProcessGroup) -> dict[str, Tensor] | None:
    """Return all weights by their names, whole in the first process; None if none is sharded.

    Tied weights stay one tensor.
    """
    if not has_shards(model):
        return None
    state = model.state_dict(keep_vars=True)
    once = {id(tensor): tensor for tensor in state.values()}
    full = dict(gathered({str(key): tensor for key, tensor in once.items()}, group))
    return {name: full[str(id(tensor))] for name, tensor in state.items()}


@contextlib.contextmanager
def in_step(model: Any, group: ProcessGroup) -> Iterator[None]:
    """Let each process compute a sharded model as often as it needs to, without gradients.

    Before each forward pass the processes agree whether any computes. One that is done computes
    single tokens until all are done.
    """
    parameter = next(model.parameters())
    if not has_shards(model):
        yield
        return

    def announce(*_: Any) -> None:
        group.any(True)

    hook = model.register_forward_pre_hook(announce, prepend=True)
    try:
        yield
    finally:
        hook.remove()
    was_training = model.training
    model.eval()
    one = torch.zeros(1, 1, dtype=torch.int64, device=parameter.device)
    while group.any(False):
        with torch.inference_mode():
            model(input_ids=one, use_cache=False)
    model.train(was_training)

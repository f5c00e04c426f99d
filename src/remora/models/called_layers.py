"""Which linear layers a model calls: an adapter on one that it never calls would do nothing.

Fused kernels, those of state-space layers above all, read a layer's weight and leave out the layer
with whatever has been put around it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from remora.errors import ConfigError
from remora.runtime import memory
from remora.tree import layouts


def only_called(model: Any, names: Sequence[str], requested: Sequence[str]) -> list[str]:
    """Return those names of linear layers that an adapter has an effect on.

    Only layers of models that cannot follow a token tree are tried, in a forward pass over a few
    tokens as in training; the others' layers are all called.

    Args:
        model: The base model; it may be without weights, on the device `meta`.
        names: Names of linear layers, or their paths.
        requested: Names from the user, which are not left out but refused.

    Raises:
        ConfigError: If the model never calls a layer that the user has named.
    """
    if layouts.why_rows(type(model), model.config) is None:
        return list(names)
    called = _called(model)
    kept = []
    for name in names:
        paths = [p for p, _ in model.named_modules() if p == name or p.endswith(f".{name}")]
        refusal = _refusal(model, name)
        if called is not None and not called.intersection(paths):
            refusal = "the model reads its weight and never calls it"
        if refusal is None:
            kept.append(name)
        elif name in requested:
            raise ConfigError(
                f"an adapter on {name} would have no effect, {refusal}; leave it out of "
                "--target-modules"
            )
    return kept


def _called(model: Any) -> set[str] | None:
    """Return the paths of the modules that a forward pass calls; None if it cannot be run here."""
    seen: set[str] = set()
    handles = [
        module.register_forward_pre_hook(lambda _, __, path=path: seen.add(path))
        for path, module in model.named_modules()
    ]
    device = next(model.parameters()).device
    was_training = model.training
    model.train()  # some kernels are for training only
    try:
        with torch.random.fork_rng(), torch.no_grad():
            model(input_ids=torch.zeros(1, 4, dtype=torch.int64, device=device), use_cache=False)
    except (RuntimeError, TypeError, ValueError, ImportError) as error:
        if memory.is_exhausted(error):
            raise
        return None
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    return seen


def _refusal(model: Any, name: str) -> str | None:
    """Return why PEFT refuses to adapt a layer of this architecture; None if it does not."""
    import peft
    from peft.tuners import tuners_utils

    check: Any = getattr(tuners_utils, "_check_lora_target_modules_mamba", None)
    try:
        if check is not None:
            check(peft.LoraConfig(), model, name.rsplit(".", 1)[-1])
    except ValueError:
        return "as kernels for this architecture read its weight, which PEFT refuses"
    return None

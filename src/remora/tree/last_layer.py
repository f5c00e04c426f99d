"""The last decoder layer where an answer is predicted, and nowhere else.

Behind the attention of the last decoder layer no token looks at another one, and the head is
computed at the predictors alone. So queries, the attention's output projection and the MLP of that
layer are needed at the predictors only; keys and values at all tokens. Each of those parts gets the
rows of the predictors, and its output is zero elsewhere, which nothing reads: results and gradients
are the same. In a token tree most tokens predict nothing.

A layer has these parts by their names. That it is the last one, and called once, is seen in a
forward pass over a few tokens: some models call their layers in turns, or in several stacks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from remora.runtime import memory

ARGUMENT = "tree_kept"
"""The predictors [P], an argument of the model's forward that it hands to its attention."""

_INSTALLED = "remora_last_layer"


def install(model: nn.Module) -> None:
    """Let a model compute its last decoder layer at the predictors, if it is given them."""
    if not any(_INSTALLED in module.__dict__ for module in model.modules()):
        layer = _last_called(model)
        if layer is not None:
            layer.__dict__[_INSTALLED] = _LastLayer(layer).hook()


def uninstall(model: nn.Module) -> bool:
    """Have the whole layer computed from now on; return whether it was not."""
    handles = [h for module in model.modules() for h in module.__dict__.pop(_INSTALLED, [])]
    for handle in handles:
        handle.remove()
    return bool(handles)


@torch.no_grad()
def _last_called(model: nn.Module) -> Any:
    """Return the layer that a forward pass calls last, and once; None if there is no such layer."""
    order: list[nn.Module] = []
    layers = [module for module in model.modules() if _has_parts(module)]
    handles = [
        layer.register_forward_pre_hook(lambda called, _: order.append(called)) for layer in layers
    ]
    was_training, device = model.training, next(model.parameters()).device
    model.train()  # in the other mode bitsandbytes packs weights for a CPU
    try:
        ids = torch.zeros(1, 2, dtype=torch.int64, device=device)
        causal = torch.ones(1, 1, 2, 2, dtype=torch.bool, device=device).tril()
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            model(input_ids=ids, attention_mask=causal, use_cache=False)
    except (RuntimeError, TypeError, ValueError, ImportError) as error:
        if memory.is_exhausted(error):
            raise
        order = layers[-1:] if device.type == "meta" else []  # for a plan, which counts
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    return order[-1] if order and order.count(order[-1]) == 1 else None


def _has_parts(module: nn.Module) -> bool:
    attention, mlp = (getattr(module, name, None) for name in ("self_attn", "mlp"))
    parts = ("q_proj", "o_proj")
    return isinstance(mlp, nn.Module) and all(hasattr(attention, name) for name in parts)


class _LastLayer:
    """The hooks of a layer. Those that act are within its forward: checkpointing repeats them."""

    def __init__(self, layer: Any) -> None:
        self._attention, self._mlp, self._layer = layer.self_attn, layer.mlp, layer
        self._kept: Tensor | None = None
        self._num_tokens = 0
        self._handles: list[RemovableHandle] = []

    def hook(self) -> list[RemovableHandle]:
        """Add the hooks that stay."""
        return [
            self._layer.register_forward_pre_hook(self._begin),
            self._attention.register_forward_pre_hook(self._attend, with_kwargs=True),
            self._attention.register_forward_hook(self._attended, always_call=True),
            *self._restrict(self._mlp),
        ]

    def _restrict(self, part: nn.Module) -> list[RemovableHandle]:
        """Let a part compute the rows of the predictors only."""
        return [
            part.register_forward_pre_hook(self._select),
            part.register_forward_hook(self._spread),
        ]

    def _begin(self, *_: Any) -> None:
        self._kept = None

    def _attend(self, attention: Any, _: tuple[Any, ...], arguments: dict[str, Any]) -> None:
        self._kept = arguments.get(ARGUMENT)
        if self._kept is not None:  # an adapter replaces these two, so they are looked up
            for part in (attention.q_proj, attention.o_proj):
                self._handles += self._restrict(part)

    def _attended(self, *_: Any) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _select(self, _: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        if self._kept is None:
            return inputs
        hidden, *others = inputs  # [1, N, H]
        self._num_tokens = hidden.shape[1]
        return (hidden.index_select(1, self._kept), *others)

    def _spread(self, _: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        if self._kept is None:
            return output
        hidden, *others = output if isinstance(output, tuple) else (output,)
        zeros = hidden.new_zeros(1, self._num_tokens, hidden.shape[-1])
        whole = zeros.index_copy(1, self._kept, hidden)
        return (whole, *others) if isinstance(output, tuple) else whole

"""The last decoder layer where an answer is predicted, and nowhere else.

Behind the attention of the last decoder layer no token looks at another one, and the head is
computed at the predictors alone. So queries, the attention's output projection and the MLP of that
layer are needed at the predictors only; keys and values at all tokens. Each of those parts gets the
rows of the predictors, and its output is zero elsewhere, which nothing reads: results and gradients
are the same. In a token tree most tokens predict nothing.

Which layers have these parts is known by the parts' names; what they compute is for the start-up
check to judge, which has the whole layer computed if results differ.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

ARGUMENT = "tree_kept"
"""The predictors [P], an argument of the model's forward that it hands to its attention."""

_INSTALLED = "remora_last_layer"


def install(model: nn.Module) -> None:
    """Let a model compute its last decoder layer at the predictors, if it is given them."""
    layer = _last(model)
    if layer is not None and _INSTALLED not in layer.__dict__:
        layer.__dict__[_INSTALLED] = _LastLayer(layer).hook()


def uninstall(model: nn.Module) -> bool:
    """Have the whole layer computed from now on; return whether it was not."""
    layer = _last(model)
    handles = [] if layer is None else layer.__dict__.pop(_INSTALLED, [])
    for handle in handles:
        handle.remove()
    return bool(handles)


def _last(model: nn.Module) -> Any:
    """Return the last layer that has all parts; None if no layer has."""
    found = None
    for module in model.modules():
        attention, mlp = (getattr(module, name, None) for name in ("self_attn", "mlp"))
        if isinstance(mlp, nn.Module) and hasattr(attention, "q_proj"):
            found = module if hasattr(attention, "o_proj") else found
    return found


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

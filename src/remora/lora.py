"""LoRA adapters: PEFT injects and stores them; here is what makes them fast.

`output = W x + scaling * B (A x)`, with W frozen, B zero at the start, scaling alpha / r
(Hu et al. 2021, https://arxiv.org/abs/2106.09685).
"""

from __future__ import annotations

import types
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from remora.errors import ModelError

SEED_RECIPE_MODULES = (
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
)


@dataclass(frozen=True, kw_only=True)
class ParameterCount:
    """How many parameters there are, and how many of them train."""

    trainable: int
    total: int
    modules: dict[str, int]  # trainable parameters by the last part of the module's name

    @property
    def share(self) -> float:
        """Trainable parameters as a fraction of all."""
        return self.trainable / self.total


def target_modules(model: Any, requested: Sequence[str] = ()) -> list[str]:
    """Return the names of the linear layers that get an adapter, without their paths.

    Args:
        model: The base model.
        requested: Names that the user wants; empty for the default: q, k, v, o, gate, up, down
            where the model has them all, otherwise every linear layer but the head.

    Raises:
        ModelError: If the model has no linear layer of a requested name.
    """
    head = model.get_output_embeddings()
    present = {
        path.rsplit(".", 1)[-1]
        for path, module in model.named_modules()
        if _is_linear(module) and module is not head
    }
    if missing := [name for name in requested if name not in present]:
        raise ModelError(
            f"the model has no linear layer named {missing[0]!r}; "
            f"choose from {', '.join(sorted(present))}"
        )
    if requested:
        return list(requested)
    if present.issuperset(SEED_RECIPE_MODULES):
        return list(SEED_RECIPE_MODULES)
    return sorted(present)


def add_adapter(
    model: Any,
    *,
    rank: int,
    alpha: float,
    dropout: float,
    modules: Sequence[str] = (),
) -> Any:
    """Freeze `model` and add a new LoRA adapter; return PEFT's model around it.

    The adapter's weights are float32 whatever the base is stored in. Until the first optimizer step
    the outputs are the base model's, bit for bit.

    Raises:
        ModelError: If the model has no linear layer of a requested name.
    """
    import peft

    names = target_modules(model, modules)
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # PEFT divides it, and takes fractions
        lora_dropout=dropout,
        target_modules=names,
        fan_in_fan_out=any(_is_conv1d(module) for module in model.modules()),
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        # PEFT still reads an attribute that transformers has renamed; nothing a user could act on.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        adapted = peft.get_peft_model(model, config)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    make_fast(adapted)
    return adapted


def count_parameters(model: Any) -> ParameterCount:
    """Count the parameters of an adapted model, and check the count against r * (in + out).

    Returns:
        The counts; tied weights count once.
    """
    modules: dict[str, int] = {}
    for path, layer in _lora_layers(model):
        name = path.rsplit(".", 1)[-1]
        for adapter, rank in layer.r.items():
            expected = rank * (layer.in_features + layer.out_features)
            found = layer.lora_A[adapter].weight.numel() + layer.lora_B[adapter].weight.numel()
            assert found == expected, f"{path}: {found} parameters, r * (in + out) is {expected}"
            modules[name] = modules.get(name, 0) + found
    parameters = list(model.parameters())
    return ParameterCount(
        trainable=sum(p.numel() for p in parameters if p.requires_grad),
        total=sum(p.numel() for p in parameters),
        modules=modules,
    )


def make_fast(model: Any) -> None:
    """Let every plain LoRA layer of a PEFT model compute as one fused operation.

    PEFT's own forward copies each layer's input to float32, and autocast copies it back; the copies
    stay alive until the backward pass. The fused operation keeps the input once, in the precision
    that it arrives in. Layers that are not plain LoRA on a plain linear layer keep PEFT's forward.
    """
    for _, layer in _lora_layers(model):
        layer.forward = types.MethodType(_forward, layer)


class _LoraLinear(torch.autograd.Function):
    """`x W' + bias + scaling * (dropout(x) A') B'`, saving the input once.

    Shapes: x [..., in], weight [out, in], a [r, in], b [out, r], mask as x or None.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scaling: float,
        mask: Tensor | None,
    ) -> Tensor:
        dropped = x if mask is None else x * mask
        a_narrow, b_narrow = a.to(x.dtype), b.to(x.dtype)
        hidden = functional.linear(dropped, a_narrow)  # [..., r]
        output = functional.linear(x, weight, bias)  # [..., out]
        flat = output.view(-1, output.shape[-1])
        flat.addmm_(hidden.view(-1, hidden.shape[-1]), b_narrow.t(), alpha=scaling)
        ctx.save_for_backward(x, weight, a, b, hidden, mask)
        ctx.scaling = scaling
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, hidden, mask = ctx.saved_tensors
        gradient = grad_outputs[0].flatten(0, -2)  # [n, out]
        flat_x, flat_hidden = x.flatten(0, -2), hidden.flatten(0, -2)
        flat_mask = None if mask is None else mask.flatten(0, -2)
        grad_hidden = (gradient @ b.to(gradient.dtype)).mul_(ctx.scaling)  # [n, r]
        dropped = flat_x if flat_mask is None else flat_x * flat_mask
        grad_a = grad_hidden.t() @ dropped  # [r, in]
        grad_b = (gradient.t() @ flat_hidden).mul_(ctx.scaling)  # [out, r]
        grad_x = None
        if ctx.needs_input_grad[0]:
            through_adapter = grad_hidden @ a.to(gradient.dtype)  # [n, in]
            if flat_mask is not None:
                through_adapter.mul_(flat_mask)
            grad_x = through_adapter.addmm_(gradient, weight).view_as(x)
        return grad_x, None, None, grad_a.to(a.dtype), grad_b.to(b.dtype), None, None


def _forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Compute a PEFT LoRA layer in one fused operation, or leave it to PEFT."""
    adapter = _fusable_adapter(layer, args, kwargs)
    if adapter is None:
        result: Tensor = type(layer).forward(layer, x, *args, **kwargs)
        return result
    base = layer.get_base_layer()
    dtype = x.dtype
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
    weight = base.weight.to(dtype)
    if _is_conv1d(base):
        weight = weight.t()
    bias = None if base.bias is None else base.bias.to(dtype)
    x = x.to(dtype)
    rate = getattr(layer.lora_dropout[adapter], "p", 0.0)
    mask = None
    if rate > 0 and layer.training:
        mask = functional.dropout(torch.ones_like(x), rate)
    output: Tensor = _LoraLinear.apply(  # type: ignore[no-untyped-call]
        x,
        weight,
        bias,
        layer.lora_A[adapter].weight,
        layer.lora_B[adapter].weight,
        layer.scaling[adapter],
        mask,
    )
    return output


def _fusable_adapter(layer: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> str | None:
    """Return the one plain adapter that is active on a layer, if that is all there is."""
    if args or kwargs or layer.disable_adapters or layer.merged:
        return None
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    base = layer.get_base_layer()
    plain = (
        len(active) == 1
        and (type(base) is nn.Linear or _is_conv1d(base))
        and base.weight.is_floating_point()
        and not base.weight.requires_grad
        and not layer.lora_variant
        and not layer.lora_bias[active[0]]
        and isinstance(layer.lora_dropout[active[0]], nn.Dropout | nn.Identity)
    )
    return active[0] if plain else None


def _lora_layers(model: Any) -> list[tuple[str, Any]]:
    from peft.tuners.lora import LoraLayer

    return [(path, m) for path, m in model.named_modules() if isinstance(m, LoraLayer)]


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or _is_conv1d(module)


def _is_conv1d(module: nn.Module) -> bool:
    """Whether this is GPT-2's linear layer, whose weight is stored as [in, out]."""
    return type(module).__name__ == "Conv1D"

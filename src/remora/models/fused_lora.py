"""LoRA layers computed in one fused operation that saves less for the backward pass."""

from __future__ import annotations

import copy
import functools
import math
import types
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from remora.models import quantize


def make_fast(model: Any) -> None:
    """Let a PEFT model compute its plain LoRA layers fused, and save less for the backward pass.

    PEFT's own forward copies each layer's input to float32, and autocast copies it back; the copies
    stay alive until the backward pass. The fused operation saves the input once, in the precision
    that it arrives in. Cheap intermediates are recomputed instead of saved: those inside a
    normalization, and the product of the two halves of a gated MLP. Layers that are not plain LoRA
    on a plain linear layer keep PEFT's forward.
    """
    for _, layer in lora_layers(model):
        if hasattr(layer, "parameter_name"):  # of experts, which PEFT adapts in a way of its own
            continue
        layer.forward = types.MethodType(_forward, layer)
    is_gated: dict[type, bool] = {}
    for module in model.modules():
        kind = type(module)
        if kind.__name__.endswith("RMSNorm") and "forward" not in vars(module):
            module.forward = types.MethodType(_recomputed, module)
        elif hasattr(module, "down_proj") and is_gated.setdefault(kind, _is_gated_mlp(module)):
            module.forward = types.MethodType(_gated_mlp, module)


def _recomputed(module: Any, x: Tensor) -> Tensor:
    """Compute a cheap module, saving only its input for the backward pass."""
    from torch.utils.checkpoint import checkpoint

    stock = functools.partial(type(module).forward, module)
    if not (torch.is_grad_enabled() and x.requires_grad):
        return cast(Tensor, stock(x))
    return cast(Tensor, checkpoint(stock, x, use_reentrant=False, preserve_rng_state=False))


def _is_gated_mlp(module: Any) -> bool:
    """Whether a module computes down(act(gate(x)) * up(x)) to the bit, by a small trial."""
    small = copy.copy(module)
    small._modules = dict(module._modules)
    generator = torch.Generator().manual_seed(0)
    for name in ("gate_proj", "up_proj", "down_proj"):
        if small._modules.get(name) is None:
            return False
        linear = nn.Linear(8, 8, bias=False, device="meta").to_empty(device="cpu")
        with torch.no_grad():
            linear.weight.normal_(generator=generator)
        small._modules[name] = linear
    x = torch.randn(3, 8, generator=generator, device="cpu")
    try:
        with torch.no_grad():
            stock = type(module).forward(small, x)
            ours = small.down_proj(small.act_fn(small.gate_proj(x)) * small.up_proj(x))
    except (AttributeError, RuntimeError, TypeError):
        return False
    return torch.equal(stock, ours)


def _gated_mlp(module: Any, x: Tensor) -> Tensor:
    """Compute a gated MLP without saving the product that goes into its last layer."""
    gate, up = module.gate_proj(x), module.up_proj(x)
    down = module.down_proj
    adapter = _fusable_adapter(down, (), {}) if hasattr(down, "get_base_layer") else None
    if adapter is None:
        return cast(Tensor, down(module.act_fn(gate) * up))
    return _fused(down, adapter, gate, up, activation=module.act_fn)


aten: Any = torch.ops.aten


class LoraLinear(torch.autograd.Function):
    """`x W' + bias + scaling * (mask * x A') B'`, saving the input once.

    The input is x [..., in], or activation(gate) * up of two inputs. Shapes: weight() [out, in], a
    [r, in], b [out, r]. Dropout is a boolean mask of the shape of x, True where kept, or a
    probability: then torch's kernel makes the mask and scales the kept values. weight() is called
    again in the backward pass, so that dequantized weights need not be saved.
    """

    @staticmethod
    def forward(
        ctx: Any,
        activation: Callable[[Tensor], Tensor] | None,
        scaling: float,
        dropout: Tensor | float | None,
        weight: Callable[[], Tensor],
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        *inputs: Tensor,
    ) -> Tensor:
        """Compute it; see the class."""
        x = inputs[0] if activation is None else activation(inputs[0]) * inputs[1]
        mask = dropout if isinstance(dropout, Tensor) else None
        if isinstance(dropout, float):
            dropped, mask = torch.native_dropout(x, dropout, True)
        else:
            dropped = x if mask is None else x * mask.to(x.dtype)
        hidden = functional.linear(dropped, a.to(x.dtype))  # [..., r]
        output = functional.linear(x, weight(), bias)  # [..., out]
        flat = output.view(-1, output.shape[-1])
        flat.addmm_(hidden.view(-1, hidden.shape[-1]), b.to(x.dtype).t(), alpha=scaling)
        ctx.save_for_backward(mask, a, b, hidden, *inputs)
        ctx.activation, ctx.scaling, ctx.weight = activation, scaling, weight
        ctx.kept = 1 - dropout if isinstance(dropout, float) else None
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the gradients; see the class."""
        mask, a, b, hidden, *inputs = ctx.saved_tensors
        leaves = [leaf.detach().requires_grad_() for leaf in inputs]
        x = leaves[0]
        if ctx.activation is not None:
            with torch.enable_grad():
                x = ctx.activation(leaves[0]) * leaves[1]
        gradient = grad_outputs[0].flatten(0, -2)  # [n, out]
        flat_x, flat_hidden = x.detach().flatten(0, -2), hidden.flatten(0, -2)
        flat_mask = None if mask is None else mask.flatten(0, -2)
        if flat_mask is not None and ctx.kept is None:
            flat_mask = flat_mask.to(x.dtype)

        def drop(flat: Tensor) -> Tensor:
            if flat_mask is None:
                return flat
            if ctx.kept is None:
                dropped: Tensor = flat * flat_mask
            else:
                dropped = aten.native_dropout_backward(flat, flat_mask, 1 / ctx.kept)
            return dropped

        grad_hidden = (gradient @ b.to(gradient.dtype)).mul_(ctx.scaling)  # [n, r]
        grad_a = grad_hidden.t() @ drop(flat_x)  # [r, in]
        grad_b = (gradient.t() @ flat_hidden).mul_(ctx.scaling)  # [out, r]
        grad_inputs: Sequence[Tensor | None] = [None] * len(inputs)
        if any(ctx.needs_input_grad[-len(inputs) :]):
            grad_x = grad_hidden @ a.to(gradient.dtype)  # [n, in], through the adapter
            grad_x = drop(grad_x).addmm_(gradient, ctx.weight()).view_as(x)
            grad_inputs = [grad_x]
            if ctx.activation is not None:
                grad_inputs = torch.autograd.grad(x, leaves, grad_x)
        return None, None, None, None, None, grad_a.to(a.dtype), grad_b.to(b.dtype), *grad_inputs


def _forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Compute a PEFT LoRA layer in one fused operation, or leave it to PEFT."""
    adapter = _fusable_adapter(layer, args, kwargs)
    if adapter is None:
        result: Tensor = type(layer).forward(layer, x, *args, **kwargs)
        return result
    return _fused(layer, adapter, x)


def _fused(
    layer: Any,
    adapter: str,
    *inputs: Tensor,
    activation: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    base = layer.get_base_layer()
    dtype, device = inputs[0].dtype, inputs[0].device
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    scaling = layer.scaling[adapter]
    dropout: Tensor | float | None = None
    rate = getattr(layer.lora_dropout[adapter], "p", 0.0)
    if rate > 0 and layer.training:
        if device.type == "cpu":
            dropout, kept = _keep_mask((*inputs[0].shape[:-1], layer.in_features), rate)
            scaling /= kept
        else:
            dropout = rate
    output: Tensor = LoraLinear.apply(  # type: ignore[no-untyped-call]
        activation,
        scaling,
        dropout,
        functools.partial(_base_weight, base, dtype),
        None if base.bias is None else base.bias.to(dtype),
        layer.lora_A[adapter].weight,
        layer.lora_B[adapter].weight,
        *(x.to(dtype) for x in inputs),
    )
    return output


def _base_weight(base: Any, dtype: torch.dtype) -> Tensor:
    """Return the weight that a layer computes with, [out, in]."""
    if quantize.is_quantized(base):
        return quantize.weight(base, dtype)
    weight: Tensor = base.weight.to(dtype)
    return weight.t() if is_conv1d(base) else weight


def _keep_mask(shape: Sequence[int], rate: float) -> tuple[Tensor, float]:
    """Return a dropout mask, True where kept, and the probability of that.

    torch's CPU generator draws one number at a time, which takes longer than the matrix product
    that the mask is for. Here each draw of 64 bits decides four elements.
    """
    size = math.prod(shape)
    bits = torch.empty(-(-size // 4), dtype=torch.int64).random_(-(1 << 63), None)
    dropped = round(rate * (1 << 16))
    mask = bits.view(torch.int16)[:size] >= dropped - (1 << 15)
    return mask.view(shape), 1 - dropped / (1 << 16)


def _fusable_adapter(layer: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> str | None:
    """Return the active adapter of a layer, None unless it is one plain LoRA on a frozen layer."""
    if args or kwargs or layer.disable_adapters or layer.merged:
        return None
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    base = layer.get_base_layer()
    plain = (
        len(active) == 1
        and (
            quantize.is_quantized(base)
            or ((type(base) is nn.Linear or is_conv1d(base)) and base.weight.is_floating_point())
        )
        and not base.weight.requires_grad
        and not layer.lora_variant
        and not layer.lora_bias[active[0]]
        and isinstance(layer.lora_dropout[active[0]], nn.Dropout | nn.Identity)
    )
    return active[0] if plain else None


def lora_layers(model: Any) -> list[tuple[str, Any]]:
    """Return the LoRA layers of a PEFT model with their paths."""
    from peft.tuners.lora import LoraLayer

    return [(path, m) for path, m in model.named_modules() if isinstance(m, LoraLayer)]


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is GPT-2's linear layer, whose weight is stored as [in, out]."""
    return type(module).__name__ == "Conv1D"

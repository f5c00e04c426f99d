"""Base weights in 4 bits, by bitsandbytes: NF4 with double quantization.

Each weight is one of 16 values times the scale of its block, and the scales are kept in 8 bits
(Dettmers et al. 2023, QLoRA, https://arxiv.org/abs/2305.14314). Layers compute with the dequantized
weights; nothing is multiplied in 4 bits.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import logging
import sys
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from remora.errors import ConfigError

BLOCK, SCALE_BLOCK = 64, 256
"""Weights that share a scale, and scales that share a scale of their own."""

DEVICES = ("cuda", "cpu")
"""Supported types of devices. bitsandbytes downloads its kernels for Apple GPUs from the hub at run
time, which nobody asked for."""


def require(device: torch.device) -> None:
    """Make sure that 4-bit weights are supported on a device.

    Raises:
        ConfigError: If bitsandbytes is not installed, or does not support the device.
    """
    if not is_installed():
        raise ConfigError(
            "qlora needs bitsandbytes, which is not installed; run pip install 'remora[qlora]'"
        )
    if device.type not in DEVICES:
        raise ConfigError(
            f"qlora does not support {device.type}; use --device cpu, or --method lora"
        )


def is_installed() -> bool:
    """Whether bitsandbytes is installed."""
    return importlib.util.find_spec("bitsandbytes") is not None


def import_peft() -> None:
    """Import PEFT without bitsandbytes, which takes seconds and only 4-bit weights need.

    PEFT imports it wherever it is installed. Afterwards PEFT finds it as soon as something else
    has imported it, as loading 4-bit weights does.
    """
    is_new = "peft" not in sys.modules and "bitsandbytes" not in sys.modules
    if is_new:
        sys.modules["bitsandbytes"] = None  # type: ignore[assignment]  # its import fails
    try:
        from peft.tuners.lora import model
    finally:
        if is_new:
            del sys.modules["bitsandbytes"]
    for name in ("is_bnb_available", "is_bnb_4bit_available"):
        if hasattr(model, name):
            setattr(model, name, _is_imported)


def _is_imported() -> bool:
    return "bitsandbytes" in sys.modules


def import_quietly() -> None:
    """Import bitsandbytes, if it is installed, without a download; otherwise PEFT imports it.

    On CPUs with bfloat16 instructions its import downloads code from the hub by the package
    `kernels`, and warns if that package is missing.
    """
    if "bitsandbytes" in sys.modules or not is_installed():
        return
    logger = logging.getLogger("bitsandbytes")
    level, kernels = logger.level, sys.modules.get("kernels")
    logger.setLevel(logging.ERROR)
    sys.modules["kernels"] = None  # type: ignore[assignment]  # its import fails, and bitsandbytes catches that
    try:
        with contextlib.suppress(ImportError):  # broken, or for another torch: as if not installed
            importlib.import_module("bitsandbytes")
    finally:
        logger.setLevel(level)
        del sys.modules["kernels"]
        if kernels is not None:
            sys.modules["kernels"] = kernels


def settings(dtype: torch.dtype) -> Any:
    """Return the quantization settings for transformers; it quantizes all but the head."""
    from transformers import BitsAndBytesConfig

    make: Any = BitsAndBytesConfig
    return make(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def is_quantized(module: nn.Module) -> bool:
    """Whether a module is a linear layer with 4-bit weights, or its stand-in for planning."""
    return isinstance(module, nn.Linear) and type(module).__name__ in {"Linear4bit", "Planned"}


def weight(linear: Any, dtype: torch.dtype) -> Tensor:
    """Return the dequantized weights of a layer, [out, in].

    bitsandbytes' CPU kernel assumes that each row begins a block, which is wrong if the row length
    is not a multiple of the block size. So it gets the weights as one row.
    """
    if isinstance(linear, Planned):
        return linear.unpacked(dtype)
    from bitsandbytes.functional import dequantize_4bit

    state = copy.copy(linear.weight.quant_state)
    shape, state.shape, state.dtype = state.shape, torch.Size((1, state.shape.numel())), dtype
    unpacked: Tensor = dequantize_4bit(linear.weight.data.view(-1, 1), state)
    return unpacked.view(shape)


def num_weights(linear: Any) -> int:
    """Return the number of weights of a quantized layer, before packing."""
    return int(linear.in_features * linear.out_features)


class _Linear(torch.autograd.Function):
    """`x W' + bias` with frozen 4-bit weights, dequantized again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, linear: Any, x: Tensor) -> Tensor:
        ctx.linear = linear
        bias = None if linear.bias is None else linear.bias.to(x.dtype)
        return functional.linear(x, weight(linear, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        gradient = grad_outputs[0]
        return None, gradient @ weight(ctx.linear, gradient.dtype)


def _forward(linear: Any, x: Tensor) -> Tensor:
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    result: Tensor = _Linear.apply(linear, x)  # type: ignore[no-untyped-call]
    return result


def install(model: nn.Module) -> None:
    """Let all quantized layers of a model compute with the weights that `weight` returns.

    bitsandbytes itself has several ways: in evaluation, on CPUs with bfloat16 instructions, it
    would repack the weights and round the factors of its products.
    """
    for _, linear in layers(model):
        linear.forward = types.MethodType(_forward, linear)


def leave_files(model: nn.Module) -> None:
    """Copy what is not quantized, so that the files of the weights are mapped no longer.

    On CPU it is views of them, and one view keeps a whole file in memory, with all the weights that
    have 4 bits now.
    """
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.device.type == "cpu" and tensor.is_floating_point():
            tensor.data = tensor.data.clone()


def layers(model: nn.Module) -> list[tuple[str, Any]]:
    """Return the quantized layers of a model with their names."""
    return [(path, module) for path, module in model.named_modules() if is_quantized(module)]


def dequantize(model: Any) -> None:
    """Replace all quantized layers by plain float32 ones that compute the same."""
    for path, linear in layers(model):
        unpacked = weight(linear, torch.float32)
        if was_conv1d(linear):
            plain = linear.source_cls(1, 1)
            plain.nf, plain.nx = unpacked.shape
            unpacked = unpacked.t().contiguous()
        else:
            plain = nn.Linear(1, 1, bias=linear.bias is not None)
            plain.out_features, plain.in_features = unpacked.shape
        plain.weight = nn.Parameter(unpacked, requires_grad=False)
        if linear.bias is not None:
            plain.bias = nn.Parameter(linear.bias.float(), requires_grad=False)
        model.set_submodule(path, plain)
    model.is_loaded_in_4bit = False
    model.hf_quantizer.remove_quantization_config(model)


def was_conv1d(module: nn.Module) -> bool:
    """Whether a quantized layer replaces GPT-2's Conv1D, whose weight is [in, out]."""
    return getattr(getattr(module, "source_cls", None), "__name__", "") == "Conv1D"


def quantize(model: Any) -> None:
    """Quantize the linear layers of a model in memory, all but its head."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    for path, linear, (out, into) in _unquantized(model):
        packed = Linear4bit(
            into, out, linear.bias is not None, compress_statistics=True, quant_type="nf4",
            device="meta",
        )  # fmt: skip
        data = linear.weight.data if isinstance(linear, nn.Linear) else linear.weight.data.t()
        packed.weight = Params4bit(
            data.contiguous(), compress_statistics=True, quant_type="nf4", module=packed
        ).to(data.device)
        packed.bias, packed.source_cls = linear.bias, type(linear)
        model.set_submodule(path, packed)
    model.is_loaded_in_4bit = True
    install(model)


def plan(model: Any) -> None:
    """Replace the linear layers of a model without weights by stand-ins of the quantized size."""
    for path, linear, (out, into) in _unquantized(model):
        model.set_submodule(path, Planned(into, out, linear.bias))
    install(model)


def _unquantized(model: Any) -> Iterator[tuple[str, Any, tuple[int, int]]]:
    """Yield the linear layers of a model but its head, each with its name and [out, in]."""
    head = model.get_output_embeddings()
    for path, module in list(model.named_modules()):
        if type(module) is nn.Linear and module is not head:
            yield path, module, (module.out_features, module.in_features)
        elif type(module).__name__ == "Conv1D":  # GPT-2's, whose weight is stored as [in, out]
            into, out = module.weight.shape
            yield path, module, (out, into)


class Planned(nn.Linear):
    """A linear layer without weights, with the memory of one quantized by bitsandbytes."""

    def __init__(self, in_features: int, out_features: int, bias: nn.Parameter | None) -> None:
        super().__init__(1, 1, bias=False, device="meta")
        self.in_features, self.out_features = in_features, out_features
        num_blocks = -(-num_weights(self) // BLOCK)

        def empty(size: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(size, dtype=dtype, device="meta")

        packed = empty(-(-num_weights(self) // 2), torch.uint8)
        self.weight = nn.Parameter(packed.view(-1, 1), requires_grad=False)
        self.bias = bias  # type: ignore[assignment]  # as in nn.Linear
        self.register_buffer("scales", empty(num_blocks, torch.uint8))
        self.register_buffer(
            "scales_of_scales", empty(-(-num_blocks // SCALE_BLOCK), torch.float32)
        )
        self.register_buffer("offset", empty(1, torch.float32))
        self.register_buffer("codes", empty(16 + 256, torch.float32))

    def unpacked(self, dtype: torch.dtype) -> Tensor:
        """Return arbitrary weights, [out, in], allocating what real dequantization would."""
        scales: Tensor = self.scales.float()  # type: ignore[assignment]
        shape = (self.out_features, self.in_features)
        return torch.empty(shape, dtype=dtype, device=scales.device)

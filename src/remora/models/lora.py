"""LoRA adapters: which layers get one, and how a base model is made trainable.

`output = W x + scaling * B (A x)`, with W frozen, B zero at the start, scaling alpha / r
(Hu et al. 2021, https://arxiv.org/abs/2106.09685).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from remora.config import TrainConfig
from remora.errors import ConfigError
from remora.models import called, quantize
from remora.models.fused_lora import is_conv1d, lora_layers, make_fast

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
    """The number of parameters, and of those that train."""

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
        requested: Names from the user; empty for the default: q, k, v, o, gate, up, down if the
            model has them all, otherwise every linear layer but the head.

    Raises:
        ConfigError: If the model has no linear layer of a requested name.
    """
    head = model.get_output_embeddings()
    present = {
        path.rsplit(".", 1)[-1]
        for path, module in model.named_modules()
        if _is_linear(module) and module is not head
    }
    if missing := [name for name in requested if name not in present]:
        raise ConfigError(
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
    use_rslora: bool = False,
    use_dora: bool = False,
    init_lora_weights: str = "default",
) -> Any:
    """Freeze `model` and add a new LoRA adapter; return PEFT's model around it.

    The adapter's weights are float32 whatever the base is stored in. Until the first optimizer step
    the outputs are the base model's, bit for bit; with DoRA up to rounding.

    PEFT implements the variants: rsLoRA (https://arxiv.org/abs/2312.03732) and DoRA
    (https://arxiv.org/abs/2402.09353).

    Raises:
        ConfigError: If the model has no linear layer of a requested name.
    """
    import peft

    names = called.only_called(model, target_modules(model, modules), modules)
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # PEFT divides it, and takes fractions
        lora_dropout=dropout,
        target_modules=names,
        use_rslora=use_rslora,
        use_dora=use_dora,
        init_lora_weights=True if init_lora_weights == "default" else init_lora_weights,  # type: ignore[arg-type]
        fan_in_fan_out=any(is_conv1d(m) or quantize.was_conv1d(m) for m in model.modules()),
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        # PEFT still reads an attribute that transformers has renamed; users cannot act on it.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        adapted = peft.get_peft_model(model, config)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    make_fast(adapted)
    return adapted


def adapt(base: Any, config: TrainConfig) -> Any:
    """Make a base model trainable as the settings say: with an adapter, or all its weights.

    Raises:
        ConfigError: If the model has no linear layer of a requested name.
    """
    if config.method == "full":
        base.float().requires_grad_(True)
        make_fast(base)
        return base
    return add_adapter(
        base,
        rank=config.rank,
        alpha=config.alpha,
        dropout=config.dropout,
        modules=config.target_modules,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        init_lora_weights=config.init_lora_weights,
    )


def count_parameters(model: Any) -> ParameterCount:
    """Count the parameters of a model, and check those of adapters against r * (in + out).

    With DoRA each layer has `out` more.

    Returns:
        The counts; tied weights count once.
    """
    modules: dict[str, int] = {}
    for path, layer in lora_layers(model):
        name = path.rsplit(".", 1)[-1]
        for adapter, rank in layer.r.items():
            expected = rank * (layer.in_features + layer.out_features)
            count = layer.lora_A[adapter].weight.numel() + layer.lora_B[adapter].weight.numel()
            assert count == expected, f"{path}: {count} parameters, r * (in + out) is {expected}"
            if adapter in layer.lora_magnitude_vector:  # DoRA's
                count += layer.lora_magnitude_vector[adapter].weight.numel()
            modules[name] = modules.get(name, 0) + count
    parameters = list(model.parameters())
    packed = sum(
        quantize.num_weights(layer) - layer.weight.numel() for _, layer in quantize.layers(model)
    )
    return ParameterCount(
        trainable=sum(p.numel() for p in parameters if p.requires_grad),
        total=sum(p.numel() for p in parameters) + packed,
        modules=modules,
    )


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or is_conv1d(module)

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
from remora.formatting import first_line
from remora.models import called_layers, class_head, quantize
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
    active: int | None = None  # those that a token uses, in a mixture of experts
    experts: int = 0  # frozen ones in stacked experts

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
    adaptable = _adaptable(model)
    present = {path.rsplit(".", 1)[-1] for path in adaptable}
    experts = expert_parameters(model)
    if missing := [name for name in requested if name not in {*present, *experts}]:
        raise ConfigError(
            f"the model has no linear layer named {missing[0]!r}; "
            f"choose from {', '.join(sorted({*present, *experts}))}"
        )
    names = [name for name in requested if name in present]
    if not requested and present.issuperset(SEED_RECIPE_MODULES):
        names = list(SEED_RECIPE_MODULES)
    elif not requested:
        names = sorted(present)
    if taken := _not_as_layers(model, names):
        if requested:
            raise ConfigError(
                f"PEFT does not adapt {taken[0]} of this model as a layer; leave it out"
                + (f", or name its experts {', '.join(sorted(experts))}" if experts else "")
            )
        names = [name for name in names if name not in taken]
    # PEFT adapts every module of a name, so where others share it the paths are given.
    wanted = [path for path in adaptable if path.rsplit(".", 1)[-1] in names]
    reached = [path for path, _ in model.named_modules() if path.rsplit(".", 1)[-1] in names]
    return names if len(reached) == len(wanted) else wanted


def expert_parameters(model: Any) -> dict[str, int]:
    """Return the names of a model's stacked expert weights, and how many numbers each holds.

    They are no layers of their own but parameters [experts, ., .], named with the module that holds
    them: `experts.down_proj`.
    """
    number = num_experts(model)
    sizes: dict[str, int] = {}
    for path, parameter in model.named_parameters():
        if number and parameter.dim() == 3 and len(parameter) == number:
            name = ".".join(path.split(".")[-2:])
            sizes[name] = sizes.get(name, 0) + parameter.numel()
    return sizes


def num_experts(model: Any) -> int:
    """Return how many experts each layer of a mixture chooses from, 0 if it is none."""
    config = model.config.get_text_config()
    names = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    parts = [config, *(part for part in vars(config).values() if hasattr(part, "to_dict"))]
    found = [getattr(part, name, None) for part in parts for name in names]
    return max((n for n in found if isinstance(n, int)), default=0)


def experts_per_token(config: Any) -> int:
    """Return how many experts of a layer compute a token, 0 if there are none or it is unknown."""
    names = ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_top_k", "moe_k")
    parts = [config, *(part for part in vars(config).values() if hasattr(part, "to_dict"))]
    found = [getattr(part, name, None) for part in parts for name in names]
    return max((n for n in found if isinstance(n, int)), default=0)


def _adaptable(model: Any) -> list[str]:
    """Return the paths of the linear layers that an adapter can be put on.

    Those of the text part, but for the head and the routers: a router writes a number for each
    expert, or one that says how much the shared expert counts; or it has several layers, in a
    module that is called one.
    """
    head, number = model.get_output_embeddings(), num_experts(model)
    is_whole = model.config.get_text_config() is model.config
    decoder = None if is_whole else model.get_decoder()
    inside = None if decoder is None else {id(module) for module in decoder.modules()}
    return [
        path
        for path, module in model.named_modules()
        if _is_linear(module)
        and module is not head
        and (inside is None or id(module) in inside)
        and not (number and (_width(module) in {1, number} or _is_in_router(path)))
    ]


def _is_in_router(path: str) -> bool:
    """Return whether a layer is inside a router, by the names of the modules around it."""
    return not {"router", "gate"}.isdisjoint(path.split(".")[:-1])


def _width(module: Any) -> int:
    """Return the number of outputs of a linear layer."""
    return int(module.nf if is_conv1d(module) else module.out_features)


def _not_as_layers(model: Any, names: Sequence[str]) -> list[str]:
    """Return those of some names that PEFT takes for the experts of this architecture.

    Their layers had such names before transformers stacked them.
    """
    import peft
    from peft.utils import transformers_weight_conversion as conversion

    converts = getattr(conversion, "convert_peft_config_for_transformers", None)
    if converts is None or not names:
        return []
    taken = []
    for group in (set(names) & set(SEED_RECIPE_MODULES[4:]), *({name} for name in names)):
        if not group:
            continue
        config = peft.LoraConfig(target_modules=list(group))
        try:
            converts(config, model, None)
        except ValueError:  # it takes several names together, or none
            continue
        taken += [name for name in group if name not in (config.target_modules or ())]
    return [name for name in names if name in taken]


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

    names = called_layers.only_called(model, target_modules(model, modules), modules)
    experts = [name for name in modules if name in expert_parameters(model)]
    if experts and use_dora:
        raise ConfigError(f"use_dora does not work on experts such as {experts[0]}; leave out one")
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # PEFT divides it, and takes fractions
        lora_dropout=0.0 if experts else dropout,  # PEFT adapts experts without dropout only
        target_modules=names,
        target_parameters=experts or None,
        use_rslora=use_rslora,
        use_dora=use_dora,
        init_lora_weights=True if init_lora_weights == "default" else init_lora_weights,  # type: ignore[arg-type]
        fan_in_fan_out=any(is_conv1d(m) or quantize.was_conv1d(m) for m in model.modules()),
        task_type="SEQ_CLS" if class_head.head_of(model) else "CAUSAL_LM",
    )
    with warnings.catch_warnings():
        # PEFT still reads an attribute that transformers has renamed; users cannot act on it.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        try:
            adapted = peft.get_peft_model(model, config)
        except ValueError as error:
            raise ConfigError(
                f"PEFT refuses this adapter ({first_line(error)}); choose other layers with "
                "--target-modules"
            ) from error
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    class_head.narrow(adapted)
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
        name = getattr(layer, "parameter_name", name)
        for adapter, rank in layer.r.items():
            expected = rank * (layer.in_features + layer.out_features)
            expected *= getattr(layer, "num_experts", 1)
            count = layer.lora_A[adapter].weight.numel() + layer.lora_B[adapter].weight.numel()
            assert count == expected, f"{path}: {count} parameters, r * (in + out) is {expected}"
            if adapter in layer.lora_magnitude_vector:  # DoRA's
                count += layer.lora_magnitude_vector[adapter].weight.numel()
            modules[name] = modules.get(name, 0) + count
    parameters = list(model.parameters())
    if head := class_head.head_of(model):
        modules["head"] = sum(p.numel() for p in head.parameters() if p.requires_grad)
        if frozen := getattr(head, "original_module", None):  # which PEFT keeps beside its copy
            own = {id(p) for p in frozen.parameters()}
            parameters = [p for p in parameters if id(p) not in own]
    packed = sum(
        quantize.num_weights(layer) - layer.weight.numel() for _, layer in quantize.layers(model)
    )
    total = sum(p.numel() for p in parameters) + packed
    experts = sum(expert_parameters(model).values())
    wrapped = [m for m in model.modules() if hasattr(m, "parameter_name")]
    used, number = experts_per_token(model.config.get_text_config()), num_experts(model)
    return ParameterCount(
        trainable=sum(p.numel() for p in parameters if p.requires_grad),
        total=total,
        modules=modules,
        active=total - experts + experts * used // number if used and experts else None,
        experts=0 if wrapped else experts,
    )


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or is_conv1d(module)

"""AdamW, its learning rate schedule, and the default rate for a model's size."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from remora.config import Method, TrainConfig
from remora.data.dataset import Dataset
from remora.tree.forward import text_config


def create_optimizer(
    named: Mapping[str, Tensor],
    adapted: Any,
    dataset: Dataset,
    config: TrainConfig,
    accelerator: Any,
) -> tuple[Any, Any, int]:
    """Return the optimizer, its learning rate schedule, and the number of steps."""
    from transformers import get_scheduler

    num_steps = config.num_steps(len(dataset.train))
    width = text_config(adapted).hidden_size
    rate = config.learning_rate or default_learning_rate(width, config.method)
    groups: list[dict[str, Any]] = [{"params": list(named.values())}]
    if config.loraplus_lr_ratio is not None:  # https://arxiv.org/abs/2402.12354; as in PEFT
        is_faster = {name: "lora_B" in name or p.dim() == 1 for name, p in named.items()}
        groups = [
            {"params": [p for n, p in named.items() if not is_faster[n]]},
            {
                "params": [p for n, p in named.items() if is_faster[n]],
                "lr": rate * config.loraplus_lr_ratio,
            },
        ]
    # One kernel for many weights, where each would be launched by itself.
    fused = True if next(iter(named.values())).is_cuda else None
    optimizer = torch.optim.AdamW(groups, lr=rate, weight_decay=config.weight_decay, fused=fused)
    scheduler = get_scheduler(
        config.schedule,
        optimizer,
        num_warmup_steps=math.ceil(config.warmup_fraction * num_steps),
        num_training_steps=num_steps,
    )
    return accelerator.prepare_optimizer(optimizer), scheduler, num_steps


def default_learning_rate(width: int, method: Method) -> float:
    """Return the peak learning rate for a model of a hidden size; docs/log.md says why.

    From a width of 1536 on 2e-4 for an adapter and 2e-5 for all weights, as in the recipes in use;
    more for narrower models, down to a width of 192.
    """
    narrower = min(8.0, max(1.0, 1536 / width))
    if method == "full":
        return 2e-5 * narrower**2
    return 2e-4 * math.pow(narrower, 5 / 3)

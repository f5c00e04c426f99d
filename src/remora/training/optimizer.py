"""AdamW and its learning rate schedule."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from remora.config import TrainConfig
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
    rate = config.rate(width)
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

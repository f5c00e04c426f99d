"""Stock models, and what they compute one sequence at a time, to compare with."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from conftest import tiny_config
from remora.data.prompt import Prompt
from remora.models import class_head, loading
from remora.tree import layouts


def exhaustive(model: Any, prompt: Prompt, messages: Sequence[str]) -> NDArray[np.float64]:
    """Each message with each label in a sequence of its own, through the stock model."""
    logs = np.empty((len(messages), len(prompt.labels)))
    for i, stem in enumerate(prompt.stems(messages)):
        for j, answer in enumerate(prompt.answers):
            ids = torch.tensor([[*stem, *answer]])
            with torch.no_grad():
                logits = model.eval()(input_ids=ids).logits[0].double().log_softmax(-1)
            steps = logits[len(stem) - 1 : -1]
            logs[i, j] = float(steps.gather(1, torch.tensor(answer)[:, None]).sum())
    scaled = np.exp(logs - logs.max(1, keepdims=True))
    probabilities: NDArray[np.float64] = scaled / scaled.sum(1, keepdims=True)
    return probabilities


def with_head(architecture: str, labels: Sequence[str]) -> tuple[Any, Any]:
    """Return a random classifier in float64 as it trains here, and a copy of the stock one."""
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    config = tiny_config(architecture)
    class_head.describe(config, labels)
    config._attn_implementation = loading._attention(config)
    model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float64)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)
    stock = copy.deepcopy(model)
    layouts.assign(model, "tree")
    class_head.install(model)
    return model, stock

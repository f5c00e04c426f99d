"""What the stock model computes, one sequence at a time, to compare with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from remora.data.prompt import Prompt


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

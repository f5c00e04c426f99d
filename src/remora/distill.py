"""An adapter that was cut learns again to say what the whole one says (Hinton et al. 2015).

At each answer token it is moved towards the distribution over the vocabulary that the whole adapter
gives, so nothing is learned from labels that the whole adapter did not learn.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from remora import data, tree
from remora.data import Table
from remora.device import Precision
from remora.progress import Reporter
from remora.prompt import Prompt

BATCH_ROWS = 32


def distill(
    adapted: Any,
    prompt: Prompt,
    table: Table,
    *,
    teacher: str,
    student: str,
    num_steps: int,
    learning_rate: float,
    max_tokens: int,
    precision: Precision,
    reporter: Reporter,
) -> None:
    """Train an adapter to give the probabilities of another one on the same base.

    Args:
        adapted: PEFT's model with both adapters, without dropout.
        prompt: How messages are asked and labels are answered.
        table: Rows; their labels say which answer tokens are looked at.
        teacher: Name of the adapter that is followed.
        student: Name of the one that trains.
        num_steps: Optimizer steps of BATCH_ROWS rows.
        learning_rate: At its peak; it falls linearly to 0.
        max_tokens: Most tokens computed at once.
        precision: The arithmetic.
        reporter: Told how it goes.
    """
    adapted.set_adapter(student)
    parameters = [p for name, p in adapted.named_parameters() if f".{student}." in name]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / (0.05 * num_steps)) * (1 - step / num_steps)
    )
    scaler = torch.amp.GradScaler(
        parameters[0].device.type, enabled=precision.autocast is torch.float16
    )
    batches = data.batches(len(table), BATCH_ROWS, num_steps, seed=0)
    for step, chosen in enumerate(batches, 1):
        rows = prompt.rows([table.texts[i] for i in chosen], [table.labels[i] for i in chosen])
        num_supervised = sum(len(row.token_ids) - row.answer_start for row in rows)
        for part in tree.split(rows, max_tokens):
            packed = part.to(parameters[0].device)
            with torch.no_grad():
                wanted = _log_probabilities(adapted, teacher, packed, precision)
            found = _log_probabilities(adapted, student, packed, precision)
            loss = functional.kl_div(found, wanted, log_target=True, reduction="sum")
            scaler.scale(loss / num_supervised).backward()  # type: ignore[no-untyped-call]
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        if scaler.is_enabled() or norm.isfinite():
            scaler.step(optimizer)
        scaler.update()
        scheduler.step()
        optimizer.zero_grad()
        reporter.scoring("distilling", step, num_steps)


def _log_probabilities(
    adapted: Any, adapter: str, packed: tree.TokenTree, precision: Precision
) -> Tensor:
    """Return the logarithms [answer tokens, vocabulary] that an adapter gives."""
    adapted.set_adapter(adapter)
    dtype = precision.autocast
    with torch.autocast(packed.token_ids.device.type, dtype, enabled=dtype is not None):
        logits = tree.answer_logits(adapted, packed)
    return logits.float().log_softmax(-1)

"""An adapter that was cut learns again, from the whole one and from the labels.

At each answer token it is moved towards the distribution over the vocabulary that the whole adapter
gives, and as much towards the label (Hinton et al. 2015). On training rows these distributions say
little more than the label. Therefore the hidden states that they come from are followed too, after
each layer (Jiao et al. 2020, TinyBERT), less and less as the steps go on.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from remora.data import splits
from remora.data.prompt import Prompt
from remora.data.table import Table
from remora.runtime.device import Precision
from remora.runtime.reporter import Reporter
from remora.tree import packing
from remora.tree.forward import model_inputs
from remora.tree.loss import loss_sum

BATCH_ROWS = 32

LABEL_WEIGHT = 0.5
"""What the labels count; the rest is for the whole adapter's probabilities."""

HIDDEN_WEIGHT = 20.0
"""What hidden states count at first, in nats, whose distance is as large as the states are."""


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
        adapted: PEFT's model with both adapters; the one that trains has its own dropout.
        prompt: How messages are asked and labels are answered.
        table: Rows to learn on.
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
    batches = splits.batches(len(table), BATCH_ROWS, num_steps, seed=0)
    with torch.random.fork_rng():
        torch.manual_seed(0)  # of the dropout
        for step, chosen in enumerate(batches, 1):
            rows = prompt.rows([table.texts[i] for i in chosen], [table.labels[i] for i in chosen])
            num_supervised = sum(len(row.token_ids) - row.answer_start for row in rows)
            for part in packing.split(rows, max_tokens):
                packed = part.to(parameters[0].device)
                with torch.no_grad():
                    wanted = _outputs(adapted.eval(), teacher, packed, precision)
                found = _outputs(adapted.train(), student, packed, precision)
                loss = _loss(found, wanted, packed, HIDDEN_WEIGHT * (1 - step / num_steps))
                scaler.scale(loss / num_supervised).backward()  # type: ignore[no-untyped-call]
            scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            if scaler.is_enabled() or norm.isfinite():
                scaler.step(optimizer)
            scaler.update()
            scheduler.step()
            optimizer.zero_grad()
            reporter.scoring("distilling", step, num_steps)
    adapted.eval()


def _outputs(
    adapted: Any, adapter: str, packed: packing.TokenTree, precision: Precision
) -> tuple[Tensor, list[Tensor]]:
    """Return what an adapter gives where answer tokens are predicted.

    Returns:
        Logits [P, vocabulary], and the hidden states after each layer [P, width], the last one
        normalized.
    """
    adapted.set_adapter(adapter)
    dtype = precision.autocast
    with torch.autocast(packed.token_ids.device.type, dtype, enabled=dtype is not None):
        output = adapted(**model_inputs(adapted, packed), output_hidden_states=True)
    hidden = [states[0, packed.predictors].float() for states in output.hidden_states[1:]]
    return output.logits[0], hidden


def _loss(
    found: tuple[Tensor, list[Tensor]],
    wanted: tuple[Tensor, list[Tensor]],
    packed: packing.TokenTree,
    hidden_weight: float,
) -> Tensor:
    """Return how far outputs are from another adapter's and from the labels, as a sum in nats."""
    ours, theirs = (logits.float().log_softmax(-1) for logits in (found[0], wanted[0]))
    divergence = functional.kl_div(ours, theirs, log_target=True, reduction="none").sum(-1)
    relative = [
        (one - other).square().sum(-1) / other.square().sum(-1)
        for one, other in zip(found[1], wanted[1], strict=True)
    ]
    followed = (1 - LABEL_WEIGHT) * divergence + hidden_weight * torch.stack(relative).mean(0)
    rows = torch.zeros_like(followed)  # [P], how many go on from there
    rows.index_add_(0, packed.edge_predictors, packed.edge_weights)
    return rows @ followed + LABEL_WEIGHT * loss_sum(found[0], packed)

"""Knowledge distillation: a truncated adapter learns from the full one and from the labels.

At each answer token the loss is the divergence from the full adapter's distribution over the
vocabulary, and as much the cross-entropy of the label (Hinton et al. 2015). On training rows these
distributions say little more than the label. Therefore the distance of the hidden states after each
layer counts too (Jiao et al. 2020, TinyBERT), with a weight that falls to 0.
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
from remora.tree import layouts
from remora.tree.forward import model_inputs, output, states_at_predictors
from remora.tree.loss import loss_sum
from remora.tree.packing import MicroBatch

BATCH_ROWS = 32

LABEL_WEIGHT = 0.5
"""Weight of the labels; the rest is for the full adapter's probabilities."""

HIDDEN_WEIGHT = 20.0
"""First weight of the hidden states, in nats if their distance is as large as they are."""


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
    """Train an adapter to give the probabilities of another adapter of the same base.

    Args:
        adapted: PEFT's model with both adapters; the student keeps its own dropout.
        prompt: Turns messages and labels into token sequences.
        table: The training rows.
        teacher: Name of the adapter to learn from.
        student: Name of the adapter that trains.
        num_steps: Optimizer steps of BATCH_ROWS rows.
        learning_rate: Peak of the learning rate, which then falls linearly to 0.
        max_tokens: Most tokens computed at once.
        precision: The arithmetic.
        reporter: Shows the progress.
    """
    # Only the student's weights train
    adapted.set_adapter(student)
    parameters = [p for name, p in adapted.named_parameters() if f".{student}." in name]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / (0.05 * num_steps)) * (1 - step / num_steps)
    )
    scaler = torch.amp.GradScaler(
        parameters[0].device.type, enabled=precision.autocast is torch.float16
    )

    # Both adapters see the same batches; the teacher without dropout
    batches = splits.batches(len(table), BATCH_ROWS, num_steps, seed=0)
    with torch.random.fork_rng():
        torch.manual_seed(0)  # for the dropout
        for step, chosen in enumerate(batches, 1):
            rows = prompt.rows([table.texts[i] for i in chosen], [table.labels[i] for i in chosen])
            num_supervised = sum(len(row.token_ids) - row.answer_start for row in rows)
            for part in layouts.split(layouts.of(adapted), rows, max_tokens):
                packed = part.to(parameters[0].device)
                with torch.no_grad():
                    theirs = _outputs(adapted.eval(), teacher, packed, precision)
                ours = _outputs(adapted.train(), student, packed, precision)
                loss = _loss(ours, theirs, packed, HIDDEN_WEIGHT * (1 - step / num_steps))
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
    adapted: Any, adapter: str, packed: MicroBatch, precision: Precision
) -> tuple[Tensor, list[Tensor]]:
    """Return an adapter's outputs at the positions that predict answer tokens.

    Returns:
        Logits [P, vocabulary], and the hidden states after each layer [P, width], the last one
        normalized.
    """
    adapted.set_adapter(adapter)
    dtype = precision.autocast
    with torch.autocast(packed.token_ids.device.type, dtype, enabled=dtype is not None):
        inputs = model_inputs(adapted, packed)
        computed = output(adapted, packed, inputs, output_hidden_states=True)
    states = computed.hidden_states[1:]
    return computed.logits[0], [states_at_predictors(packed, each).float() for each in states]


def _loss(
    ours: tuple[Tensor, list[Tensor]],
    theirs: tuple[Tensor, list[Tensor]],
    packed: MicroBatch,
    hidden_weight: float,
) -> Tensor:
    """Return the loss of the student's outputs, summed over the answer tokens of all rows, in nats.

    Args:
        ours: The student's logits and hidden states, as `_outputs` returns them.
        theirs: The teacher's.
        packed: The micro-batch that they are of.
        hidden_weight: Weight of the hidden states.
    """
    logs, targets = (logits.float().log_softmax(-1) for logits in (ours[0], theirs[0]))
    divergence = functional.kl_div(logs, targets, log_target=True, reduction="none").sum(-1)
    relative = [
        (one - other).square().sum(-1) / other.square().sum(-1)
        for one, other in zip(ours[1], theirs[1], strict=True)
    ]
    per_token = (1 - LABEL_WEIGHT) * divergence + hidden_weight * torch.stack(relative).mean(0)
    num_rows = torch.zeros_like(per_token)  # [P], that share this prediction
    num_rows.index_add_(0, packed.edge_predictors, packed.edge_weights)
    return num_rows @ per_token + LABEL_WEIGHT * loss_sum(ours[0], packed)

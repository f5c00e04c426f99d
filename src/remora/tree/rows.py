"""Padded rows: a batch through a model's ordinary forward pass, for models that follow no tree.

A layer that carries a state along the row, or that measures distances by index, cannot branch.
There each row is computed by itself: rows are sorted by length and padded on the right to the
longest of their micro-batch. What stands behind a token reaches nothing before it in a causal
model, so the padding changes no prediction, and no mask is needed to say so; the start-up check
compares with each row alone. Padding on the left would enter the states of the tokens after it.

As in a tree the head is computed only where an answer token is predicted.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from remora.data.prompt import TokenSequence
from remora.errors import ModelError
from remora.tree.packing import MicroBatch

Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True)
class PaddedRows(MicroBatch):
    """A batch of sequences, one a row. B rows, S tokens in the longest."""


def build(rows: Sequence[TokenSequence]) -> PaddedRows:
    """Pad rows to the longest of them.

    Args:
        rows: Token sequences with a prompt and an answer.
    """
    width = max(len(row.token_ids) for row in rows)
    predictors: list[int] = []
    edges: list[int] = []
    targets: list[int] = []
    weights: list[float] = []
    for index, row in enumerate(rows):
        assert row.answer_start > 0 < row.num_targets, "a row needs a prompt and an answer"
        begin = len(predictors)
        predictors += [index * width + place for place in row.predictors]
        if row.class_set is None:
            edges += range(begin, len(predictors))
        else:
            edges += [begin] * len(row.class_set)
        targets += row.targets
        weights += [row.weight] * len(row.targets)
    are_sets = rows[0].class_set is not None
    return PaddedRows(
        token_ids=padded([row.token_ids for row in rows]),
        predictors=torch.tensor(predictors),
        edge_predictors=torch.tensor(edges, dtype=torch.int64),
        edge_targets=torch.tensor(targets, dtype=torch.int64),
        edge_weights=torch.tensor(weights, dtype=torch.float32),
        num_rows=len(rows),
        num_row_tokens=sum(len(row.token_ids) for row in rows),
        row_weights=torch.tensor([row.weight for row in rows]) if are_sets else None,
    )


def split(rows: Sequence[TokenSequence], max_tokens: int) -> list[PaddedRows]:
    """Cut rows into batches of at most `max_tokens` computed tokens, padding included.

    A longer row is alone. Rows are sorted by length first, so that little is padded.
    """
    ordered = sorted(rows, key=lambda row: (len(row.token_ids), row.token_ids))
    return [build(group) for group in groups(ordered, lambda row: row.token_ids, max_tokens)]


def groups(
    items: Sequence[Item], tokens: Callable[[Item], Sequence[int]], max_tokens: int
) -> Iterator[list[Item]]:
    """Cut items, sorted by their length, into groups that fit padded into `max_tokens`."""
    group: list[Item] = []
    for item in items:
        if group and (len(group) + 1) * len(tokens(item)) > max_tokens:
            yield group
            group = []
        group.append(item)
    if group:
        yield group


def padded(sequences: Sequence[Sequence[int]]) -> Tensor:
    """Return sequences as one array [B, S], padded on the right with each one's last token.

    That is a token like any other: some models warn of their own padding token without a mask.
    """
    width = max(map(len, sequences))
    return torch.tensor([[*each, *[each[-1]] * (width - len(each))] for each in sequences])


def hidden_states(
    model: Any, stems: Sequence[Sequence[int]]
) -> tuple[list[Tensor], list[list[int]]]:
    """Return the hidden states of each layer, [B * S, H] each, and each stem's places in them."""
    ids = padded(stems).to(next(model.parameters()).device)
    with head_at(model, ids.new_zeros(1)):
        states = model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states
    starts = range(0, ids.numel(), ids.shape[1])
    places = [list(range(a, a + len(stem))) for a, stem in zip(starts, stems, strict=True)]
    return [layer.flatten(0, 1) for layer in states], places


@contextlib.contextmanager
def head_at(model: Any, places: Tensor) -> Iterator[None]:
    """Let a model compute its head only at some places of its padded rows.

    Args:
        model: The model. While this lasts its logits are [1, places, vocabulary].
        places: Indices into the flattened rows, [P].

    Raises:
        ModelError: If the model names no head.
    """
    head = model.get_output_embeddings()
    if head is None:
        raise ModelError(
            "this model names no output layer (get_output_embeddings), so its answers cannot be "
            "computed; choose another"
        )

    # Models take one set of positions for all rows, if any; the head sees all hidden states.
    def select(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden, *others = arguments
        return (hidden.flatten(0, 1)[places][None], *others)

    handle = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()

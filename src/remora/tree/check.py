"""The start-up check: whether a model computes a batch in its layout as it computes each row."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from remora.data.prompt import TokenSequence, common_prefix_length
from remora.errors import ModelError
from remora.formatting import first_line
from remora.runtime import memory
from remora.tree import attention, last_layer, layouts, packing
from remora.tree.forward import answer_logits, is_narrow, model_inputs, text_config
from remora.tree.loss import loss_sum
from remora.tree.packing import split
from remora.tree.rows import build

_FAILURES = (
    *(RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError, AssertionError),
    ImportError,
)
"""What a model raises that does not take masks or positions such as a tree's, or lacks a kernel."""

MARGIN = 64
"""Tokens beyond a window that a checked tree has at least."""


def check_layout(model: nn.Module, rows: Sequence[TokenSequence]) -> None:
    """Make sure that a model computes rows together, in its layout, as it computes each alone.

    Raises:
        ModelError: If they differ by more than rounding.
    """
    check = check_tree if layouts.of(model) == "tree" else check_rows
    check(model, rows)


@torch.no_grad()
def check_tree(
    model: nn.Module,
    rows: Sequence[TokenSequence],
    heaviest: Sequence[TokenSequence] = (),
    max_tokens: int = 0,
) -> None:
    """Make sure that a model's attention and positions follow the tree.

    Compares the summed loss of some rows, packed, with that of each row alone in the model's own
    ordinary forward pass. A model whose last layer cannot be computed at the predictors alone
    computes all of it from then on, and one that does not pass blocks to its attention uses whole
    masks. Then some rows of the largest tree that training computes, since a model with a window
    of its own is right until a tree is longer than that.

    Args:
        model: The model.
        rows: A few short rows.
        heaviest: The rows of the effective batch with the largest tree.
        max_tokens: Most tokens of a tree.

    Raises:
        ModelError: If they differ by more than rounding, or the model takes no such inputs.
    """
    was_training = model.training
    model.eval()
    rows = [row._replace(weight=1.0) for row in rows]  # as each row alone
    packed = packing.build(rows).to(next(model.parameters()).device)
    # Each row alone.
    expected = 0.0
    for row in rows:
        expected += _row_loss(_alone(model, row), row)
    tolerance = _tolerance(model)

    def follows_in_blocks() -> bool:
        try:
            blocked = model(**model_inputs(model, packed, in_blocks=True)).logits[0]
        except _FAILURES:
            return False
        return abs(float(loss_sum(blocked, packed)) - expected) <= tolerance * abs(expected)

    # The tree in blocks, and the last layer at its predictors
    follows = follows_in_blocks()
    if not follows and last_layer.uninstall(model):
        follows = follows_in_blocks()
    if not follows:
        attention.uninstall(model)
    # The tree as it is computed in training.
    try:
        in_tree = float(loss_sum(answer_logits(model, packed), packed))
    except _FAILURES as error:
        model.train(was_training)
        if isinstance(error, ModelError) or memory.is_exhausted(error):
            raise
        raise ModelError(
            f"this model computes no token tree ({first_line(error)}); use --layout rows"
        ) from error
    right = abs(in_tree - expected) <= tolerance * abs(expected)
    if right and heaviest:
        reach = _long_rows(text_config(model), heaviest, max_tokens)
        in_tree, expected, right = _compare_far_rows(model, reach, max_tokens)
    model.train(was_training)
    if not right:
        raise ModelError(
            f"this model's loss is {in_tree:.4f} in a token tree and {expected:.4f} row by row, so "
            "its attention or positions do not follow the tree; use --layout rows"
        )


def _long_rows(
    config: Any, rows: Sequence[TokenSequence], max_tokens: int
) -> Sequence[TokenSequence]:
    """Return rows whose tree is longer than each window of a model, as far as trees may be.

    What a model calls a window or a chunk may count neighbours in the packed row.
    """
    windows = [
        value
        for key, value in vars(config).items()
        if ("window" in key or "chunk" in key) and isinstance(value, int)
    ]
    within = [window for window in windows if window < max_tokens - MARGIN]
    wanted = max(within, default=-MARGIN) + MARGIN
    if max(tree.num_tokens for tree in split(rows, max_tokens)) >= wanted:
        return rows
    # More rows: messages that begin with other tokens of the same rows.
    shared = min(common_prefix_length(rows[0].token_ids, row.token_ids) for row in rows)
    longest = max(rows, key=lambda row: row.answer_start)
    shared = min(shared, longest.answer_start - 1)
    pairs = itertools.product(sorted({token for row in rows for token in row.token_ids}), repeat=2)
    more, num_tokens = list(rows), 0
    for pair in pairs:
        if num_tokens > wanted:
            break
        ids = [*longest.token_ids[:shared], *pair, *longest.token_ids[shared:]]
        more.append(longest._replace(token_ids=ids, answer_start=longest.answer_start + len(pair)))
        num_tokens += len(ids) - shared - 1  # rows may share the first of the pair
    return more


def _compare_far_rows(
    model: nn.Module, rows: Sequence[TokenSequence], max_tokens: int
) -> tuple[float, float, bool]:
    """Return the loss of rows far apart in the largest tree, and alone, and if each agrees."""
    device = next(model.parameters()).device
    largest = max(split(rows, max_tokens), key=lambda tree: tree.num_tokens)
    paths = [(row, path) for row in rows if (path := largest.path(row))]
    ends = (min, max)
    chosen = [choose(paths, key=lambda each: each[1][-1]) for choose in ends]
    chosen.append(max(paths, key=lambda each: len(each[1])))
    place = {node: index for index, node in enumerate(largest.predictors.tolist())}
    alone = []
    for row, _ in chosen:
        ids = torch.tensor([list(row.token_ids)], device=device)
        kept = torch.tensor(row.predictors, device=device)
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=kept).logits[0]
        alone.append(_row_loss(logits, row))
    in_tree: list[float] = []
    right = False
    for in_blocks in (None, False):
        logits = model(**model_inputs(model, largest.to(device), in_blocks=in_blocks)).logits[0]
        in_tree = [
            _row_loss(logits[[place[path[i]] for i in row.predictors]], row) for row, path in chosen
        ]
        # In 16 bits rounding may send a token to another expert.
        tolerance = 1e-1 if is_narrow(model) else 1e-4
        pairs = zip(in_tree, alone, strict=True)
        right = all(abs(one - other) <= tolerance * max(1, other) for one, other in pairs)
        if right:
            break
        attention.uninstall(model)
    return sum(in_tree), sum(alone), right


def _row_loss(logits: Tensor, row: TokenSequence) -> float:
    """Return the summed loss of a row's answer; logits [answer tokens, vocabulary]."""
    if row.class_set is not None:
        wanted = torch.zeros_like(logits, dtype=torch.float32)
        wanted[0, list(row.class_set)] = 1
        return float(functional.binary_cross_entropy_with_logits(logits.float(), wanted))
    targets = torch.tensor(row.targets, device=logits.device)
    return float(functional.cross_entropy(logits.float(), targets, reduction="sum"))


@torch.no_grad()
def check_rows(model: nn.Module, rows: Sequence[TokenSequence]) -> None:
    """Make sure that padding on the right changes no prediction, and that the head is where it is.

    Compares the logits of some rows, padded to the longest, with those of each row alone.

    Raises:
        ModelError: If they differ by more than rounding, which a causal model's do not.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    try:
        together = answer_logits(model, build(rows).to(device))
        alone = torch.cat([_alone(model, row) for row in rows])
    except _FAILURES as error:
        if isinstance(error, ModelError) or memory.is_exhausted(error):
            raise
        found, advice = "this model computes no padded rows", "choose another"
        if isinstance(error, ImportError):
            found, advice = "this model needs what is not here", f"install it, or {advice} model"
        raise ModelError(f"{found} ({first_line(error)}); {advice}") from error
    finally:
        model.train(was_training)
    if not same_logits(model, together, alone):
        raise ModelError(
            "this model predicts something else if rows are padded on the right, so it is no "
            "causal language model; choose another"
        )


def same_logits(model: nn.Module, one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether two arrays of logits differ by no more than rounding."""
    difference = (one.float() - other.float()).abs().max()
    return bool(difference <= _tolerance(model) * other.float().abs().max())


def _tolerance(model: nn.Module) -> float:
    return 3e-2 if is_narrow(model) else 1e-3


def _alone(model: Any, row: TokenSequence) -> torch.Tensor:
    """Return a row's answer logits by the model's own ordinary forward pass, [answer, V]."""
    ids = torch.tensor([list(row.token_ids)], device=next(model.parameters()).device)
    logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits[0, list(row.predictors)]
    return logits

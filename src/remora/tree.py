"""The token tree: a batch of token sequences as one trie, every shared token computed once.

The rows of a classification batch begin alike: the same chat template, the same instruction, often
the same list of labels. The trie of a batch, laid out in depth-first preorder, is ONE row of N
tokens:

    token_ids     [N]
    position_ids  [N]  depth in the trie, so that rotary and learned positions see what they would
                       see in the unpacked row
    subtree_end   [N]  exclusive end of the node's subtree, in preorder

    query q may see key k  iff  k <= q < subtree_end[k]     (k is an ancestor of q, or q itself)

The head is computed only at `predictors`, the nodes below which an answer token is predicted. The
loss is sum(weight * cross entropy) / sum(weight) over the edges of the trie, where the weight of an
edge counts the rows that are supervised on it. Gradients flow through the shared nodes, so they are
those of the padded computation, up to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from remora import attention
from remora.errors import ModelError
from remora.prompt import TokenSequence, common_prefix_length


@dataclass(frozen=True, kw_only=True)
class TokenTree:
    """A batch of sequences, packed. N nodes, P predictors, E supervised edges."""

    token_ids: Tensor  # [N] int64
    position_ids: Tensor  # [N] int64
    subtree_end: Tensor  # [N] int64
    predictors: Tensor  # [P] int64, nodes where the head is computed
    edge_predictors: Tensor  # [E] int64, indices into `predictors`
    edge_targets: Tensor  # [E] int64, the token that the edge leads to
    edge_weights: Tensor  # [E] float32, how many rows are supervised on the edge
    num_rows: int
    num_row_tokens: int  # tokens of all rows before packing

    @property
    def num_tokens(self) -> int:
        """N, the number of tokens that are computed."""
        return len(self.token_ids)

    @property
    def num_supervised_tokens(self) -> int:
        """Answer tokens of all rows: the sum of the edge weights."""
        return int(self.edge_weights.sum())

    def to(self, device: torch.device | str) -> TokenTree:
        """Return the tree with its tensors on `device`."""
        tensors = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **tensors)  # type: ignore[arg-type]

    def visible(self, window: int | None = None) -> Tensor:
        """Return the attention rule as a mask [N, N] of booleans, rows are queries.

        Args:
            window: Width of a sliding window: a key is seen from at most `window - 1` positions on.
                Measured in positions, since neighbours in the packed row may be far apart in depth.
        """
        index = torch.arange(self.num_tokens, device=self.token_ids.device)
        mask = (index[None, :] <= index[:, None]) & (index[:, None] < self.subtree_end[None, :])
        if window is not None:
            mask &= self.position_ids[:, None] - self.position_ids[None, :] < window
        return mask


def build(rows: Sequence[TokenSequence]) -> TokenTree:
    """Pack rows into one token tree.

    Args:
        rows: Token sequences; tokens from `answer_start` on are predicted from the one before.
    """
    token_ids: list[int] = []
    position_ids: list[int] = []
    subtree_end: list[int] = []
    parents: list[int] = []
    weights: list[int] = []
    path: list[int] = []  # nodes of the row before, from the root down
    before: list[int] = []
    for row in sorted(rows, key=lambda row: row.token_ids):
        assert 0 < row.answer_start < len(row.token_ids), "a row needs a prompt and an answer"
        shared = common_prefix_length(before, row.token_ids)
        for node in path[shared:]:
            subtree_end[node] = len(token_ids)
        del path[shared:]
        for depth in range(shared, len(row.token_ids)):
            parents.append(path[-1] if path else -1)
            path.append(len(token_ids))
            token_ids.append(row.token_ids[depth])
            position_ids.append(depth)
            subtree_end.append(-1)
            weights.append(0)
        for node in path[row.answer_start :]:
            weights[node] += 1
        before = row.token_ids
    for node in path:
        subtree_end[node] = len(token_ids)

    edges = [node for node, weight in enumerate(weights) if weight]
    predictors = sorted({parents[node] for node in edges})
    place = {node: index for index, node in enumerate(predictors)}
    return TokenTree(
        token_ids=torch.tensor(token_ids),
        position_ids=torch.tensor(position_ids),
        subtree_end=torch.tensor(subtree_end),
        predictors=torch.tensor(predictors),
        edge_predictors=torch.tensor([place[parents[node]] for node in edges]),
        edge_targets=torch.tensor([token_ids[node] for node in edges]),
        edge_weights=torch.tensor([weights[node] for node in edges], dtype=torch.float32),
        num_rows=len(rows),
        num_row_tokens=sum(len(row.token_ids) for row in rows),
    )


def split(rows: Sequence[TokenSequence], max_tokens: int) -> list[TokenTree]:
    """Cut rows into trees of at most `max_tokens` computed tokens each; a longer row stands alone.

    Rows are ordered by their tokens first, so that those which share most fall into one tree. The
    order inside an effective batch changes no sum over it.
    """
    trees: list[TokenTree] = []
    group: list[TokenSequence] = []
    num_tokens = 0
    for row in sorted(rows, key=lambda row: row.token_ids):
        added = len(row.token_ids)
        if group:
            added -= common_prefix_length(group[-1].token_ids, row.token_ids)
        if group and num_tokens + added > max_tokens:
            trees.append(build(group))
            group, num_tokens, added = [], 0, len(row.token_ids)
        group.append(row)
        num_tokens += added
    if group:
        trees.append(build(group))
    return trees


def filled(tree: TokenTree) -> TokenTree:
    """Return a tree filled up to sizes that many have, with what counts nothing.

    Each size becomes a multiple of an eighth of the power of two below it. An added token sees
    itself alone, an added predictor has no edge but added ones, and those weigh nothing.
    """
    num_tokens = _full_size(tree.num_tokens)
    # One predictor at least is an added one, for the added edges to leave from.
    size = _full_size(1 + max(len(tree.predictors), len(tree.edge_weights)))
    own = torch.arange(tree.num_tokens, num_tokens)

    def fill(tensor: Tensor, size: int, value: int = 0) -> Tensor:
        return functional.pad(tensor, (0, size - len(tensor)), value=value)

    return replace(
        tree,
        token_ids=fill(tree.token_ids, num_tokens),
        position_ids=fill(tree.position_ids, num_tokens),
        subtree_end=torch.cat([tree.subtree_end, own + 1]),
        predictors=fill(tree.predictors, size),
        edge_predictors=fill(tree.edge_predictors, size, size - 1),
        edge_targets=fill(tree.edge_targets, size),
        edge_weights=fill(tree.edge_weights, size),
    )


def _full_size(size: int) -> int:
    step = max(32, (1 << size.bit_length()) // 16)
    return -(-size // step) * step


def answer_logits(model: nn.Module, tree: TokenTree) -> Tensor:
    """Return the logits at the tree's predictors, [P, vocabulary], as the model computes them."""
    logits: Tensor = model(**inputs(model, tree)).logits[0]
    return logits


def inputs(model: nn.Module, tree: TokenTree, *, in_blocks: bool | None = None) -> dict[str, Any]:
    """Return the arguments of a Hugging Face model's forward that compute a tree's logits.

    With `in_blocks` or without it attention is computed in blocks or not, whichever costs less.
    """
    return {
        "input_ids": tree.token_ids[None],
        "position_ids": tree.position_ids[None],
        **attention.inputs(text_config(model), tree.visible, _dtype(model), in_blocks=in_blocks),
        "logits_to_keep": tree.predictors,
        "use_cache": False,
    }


def loss_sum(logits: Tensor, tree: TokenTree) -> Tensor:
    """Return sum(weight * cross entropy) over the tree's edges, in nats, computed in float32.

    Divide by the sum of the weights over the whole effective batch to get its mean loss.

    Args:
        logits: [P, vocabulary], from `answer_logits`.
        tree: The tree that they belong to.
    """
    loss: Tensor = _CrossEntropySum.apply(  # type: ignore[no-untyped-call]
        logits, tree.edge_predictors, tree.edge_targets, tree.edge_weights
    )
    return loss


class _CrossEntropySum(torch.autograd.Function):
    """Cross entropy of several weighted targets a row, without float32 copies of all the logits.

    The gradient is made beside the loss, a few rows at a time, so that of the large [P, vocabulary]
    arrays only the logits and their gradient exist.
    """

    CHUNK_ELEMENTS = 1 << 21  # stays in a processor's cache as float32

    @staticmethod
    def forward(ctx: Any, logits: Tensor, rows: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        wide = torch.promote_types(logits.dtype, torch.float32)
        weights = weights.to(wide)
        row_weights = torch.zeros(len(logits), dtype=wide, device=logits.device)
        row_weights.index_add_(0, rows, weights)
        log_normalizer = torch.empty_like(row_weights)
        needs_gradient = logits.requires_grad
        # float16 would lose small gradients here, before the loss scale can lift them.
        narrow = wide if logits.dtype == torch.float16 else logits.dtype
        gradient = torch.empty_like(logits, dtype=narrow) if needs_gradient else None
        step = max(1, _CrossEntropySum.CHUNK_ELEMENTS // logits.shape[-1])
        for start in range(0, len(logits), step):
            part = slice(start, start + step)
            shifted = logits[part].to(wide, copy=True)
            largest = shifted.amax(-1, keepdim=True)
            total = shifted.sub_(largest).exp_().sum(-1, keepdim=True)
            log_normalizer[part] = (largest + total.log()).squeeze(-1)
            if gradient is not None:
                gradient[part] = shifted.mul_(row_weights[part, None] / total)
        chosen = logits[rows, targets].to(wide)  # [E]
        log_probabilities = chosen - log_normalizer[rows]
        if gradient is not None:
            # In wide arithmetic, since probability - 1 cancels where the model is sure.
            difference = log_probabilities.exp() * row_weights[rows] - weights
            gradient[rows, targets] = difference.to(narrow)
        ctx.save_for_backward(gradient)
        ctx.dtype = logits.dtype
        return -(weights * log_probabilities).sum()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * grad_outputs[0]).to(ctx.dtype), None, None, None


@torch.no_grad()
def check(model: nn.Module, rows: Sequence[TokenSequence]) -> None:
    """Make sure that a model's attention and positions follow the tree.

    Compares the summed loss of some rows, packed, with that of each row alone in the model's own
    ordinary forward pass. A model that does not pass the blocks on to its attention computes it
    over whole masks from then on.

    Raises:
        ModelError: If they differ by more than rounding explains.
    """
    was_training = model.training
    model.eval()
    packed = build(rows).to(next(model.parameters()).device)
    logits = answer_logits(model, packed)
    found = float(loss_sum(logits, packed))
    tolerance = 1e-3 if logits.dtype in {torch.float32, torch.float64} else 3e-2
    expected = 0.0
    for row in rows:
        ids = torch.tensor([list(row.token_ids)], device=logits.device)
        alone = model(input_ids=ids, use_cache=False).logits[0, row.answer_start - 1 : -1]
        targets = ids[0, row.answer_start :]
        expected += float(functional.cross_entropy(alone.float(), targets, reduction="sum"))
    try:
        blocked = model(**inputs(model, packed, in_blocks=True)).logits[0]
        follows = abs(float(loss_sum(blocked, packed)) - expected) <= tolerance * abs(expected)
    except (RuntimeError, TypeError, ValueError):
        follows = False
    if not follows:
        attention.uninstall(model)
    model.train(was_training)
    if not abs(found - expected) <= tolerance * abs(expected):
        raise ModelError(
            f"the token tree gives a loss of {found:.4f} where this model gives {expected:.4f}, so "
            "its attention or positions do not follow the tree; choose another architecture"
        )


def text_config(model: Any) -> Any:
    """Return the configuration of a model's text part."""
    return model.config.get_text_config()


def _dtype(model: nn.Module) -> torch.dtype:
    return next(p.dtype for p in model.parameters() if p.is_floating_point())

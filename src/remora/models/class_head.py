"""A linear head over classes, in the place of the one over the vocabulary.

transformers calls it sequence classification: `score` on the last token's hidden state. PEFT trains
it whole beside the adapter (task type SEQ_CLS). Here such a model computes its head at the places
that it is asked for, as a causal language model does, so that its classes are to the token tree, to
padded rows and to the search of labels what tokens are to a model that writes.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from remora.data.prompt import Prompt
from remora.errors import ModelError

HEAD = "score"
"""The head's name in transformers' models for sequence classification with a decoder."""

KIND = "single_label_classification"
"""What transformers calls a model that answers with one of several classes."""

SET_KIND = "multi_label_classification"
"""What it calls one that scores each class by itself, since several may be true, or none."""

NAMES = frozenset(f"{HEAD}.{name}" for name in ("weight", "bias"))
"""Names of the head's weights in a whole model."""

SAVED_NAMES = frozenset(f"base_model.model.{name}" for name in NAMES)
"""The same in the file of an adapter."""


class Head(nn.Linear):
    """A linear layer that computes in the precision of its weights, within autocast too."""

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [..., classes] of hidden states [..., H]."""
        with torch.autocast(x.device.type, enabled=False):
            return functional.linear(x.to(self.weight.dtype), self.weight, self.bias)


def describe(config: Any, classes: Sequence[str]) -> None:
    """Let a configuration be that of a model with a head over some classes; () for a vocabulary.

    Raises:
        ModelError: If transformers has no such model of this architecture.
    """
    config.problem_type = KIND if classes else None
    if not classes:
        return
    if type(config) not in _mapping():
        raise ModelError(
            f"transformers has no {config.model_type} for sequence classification, so no head can "
            "score classes; use --answer words"
        )
    config.tie_word_embeddings = False  # to a head over the vocabulary, which is not there
    config.id2label = dict(enumerate(classes))
    config.label2id = {label: index for index, label in enumerate(classes)}


def is_described(config: Any) -> bool:
    """Return whether a configuration is that of a model with a head over classes."""
    return getattr(config, "problem_type", None) in {KIND, SET_KIND}


def auto_class(config: Any) -> Any:
    """Return the class of transformers that makes a configuration's model."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    return AutoModelForSequenceClassification if is_described(config) else AutoModelForCausalLM


def install(model: Any) -> None:
    """Let a model for sequence classification compute its head wherever it is asked to.

    Models of other kinds stay as they are. The head is float32 from now on, whatever the base is
    stored in.

    Raises:
        ModelError: If its head is not a single linear layer.
    """
    if not is_described(model.config):
        return
    stock = getattr(model, HEAD, None)
    if not isinstance(stock, nn.Linear):
        raise ModelError(
            f"{type(model).__name__} has no linear head named {HEAD}; use --answer words"
        )
    head = Head(
        stock.in_features, stock.out_features, stock.bias is not None, device="meta"
    ).to_empty(device=stock.weight.device)
    head.load_state_dict(stock.float().state_dict())
    setattr(model, HEAD, head.requires_grad_(stock.weight.requires_grad))
    kind: Any = type(model)
    model.__class__ = _where_asked(kind)


def head_of(model: Any) -> Any:
    """Return the head over classes of a model or of PEFT's around it; None where it writes."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return getattr(base, HEAD, None) if is_described(base.config) else None


@torch.no_grad()
def begin(model: Any, prompt: Prompt) -> None:
    """Set the rows of a new head, if the model has one, to what its labels' words are embedded as.

    A row is the mean of the embeddings of its label's tokens, and zero if there are none that the
    tokenizer knows. docs/log.md compares it with zeros and random rows.
    """
    head = head_of(model)
    if head is None:
        return
    embedding = model.get_input_embeddings().weight  # [V, E]
    head.weight.zero_()
    if head.bias is not None:
        head.bias.zero_()
    if embedding.shape[1] != head.in_features:
        return
    for row, label in zip(head.weight, prompt.labels, strict=True):
        words = " ".join(re.split(r"[\W_]+", label)).strip()
        ids = prompt.tokenizer(words, add_special_tokens=False)["input_ids"]
        if known := [token for token in ids if token != prompt.tokenizer.unk_token_id]:
            row.copy_(embedding[known].float().mean(0))


def narrow(adapted: Any) -> None:
    """Store the head that PEFT keeps beside its trained copy as the base is stored.

    Weights that are sharded together are of one type.
    """
    head = head_of(adapted)
    if head is not None and hasattr(head, "original_module"):
        embedding = adapted.get_input_embeddings().weight
        head.original_module.to(embedding.dtype)


def resize(model: Any, num_classes: int) -> None:
    """Give the head that PEFT copies for the next adapter another number of classes."""
    wrapper = head_of(model)
    original = wrapper.original_module if hasattr(wrapper, "original_module") else wrapper
    if original.out_features == num_classes:
        return
    empty = Head(original.in_features, num_classes, original.bias is not None, device="meta")
    empty = empty.to_empty(device=original.weight.device).requires_grad_(False)
    nn.init.zeros_(empty.weight)
    if wrapper is original:
        setattr(model, HEAD, empty)
    else:
        wrapper.original_module = empty


def _mapping() -> Any:
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification._model_mapping


@functools.cache
def _where_asked(kind: type) -> type:
    """Return a class of models for sequence classification with the interface of causal ones."""
    stock: Any = kind

    @functools.wraps(stock.forward)  # whose arguments say what the model takes
    def forward(
        self: Any,
        input_ids: Tensor | None = None,
        *,
        logits_to_keep: int | Tensor = 0,
        **more: Any,
    ) -> Any:
        from transformers.modeling_outputs import CausalLMOutputWithPast

        given = {name: value for name, value in more.items() if value is not None}
        output = self.base_model(input_ids=input_ids, **given)
        states = output.last_hidden_state
        if isinstance(logits_to_keep, int):
            logits_to_keep = torch.arange(states.shape[1], device=states.device)[-logits_to_keep:]
        return CausalLMOutputWithPast(
            logits=self.score(states[:, logits_to_keep]),
            past_key_values=output.get("past_key_values"),
            hidden_states=output.get("hidden_states"),
        )

    def get_output_embeddings(self: Any) -> Any:
        return self.score

    members = {
        "forward": forward,
        "get_output_embeddings": get_output_embeddings,
        "__module__": kind.__module__,
    }
    return type(kind.__name__, (kind,), members)

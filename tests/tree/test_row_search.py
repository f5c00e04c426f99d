"""Scoring by rows equals the exhaustive computation with the stock model.

Also covers remora.tree.row_states.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from test_scoring import LABELS, MESSAGES, count_tokens

from hybrids import BRANCHLESS, CONTINUED, hybrid_model
from remora.data.prompt import Prompt
from remora.tree import layouts, row_search
from remora.tree.features import Extractor
from remora.tree.row_search import RowSearch
from remora.tree.row_states import RowStates
from remora.tree.scoring import Scorer
from stock import exhaustive


def search_of(scorer: Scorer) -> RowSearch:
    searching = scorer._searching
    assert isinstance(searching, RowSearch)
    return searching


@pytest.fixture
def prompt(tokenizer: Any) -> Prompt:
    return Prompt(tokenizer, LABELS, instruction="Sort this.", max_length=200)


@pytest.mark.parametrize("kind", [*BRANCHLESS, "llama"])
def test_probabilities_equal_the_exhaustive_computation(
    kind: str, prompt: Prompt, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = hybrid_model(kind, len(tokenizer))
    layouts.assign(model, "rows")
    expected = exhaustive(model, prompt, MESSAGES)
    for max_tokens in (4096, 40):
        scorer = Scorer(model, prompt, tolerance=0, max_tokens=max_tokens)
        found = scorer.probabilities(MESSAGES)
        np.testing.assert_allclose(found, expected, atol=1e-6)
        assert search_of(scorer).continued == CONTINUED.get(kind, "at once")
    # A model that keeps no states computes whole rows.
    monkeypatch.setattr(row_search, "cache_argument", lambda model: None)
    scorer = Scorer(model, prompt, tolerance=0, max_tokens=150)
    np.testing.assert_allclose(scorer.probabilities(MESSAGES), expected, atol=1e-6)
    assert not search_of(scorer).is_cached


@pytest.mark.parametrize("kind", ["lfm2", "mamba"])
def test_evaluation_is_exact(kind: str, prompt: Prompt, tokenizer: Any) -> None:
    model = hybrid_model(kind, len(tokenizer))
    expected = exhaustive(model, prompt, MESSAGES)
    for true in ([1, 4, 5, 0, 2, 3], expected.argmax(1).tolist()):
        correct, losses = Scorer(model, prompt).evaluate(MESSAGES, true)
        assert correct.tolist() == (expected.argmax(1) == true).tolist()
        for stem, label, loss in zip(prompt.stems(MESSAGES), true, losses, strict=True):
            answer = prompt.answers[label]
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([[*stem, *answer]]), use_cache=False).logits
            steps = logits[0, len(stem) - 1 : -1].double().log_softmax(-1)
            wanted = -float(steps.gather(1, torch.tensor(answer)[:, None]).sum())
            assert loss == pytest.approx(wanted, rel=1e-6)


def test_the_prefix_and_each_message_are_computed_once(prompt: Prompt, tokenizer: Any) -> None:
    model = hybrid_model("lfm2", len(tokenizer), torch.float32)
    scorer = Scorer(model, prompt, tolerance=0)
    scorer.probabilities(MESSAGES[:1])  # tries the cache, and computes the prefix
    rows: list[list[int]] = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: rows.extend(kwargs["input_ids"].tolist()), with_kwargs=True
    )
    scorer.probabilities(MESSAGES)
    start = len(prompt.prefix)
    assert not [row for row in rows if row[:start] == list(prompt.prefix)]
    for stem in prompt.stems(MESSAGES):
        assert stem[:start] == list(prompt.prefix)
        assert sum(row[: len(stem) - start] == stem[start:] for row in rows) == 1


def test_tolerance_explores_less_and_keeps_the_argmax(prompt: Prompt, tokenizer: Any) -> None:
    model = hybrid_model("lfm2", len(tokenizer))
    exact = Scorer(model, prompt, tolerance=0).probabilities(MESSAGES)
    looked_at = []
    for tolerance in (0, 1.0):
        total = count_tokens(model)
        found = Scorer(model, prompt, tolerance=tolerance).probabilities(MESSAGES)
        looked_at.append(total())
        assert (found.argmax(1) == exact.argmax(1)).all()
    assert looked_at[1] < looked_at[0]


def test_a_cache_that_forgets_is_not_used(
    prompt: Prompt, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = hybrid_model("lfm2", len(tokenizer))
    expected = exhaustive(model, prompt, MESSAGES)
    extend = RowStates.extend

    def forgetful(self: RowStates, tokens: Any, places: Any) -> Any:
        for layer in getattr(self._cache, "layers", ()):
            for state in getattr(layer, "conv_states", {}).values():
                if state is not None:
                    state.zero_()
        return extend(self, tokens, places)

    monkeypatch.setattr(RowStates, "extend", forgetful)
    scorer = Scorer(model, prompt, tolerance=0)
    assert not search_of(scorer).is_cached
    np.testing.assert_allclose(scorer.probabilities(MESSAGES), expected, atol=1e-6)


def test_copies_of_states_leave_them_as_they_are(tokenizer: Any) -> None:
    model = hybrid_model("qwen3_5", len(tokenizer)).eval()
    with torch.inference_mode():
        states = RowStates(model)
        states.extend([[5, 6, 7, 8]], [3])
        first = states.select([0, 0]).extend([[9, 10], [11]], [1, 2])
        again = states.select([0, 0]).extend([[9, 10], [11]], [1, 2])
        alone = states.select([0]).extend([[11]], [0])
    assert torch.equal(first, again)
    torch.testing.assert_close(first[1:], alone)


@pytest.mark.parametrize("kind", ["lfm2", "llama"])
def test_features_by_rows_are_those_of_each_message_alone(
    kind: str, prompt: Prompt, tokenizer: Any
) -> None:
    model = hybrid_model(kind, len(tokenizer))
    stems = [tuple(stem) for stem in prompt.stems(MESSAGES)]
    in_trees = Extractor(model, prompt, max_tokens=100).features(stems) if kind == "llama" else None
    layouts.assign(model, "rows")
    found = Extractor(model, prompt, max_tokens=100).features(stems)
    for stem, features in zip(stems, found, strict=True):
        with torch.no_grad():
            states = model(input_ids=torch.tensor([stem]), output_hidden_states=True).hidden_states
        np.testing.assert_allclose(features[0], states[-1][0, -1].half().numpy(), rtol=2e-3)
        own = states[0][0, len(prompt.prefix) :].mean(0).half().numpy()
        np.testing.assert_allclose(features[2], own, rtol=2e-3, atol=1e-3)
    if in_trees is not None:
        np.testing.assert_allclose(found, in_trees, rtol=2e-3, atol=1e-3)

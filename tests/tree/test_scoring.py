"""Scoring equals the exhaustive computation with the stock model, and explores fewer labels.

Also covers remora.tree.label_search and packed_row.
"""

from __future__ import annotations

import itertools
import time
import weakref

import numpy as np
import pytest
import torch

from conftest import ARCHITECTURES, tiny_model
from remora.data.prompt import Prompt
from remora.data.table import Table
from remora.errors import Stopped
from remora.models import hub, loading
from remora.runtime import memory
from remora.runtime.reporter import Reporter
from remora.runtime.stop import Stop
from remora.tree import layouts, packing, scoring
from remora.tree.forward import answer_logits
from remora.tree.loss import loss_sum
from remora.tree.packed_row import PackedRow
from remora.tree.scoring import Scorer
from stock import exhaustive

LABELS = ["card arrival", "card arrival late", "card", "refund", "refund not showing up", "top up"]
MESSAGES = [
    "where is my card",
    "my refund!",
    "top up failed, why?",
    "where is my card",
    "card",
    "é",
]


@pytest.mark.usefixtures("pairs")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_probabilities_equal_the_exhaustive_computation(architecture, tokenizer):
    model = tiny_model(architecture, torch.float64, vocabulary=len(tokenizer))
    prompt = Prompt(tokenizer, LABELS, instruction="Sort this.", max_length=200)
    expected = exhaustive(model, prompt, MESSAGES)
    for max_tokens in (4096, 60, 12):
        found = Scorer(model, prompt, tolerance=0, max_tokens=max_tokens).probabilities(MESSAGES)
        np.testing.assert_allclose(found, expected, atol=1e-6)


def many_labels():
    labels = [
        f"{a} {b}" for a in ("card", "refund", "top up") for b in ("late", "lost", "fee", "no")
    ]
    return labels, [f"{m} {i}" for i in range(20) for m in MESSAGES]


def test_tolerance_bounds_the_error_and_keeps_the_argmax(tokenizer):
    labels, messages = many_labels()
    model = tiny_model("qwen2", torch.float64, vocabulary=len(tokenizer))
    prompt = Prompt(tokenizer, labels, instruction="", max_length=200)
    exact = Scorer(model, prompt, tolerance=0).probabilities(messages)
    looked_at = {}
    for tolerance in (1e-3, 0.1, 1.0):
        scorer = Scorer(model, prompt, tolerance=tolerance)
        calls = count_tokens(model)
        found = scorer.probabilities(messages)
        looked_at[tolerance] = calls()
        assert (found.argmax(1) == exact.argmax(1)).all()
        np.testing.assert_allclose(found.sum(1), 1)
        if tolerance < 1:
            assert np.abs(found - exact).max() <= tolerance / (1 - tolerance)
    assert looked_at[1.0] < looked_at[0.1] <= looked_at[1e-3]


@pytest.mark.durability
def test_a_validation_of_1500_labels_takes_less_than_a_minute_on_two_cores():
    """300 rows of an untrained model, which is unsure: a tenth of them, by the CPU's own clock."""
    folder = hub.find("nano")
    sizes = range(10), range(15), range(10)
    labels = [f"area {a} > thing {b} > state {c}" for a, b, c in itertools.product(*sizes)]
    prompt = Prompt(loading.load_tokenizer(folder), labels, instruction="Sort.", max_length=200)
    model = loading.load_base(folder, "lora", torch.float32, torch.device("cpu")).eval()
    scorer = Scorer(model, prompt)
    messages = [f"{message} {i}" for i in range(5) for message in MESSAGES]
    true = np.random.default_rng(0).integers(len(labels), size=len(messages)).tolist()
    scorer.evaluate(messages[:2], true[:2])
    began = time.process_time()
    scorer.evaluate(messages, true)
    assert time.process_time() - began < 2 * 60 / 10


def count_tokens(model):
    """Count the tokens that a model computes from here on."""
    seen = []
    handle = model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True
    )

    def total():
        handle.remove()
        return sum(seen)

    return total


def test_the_prefix_is_computed_once(tokenizer):
    model = tiny_model("qwen2", torch.float32, vocabulary=len(tokenizer))
    prompt = Prompt(tokenizer, LABELS, instruction="Sort this. " * 10, max_length=200)
    scorer = Scorer(model, prompt, max_tokens=20)
    total = count_tokens(model)
    scorer.probabilities(MESSAGES * 3)
    first = total()
    total = count_tokens(model)
    scorer.probabilities(MESSAGES * 3)
    assert first - total() == len(prompt.prefix)


def test_no_pass_has_more_logits_than_it_may(tokenizer, monkeypatch):
    model = tiny_model("qwen2", torch.float64, vocabulary=len(tokenizer))
    prompt = Prompt(tokenizer, LABELS, instruction="Sort this.", max_length=200)
    free = Scorer(model, prompt, tolerance=0).probabilities(MESSAGES)
    kept = []
    handle = model.register_forward_pre_hook(
        lambda _, args, kwargs: kept.append(len(kwargs["logits_to_keep"])), with_kwargs=True
    )
    for most, longest_path in ((20, 20), (2, 8)):  # a path without a branch is computed at once
        monkeypatch.setattr(scoring, "LOGIT_ELEMENTS", most * len(tokenizer))
        kept.clear()
        found = Scorer(model, prompt, tolerance=0).probabilities(MESSAGES)
        assert max(kept) <= longest_path
        np.testing.assert_allclose(found, free, atol=1e-9)
    handle.remove()


def test_no_messages_give_no_rows(tokenizer):
    model = tiny_model("qwen2", torch.float32, vocabulary=len(tokenizer))
    prompt = Prompt(tokenizer, LABELS, instruction="", max_length=200)
    assert Scorer(model, prompt).probabilities([]).shape == (0, len(LABELS))


def test_the_model_keeps_its_mode(tokenizer):
    model = tiny_model("qwen2", torch.float32, vocabulary=len(tokenizer)).train()
    prompt = Prompt(tokenizer, LABELS, instruction="", max_length=200)
    Scorer(model, prompt).probabilities(["a"])
    assert model.training


def test_a_row_that_was_parted_is_freed(tokenizer, monkeypatch):
    model = tiny_model("qwen2", torch.float32, vocabulary=len(tokenizer))
    prompt = Prompt(tokenizer, LABELS, instruction="", max_length=200)
    messages = [f"{message} {i}" for i in range(8) for message in MESSAGES]
    parted, alive = [], []
    keep_only, extend = PackedRow.keep_only, PackedRow.extend

    def keeping(row, searches):
        if not parted or parted[-1]() is not row:
            parted.append(weakref.ref(row))
        return keep_only(row, searches)

    def extending(row, *arguments):
        alive.append(sum(ref() is not None for ref in parted))
        return extend(row, *arguments)

    monkeypatch.setattr(PackedRow, "keep_only", keeping)
    monkeypatch.setattr(PackedRow, "extend", extending)
    Scorer(model, prompt, tolerance=0, max_tokens=150).probabilities(messages)
    assert len(parted) > 3
    assert max(alive) == 0


def test_what_is_freed_above_the_limit_is_given_back(tokenizer, monkeypatch):
    model = tiny_model("qwen2", torch.float32, vocabulary=len(tokenizer))
    prompt = Prompt(tokenizer, LABELS, instruction="", max_length=200)
    trimmed = []
    monkeypatch.setattr(memory, "trim", lambda: trimmed.append(1))
    for limit, gives in ((None, False), (1 << 60, False), (1, True)):
        Scorer(model, prompt, tolerance=0, limit_bytes=limit).probabilities(MESSAGES)
        assert bool(trimmed) is gives


@pytest.mark.usefixtures("pairs")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_evaluation_equals_the_exhaustive_computation(architecture, tokenizer):
    model = tiny_model(architecture, torch.float64, vocabulary=len(tokenizer))
    prompt = Prompt(tokenizer, LABELS, instruction="Sort this.", max_length=200)
    # Each message with each label, so that each label is the true one and the right one at times.
    messages = [message for message in MESSAGES for _ in LABELS]
    labels = [*range(len(LABELS))] * len(MESSAGES)
    right = exhaustive(model, prompt, MESSAGES).argmax(1).repeat(len(LABELS)) == labels
    rows = prompt.rows(messages, [LABELS[label] for label in labels])
    expected = []
    for ids, start in ((row.token_ids, row.answer_start) for row in rows):
        with torch.no_grad():
            logits = model.eval()(input_ids=torch.tensor([ids])).logits[0, start - 1 : -1]
        target = torch.tensor(ids[start:])
        expected.append(torch.nn.functional.cross_entropy(logits, target, reduction="sum"))
    for max_tokens in (4096, 60, 12):
        done = []
        scorer = Scorer(model, prompt, max_tokens=max_tokens)
        correct, losses = scorer.evaluate(messages, labels, done.append)
        assert correct.tolist() == right.tolist()
        np.testing.assert_allclose(losses, expected, atol=1e-6)
        assert sum(done) == len(messages)
        assert len(done) > 1 or max_tokens > 1000


def test_an_evaluation_explores_less_than_probabilities(tokenizer):
    labels, messages = many_labels()
    model = tiny_model("qwen2", torch.float64, vocabulary=len(tokenizer))
    prompt = Prompt(tokenizer, labels, instruction="", max_length=200)
    calls = count_tokens(model)
    best = Scorer(model, prompt).probabilities(messages).argmax(1)
    of_all = calls()
    for true, is_right in ((best, True), ((best + 1) % len(labels), False)):
        calls = count_tokens(model)
        correct, _ = Scorer(model, prompt).evaluate(messages, true.tolist())
        assert (correct == is_right).all()
        assert calls() < of_all


def test_no_pass_of_an_evaluation_has_more_logits_than_it_may(tokenizer, monkeypatch):
    model = tiny_model("qwen2", torch.float64, vocabulary=len(tokenizer))
    prompt = Prompt(tokenizer, LABELS, instruction="Sort this.", max_length=200)
    kept = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: kept.append(len(kwargs["logits_to_keep"])), with_kwargs=True
    )
    monkeypatch.setattr(scoring, "LOGIT_ELEMENTS", 20 * len(tokenizer))
    Scorer(model, prompt).evaluate(MESSAGES, [1, 4, 5, 0, 2, 3])
    assert max(kept) <= 20
    assert sum(kept) >= sum(len(prompt.answers[i]) for i in (1, 4, 5, 0, 2, 3))


def test_a_request_to_stop_is_noticed_within_a_batch(tokenizer):
    model = tiny_model("qwen2", torch.float32, vocabulary=len(tokenizer))
    prompt = Prompt(tokenizer, LABELS, instruction="", max_length=200)
    texts = [f"{message} {i}" for i in range(8) for message in MESSAGES]
    told = []
    reporter = Reporter()
    reporter.scoring = lambda what, done, total: told.append(done)
    stop = Stop(max_seconds=-1.0)
    stop.check = lambda: told[-1] and Stop.check(stop)  # once rows are done
    with pytest.raises(Stopped, match="time limit reached"):
        scoring.score_table(Scorer(model, prompt, max_tokens=60), texts, "test", reporter, stop)
    assert 0 < told[-1] < len(texts) < scoring.BATCH_ROWS


@pytest.mark.parametrize("layout", ["tree", "rows"])
def test_a_request_to_stop_is_noticed_between_the_passes_of_a_group(tokenizer, layout):
    labels, messages = many_labels()
    model = tiny_model("qwen2", torch.float64, vocabulary=len(tokenizer))
    prompt = Prompt(tokenizer, labels, instruction="", max_length=200)
    layouts.assign(model, layout)
    scorer = Scorer(model, prompt, tolerance=0)
    told: list[int] = []
    reporter = Reporter()
    reporter.scoring = lambda what, done, total: told.append(done)
    stop, checks = Stop(max_seconds=-1.0), []

    def check() -> None:
        checks.append(len(told))
        if len(checks) == 3:  # at the start, before the second pass, before the third
            Stop.check(stop)

    stop.check = check
    with pytest.raises(Stopped, match="time limit reached"):
        scoring.score_table(scorer, messages, "test", reporter, stop)
    assert told == [0]


def test_the_loss_of_a_table_is_that_of_training(tokenizer):
    """The mean over answer tokens, as of an effective batch of all rows; told as it goes on."""
    model = tiny_model("qwen2", torch.float64, vocabulary=len(tokenizer))
    prompt = Prompt(tokenizer, LABELS, instruction="", max_length=200)
    rows = Table(MESSAGES, LABELS)
    told = []
    reporter = Reporter()
    reporter.scoring = lambda *progress: told.append(progress)
    accuracy, loss = scoring.evaluate_rows(Scorer(model, prompt), rows, "validation", reporter)
    packed = packing.build(prompt.rows(MESSAGES, LABELS))
    with torch.no_grad():
        expected = loss_sum(answer_logits(model, packed), packed) / packed.num_supervised_tokens
    assert loss == pytest.approx(float(expected), rel=1e-9)
    scored = scoring.score_rows(Scorer(model, prompt, tolerance=0), rows, "test", Reporter())
    assert accuracy == scored.correct.mean()
    assert told[0] == ("validation", 0, len(MESSAGES))
    assert told[-1] == ("validation", len(MESSAGES), len(MESSAGES))

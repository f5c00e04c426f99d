"""One session assembles everything: what it leaves behind, and what it refuses."""

from __future__ import annotations

import inspect
from dataclasses import replace

import pytest
import torch

from remora.config import TrainConfig
from remora.data.dataset import load_data
from remora.errors import ModelError, ResourceError
from remora.runtime.reporter import Reporter
from remora.training import feasibility, layout, loop
from remora.training.session import open_session
from remora.tree import layouts


def test_the_plan_holds_for_training_and_for_scoring(config: TrainConfig) -> None:
    with open_session(replace(config, checkpointing="on"), load_data(config)) as opened:
        assert opened.settings.micro_batch_tokens == opened.plan.micro_batch_tokens == 40
        assert opened.settings.checkpointing == "on"
        scorer = opened.scorer()
        assert (scorer.max_tokens, scorer.limit_bytes) == (40, opened.heaviest.limit_bytes)
        assert opened.parameters.trainable == sum(
            p.numel() for p in opened.model.parameters() if p.requires_grad
        )


def test_the_seed_decides_and_the_callers_random_numbers_stay(config: TrainConfig) -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    starts = []
    for _ in range(2):
        torch.manual_seed(7)
        with open_session(config, load_data(config)) as opened:
            torch.rand(5)
            named = opened.model.named_parameters()
            starts.append([p.clone() for name, p in named if "lora_A" in name])
        assert torch.equal(torch.rand(3), expected)
    assert all(map(torch.equal, *starts))


def test_a_full_disk_is_refused_where_a_run_needs_it(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan_run = feasibility.plan_run

    def without_disk(*arguments, **settings):
        planned, heaviest = plan_run(*arguments, **settings)
        return replace(planned, free_disk_bytes=0), heaviest

    monkeypatch.setattr(feasibility, "plan_run", without_disk)
    dataset = load_data(config)
    with (
        pytest.raises(ResourceError, match="of disk"),
        open_session(config, dataset, needs_disk=True),
    ):
        pass
    with open_session(config, dataset):
        pass


def test_a_model_that_does_not_follow_the_tree_computes_rows_unless_the_tree_is_asked_for(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(model, rows, *more):
        raise ModelError("it does not follow; do this")

    monkeypatch.setattr(layout, "check_tree", refuse)
    with (
        pytest.raises(ModelError, match="does not follow"),
        open_session(replace(config, layout="tree"), load_data(config)),
    ):
        pass
    said: list[str] = []
    reporter = Reporter()
    monkeypatch.setattr(reporter, "say", said.append)
    with open_session(config, load_data(config), reporter=reporter) as opened:
        assert opened.plan.layout == opened.card.layout == layouts.of(opened.model) == "rows"
        assert opened.heaviest.rows
        assert opened.plan.micro_batch_tokens == config.micro_batch_tokens
    assert "layout: rows, it does not follow" in said


def test_the_layout_that_is_asked_for_is_taken(config: TrainConfig) -> None:
    said: list[str] = []
    reporter = Reporter()
    reporter.say = said.append  # type: ignore[method-assign]
    for wanted in ("auto", "tree", "rows"):
        asked = replace(config, layout=wanted)
        with open_session(asked, load_data(config), reporter=reporter) as opened:
            assert layouts.of(opened.model) == ("rows" if wanted == "rows" else "tree")
            assert opened.settings.layout == layouts.of(opened.model)
    assert "layout: tree, which its attention and positions follow" in said
    assert "layout: rows, as requested" in said


def test_the_loop_takes_a_session_and_little_else() -> None:
    assert len(inspect.signature(loop.fit).parameters) <= 8


@pytest.mark.parametrize(("kept", "told"), [("head", "their beginning"), ("tail", "their end")])
def test_long_messages_are_counted_and_cut_as_asked(config: TrainConfig, kept, told) -> None:
    said: list[str] = []
    reporter = Reporter()
    reporter.say = said.append  # type: ignore[method-assign]
    dataset = load_data(config)
    long = "first " + "and more of it " * 40 + "last"
    dataset.train.texts[0] = long
    settings = replace(config, truncate=kept, max_length=64)
    with open_session(settings, dataset, reporter=reporter) as opened:
        text = opened.prompt.tokenizer.decode(opened.prompt.stems([long])[0])
        assert ("first" in text, "last" in text) == (kept == "head", kept == "tail")
        assert opened.card.truncate == kept
    assert any("messages are longer than 64 tokens" in line and told in line for line in said)


def test_the_time_left_follows_the_rate(config: TrainConfig) -> None:
    """It is told again once other work has made a run slower, at the rate since then."""
    said: list[str] = []

    class Told(Reporter):
        def say(self, line: str) -> None:
            said.append(line)

    long = replace(config, max_steps=100_000)
    with open_session(long, load_data(long), reporter=Told()) as opened:
        state = loop._State(opened, None, None, 0)
        state.eval_seconds = 0.001
        hours = []
        for seconds in (1.0, 1.02, 10.0):  # for the same examples
            said.clear()
            state.progress.step += 10
            state.progress.speed.examples += 10 * config.batch_size
            state.progress.speed.seconds += seconds
            state.tell_time_left()
            hours.append(state.time_left().training / 3600)
            assert len(said) == (seconds != 1.02), said
        assert "about" in said[0]
        assert hours[2] == pytest.approx(10 * hours[0], rel=0.01)

"""What a run keeps and measures, and what it does where memory or numbers run out."""

from __future__ import annotations

import contextlib
import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import WORDS
from remora.config import TrainConfig
from remora.data.dataset import load_dataset
from remora.errors import ConfigError, DataError, DivergedError, ResourceError
from remora.evaluation.predictions import PROBABILITIES, read_probabilities
from remora.models import loading, saved
from remora.planning.plan import Rates
from remora.runtime import memory
from remora.runtime.device import choose_precision
from remora.runtime.process_group import ProcessGroup
from remora.runtime.reporter import Reporter, Validation
from remora.training import feasibility, finish, layout, micro_batches, run
from remora.training.progress import Speed
from remora.training.run import train
from remora.training.trainable import load_trainable
from remora.tree import scoring
from remora.tree.forward import answer_logits
from remora.tree.loss import loss_sum


@pytest.fixture
def config(base: Path, table: Path, tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        str(table),
        model=str(base),
        output=tmp_path / "runs",
        learning_rate=1e-2,
        epochs=8,
        batch_size=8,
        precision="float32",
        device="cpu",
        rank=8,
    )


class Watcher(Reporter):
    def __init__(self) -> None:
        self.seen: list[Validation] = []

    def validated(self, validation: Validation) -> None:
        self.seen.append(validation)


def test_the_best_adapter_is_kept_not_the_last(config: TrainConfig) -> None:
    watcher = Watcher()
    spoiled = replace(config, learning_rate=0.1, schedule="constant", eval_steps=1, max_steps=8)
    result = train(spoiled, reporter=watcher)
    best = max(watcher.seen, key=lambda v: (v.accuracy, -v.loss))
    assert watcher.seen[-1] != best
    assert result.best_step == best.step
    assert [v for v in watcher.seen if v.best][-1] == best
    dtype, device = torch.float32, torch.device("cpu")
    adapted, prompt, _ = saved.load_adapter(result.directory, base=None, dtype=dtype, device=device)
    dataset = load_dataset(config.data, seed=config.seed)
    scorer = scoring.Scorer(adapted, prompt)
    found = scoring.evaluate_rows(scorer, dataset.validation, "validation", Reporter())
    assert found == pytest.approx((best.accuracy, best.loss), rel=1e-4)


def test_each_evaluation_scores_the_same_sample_and_the_end_all_rows(
    config: TrainConfig, monkeypatch
) -> None:
    seen = []
    evaluate = scoring.evaluate_rows

    def noting(scorer, rows, *others):
        seen.append(rows)
        return evaluate(scorer, rows, *others)

    monkeypatch.setattr(scoring, "evaluate_rows", noting)
    watcher = Watcher()
    result = train(replace(config, epochs=2, eval_rows=6), reporter=watcher)
    assert [v.rows for v in watcher.seen] == [6, 6]
    assert seen[0] == seen[1]
    assert Counter(seen[0].labels) == dict.fromkeys(WORDS, 2)
    validation = load_dataset(config.data, seed=config.seed).validation
    assert len(validation) == 9
    assert set(seen[0].texts) < set(validation.texts)
    kept = read_probabilities(result.directory / PROBABILITIES, sorted(WORDS), "validation")
    assert len(kept.true) == 9


def test_a_run_tells_how_long_it_takes_and_what_measuring_took(
    config: TrainConfig, monkeypatch
) -> None:
    """The rates at the start are given; those of the first evaluation are measured."""
    rates = Rates(0.5, 0.25)
    monkeypatch.setattr(micro_batches.MicroBatches, "try_heaviest", lambda _: rates)
    listener = Listener()
    result = train(replace(config, epochs=2), reporter=listener)
    planned = json.loads((result.directory / "plan.json").read_text())
    assert planned["num_evaluations"] == 2
    assert planned["eval_rows"] == planned["num_scored_rows"] // 2 == 9  # 9 of the test
    assert planned["seconds"] == pytest.approx(0.5 * planned["run_tokens"])
    assert planned["validation_seconds"] == pytest.approx(0.25 * 18 * planned["eval_tokens"])
    assert planned["test_seconds"] == pytest.approx(0.25 * 18 * planned["scored_tokens"])
    assert planned["seconds_are"] == "estimated from the largest micro-batch"
    (told,) = [line for line in listener.lines if line.startswith("about ") and "steps" in line]
    assert re.match(
        r"about [\d.]+ min \([\d.]+ min training, [\d.]+ \w+ validation, "
        r"[\d.]+ \w+ scoring held-out rows\) "
        r"for 18 steps, ",
        told,
    )
    assert sum(line.endswith(" left") for line in listener.lines) == 1  # after the first of two
    figures = json.loads((result.directory / "evaluation.json").read_text())
    assert 0 < figures["validation_seconds"] < figures["train_seconds"]
    assert figures["test_seconds"] > 0


def test_early_stopping_stops_after_patience(config: TrainConfig) -> None:
    watcher = Watcher()
    spoiled = replace(config, learning_rate=0.3, schedule="constant", eval_steps=1, patience=2)
    result = train(spoiled, reporter=watcher)
    assert [v.best for v in watcher.seen[-3:]] == [True, False, False]
    assert result.num_steps == watcher.seen[-1].step < 72


def test_micro_batches_change_no_result(config: TrainConfig) -> None:
    weights = []
    for tokens in (4096, 40):
        result = train(replace(config, micro_batch_tokens=tokens, dropout=0.0, max_steps=6))
        path = result.directory / "metrics.jsonl"
        records = [json.loads(line) for line in path.read_text().splitlines()]
        weights.append([r["loss"] for r in records if "loss" in r])
    np.testing.assert_allclose(weights[0], weights[1], rtol=1e-4)


def run_out_of_memory(monkeypatch, above: int, calls: set[int] | None = None) -> list[int]:
    """Let the forward pass of trees above a size, or of these calls, run out of memory."""
    seen: list[int] = []
    forward = answer_logits

    def limited(adapted, packed):
        seen.append(packed.num_tokens)
        full = packed.num_tokens > above if calls is None else len(seen) in calls
        if adapted.training and full:
            forward(adapted, packed)  # its random numbers have been drawn
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(adapted, packed)

    monkeypatch.setattr(micro_batches, "answer_logits", limited)
    return seen


def losses(result: finish.TrainResult) -> list[float]:
    records = (result.directory / "metrics.jsonl").read_text().splitlines()
    return [record["loss"] for record in map(json.loads, records) if "loss" in record]


class Listener(Reporter):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


@pytest.mark.parametrize("calls", [None, {6}])
def test_running_out_of_memory_changes_no_result(
    config: TrainConfig, monkeypatch, calls: set[int] | None
) -> None:
    settings = replace(config, dropout=0.0, max_steps=6)
    undisturbed = losses(train(settings))
    listener = Listener()
    run_out_of_memory(monkeypatch, 60, calls)
    disturbed = losses(train(settings, reporter=listener))
    np.testing.assert_allclose(disturbed, undisturbed, rtol=1e-4)
    assert len([line for line in listener.lines if "out of memory" in line]) == 1


def test_a_run_that_ran_out_is_the_run_that_began_smaller(config: TrainConfig, monkeypatch) -> None:
    settings = replace(config, dropout=0.3, max_steps=4)
    # Untried, so that memory runs out in the first step itself, after its dropout has been drawn.
    monkeypatch.setattr(micro_batches.MicroBatches, "try_heaviest", lambda _: Rates(0.0, 0.0))
    sizes = []
    halve = micro_batches.MicroBatches._halve

    def halve_and_note(self, batch) -> None:
        halve(self, batch)
        sizes.append(self.max_tokens)

    monkeypatch.setattr(micro_batches.MicroBatches, "_halve", halve_and_note)
    with monkeypatch.context() as patch:
        run_out_of_memory(patch, 0, {1})
        disturbed = losses(train(settings))
    (size,) = sizes
    assert losses(train(replace(settings, micro_batch_tokens=size))) == disturbed


def test_memory_that_holds_no_row_is_one_line_and_exit_five(config, monkeypatch) -> None:
    run_out_of_memory(monkeypatch, 0)
    with pytest.raises(ResourceError, match="a single row of") as error:
        train(config)
    assert error.value.exit_code == 5


def test_a_processor_is_not_asked_for_memory_that_is_not_there(config, monkeypatch) -> None:
    listener = Listener()
    undisturbed = losses(train(replace(config, dropout=0.0, max_steps=3)))
    planned = feasibility.plan_run

    def plan_then_shrink(*arguments, **options):
        made, heaviest = planned(*arguments, **options)
        largest = made.largest_micro_batch * heaviest.bytes_per_token
        monkeypatch.setattr(memory, "free_bytes", lambda _: int(largest * 0.7))
        return made, heaviest

    monkeypatch.setattr(feasibility, "plan_run", plan_then_shrink)
    settings = replace(config, dropout=0.0, max_steps=3)
    disturbed = losses(train(settings, reporter=listener))
    assert [line for line in listener.lines if "out of memory" in line]
    np.testing.assert_allclose(disturbed, undisturbed, rtol=1e-4)


def test_what_cannot_fit_is_refused_before_weights_are_read(config, monkeypatch) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda _: 0)
    monkeypatch.setattr(loading, "load", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(ResourceError, match=r"of memory, .* are available; what fits"):
        train(config)


def test_scoring_keeps_to_what_was_planned(config: TrainConfig, monkeypatch) -> None:
    plan_run = feasibility.plan_run
    made = []

    def plan_smaller(*arguments, **settings):
        planned, heaviest = plan_run(*arguments, **settings)
        return replace(planned, micro_batch_tokens=70), heaviest

    class Noted(scoring.Scorer):
        def __init__(self, *arguments, **settings) -> None:
            made.append(settings)
            super().__init__(*arguments, **settings)

    monkeypatch.setattr(feasibility, "plan_run", plan_smaller)
    monkeypatch.setattr(saved, "Scorer", Noted)
    train(replace(config, epochs=1))
    assert len(made) >= 2  # for validation and for the test rows
    assert {settings["max_tokens"] for settings in made} == {70}
    assert all(settings["limit_bytes"] > 0 for settings in made)


def test_the_peak_that_is_told_is_that_of_any_process(config: TrainConfig, monkeypatch) -> None:
    class OfTwo(ProcessGroup):
        def gather(self, value):
            told = super().gather(value)
            return [*told, told[0] + 10**12] if isinstance(value, int) and value > 10**7 else told

    monkeypatch.setattr(run, "join", lambda: contextlib.nullcontext(OfTwo()))
    result = train(replace(config, epochs=1))
    planned = json.loads((result.directory / "plan.json").read_text())
    assert result.peak_memory_bytes == planned["measured_peak_bytes"] > 10**12


def test_the_loss_of_the_first_step_is_the_stock_loss(config: TrainConfig, base: Path) -> None:
    from transformers import AutoModelForCausalLM

    result = train(replace(config, max_steps=1, dropout=0.0, schedule="constant"))
    first = json.loads((result.directory / "metrics.jsonl").read_text().splitlines()[0])
    dataset = load_dataset(config.data, seed=config.seed)
    _, prompt, _, _ = load_trainable(
        config, dataset.labels, choose_precision(torch.device("cpu"), "float32"), "cpu"
    )
    order = np.random.default_rng((config.seed, 0)).permutation(len(dataset.train))[
        : config.batch_size
    ]
    stock = AutoModelForCausalLM.from_pretrained(base).eval()
    total, count = 0.0, 0
    for i in order:
        (row,) = prompt.rows([dataset.train.texts[i]], [dataset.train.labels[i]])
        labels = [-100] * row.answer_start + row.token_ids[row.answer_start :]
        n = len(row.token_ids) - row.answer_start
        with torch.no_grad():
            loss = stock(torch.tensor([row.token_ids]), labels=torch.tensor([labels])).loss
        total, count = total + float(loss) * n, count + n
    assert first["loss"] == pytest.approx(total / count, rel=1e-5)


def diverging(monkeypatch, steps: set[int]) -> None:
    """Make the loss of some steps not finite, where a step has one micro-batch."""
    # The heaviest micro-batch comes first, and is computed twice.
    done = [-2]

    def spoilt(logits, packed):
        done[0] += 1
        return loss_sum(logits, packed) * (float("nan") if done[0] in steps else 1.0)

    monkeypatch.setattr(micro_batches, "loss_sum", spoilt)
    monkeypatch.setattr(layout, "check_tree", lambda *_: None)


def test_a_diverging_run_ends_with_six_and_says_where_it_began(
    config: TrainConfig, monkeypatch
) -> None:
    diverging(monkeypatch, set(range(3, 100)))
    with pytest.raises(
        DivergedError, match="the loss is nan, and has not been finite since step 3; lower"
    ):
        train(config)
    (directory,) = config.output.iterdir()
    log = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert [r["loss"] is None for r in log if "loss" in r] == [False] * 2 + [True] * 5


def test_a_step_that_is_not_finite_is_not_taken(config: TrainConfig, monkeypatch) -> None:
    lines: list[str] = []

    class Listener(Reporter):
        def say(self, line: str) -> None:
            lines.append(line)

    diverging(monkeypatch, {2, 4, 5})
    result = train(config, reporter=Listener())
    assert [line for line in lines if "skipping" in line] == [
        "the loss is nan at step 2; skipping this step",
        "the loss is nan at step 4; skipping this step",
    ]
    assert result.metrics.accuracy > 0.5


def test_no_rows_to_measure_on_is_an_error(config: TrainConfig) -> None:
    with pytest.raises(DataError, match="no rows to measure on"):
        train(replace(config, test_fraction=0.0, validation_fraction=0.0))


def test_speed_leaves_the_warm_up_out() -> None:
    speed = Speed(warm_up_steps=2)
    for seconds in (100.0, 50.0, 2.0, 2.0):
        speed.add(32, 64, seconds)
    assert speed.examples_per_second == 16
    assert speed.supervised_tokens_per_second == 32


@pytest.mark.parametrize("first", [5.0, 50.0])
def test_a_run_is_timed_without_what_sets_up_the_libraries(
    first: float, config: TrainConfig, monkeypatch
) -> None:
    """The largest micro-batch is timed when it is computed again, unless it takes long."""
    now = [0.0]
    passed = iter([first, 1.0])

    def backward(self, packed, num_supervised) -> torch.Tensor:
        now[0] += next(passed)
        sizes.append(packed.num_tokens)
        return torch.zeros(())

    sizes: list[int] = []
    found: list[float] = []
    tried = micro_batches.MicroBatches.try_heaviest

    def try_heaviest(self) -> Rates:
        with monkeypatch.context() as patch:
            patch.setattr(micro_batches.MicroBatches, "_backward", backward)
            patch.setattr(micro_batches.time, "perf_counter", lambda: now[0])
            found.append(tried(self).training * sizes[0])
        return Rates(0.0, 0.0)

    monkeypatch.setattr(micro_batches.MicroBatches, "try_heaviest", try_heaviest)
    train(replace(config, max_steps=1))
    assert found == [pytest.approx(1.0 if first < micro_batches.LONG_SECONDS else first)]
    assert len(sizes) == (2 if first < micro_batches.LONG_SECONDS else 1)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("tensorbord", "there is no tracker 'tensorbord'; choose from aim, "),
        ("aim", "the tracker aim is not installed; install its package first"),
    ],
)
def test_a_tracker_that_would_stay_silent_is_refused(name: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        train(TrainConfig("sample:support", model="none", trackers=(name,)))


def test_the_tolerance_of_the_final_scoring_changes_no_weights(config: TrainConfig) -> None:
    kept, figures, adapters = {}, {}, set()
    for tolerance in (0.0, 1.0):
        settings = replace(config, max_steps=1, tolerance=tolerance)
        directory = train(settings).directory
        kept[tolerance] = read_probabilities(directory / PROBABILITIES, sorted(WORDS), "test")
        figures[tolerance] = json.loads((directory / "evaluation.json").read_text())
        adapters.add((directory / "adapter" / "adapter_model.safetensors").read_bytes())
        assert figures[tolerance]["tolerance"] == tolerance
    assert len(adapters) == 1
    assert figures[0.0]["metrics"]["accuracy"] == figures[1.0]["metrics"]["accuracy"]
    assert np.abs(kept[0.0].probabilities - kept[1.0].probabilities).max() > 1e-4

"""The whole path from a table to a measured adapter, through the real command line."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import WORDS, call
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


def remora(*arguments: str | Path, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "remora", *map(str, arguments)]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, check=False)


@pytest.fixture
def remora_here(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """Run the command line in this process, which has torch imported, and return its output."""

    def run_here(*arguments: str | Path, stdin: str = "") -> str:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
            code = call(*arguments)
        shown = capsys.readouterr()
        assert code == 0, shown.err
        return shown.out

    return run_here


@pytest.fixture(scope="module")
def finished(base: Path, table: Path, tmp_path_factory: pytest.TempPathFactory):
    output = tmp_path_factory.mktemp("cli")
    settings = ["--learning-rate", "1e-2", "--epochs", "8", "--rank", "8", "--batch-size", "8"]
    settings += ["--device", "cpu", "--seed", "1"]
    done = remora(
        "train", table, "--model", base, "--output", output, *settings, "--precision", "float32"
    )
    assert done.returncode == 0, done.stderr
    (directory,) = output.iterdir()
    return done, directory


def test_train_learns_and_shows_what_a_user_wants_to_know(finished) -> None:
    done, directory = finished
    result = json.loads((directory / "evaluation.json").read_text())
    assert result["metrics"]["accuracy"] == 1.0
    for wanted in ("accuracy   100.00%", "95% interval", "TF-IDF + linear SVM", "macro-F1"):
        assert wanted in done.stdout
    assert re.search(
        r"time +training \d+ s, validation \d+ s \(\d+%\), scoring held-out rows \d+ s \(\d+%\)\n",
        done.stdout,
    )
    for wanted in ("examples/s", "supervised tokens/s", "peak memory", "adapter    "):
        assert wanted in done.stdout
    *_, command = done.stdout.splitlines()
    assert "\nwhat to do next\n1. " in done.stdout
    assert command.startswith("    remora ")
    assert str(directory) in command
    assert "it/s" not in done.stdout + done.stderr
    assert "Warning" not in done.stderr
    assert "Traceback" not in done.stderr


def test_the_run_directory_holds_what_it_takes_to_repeat_the_run(finished) -> None:
    _, directory = finished
    names = {str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file()}
    assert names == {
        "config.toml",
        "environment.json",
        "data.json",
        "plan.json",
        "metrics.jsonl",
        "evaluation.json",
        "predictions.csv",
        "probabilities.safetensors",
        "features.safetensors",
        "neighbours.json",
        "README.md",
        "report.html",
        "adapter/adapter_model.safetensors",
        "adapter/adapter_config.json",
        "adapter/remora.json",
    }
    records = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    steps = [r for r in records if "loss" in r]
    assert [r["step"] for r in steps] == list(range(1, len(steps) + 1))
    assert steps[-1]["loss"] < 0.75 * steps[0]["loss"]  # which was that of labels at random
    assert steps[-1]["examples_per_second"] > 0
    rows = list(csv.DictReader(io.StringIO((directory / "predictions.csv").read_text("utf-8"))))
    assert {row["predicted"] for row in rows} == set(WORDS)
    assert set(json.loads((directory / "data.json").read_text())["labels"]) == set(WORDS)
    assert all(0 < float(row["probability"]) <= 1 for row in rows)
    kept = read_probabilities(directory / PROBABILITIES, sorted(WORDS), "test")
    np.testing.assert_allclose(kept.confidence, [float(r["probability"]) for r in rows], atol=1e-6)
    assert [sorted(WORDS)[i] for i in kept.true] == [row["label"] for row in rows]
    assert {row["baseline"] for row in rows} <= set(WORDS)


def test_the_same_settings_give_the_same_adapter_again(finished, tmp_path: Path) -> None:
    _, directory = finished
    again = remora("train", "--config", directory / "config.toml", "--output", tmp_path)
    assert again.returncode == 0, again.stderr
    (other,) = tmp_path.iterdir()
    name = "adapter/adapter_model.safetensors"
    assert (directory / name).read_bytes() == (other / name).read_bytes()


def test_predict_streams_labels_in_order(finished, remora_here) -> None:
    _, directory = finished
    done = remora("predict", directory, "--device", "cpu", stdin="my card\nmy refund\n")
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader(done.stdout.splitlines()))
    assert [row["text"] for row in rows] == ["my card", "my refund"]
    assert [row["label"] for row in rows] == ["card arrival", "refund"]
    shown = remora_here("predict", directory, "--json", "--top-k", "2", stdin="top up please\n")
    (line,) = shown.splitlines()
    ranked = json.loads(line)["labels"]
    assert ranked[0]["label"] == "top up failed"
    assert ranked[0]["probability"] >= ranked[1]["probability"]


def test_eval_measures_what_train_measured(
    finished, remora_here, table: Path, tmp_path: Path
) -> None:
    _, directory = finished
    kept = tmp_path / "kept.csv"
    shown = remora_here("eval", directory, table, "--json", "--predictions", kept)
    assert json.loads(shown)["accuracy"] > 0.95
    assert len(kept.read_text(encoding="utf-8").splitlines()) == 91


def test_eval_chooses_its_threshold_on_validation_rows(
    finished, remora_here, table: Path, tmp_path: Path
) -> None:
    _, directory = finished
    shown = remora_here("eval", directory, table, "--abstain-at-accuracy", "0.9")
    assert re.search(r"abstain    threshold 0\.\d+ for 90.0% accuracy, chosen on 9", shown)
    assert re.search(r"at temperature \d+\.\d\d, fitted on 9 validation rows", shown)
    (tmp_path / "oos.csv").write_text("text\nWhat a fine day\nbla bla\n", encoding="utf-8")
    only = tmp_path / "adapter"
    shutil.copytree(directory / "adapter", only)
    shown = remora_here(
        *("eval", only, table, "--json", "--abstain-at-accuracy", "0.9"),
        *("--out-of-scope", tmp_path / "oos.csv"),
    )
    found = json.loads(shown)["reliability"]
    assert found["abstention"]["chosen_on"] == "the measured rows"
    assert found["temperature"] is None
    assert found["out_of_scope"]["num_rows"] == 2
    assert 0 < found["out_of_scope"]["auroc"] < 1


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


def test_the_plan_is_kept_beside_what_was_measured(finished) -> None:
    done, directory = finished
    kept = json.loads((directory / "plan.json").read_text())
    assert kept["peak_bytes"] == sum(kept["memory"].values())
    assert kept["measured_peak_bytes"] > 0
    assert "peak memory of training: " in done.stderr


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


def test_a_tracker_gets_every_record(remora_here, base: Path, table: Path, tmp_path: Path) -> None:
    remora_here(
        *("train", table, "--model", base, "--output", tmp_path, "--name", "run"),
        *("--max-steps", 3, "--trackers", "tensorboard"),
    )
    (events,) = (tmp_path / "run").rglob("events.out.tfevents*")
    written = events.read_bytes()
    assert b"validation_accuracy" in written
    assert b"examples_per_second" in written


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

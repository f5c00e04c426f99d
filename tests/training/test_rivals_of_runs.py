"""The baselines of a run: which are chosen, what they answer, and what they may not cost.

Of remora.training.rivals. Test files need names of their own, and tests/evaluation has test_rivals.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import encoders
from conftest import WORDS, call
from remora.config import CompareConfig, DiagnoseConfig, TrainConfig
from remora.data.dataset import load_data
from remora.diagnosis import diagnose
from remora.errors import ConfigError, Stopped
from remora.evaluation import compare, regression, results
from remora.models import loading
from remora.report import pages
from remora.runtime import memory
from remora.runtime.reporter import Reporter
from remora.training import finish, resume, rivals
from remora.training.run import train
from remora.training.trainable import as_base
from remora.tree import features
from remora.tree.scoring import Scorer
from runtime.test_process_group import ended

ALL = ("svm", "zero-shot", "probe")


class Listener(Reporter):
    def __init__(self) -> None:
        self.lines: list[str] = []
        self.scored: list[tuple[str, int, int]] = []

    def say(self, line: str) -> None:
        self.lines.append(line)

    def scoring(self, what: str, done: int, total: int) -> None:
        self.scored.append((what, done, total))


def columns(run: Path) -> dict[str, list[str]]:
    with (run / "predictions.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return {name: [row[name] for row in rows] for name in rows[0]}


def base_answers(config: TrainConfig, texts: list[str]) -> list[str]:
    """What the untrained base says is likeliest, every label explored."""
    base, prompt, _ = loading.load_base_and_prompt(
        config, sorted(WORDS), torch.float32, torch.device("cpu")
    )
    scored = Scorer(base, prompt, tolerance=0).probabilities(texts)
    return [prompt.labels[i] for i in scored.argmax(1)]


@pytest.mark.parametrize("method", ["lora", "full"])
def test_zero_shot_and_probe_are_of_the_base_not_of_what_trained(
    config: TrainConfig, method: str
) -> None:
    config = replace(config, method=method, baselines=ALL)
    run = train(config).directory
    given = columns(run)
    assert given["zero-shot"] == base_answers(config, given["text"])
    assert given["zero-shot"] != given["predicted"]
    # The probe: the same features, computed by the stock model row by row
    dataset = load_data(config)
    base, prompt, _ = loading.load_base_and_prompt(
        config, dataset.labels, torch.float32, torch.device("cpu")
    )

    def states(texts: list[str]) -> np.ndarray:
        rows = []
        for stem in prompt.stems(texts):
            with torch.no_grad():
                out = base(torch.tensor([stem]), output_hidden_states=True).hidden_states[-1]
            rows.append(out[0, -1].numpy().astype(np.float16))
        return np.stack(rows)

    expected = regression.predict(
        states(dataset.train.texts), dataset.train.labels, states(given["text"])
    )
    assert np.mean([a == b for a, b in zip(expected, given["probe"], strict=True)]) >= 0.8
    figures = json.loads((run / "evaluation.json").read_text())
    found = {each["name"]: each for each in figures["rivals"]}
    assert list(found) == [*ALL]
    for name, column in (("svm", "baseline"), ("zero-shot", "zero-shot"), ("probe", "probe")):
        right = [a == b for a, b in zip(given[column], given["label"], strict=True)]
        assert found[name]["accuracy"] == pytest.approx(np.mean(right))
        assert found[name]["seconds"] > 0
    assert found["probe"]["num_train_rows"] == len(dataset.train)
    assert found["zero-shot"]["num_train_rows"] == 0
    assert found["svm"]["accuracy"] == figures["baseline"]["metrics"]["accuracy"]
    assert found["svm"]["p_value"] == figures["p_value"]


def test_an_adapter_trains_on_after_its_base_was_asked(config: TrainConfig) -> None:
    """The adapter and its gradients are as before when the baselines are done."""
    from remora.models import lora

    base, _, folder = loading.load_base_and_prompt(
        config, sorted(WORDS), torch.float32, torch.device("cpu")
    )
    adapted = lora.adapt(base, config)
    before = {name: p.requires_grad for name, p in adapted.named_parameters()}
    card = SimpleNamespace(method="lora")
    with as_base(adapted, card, folder, torch.float32):
        pass
    assert {name: p.requires_grad for name, p in adapted.named_parameters()} == before


def test_baselines_change_no_result_of_the_run(config: TrainConfig) -> None:
    runs = [
        train(replace(config, baselines=names, max_steps=4)).directory
        for names in (("none",), ("svm",), ALL)
    ]
    weights = {(run / "adapter" / "adapter_model.safetensors").read_bytes() for run in runs}
    assert len(weights) == 1
    figures = [json.loads((run / "evaluation.json").read_text()) for run in runs]
    assert figures[0]["metrics"] == figures[1]["metrics"] == figures[2]["metrics"]
    assert (figures[0]["baseline"], figures[0]["rivals"]) == (None, [])
    assert "p_value" not in figures[0]
    assert [each["name"] for each in figures[1]["rivals"]] == ["svm"]
    both = [figures[i]["baseline"] for i in (1, 2)]
    for each in both:
        each.pop("seconds")
    assert both[0] == both[1]
    assert "baseline" not in columns(runs[0])


def test_a_run_without_baselines_is_read_by_everything(config: TrainConfig, capsys) -> None:
    """The report, the card, the comparison and the diagnosis do without."""
    without = train(replace(config, baselines=("none",), max_steps=2, name="without")).directory
    other = train(replace(config, max_steps=4, baselines=("svm",), name="with")).directory
    assert results.read(without).baseline is None
    page = pages.page(without)
    assert "Baselines: what could be used instead" not in page
    assert "| baseline |" not in (without / "README.md").read_text()
    for order in ((without, other), (other, without)):
        found = compare.compare_runs(CompareConfig(order))
        named = [each.name for each in found.contenders if each.is_baseline]
        assert named == ["TF-IDF + linear SVM"]
    third = train(replace(config, baselines=("none",), max_steps=3, name="third")).directory
    found = compare.compare_runs(CompareConfig((without, third)))
    assert [each.name for each in found.contenders if each.is_baseline] == []
    assert "no run has predictions of the SVM, which is left out" in found.notes
    diagnose.diagnose_run(DiagnoseConfig(without, method="tfidf"))
    arguments = ["--model", config.model, "--output", str(config.output), "--max-steps", "1"]
    assert call("train", config.data, *arguments, "--baselines", "none") == 0
    shown = capsys.readouterr()
    assert "baseline  " not in shown.out  # the head of their table
    assert "baselines: " not in shown.err


def test_the_terminal_names_them_all_and_the_best(config: TrainConfig, capsys) -> None:
    arguments = ["--model", config.model, "--output", str(config.output), "--max-steps", "2"]
    arguments += ["--baselines", "svm,zero-shot", "--baselines", "probe", "--device", "cpu"]
    assert call("train", config.data, *arguments) == 0
    shown = capsys.readouterr()
    told = " ".join(shown.out.split())
    name = Path(config.model).name
    for wanted in ("TF-IDF + linear SVM", f"{name}, zero-shot", f"{name}, linear probe"):
        assert wanted in told
    assert "adjusted for 3 baselines" in told
    assert "baselines: svm, zero-shot, probe" in shown.err
    assert "baseline zero-shot: scoring 6 rows" in shown.err
    (run,) = config.output.iterdir()
    page = pages.page(run)
    for text in (page, (run / "README.md").read_text()):
        assert f"{name}, linear probe" in text
        assert "adjusted for 3 baselines" in text


def test_compare_shows_the_baselines_of_all_rows(config: TrainConfig) -> None:
    runs = [
        train(replace(config, baselines=ALL, max_steps=steps, name=f"{steps}")).directory
        for steps in (2, 4)
    ]
    found = compare.compare_runs(CompareConfig((*runs,)))
    name = Path(config.model).name
    baselines = {each.name: each for each in found.contenders if each.is_baseline}
    assert baselines.keys() == {
        "TF-IDF + linear SVM",
        f"{name}, zero-shot",
        f"{name}, linear probe",
    }
    assert baselines[f"{name}, linear probe"].num_bytes > baselines[f"{name}, zero-shot"].num_bytes
    given = columns(runs[0])
    right = {
        column: np.array(given[column]) == np.array(given["label"])
        for column in ("predicted", "probe")
    }
    pair = next(
        each for each in found.pairs if {each.first, each.second} == {"2", f"{name}, linear probe"}
    )
    only = {
        int((right["predicted"] & ~right["probe"]).sum()),
        int((right["probe"] & ~right["predicted"]).sum()),
    }
    assert {pair.only_first_right, pair.only_second_right} == only
    shown = {frozenset((each.first, each.second)) for each in found.shown_pairs}
    assert shown < {frozenset((each.first, each.second)) for each in found.pairs}
    assert not any(pair <= baselines.keys() for pair in shown)


PLAN = SimpleNamespace(message_tokens=10.0, prefix_tokens=20)


def affordable(budget: float, num_train: int = 2_000, num_held_out: int = 1_500):
    """A message has 10 tokens, the labels 30 more, the prefix 20."""
    return rivals.affordable(budget, PLAN, 30, num_train, num_held_out)


def test_what_a_tenth_pays_for_is_counted_by_hand() -> None:
    zero_shot = 20 + 500 * 40
    assert affordable(1e9) == affordable(3 * zero_shot) == (500, 2_000, 1_500)
    # A third for zero-shot; the probe gets all training rows, then held-out rows
    assert affordable(50_040) == (416, 2_000, (50_040 - (20 + 416 * 40) - 20) // 10 - 2_000)
    # A part of the training rows beside 1,000 held-out ones, at least half of them
    found = affordable(36_000)
    assert found == (299, (36_000 - 20 - 299 * 40 - 20) // 10 - 1_000, 1_000)
    assert 1_000 < found[1] < 2_000
    assert affordable(28_000) == (232, 0, 0)
    # Too few rows to score zero-shot leave more to the probe
    assert affordable(11_000, num_train=90, num_held_out=1_500) == (0, 90, 1_008)
    assert affordable(1_000) == affordable(-5) == (0, 0, 0)
    # Fewer held-out rows than the least are enough if they are all
    assert affordable(1e6, num_train=10, num_held_out=6) == (6, 10, 6)


def test_a_run_is_counted_in_forward_passes() -> None:
    """Of an adapter a forward pass is half of a step, of all weights a third; once more if layers
    are recomputed."""
    held_out = {"num_evaluations": 3, "eval_rows": 100, "eval_tokens": 15.0}
    held_out |= {"num_scored_rows": 200, "scored_tokens": 20.0}
    plan = SimpleNamespace(run_tokens=10_000.0, checkpointing=False, **held_out)
    measuring = 3 * 100 * 15 + 200 * 20
    assert rivals.forward_tokens(plan, "lora") == pytest.approx(20_000 + measuring)
    assert rivals.forward_tokens(plan, "full") == pytest.approx(30_000 + measuring)
    plan.checkpointing = True
    assert rivals.forward_tokens(plan, "qlora") == pytest.approx(30_000 + measuring)


def test_tokens_that_labels_share_count_once() -> None:
    answers = ((1, 2, 9), (1, 2, 3, 9), (4, 9))
    assert rivals.label_tokens(SimpleNamespace(answers=answers)) == 7


def test_auto_says_what_it_leaves_out_and_how_to_ask(config: TrainConfig, monkeypatch) -> None:
    short, long = Listener(), Listener()
    run = train(replace(config, max_steps=1), reporter=short).directory
    (line,) = [line for line in short.lines if line.startswith("baselines:")]
    assert line == (
        "baselines: svm; zero-shot and probe would take more than a tenth of the run's time, add "
        "them by --baselines auto,zero-shot,probe"
    )
    assert not (run / features.FEATURES).exists()
    monkeypatch.setattr(rivals, "SHARE", 100.0)
    run = train(replace(config, max_steps=1), reporter=long).directory
    assert "baselines: svm, zero-shot, probe" in long.lines
    assert (run / features.FEATURES).is_file()


def test_a_part_of_the_rows_is_stratified_and_told(config: TrainConfig, monkeypatch) -> None:
    monkeypatch.setattr(rivals, "affordable", lambda *_: (3, 30, 4))
    listener = Listener()
    run = train(replace(config, max_steps=1), reporter=listener).directory
    given = columns(run)
    measured = [i for i, each in enumerate(given["zero-shot"]) if each]
    assert len(measured) == 3
    assert {given["label"][i] for i in measured} == set(WORDS)
    assert sum(map(bool, given["probe"])) == 4
    found = {each["name"]: each for each in results.read(run).figures["rivals"]}
    assert (found["zero-shot"]["num_rows"], found["zero-shot"]["num_all_rows"]) == (3, 6)
    assert (found["probe"]["num_train_rows"], found["probe"]["num_all_train_rows"]) == (30, 48)
    assert (found["probe"]["num_rows"], found["probe"]["num_all_rows"]) == (4, 6)
    told = "baselines: svm, zero-shot on 3 of 6 rows, probe trained on 30 of 48 rows and measured "
    assert f"{told}on 4 of 6 rows" in listener.lines
    comparison = compare.compare_runs(CompareConfig((run,)))
    assert any("zero-shot is left out:" in note for note in comparison.notes)


def test_memory_bounds_the_rows_of_a_probe(config: TrainConfig, monkeypatch) -> None:
    monkeypatch.setattr(rivals, "MIN_MEMORY_ROWS", 9)
    answers = rivals.of_base

    def short_of_memory(*arguments, **others):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(memory, "free_bytes", lambda _: 0)
            return answers(*arguments, **others)

    monkeypatch.setattr(rivals, "of_base", short_of_memory)
    run = train(replace(config, baselines=("probe",), max_steps=1)).directory
    (found,) = results.read(run).figures["rivals"]
    assert (found["num_train_rows"], found["num_all_train_rows"]) == (9, 48)


@pytest.mark.parametrize(
    ("place", "error", "told"),
    [
        (
            "_zero_shot",
            torch.OutOfMemoryError("CUDA out of memory"),
            "zero-shot is left out: memor",
        ),
        ("_features", RuntimeError("odd\nthing"), "probe is left out: odd thing"),
        ("_probe", ValueError("features are not finite"), "probe is left out: features are not"),
    ],
)
def test_one_that_fails_costs_the_run_nothing(
    config: TrainConfig, monkeypatch, place: str, error: Exception, told: str
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(rivals, place, fail)
    listener = Listener()
    run = train(replace(config, baselines=ALL, max_steps=2), reporter=listener).directory
    assert [line for line in listener.lines if told in line]
    names = [each["name"] for each in results.read(run).figures["rivals"]]
    assert names == [each for each in ALL if each not in told]
    assert resume.is_finished(run)
    assert (run / "report.html").is_file()


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (MemoryError("no room"), "the baseline svm is left out: memory does not suffice"),
        (ValueError("odd\nthing"), "the baseline svm is left out: odd thing"),
    ],
)
def test_an_svm_that_fails_costs_the_run_nothing(
    config: TrainConfig, monkeypatch, error: Exception, told: str
) -> None:
    """The figures are there when it begins, for the kernel may kill it."""
    config = replace(config, baselines=("svm", "probe"), max_steps=2, name="run")
    known = {}

    def fail(*_: object) -> None:
        figures = json.loads((config.output / "run" / "evaluation.json").read_text())
        known.update(figures, neighbours=(config.output / "run" / "neighbours.json").is_file())
        raise error

    monkeypatch.setattr(finish, "train_svm", fail)
    listener = Listener()
    result = train(config, reporter=listener)
    assert [line for line in listener.lines if "left out" in line] == [told]
    figures = results.read(result.directory).figures
    assert [each["name"] for each in figures["rivals"]] == ["probe"]
    assert (figures["baseline"], known["neighbours"]) == (None, True)
    assert "p_value" not in figures
    assert known["metrics"] == figures["metrics"]
    assert (known["baseline"], known["rivals"], known["verdict"]) == (None, [], None)
    assert known.keys() - {"neighbours"} == figures.keys()
    assert "baseline" not in columns(result.directory)
    assert resume.is_finished(result.directory)


def test_a_failure_within_a_batch_is_one_of_the_baseline(config: TrainConfig, monkeypatch) -> None:
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(features.Extractor, "features", fail)
    listener = Listener()
    run = train(replace(config, baselines=ALL, max_steps=2), reporter=listener).directory
    assert "the baseline probe is left out: memory does not suffice" in listener.lines
    assert [each["name"] for each in results.read(run).figures["rivals"]] == ["svm", "zero-shot"]


@pytest.mark.parametrize("place", ["scoring", "_probe"])
def test_a_signal_in_a_baseline_ends_and_resumes_as_any_stop(
    config: TrainConfig, monkeypatch, place: str
) -> None:
    """Between two batches, and within a regression that cannot be interrupted otherwise."""
    config = replace(config, baselines=ALL, max_steps=2, name="stopped")

    class Interrupting(Reporter):
        def scoring(self, what: str, done: int, total: int) -> None:
            if what == "features":
                os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        if place == "_probe":
            patch.setattr(rivals, place, lambda *_: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(Stopped):
            train(config, reporter=Interrupting() if place == "scoring" else None)
    run = config.output / "stopped"
    assert not resume.is_finished(run)
    assert json.loads((run / "evaluation.json").read_text())["metrics"]
    if place == "_probe":  # its features are kept
        monkeypatch.setattr(
            features.Extractor, "features", lambda *_: pytest.fail("computed again")
        )
    again = train(config)
    assert [each.name for each in again.rivals] == [*ALL]
    assert resume.is_finished(run)
    assert again.rivals[2].seconds > 0


def test_a_stopped_run_may_resume_with_other_baselines(config: TrainConfig) -> None:
    config = replace(config, name="stopped", max_time="0s")
    with pytest.raises(Stopped):
        train(config)
    done = train(replace(config, max_time=None, baselines=("none",)))
    assert done.rivals == ()


@pytest.mark.parametrize("method", ["lora", "full"])
def test_two_processes_have_the_baselines_of_one(
    config: TrainConfig, tmp_path: Path, method: str
) -> None:
    """With method full the weights are sharded."""
    config = replace(config, name="run", method=method, baselines=ALL, dropout=0.0, max_steps=2)
    train(config)
    together = replace(config, output=tmp_path / "two", devices=2)
    code, said = ended(together)
    assert code == 0, "\n".join(said)
    assert sum("baseline zero-shot: scoring 6 rows" in line for line in said) == 1
    alone, several = (columns(each.output / "run") for each in (config, together))
    assert alone["zero-shot"] == several["zero-shot"]
    same = [a == b for a, b in zip(alone["probe"], several["probe"], strict=True)]
    assert sum(same) >= len(same) - 1  # features differ by rounding
    assert set(several) == set(alone)


def test_one_process_that_fails_is_a_failure_in_all() -> None:
    """So none of them waits for results of one that has given up."""
    gathered = [None, "odd"]
    group = SimpleNamespace(gather=lambda _: gathered)
    session = SimpleNamespace(group=group, model=torch.nn.Linear(1, 1))
    with pytest.raises(rivals._Failed, match="odd"):
        rivals._agreed(session, lambda: 7)
    gathered[1] = None
    assert rivals._agreed(session, lambda: 7) == 7


def test_a_learning_curve_has_the_svm_beside_each_size(config: TrainConfig) -> None:
    with pytest.raises(ConfigError, match="a learning curve shows the svm beside each size"):
        replace(config, learning_curve="5,all", baselines=("probe",))
    arguments = ["--model", config.model, "--output", str(config.output), "--max-steps", "2"]
    arguments += ["--learning-curve", "5,all", "--baselines", "svm,zero-shot"]
    assert call("train", config.data, *arguments) == 0
    (run,) = config.output.iterdir()
    names = {
        path.parent.name: [each["name"] for each in json.loads(path.read_text())["rivals"]]
        for path in run.rglob("evaluation.json")
    }
    assert names == {run.name: ["svm", "zero-shot"], "5-per-class": ["svm"]}


@pytest.mark.skipif(
    importlib.util.find_spec("sentence_transformers") is None, reason="needs sentence-transformers"
)
def test_embeddings_are_trained_beside_and_loaded_from_a_folder(
    config: TrainConfig, tmp_path: Path
) -> None:
    folder = encoders.write(tmp_path / "tiny-encoder")
    config = replace(
        config, baselines=("auto", "embeddings"), embedding_model=str(folder), max_steps=1
    )
    listener = Listener()
    run = train(config, reporter=listener).directory
    found = {each["name"]: each for each in results.read(run).figures["rivals"]}
    assert found["embeddings"]["description"] == "tiny-encoder + logistic regression"
    assert found["embeddings"]["num_train_rows"] == 48
    assert found["embeddings"]["accuracy"] > 0.5  # the words tell the labels apart
    assert set(columns(run)["embeddings"]) <= set(WORDS)
    assert ("embeddings", 54, 54) in listener.scored


def test_embeddings_are_refused_before_anything_trains(config: TrainConfig, monkeypatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="needs sentence-transformers, which is not installed"):
        train(replace(config, baselines=("embeddings",)))

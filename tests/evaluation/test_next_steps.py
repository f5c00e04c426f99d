"""What a run says to do next, held against what a practitioner would say of six runs.

Also covers remora.evaluation.findings, label_findings, run_facts and run_commands, and
remora.display.next_steps_results.
"""

from __future__ import annotations

import json
import os
import shlex
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import finished
from conftest import call
from constructed import LABELS, construct, diagnose, pair
from remora.config import CompareConfig, TrainConfig
from remora.data import label_forms
from remora.display.next_steps_results import show_next_steps
from remora.evaluation import compare, findings, results
from remora.evaluation.findings import NextStep
from remora.evaluation.next_steps import after_comparison, after_run, find_next_steps
from remora.evaluation.predictions import PROBABILITIES
from remora.evaluation.run_facts import read_facts
from remora.report import charts
from remora.runtime import files
from test_docs import parse


def arguments(step: NextStep) -> list[str]:
    """The words of a step's command as a shell passes them."""
    first, *rest = shlex.split(step.command)
    assert first == "remora"
    return rest


# What a practitioner would say of six runs


def say(run: Path) -> list[str]:
    return [each.kind for each in find_next_steps(run)]


def test_undertrained(tmp_path: Path) -> None:
    """ "It has not even seen all rows once. Train it properly before you look at anything else;
    until then the SVM is better. And some mistakes look like label mistakes.\""""
    run = construct(
        tmp_path / "run",
        wrong=380,
        wrong_by_rival=260,
        alike=40,
        history=((19, 0.40, 1.5), (38, 0.62, 1.1)),
        settings={"max_steps": None, "epochs": 0.6},
    )
    first, second, third = find_next_steps(run)
    assert (first.kind, second.kind, third.kind) == ("train_longer", "rival", "diagnose")
    assert "0.6 epochs, so 39% of the training rows were never seen" in first.evidence[0]
    assert "by default 2,000 rows get 4.0" in first.evidence[0]
    assert "TF-IDF + linear SVM is 12.0 points above the adapter" in first.evidence[2]
    config = str(run / "config.toml")
    assert arguments(first) == ["train", "--config", config, "--epochs", "4"]
    assert second.sentence.startswith("Use TF-IDF + linear SVM until")
    assert arguments(third) == ["diagnose", str(run)]


def test_noisy_labels(tmp_path: Path) -> None:
    """ "One label in twelve is wrong. Go through the suspects before anything else.\""""
    run = construct(tmp_path / "run", wrong=140, wrong_by_rival=200, alike=50)
    diagnose(run, wrong=(0.08, 0.065, 0.096), held_out_wrong=0.06, num_likely=130)
    first, *others = find_next_steps(run)
    assert first.kind == "review"
    assert "130 rows" in first.sentence
    assert "20 more" in first.sentence
    assert "8.0% of the training labels are wrong (95% interval 6.5% to 9.6%)" in first.evidence[0]
    assert arguments(first) == ["review", str(run)]
    assert [each.kind for each in others] == ["abstain"]


FEW_ROWS: dict[str, Any] = {
    "wrong": 300,
    "wrong_by_rival": 420,
    "num_train": 90,
    "history": ((30, 0.6, 1.1), (45, 0.69, 1.0), (60, 0.69, 1.0)),
}


def test_too_few_rows(tmp_path: Path) -> None:
    """ "Nine rows a label, learned by heart. Label more, and measure first what that brings.\""""
    run = construct(tmp_path / "run", **FEW_ROWS, alike=4, train_loss=0.004, confidences=(0.8, 0.6))
    first, *others = find_next_steps(run)
    assert first.kind == "more_rows"
    assert [each.kind for each in others] == ["abstain", "diagnose"]
    assert first.evidence[0] == "9 training rows for each of 10 labels on average"
    assert "0.004 on training rows and 1.000 on validation rows" in first.evidence[1]
    assert arguments(first)[-2:] == ["--learning-curve", "1,2,4,all"]


@pytest.mark.parametrize(
    ("settings", "flags"),
    [
        ({"rows_per_class": 9}, ["--rows-per-class", "36"]),
        ({"rows_per_class": 50}, None),  # more than there are
        ({"baselines": ("none",)}, ["--learning-curve", "1,2,4,all", "--baselines", "svm"]),
        ({"baselines": ("probe", "svm")}, ["--learning-curve", "1,2,4,all"]),
        ({"start_from": "runs/a"}, None),
        ({"devices": 2}, None),
    ],
)
def test_more_rows_by_flags_that_go_with_the_settings(
    settings: dict[str, Any], flags: list[str] | None, tmp_path: Path
) -> None:
    run = construct(tmp_path / "run", **FEW_ROWS, settings=settings)
    found = [arguments(each) for each in find_next_steps(run) if each.kind == "more_rows"]
    if flags is None:
        assert found == []
    else:
        (given,) = found
        assert given == ["train", "--config", str(run / "config.toml"), *flags]
        changed = {flags[i][2:].replace("-", "_"): flags[i + 1] for i in range(0, len(flags), 2)}
        changed |= {"baselines": ("svm",)} if "baselines" in changed else {}
        changed |= {"rows_per_class": 36} if "rows_per_class" in changed else {}
        replace(TrainConfig("data.csv", model="some/base", **settings), **changed)  # not refused


def test_after_a_warm_start_nothing_is_said_that_needs_another_beginning(tmp_path: Path) -> None:
    """A third of the usual passes is its default, and another base model has no such adapter."""
    run = construct(
        tmp_path / "run",
        wrong=200,
        wrong_by_rival=130,
        num_train=640,
        history=((80, 0.7, 0.6), (84, 0.7, 0.6)),
        settings={"start_from": "runs/a"},
    )
    told = find_next_steps(run)
    assert "train_longer" not in [each.kind for each in told]
    assert told[0].kind == "rival"
    assert not any("--model" in each.command for each in told)


def test_a_rival_is_better(tmp_path: Path) -> None:
    """ "It has learned what it can. Take the embeddings, or a larger model.\""""
    run = construct(tmp_path / "run", wrong=200, wrong_by_rival=130, alike=4, rival="embeddings")
    first, *others = find_next_steps(run)
    assert first.kind == "rival"
    assert [each.kind for each in others] == ["abstain", "diagnose"]
    assert first.sentence.startswith("Use sentence embeddings instead of this adapter.")
    assert "7.0 points above the adapter (95% interval +3." in first.evidence[0]
    assert arguments(first)[-2:] == ["--model", "Qwen/Qwen2.5-0.5B-Instruct"]
    assert "train_longer" not in say(run)


def test_overlapping_labels(tmp_path: Path) -> None:
    """ "Nobody can tell these two apart. Merge them, or write down where the border is.\""""
    run = construct(tmp_path / "run", wrong=140, wrong_by_rival=200, alike=50)
    pairs = [pair(0, 1, "labels overlap", 0.92), pair(1, 2, "labels overlap", 0.87)]
    diagnose(run, overlapping=0.1, pairs=[*pairs, pair(3, 4, "undecided", 0.9)])
    first, second = find_next_steps(run)
    assert (first.kind, second.kind) == ("merge_labels", "abstain")
    assert "'label 0' and 'label 1'." in first.sentence  # a label is merged once only
    assert "accuracy would be 92.0% instead of 86.0%" in first.evidence[0]
    names = json.loads(arguments(first)[-1])
    assert names == dict.fromkeys(("label 0", "label 1"), "label 0 or label 1")
    label_forms.refuse_unknown(names, LABELS)


def test_all_well(tmp_path: Path) -> None:
    """ "Nothing to do. Ship it.\""""
    run = construct(
        tmp_path / "run",
        wrong=25,
        wrong_by_rival=90,
        alike=4,
        history=((125, 0.96, 0.15), (188, 0.975, 0.12), (250, 0.975, 0.12)),
        confidences=(0.985, 0.6),
    )
    (only,) = find_next_steps(run)
    assert only.kind == "all_well"
    assert only.sentence.startswith("All is well")
    assert "97.5% accuracy (95% interval 96.3% to 98.3%) on 1,000 test rows" in only.evidence[0]
    assert "6.5 points below the adapter" in only.evidence[1]
    assert arguments(only) == ["predict", str(run)]


@pytest.mark.parametrize(
    ("count", "said"), [(1, "1 test row says little"), (12, "12 test rows say little")]
)
def test_few_held_out_rows_are_not_called_well(count: int, said: str, tmp_path: Path) -> None:
    facts = read_facts(construct(tmp_path / "run", wrong=5, wrong_by_rival=90, alike=4))
    told = {"accuracy": 1.0, "accuracy_interval": [0.2, 1.0], "num_rows": count}
    facts.run.figures["metrics"] |= told | {"num_correct": count}
    (only,) = after_run(facts)
    assert only.sentence.startswith(f"Nothing stands out, but {said}: check its answers")


# Each finding needs its evidence


def test_a_batch_that_is_not_full_is_seen_too(tmp_path: Path) -> None:
    run = construct(tmp_path / "run", wrong=300, wrong_by_rival=400, num_train=34, num_steps=1)
    facts = read_facts(run)
    step = findings.undertrained(facts)
    assert step is not None
    assert "0.5 epochs, so 6% of the training rows were never seen" in step.evidence[0]


def test_validation_that_still_rises_is_not_trained_for_long_enough(tmp_path: Path) -> None:
    rising = ((125, 0.70, 0.9), (188, 0.76, 0.8), (250, 0.80, 0.7))
    shape = {"wrong": 190, "wrong_by_rival": 300}
    (step, *_) = find_next_steps(construct(tmp_path / "rising", history=rising, **shape))
    assert step.kind == "train_longer"
    assert (
        "rose from 70.0% at step 125 to 80.0% at step 250, the last (400 rows)" in step.evidence[0]
    )
    assert arguments(step)[-2:] == ["--epochs", "8"]
    # Five rows of 400 may be chance, a loss that rises is overfitting, and patience has ended
    few = ((125, 0.78, 0.8), (200, 0.78, 0.79), (250, 0.7925, 0.79))
    worse = ((125, 0.70, 0.8), (250, 0.80, 0.9))
    for name, history, more in (
        ("few", few, {}),
        ("worse", worse, {}),
        ("ended", rising, {"planned": 500}),
    ):
        run = construct(tmp_path / name, history=history, **shape, **more)
        assert "train_longer" not in say(run), name


def test_a_quarter_of_the_usual_epochs_is_too_little_to_level_off(tmp_path: Path) -> None:
    flat = ((32, 0.80, 0.6), (48, 0.80, 0.6), (63, 0.80, 0.6))
    shape = {"wrong": 190, "wrong_by_rival": 300}
    (step, *_) = find_next_steps(construct(tmp_path / "few", history=flat, **shape))
    assert step.evidence == ("1.0 epochs; by default 2,000 rows get 4.0",)
    flat = ((64, 0.80, 0.6), (128, 0.80, 0.6), (189, 0.80, 0.6))
    assert "train_longer" not in say(construct(tmp_path / "three", history=flat, **shape))


def test_steps_that_were_limited_are_given_as_steps(tmp_path: Path) -> None:
    run = construct(
        tmp_path / "run",
        wrong=380,
        wrong_by_rival=260,
        history=((20, 0.62, 1.1),),
        settings={"max_steps": 20, "name": "demo", "output": tmp_path},
    )
    (tmp_path / "demo-2").mkdir()
    assert arguments(find_next_steps(run)[0])[3:] == ["--name", "demo-3", "--max-steps", "252"]


def test_a_lead_that_may_be_chance_is_no_reason_to_change(tmp_path: Path) -> None:
    assert "rival" not in say(construct(tmp_path / "run", wrong=150, wrong_by_rival=135))
    as_good = construct(tmp_path / "same", wrong=150, wrong_by_rival=148, alike=145)
    (step, *_) = (each for each in find_next_steps(as_good) if each.kind == "rival")
    assert "as good, and far cheaper" in step.sentence
    dear = construct(
        tmp_path / "dear", wrong=150, wrong_by_rival=148, alike=145, rival_seconds=60.0
    )
    assert "rival" not in say(dear)


def test_training_that_does_harm_calls_for_a_lower_learning_rate(tmp_path: Path) -> None:
    run = construct(tmp_path / "run", wrong=300, wrong_by_rival=200, rival="zero-shot")
    (step, *_) = find_next_steps(run)
    assert step.sentence.startswith("Lower the learning rate")
    assert arguments(step)[-2:] == ["--learning-rate", "0.0001"]


def test_labels_of_few_rows_are_named(tmp_path: Path) -> None:
    run = construct(tmp_path / "run", wrong=100, wrong_by_rival=300)
    counts = dict.fromkeys(LABELS, 250)
    summary = json.loads((run / "data.json").read_text(encoding="utf-8"))
    files.write_json(run / "data.json", summary | {"rows_per_label": counts | {LABELS[9]: 14}})
    figures = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
    for recall, is_more in ((0.84, False), (0.5, True)):  # p = 0.052 and p < 0.001
        figures["metrics"]["per_class"][9]["recall"] = recall
        files.write_json(run / "evaluation.json", figures)
        assert ("more_rows" in say(run)) == is_more
    (step,) = (each for each in find_next_steps(run) if each.kind == "more_rows")
    assert "'label 9'" in step.sentence
    assert "50 of 100 rows of labels with at most 14 training rows are wrong" in step.evidence[0]


def test_a_learning_curve_that_rises_calls_for_rows(tmp_path: Path) -> None:
    run = construct(tmp_path / "run", wrong=200, wrong_by_rival=300)
    finished.learn(run)
    (step, *_) = find_next_steps(run)
    assert step.kind == "more_rows"
    assert "from 200 to 400 rows, accuracy changed by +10.0 points per doubling" in step.evidence[0]
    curve = json.loads((run / "learning_curve.json").read_text(encoding="utf-8"))
    files.write_json(
        run / "learning_curve.json", curve | {"gain": 0.001, "gain_interval": [-0.007, 0.009]}
    )
    (step,) = (each for each in find_next_steps(run) if each.kind == "larger_model")
    assert "doubling the rows adds at most 0.9 points" in step.evidence[0]


def test_decided_rows_are_applied(tmp_path: Path) -> None:
    run = construct(tmp_path / "run", wrong=140, wrong_by_rival=200)
    noisy = {"wrong": (0.08, 0.065, 0.096), "held_out_wrong": 0.06}
    diagnose(run, **noisy, num_likely=130, decided=LABELS[1])
    (step, *_) = find_next_steps(run)
    assert step.sentence == "Train again on the corrected rows: 130 are decided."
    assert arguments(step) == ["retrain", str(run)]
    comma = (run / "relabel.csv").read_text(encoding="utf-8")
    german = comma.replace(",", ";").replace("0.", "0,")  # as a spreadsheet there saves it
    (run / "relabel.csv").write_text(german, encoding="utf-8")
    assert find_next_steps(run)[0] == step
    (run / "corrections.csv").write_text(comma, encoding="utf-8")  # it was trained on them
    assert "apply" not in say(run)
    (run / "corrections.csv").unlink()
    predictions = (run / "predictions.csv").read_text(encoding="utf-8")
    held_out = comma.replace(",a,", ",message 1,")  # decided, and not trained on
    (run / "relabel.csv").write_text(held_out, encoding="utf-8")
    assert "message 1," in predictions
    assert "apply" not in say(run)
    diagnose(run, **noisy, num_likely=130, decided=LABELS[0])  # all were right as they are
    assert not {"apply", "review"} & {*say(run)}
    (run / "relabel.csv").write_text("row,text\n1", encoding="utf-8")  # someone broke it
    assert not {"apply", "review"} & {*say(run)}


def test_confidence_that_is_too_high_is_no_probability(tmp_path: Path) -> None:
    shape = {"wrong": 140, "wrong_by_rival": 300}
    run = construct(tmp_path / "run", confidences=(0.97, 0.97), **shape)
    (step,) = (each for each in find_next_steps(run) if each.kind == "calibrate")
    assert "points too high" in step.sentence
    assert "accuracy 86.0% (95% interval 83.7% to 88.0%)" in step.evidence[0]
    good = construct(tmp_path / "good", confidences=(0.86, 0.85), **shape)
    assert "calibrate" not in say(good)
    figures = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
    figures["metrics"]["accuracy_interval"] = [0.7, 0.99]  # as of few rows
    files.write_json(run / "evaluation.json", figures)
    assert "calibrate" not in say(run)


def test_an_easy_task_may_do_with_a_smaller_model(tmp_path: Path) -> None:
    shape = {"wrong": 15, "wrong_by_rival": 30, "confidences": (0.99, 0.6)}
    (step,) = find_next_steps(construct(tmp_path / "7b", num_base=7_600_000_000, **shape))
    assert step.kind == "smaller_model"
    assert arguments(step)[-2:] == ["--model", "Qwen/Qwen2.5-1.5B-Instruct"]
    assert say(construct(tmp_path / "small", **shape)) == ["all_well"]


def test_rows_from_standard_input_are_not_diagnosed(tmp_path: Path) -> None:
    run = construct(tmp_path / "run", wrong=300, wrong_by_rival=400, alike=100)
    assert "diagnose" in say(run)
    for source in ("-", "/dev/stdin", "/dev/fd/63", "/proc/self/fd/63"):
        config = TrainConfig(source, model="some/base")
        files.write_text(run / "config.toml", config.to_toml())
        assert "diagnose" not in say(run)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    short = construct(tmp_path / "short", wrong=380, wrong_by_rival=260, history=((20, 0.62, 1.1),))
    config = TrainConfig(str(pipe), model="some/base", max_steps=20)
    files.write_text(short / "config.toml", config.to_toml())
    found = {each.kind: arguments(each) for each in find_next_steps(short)}
    assert "diagnose" not in found
    commands = [each for each in found.values() if each[0] == "train"]
    assert commands
    assert all(each[1] == "TABLE" for each in commands)  # to be given again


def test_a_figure_that_was_not_finite_is_not_in_the_way(tmp_path: Path) -> None:
    """A skipped step's loss is null in metrics.jsonl, and so may be that of validation."""
    run = construct(tmp_path / "run", **FEW_ROWS)
    told = find_next_steps(run)
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    for place, name in ((7, "loss"), (-1, "validation_loss")):
        lines[place] = json.dumps(json.loads(lines[place]) | {name: None})
    files.write_text(run / "metrics.jsonl", "\n".join(lines) + "\n")
    assert [each.kind for each in find_next_steps(run)] == [each.kind for each in told]
    assert "nan" not in str(find_next_steps(run))
    facts = read_facts(run)
    loss, *_ = charts.training(facts.records)
    assert len(loss.lines[0].points.split()) == facts.num_steps - 1


def test_a_run_of_an_earlier_version_has_next_steps(tmp_path: Path) -> None:
    run = construct(tmp_path / "run", wrong=200, wrong_by_rival=130)
    for name in ("data.json", "metrics.jsonl", PROBABILITIES):
        (run / name).unlink()
    figures = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
    for key in ("rivals", "reliability"):
        del figures[key]
    files.write_json(run / "evaluation.json", figures)
    assert find_next_steps(run)


# Commands and where they are shown


def test_every_command_is_one_that_remora_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the run is called, and whatever its labels are."""
    seen = set()
    noisy = {"num_likely": 99, "wrong": (0.05, 0.03, 0.07)}
    for number, (shape, about) in enumerate(
        (
            (
                {"wrong": 380, "wrong_by_rival": 260, "alike": 50, "num_steps": 38, "history": ()},
                {},
            ),
            ({"wrong": 200, "wrong_by_rival": 130}, noisy),
            ({"wrong": 200, "wrong_by_rival": 130, "rival": "zero-shot"}, {}),
            ({"wrong": 140, "wrong_by_rival": 200}, {"overlapping": 0.1}),
            ({"wrong": 140, "wrong_by_rival": 200}, noisy | {"decided": LABELS[3]}),
            ({"wrong": 300, "wrong_by_rival": 420, "num_train": 90}, {}),
            ({"wrong": 140, "wrong_by_rival": 300, "confidences": (0.97, 0.97)}, {}),
            ({"wrong": 15, "wrong_by_rival": 30, "num_base": 7_600_000_000}, {}),
            ({"wrong": 140, "wrong_by_rival": 150}, {}),
            ({"wrong": 25, "wrong_by_rival": 90}, {}),
        )
    ):
        run = construct(tmp_path / f"it's a $(run) {number}", **shape)
        if about:
            diagnose(run, pairs=[pair(0, 1, "labels overlap", 0.92)], **about)
        for step in find_next_steps(run):
            seen.add(step.kind)
            words = arguments(step)
            assert any(str(run) in word for word in words)
            with monkeypatch.context() as undone:
                parse(words, undone)
    assert seen >= {
        *("train_longer", "rival", "review", "apply", "merge_labels", "more_rows", "larger_model"),
        *("smaller_model", "diagnose", "abstain", "calibrate", "all_well"),
    }


def test_compare_says_which_run_to_take(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = construct(tmp_path / "small", wrong=150, wrong_by_rival=400)
    large = construct(tmp_path / "large", wrong=148, wrong_by_rival=400)
    figures = json.loads((large / "evaluation.json").read_text(encoding="utf-8"))
    files.write_json(large / "evaluation.json", figures | {"base_bytes": 10**10})
    runs = (small, large)
    first, *others = after_comparison(compare.compare_runs(CompareConfig(runs)), runs)
    assert first.sentence == "Take small."
    assert "large may lead small by chance: +0.2 points" in first.evidence[0]
    assert arguments(first) == ["predict", str(small)]
    assert others == [*find_next_steps(small)][:2]
    assert call("compare", *runs) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[shown.index("what to do next") + 1] == "1. Take small."
    assert shown[-1] == f"    {others[-1].command}"
    assert call("compare", *runs, "--json") == 0
    given = json.loads(capsys.readouterr().out)["next_steps"]
    assert [each["kind"] for each in given] == ["take", *(each.kind for each in others)]
    assert given[0] | {"evidence": (), "worth": 0} == vars(first) | {"evidence": (), "worth": 0}


def test_a_baseline_that_no_run_beats_is_the_one_to_take(tmp_path: Path) -> None:
    run = construct(tmp_path / "run", wrong=300, wrong_by_rival=200)
    assert "rival" in say(run)
    first, *others = after_comparison(compare.compare_runs(CompareConfig((run,))), (run,))
    assert first.sentence == "Take TF-IDF + linear SVM."
    assert others
    assert "rival" not in [each.kind for each in others]
    well = construct(tmp_path / "well", wrong=15, wrong_by_rival=90, confidences=(0.985, 0.6))
    (only,) = after_comparison(compare.compare_runs(CompareConfig((well,))), (well,))
    assert only.sentence == "Take well."


def test_a_broken_file_takes_only_the_next_steps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = construct(tmp_path / "run", wrong=300, wrong_by_rival=290)
    (run / "diagnosis.json").write_text("{", encoding="utf-8")
    assert call("compare", run) == 0
    captured = capsys.readouterr()
    assert "what to do next" not in captured.out
    assert "there are no next steps, since" in captured.err
    (run / "diagnosis.json").write_text("[]", encoding="utf-8")
    assert results.read(run)


def test_lines_break_at_words_and_commands_do_not() -> None:
    step = NextStep(
        kind="diagnose",
        sentence="Find out why it errs, " * 4,
        evidence=("one clause that is longer than a line of forty characters is",),
        command="remora diagnose 'a folder with a name that is longer than the line'",
        worth=0.1,
    )
    for is_terminal, num_lines in ((True, 8), (False, 5)):
        file = StringIO()
        console = Console(file=file, width=40, force_terminal=is_terminal, color_system=None)
        show_next_steps([step], console)
        lines = file.getvalue().splitlines()
        assert lines[-1] == f"    {step.command}"
        assert len(lines) == num_lines
        if is_terminal:
            assert max(map(len, lines[:-1])) <= 40
            assert lines[3].startswith("  ")

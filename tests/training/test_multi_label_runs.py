"""Runs on rows with several labels: trained, measured, asked, served, merged, refused."""

from __future__ import annotations

import contextlib
import csv
import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from conftest import WORDS, call
from on_ray import StandIn
from remora import Predictor, TextClassifier
from remora.config import TrainConfig
from remora.data.label_sets import labels_in
from remora.errors import DataError
from remora.evaluation import predictions
from remora.evaluation.predictions import ScoredSets
from remora.models import metadata, saved
from remora.report import pages
from remora.runtime.reporter import Reporter, Validation
from remora.serving import predict, ray_engine, ray_workers
from remora.training import tune
from remora.training.run import train

LABELS = sorted(WORDS)
WAYS = ("Where is my {}?", "the {} again", "Still no {}!")
MESSAGES = ["Where is my card? the refund again", "Still no refund!", "hello there"]


def rows() -> list[tuple[str, list[str]]]:
    """Return messages on none, one or two of three things, in several ways."""
    found: list[tuple[str, list[str]]] = [(f"hello there {i}", []) for i in range(16)]
    for number, way in enumerate(itertools.product(WAYS, repeat=2)):
        for one, other in itertools.permutations(LABELS, 2):
            text = f"{way[0].format(WORDS[one])} {way[1].format(WORDS[other])}"
            found.append((text, sorted([one, other])))
        for i in range(2):
            found += [(f"{way[0].format(WORDS[x])} {number % 3 + i}", [x]) for x in LABELS]
    return found


def settings(place: Path, **more: Any) -> TrainConfig:
    return TrainConfig(
        str(place / "data.jsonl"),
        **{
            "model": str(place / "base"),
            "output": place,
            "name": "run",
            "learning_rate": 1e-2,
            "max_steps": 80,
            "seed": 3,
            "patience": 0,
            "batch_size": 16,
            "micro_batch_tokens": 512,
            "precision": "float32",
            "device": "cpu",
            **more,
        },
    )


@pytest.fixture(scope="module")
def place(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, its base and its table in one folder."""
    folder = tmp_path_factory.mktemp("several")
    shutil.copytree(base, folder / "base")
    lines = [json.dumps({"text": text, "labels": labels}) for text, labels in rows()]
    (folder / "data.jsonl").write_text("\n".join(lines), encoding="utf-8")
    result = train(settings(folder))
    assert result.metrics.accuracy > 0.8
    assert [rival.name for rival in result.rivals] == ["svm"]
    return folder


def opened(path: Path) -> saved.Trained:
    return saved.open_trained(path, device="cpu", precision="float32")


def test_the_run_keeps_its_thresholds_and_figures(place: Path) -> None:
    run = place / "run"
    card = metadata.parse_card(run / "adapter")
    assert (card.answer, card.multi_label, card.labels) == ("classes", True, tuple(LABELS))
    validation, test = (
        predictions.read_probabilities(run / predictions.PROBABILITIES, LABELS, split)
        for split in ("validation", "test")
    )
    assert isinstance(validation, ScoredSets)
    assert isinstance(test, ScoredSets)
    assert tuple(test.thresholds) == card.thresholds
    assert set(card.thresholds) != {0.5}
    figures = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
    assert figures["metrics"]["accuracy"] == test.correct.mean()
    assert figures["metrics"]["thresholds"] == list(card.thresholds)
    assert {"micro_f1", "label_ranking", "micro_f1_interval"} <= figures["metrics"].keys()
    assert {"micro_f1", "micro_f1_difference_interval"} <= figures["rivals"][0].keys()
    settings_kept = (run / "config.toml").read_text(encoding="utf-8")
    assert 'multi_label = "on"' in settings_kept
    assert 'metric = "micro_f1"' in settings_kept
    records = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()]
    assert any("validation_micro_f1" in each for each in records)


def test_both_layouts_give_the_same_probabilities(place: Path) -> None:
    from remora.tree import layouts

    trained = opened(place / "run")
    found = trained.scorer().probabilities(MESSAGES)
    layouts.assign(trained.model, "rows")
    np.testing.assert_allclose(trained.scorer().probabilities(MESSAGES), found, atol=1e-5)
    assert abs(found.sum(1) - 1).min() > 0.05  # each is a probability of its own


def test_the_stock_pipeline_gives_the_same_on_the_merged_model(place: Path, tmp_path: Path) -> None:
    from transformers import pipeline

    trained, merged = opened(place / "run"), tmp_path / "merged"
    assert call("export", place / "run", "--merge", "--dtype", "float32", "--output", merged) == 0
    wanted = trained.scorer().probabilities(MESSAGES)
    whole = opened(merged)
    np.testing.assert_allclose(whole.scorer().probabilities(MESSAGES), wanted, atol=1e-5)
    assert whole.card.thresholds == trained.card.thresholds
    rendered = whole.card.rendered
    texts = [rendered["head"] + message + rendered["tail"] for message in MESSAGES]
    pipe = pipeline("text-classification", model=str(merged), dtype="float32", device="cpu")
    for more in ({"function_to_apply": "sigmoid"}, {}):  # which the configuration says by itself
        answers = pipe(texts, add_special_tokens=False, top_k=None, **more)
        found = [{each["label"]: each["score"] for each in answer} for answer in answers]
        table = [[scores[label] for label in LABELS] for scores in found]
        np.testing.assert_allclose(table, wanted, atol=1e-5)


def write_csv(path: Path, header: list[str], table: list[list[Any]]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *table])
    return path


def with_form(place: Path, folder: Path, **form: Any) -> Path:
    """Return a copy of the run whose training table wrote labels in another form."""
    shutil.copytree(place / "run" / "adapter", folder / "adapter")
    path = folder / "adapter" / "remora.json"
    card = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(card | form), encoding="utf-8")
    return folder


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
@pytest.mark.parametrize(
    ("form", "cells"),
    [
        ({}, [{"card arrival", "refund"}, {"refund"}, set()]),
        ({"split_labels_at": "|"}, ["card arrival|refund", "refund", ""]),
        ({"label_columns": LABELS}, [[1, 1, 0], [0, 1, 0], [0, 0, 0]]),
    ],
)
def test_predictions_have_the_form_of_the_training_table(
    place: Path, tmp_path: Path, form: dict[str, Any], cells: list[Any], suffix: str
) -> None:
    run = with_form(place, tmp_path / "run", **form)
    table = write_csv(tmp_path / "in.csv", ["id", "text"], [[i, x] for i, x in enumerate(MESSAGES)])
    with table.open("a", encoding="utf-8") as file:
        file.write("9,\n")  # blank
    output = tmp_path / f"out{suffix}"
    base = ("--precision", "float32", "--model", place / "base")
    assert call("predict", run, table, "--output", output, "--top-k", 2, *base) == 0
    if suffix == ".csv":
        with output.open(encoding="utf-8", newline="") as file:
            found: list[dict[str, Any]] = list(csv.DictReader(file))
    elif suffix == ".jsonl":
        found = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    else:
        import pyarrow.parquet

        found = pyarrow.parquet.read_table(output).to_pylist()
    assert len(found) == 4
    for record, wanted in zip(found, cells, strict=False):
        if isinstance(wanted, list):
            assert [int(record[label]) for label in LABELS] == wanted
        else:
            labels = record["labels"]
            if isinstance(wanted, set):
                labels = {*(json.loads(labels) if isinstance(labels, str) else labels)}
            assert labels == wanted
        ranked = record["probabilities"]
        ranked = json.loads(ranked) if isinstance(ranked, str) else ranked
        assert len(ranked) == 2
        assert ranked[0]["probability"] >= ranked[1]["probability"]
    assert not found[3].get("labels")
    assert not found[3]["probabilities"]


@pytest.mark.parametrize(
    ("suffix", "form"),
    [
        (".csv", {"label_columns": LABELS}),
        (".csv", {"split_labels_at": "|"}),
        (".jsonl", {}),
        (".parquet", {}),
    ],
)
def test_ray_gives_the_rows_of_predict(
    place: Path,
    tmp_path: Path,
    form: dict[str, Any],
    suffix: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = with_form(place, tmp_path / "run", **form)
    cells = [[i, x] for i, x in enumerate([*MESSAGES, "", *MESSAGES])]
    table = write_csv(tmp_path / "in.csv", ["id", "text"], cells)
    monkeypatch.setattr(ray_workers, "connected", lambda _: contextlib.nullcontext(StandIn()))
    monkeypatch.setattr(ray_workers, "require", lambda: None)
    monkeypatch.setattr(ray_engine, "CHUNK_ROWS", 2)
    monkeypatch.setattr(predict, "BATCH_ROWS", 2)  # rows beside others are rounded otherwise
    given = ("predict", run, table, "--precision", "float32", "--model", place / "base")
    alone, parts = tmp_path / f"alone{suffix}", tmp_path / f"parts{suffix}"
    assert call(*given, "--output", alone) == 0
    more = ("--engine", "ray", "--part-rows", 4, "--device", "cpu", "--worker-cores", 1)
    assert call(*given, *more, "--output", parts) == 0
    paths = sorted(parts.glob("part-*"))
    assert len(paths) == 2
    if suffix == ".parquet":
        import pyarrow.parquet

        read = [pyarrow.parquet.read_table(path) for path in paths]
        assert pyarrow.concat_tables(read).equals(pyarrow.parquet.read_table(alone))
    else:
        lines = [path.read_text(encoding="utf-8").splitlines() for path in paths]
        header = 1 if suffix == ".csv" else 0
        assert lines[0] + lines[1][header:] == alone.read_text(encoding="utf-8").splitlines()
    capsys.readouterr()
    assert call(*given, *more, "--output", parts, "--abstain-at-accuracy", 0.9) == 2
    assert "abstain_at_accuracy is for models of one label a row" in capsys.readouterr().err


def test_a_predictor_answers_batches_of_every_kind(place: Path) -> None:
    pandas, pyarrow = pytest.importorskip("pandas"), pytest.importorskip("pyarrow")
    predictor = Predictor(place / "run", precision="float32", device="cpu")
    wanted = [["card arrival", "refund"], ["refund"], []]
    texts = {"text": MESSAGES, "labels": ["taken"] * 3}
    found = predictor(texts)
    assert list(found["predicted_labels"]) == wanted
    assert found["predicted_probabilities"][1][0]["label"] == "refund"
    frame = predictor(pandas.DataFrame(texts))
    assert frame["predicted_labels"].tolist() == wanted
    table = predictor(pyarrow.table({"text": MESSAGES}))
    assert table["labels"].to_pylist() == wanted
    assert table.schema.field("labels").type == pyarrow.list_(pyarrow.string())


def test_eval_measures_with_the_thresholds_of_the_run(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = write_csv(
        tmp_path / "test.csv", ["text", "labels"], [[x, str(y)] for x, y in rows()[::7]]
    )
    out = tmp_path / "predictions.csv"
    how = ("--precision", "float32", "--device", "cpu")
    assert call("eval", place / "run", table, "--json", "--predictions", out, *how) == 0
    figures = json.loads(capsys.readouterr().out)
    kept = predictions.read_predictions(out, LABELS, multi_label=True)
    right = sum(a == b for a, b in zip(kept.true, kept.predicted, strict=True))
    assert figures["accuracy"] == right / len(kept.true) > 0.8
    assert figures["micro_f1"] > 0.8
    assert call("eval", place / "run", table, *how) == 0
    shown = capsys.readouterr().out
    assert "micro-F1" in shown
    assert "of the rows with all labels right" in shown


def test_a_service_gives_the_labels_and_keeps_its_shape(place: Path) -> None:
    pytest.importorskip("fastapi")
    import service

    with service.running(place / "run") as running:
        answer = service.call(running.url, "/v1/classify", {"texts": MESSAGES})
        assert answer.status == 200
        found = answer.json["results"]
        assert [each["predicted"] for each in found] == [["card arrival", "refund"], ["refund"], []]
        assert [len(each["labels"]) for each in found] == [2, 1, 1]
        chat = {"model": "run", "messages": [{"role": "user", "content": "hello"}]}
        refused = service.call(running.url, "/v1/chat/completions", chat)
        assert refused.status == 422
        assert "may give a message several labels" in refused.json["error"]


def test_the_report_has_a_table_by_label_and_trusts_no_text(place: Path, tmp_path: Path) -> None:
    run = tmp_path / "hostile"
    shutil.copytree(place / "run", run)
    path = run / "predictions.csv"
    with path.open(encoding="utf-8", newline="") as file:
        header, *table = list(csv.reader(file))
    table[0][0], table[0][2] = (
        "<script>alert(1)</script>",
        "[]" if table[0][1] != "[]" else ('["refund"]'),
    )
    write_csv(path, header, table)
    page = pages.page(run)
    assert "<script>" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "Wrongly given" in page
    assert "missed <bdi>" in page or "wrongly given <bdi>" in page
    for label in LABELS:
        assert f"<bdi>{label}</bdi></th>" in page
    assert "Confusion" not in page


def test_lists_of_labels_fit_a_classifier(place: Path, tmp_path: Path) -> None:
    texts, lists = map(list, zip(*rows(), strict=True))
    classifier = TextClassifier(
        str(place / "base"),
        learning_rate=1e-2,
        max_steps=80,
        patience=0,
        batch_size=16,
        micro_batch_tokens=512,
        precision="float32",
        device="cpu",
    ).fit(texts, lists)
    assert classifier.classes_.tolist() == LABELS
    probabilities = classifier.predict_proba(MESSAGES)
    assert probabilities.shape == (3, 3)
    given = classifier.predict(MESSAGES)
    card = classifier._trained.card
    assert set(card.thresholds) != {0.5}  # fitted on rows held out
    assert given == [
        [label for label, p, t in zip(LABELS, row, card.thresholds, strict=True) if p >= t]
        for row in probabilities
    ]
    classifier.save(tmp_path / "saved")
    again = TextClassifier.load(tmp_path / "saved", precision="float32", device="cpu")
    assert again.predict(MESSAGES) == given
    with pytest.raises(DataError, match="give a label for each text, or a list of its labels"):
        classifier.fit(texts, np.zeros((len(texts), 3)))
    with pytest.raises(DataError, match="some texts have a list of labels and others none"):
        classifier.fit(["a", "b"], ["x", ["y"]])  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("export", "{run}", "--gguf", "Q8_0"), "answers by classes"),
        (("export", "{run}", "--compress"), "answers by classes"),
        (("predict", "{run}", "{text}", "--abstain-at-accuracy", "0.9"), "abstain_at_accuracy"),
        (("eval", "{run}", "{data}", "--out-of-scope", "{text}"), "out_of_scope is for models of"),
        (
            ("choose", "{data}", "--models", "{base}", "--bar", "0.9", "--answer", "words"),
            "answer is words and rows",
        ),
        (("train", "{data}", "--model", "{base}", "--answer", "words"), "answer is words and rows"),
        (
            ("train", "{data}", "--model", "{base}", "--class-weights", "balanced"),
            "class_weights is for rows with one label",
        ),
        (
            ("train", "{single}", "--model", "{base}", "--answer", "classes", "--from", "{run}"),
            "gives a message several labels, and these rows have one each",
        ),
        (
            ("plan", "{data}", "--model", "{base}", "--label-texts", '{"refund": "x"}'),
            "label_texts is for rows with one label",
        ),
        (
            ("train", "{data}", "--model", "{base}", "--baselines", "probe"),
            "the baseline probe is for rows with one label",
        ),
        (
            ("train", "{data}", "--model", "{base}", "--baselines", "zero-shot"),
            "the baseline zero-shot is for rows with one label",
        ),
        (
            ("train", "{data}", "--model", "{base}", "--multi-label", "off"),
            "each row needs one label",
        ),
    ],
)
def test_what_is_for_one_label_is_refused_in_a_line(
    arguments: tuple[str, ...],
    message: str,
    place: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "text.txt").write_text("hello\n", encoding="utf-8")
    single = write_csv(
        tmp_path / "single.csv", ["text", "label"], [[x, y[0]] for x, y in rows() if len(y) == 1]
    )
    names = {
        "single": single,
        "run": place / "run",
        "data": place / "data.jsonl",
        "base": place / "base",
        "text": tmp_path / "text.txt",
    }
    given = [each if '"' in each else each.format(**names) for each in arguments]
    if arguments[0] in {"train", "tune", "choose"}:
        given += ["--output", str(tmp_path / "runs")]
    assert call(*given) in {2, 3, 4}
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error


def test_comparisons_plans_and_cards_know_of_several_labels(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("compare", place / "run", "--report", tmp_path / "c.html") == 0
    shown = capsys.readouterr().out
    assert "rows have several labels, so micro-F1 decides" in shown
    assert "all labels right" in shown.splitlines()[0]
    shutil.copytree(place / "run", tmp_path / "other")
    assert call("compare", place / "run", tmp_path / "other", "--report", tmp_path / "d.html") == 0
    assert "by label: of no label the recall differs" in capsys.readouterr().out
    assert call("plan", place / "data.jsonl", "--model", place / "base", "--json") == 0
    card = (place / "run" / "README.md").read_text(encoding="utf-8")
    assert "Every message gets any of these 3 labels, or none" in card
    assert "logits.sigmoid()" in card


def test_a_search_compares_trials_by_micro_f1(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("optuna")
    flags = ["--model", place / "base", "--output", tmp_path, "--max-steps", "3", "--trials", "2"]
    flags += ["--device", "cpu", "--precision", "float32", "--search", "rank", "--name", "tuned"]
    assert call("tune", place / "data.jsonl", *flags, "--json") == 0
    tuned = json.loads(capsys.readouterr().out)
    assert tuned["metric"] == "micro_f1"
    assert all(0 <= each["validation"] <= 1 for each in tuned["trials"])
    assert call("tune", place / "data.jsonl", *flags) == 0  # trains nothing
    assert "micro-F1" in capsys.readouterr().out


def test_a_trial_is_pruned_by_the_micro_f1_of_its_evaluations() -> None:
    pytest.importorskip("optuna")
    told: list[float] = []
    trial = SimpleNamespace(report=lambda value, step: told.append(value), should_prune=bool)
    seen = Validation(step=1, accuracy=0.1, loss=1.0, rows=9, best=True, micro_f1=0.5)
    tune._Pruning(Reporter(), trial, "micro_f1", 10).validated(seen)
    tune._Pruning(Reporter(), trial, "micro_f1", 10).validated(replace(seen, micro_f1=None))
    assert told == [0.5, 0.1]  # where each row has one label, micro-F1 is accuracy


def test_a_broken_card_is_refused(place: Path, tmp_path: Path) -> None:
    from remora.errors import ModelError

    for wrong in ({"thresholds": [0.5]}, {"thresholds": [0.5, 2.0, 0.1]}, {"multi_label": 1}):
        run = with_form(place, tmp_path / str(len(list(tmp_path.iterdir()))), **wrong)
        with pytest.raises(ModelError, match="is broken"):
            metadata.parse_card(run / "adapter")


def test_the_labels_of_a_row_are_told_by_name(place: Path) -> None:
    run = place / "run"
    kept = predictions.read_predictions(run / "predictions.csv", LABELS, multi_label=True)
    assert {label for text in kept.true for label in labels_in(text)} == {*LABELS}
    assert "[]" in kept.true
    assert torch.isfinite(torch.tensor(kept.probability)).all()

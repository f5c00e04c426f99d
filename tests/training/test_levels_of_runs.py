"""Runs whose labels form a hierarchy, through everything that shows its levels."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest

from conftest import WAYS, WORDS, call
from data.test_table import write_csv
from remora import Predictor
from remora.data.levels import Hierarchy
from remora.data.prompt import Prompt
from remora.serving.predictor import levels_above
from remora.tree.label_search import nodes_not_in_trie

NAMES = dict(zip(WORDS, ("card > arrival", "card > refund", "top up"), strict=True))
TEXTS = ["where is my card?", "  ", "the refund again"]


@pytest.fixture(scope="module", params=["words", "classes"])
def run(request: Any, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps on labels of two levels, one of them shorter."""
    folder = tmp_path_factory.mktemp("levels")
    rows = [
        (f"{way.format(word)} {i}", NAMES[label])
        for i in range(3)
        for label, word in WORDS.items()
        for way in WAYS
    ]
    path = write_csv(folder / "data.csv", rows)
    settings = ("--max-steps", "2", "--device", "cpu", "--baselines", "svm", "--name", "run")
    given = ("--label-separator", " > ", "--answer", request.param, "--output", folder)
    assert call("train", path, "--model", base, *settings, *given) == 0
    return folder / "run"


def test_levels_are_kept_measured_and_shown(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    card = json.loads((run / "adapter" / "remora.json").read_text())
    assert card["label_separator"] == " > "
    figures = json.loads((run / "evaluation.json").read_text())
    for metrics in (figures["metrics"], figures["baseline"]["metrics"]):
        first, second = metrics["levels"]
        assert (first["num_nodes"], second["num_nodes"]) == (2, 3)
        assert second["accuracy"] == metrics["accuracy"] <= first["accuracy"]
    page = (run / "report.html").read_text()
    assert "Levels of the labels" in page
    assert "SVM macro-F1" in page
    assert call("eval", run, run.parent / "data.csv", "--device", "cpu", "--json") == 0
    measured = json.loads(capsys.readouterr().out)
    assert [each["level"] for each in measured["levels"]] == [1, 2]
    assert call("eval", run, run.parent / "data.csv", "--device", "cpu") == 0
    assert "1 (2 nodes)" in capsys.readouterr().out


def test_predictions_have_columns_of_the_levels_above(run: Path, tmp_path: Path) -> None:
    source = write_csv(tmp_path / "in.csv", [(text, "x") for text in TEXTS], ("text", "level_1"))
    found = {}
    for suffix in ("csv", "jsonl", "parquet"):
        out = tmp_path / f"out.{suffix}"
        assert call("predict", run, source, "--device", "cpu", "--output", out) == 0
        found[suffix] = out
    names = [f"predicted_{each}" for each in ("label", "probability", "level_1")]
    names.append("predicted_level_1_probability")
    header, *rows = csv.reader(found["csv"].read_text().splitlines())
    assert header == ["text", "level_1", *names]
    assert rows[1][2:] == [""] * 4  # a blank text
    for row in (rows[0], rows[2]):
        assert row[4] == row[2].split(" > ")[0]
        assert 1 >= float(row[5]) >= float(row[3])
    table = pyarrow.parquet.read_table(found["parquet"])
    kinds = {"string": 0, "double": 0}
    for name in names:
        kinds[str(table.schema.field(name).type)] += 1
    assert kinds == {"string": 2, "double": 2}
    assert table["predicted_level_1"].to_pylist() == [rows[0][4], None, rows[2][4]]
    lines = [json.loads(line) for line in found["jsonl"].read_text().splitlines()]
    assert [[each["label"] for each in line.get("levels", [])] for line in lines] == [
        [rows[0][4]],
        [],
        [rows[2][4]],
    ]
    columns = Predictor(run, device="cpu")({"text": TEXTS})
    assert list(columns) == ["text", *(name.removeprefix("predicted_") for name in names)]
    assert list(columns["level_1"]) == [rows[0][4], None, rows[2][4]]


def test_a_level_is_given_where_the_label_is_not_sure_enough() -> None:
    hierarchy = Hierarchy(("a > b > c", "a > b > d", "a > e", "f"), " > ")
    rows = np.array([[0.3, 0.25, 0.3, 0.15], [0.0, 0.1, 0.2, 0.7]])
    assert levels_above(hierarchy, rows, 0.6) == [
        [("a", pytest.approx(0.85)), (None, pytest.approx(0.55))],
        [("f", pytest.approx(0.7)), ("f", pytest.approx(0.7))],
    ]
    assert levels_above(None, rows) == [(), ()]


def test_a_service_gives_the_levels(run: Path) -> None:
    from service import call as ask
    from service import running

    with running(run, device="cpu") as service:
        answer = ask(service.url, "/v1/classify", {"texts": TEXTS[:1]})
    (result,) = json.loads(answer.body)["results"]
    (level,) = result["levels"]
    assert level["label"] == result["labels"][0]["label"].split(" > ")[0]
    assert level["probability"] >= result["labels"][0]["probability"]


@pytest.mark.parametrize("separator", [" > ", ">", "/", ".", "_", "::"])
def test_every_level_is_a_node_of_the_label_trie(tokenizer: Any, separator: str) -> None:
    labels = [
        separator.join(parts)
        for parts in (("card", "lost"), ("card", "arrival", "late"), ("card", "arrival", "never"))
    ]
    labels += ["card", "cards", separator.join(("cards", "new")), separator.join(("top up", "no"))]
    prompt = Prompt(tokenizer, labels, instruction="", max_length=200)
    assert nodes_not_in_trie(prompt.answers, Hierarchy(tuple(labels), separator)) == []


def test_a_level_that_no_token_ends_at_is_told() -> None:
    """1 is "card/", 2 is "card/a", and 3 "card/b": no token ends with "card"."""
    hierarchy = Hierarchy(("card/a", "card/b", "other/a", "other/b"), "/")
    assert nodes_not_in_trie([[2, 0], [3, 0], [4, 5, 0], [4, 6, 0]], hierarchy) == ["card"]
    assert nodes_not_in_trie([[1, 2, 0], [1, 3, 0], [4, 5, 0], [4, 6, 0]], hierarchy) == []

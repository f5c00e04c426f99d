"""`Predictor`: the answers of `remora predict`, for engines that hand batches of columns to it."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pyarrow
import pytest

import remora
from conftest import WORDS
from remora.errors import ConfigError, DataError, ModelError
from remora.serving import predictor as module
from remora.serving.predictor import Predictor
from service import call, predicted, running, write_adapter

TEXTS = [
    f"{way} the {word} {i}" for i in range(40) for way in ("where is", "why") for word in "abc"
]
"""More than two batches."""


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(tmp_path_factory.mktemp("runs") / "a", base, 1)


def predictor(run: Path, **settings: Any) -> Predictor:
    return remora.Predictor(run, device="cpu", precision="float32", **settings)


def as_kinds(table: dict[str, list[Any]]) -> dict[str, Any]:
    """The batches that Ray Data, Spark, Daft and a user hand over."""
    return {
        "arrays": {name: np.array(values, dtype=object) for name, values in table.items()},
        "lists": table,
        "pandas": pandas.DataFrame(table, index=range(5, 5 + len(table["text"]))),
        "arrow": pyarrow.table(table),
        "record batch": pyarrow.RecordBatch.from_pydict(table),
    }


def columns_of(batch: Any) -> dict[str, list[Any]]:
    if isinstance(batch, pyarrow.Table | pyarrow.RecordBatch):
        return batch.to_pydict()
    return {name: list(batch[name]) for name in batch}


def missing(value: object) -> bool:
    return value is None or value != value


@pytest.mark.parametrize("kind", ["arrays", "lists", "pandas", "arrow", "record batch"])
def test_every_kind_of_batch_gets_the_answers_of_predict(run: Path, kind: str) -> None:
    expected = predicted(run, TEXTS, 2, device="cpu")
    given = as_kinds({"id": list(range(len(TEXTS))), "text": TEXTS})[kind]
    found = predictor(run, top_k=2)(given)
    assert type(found) is type(given)
    columns = columns_of(found)
    names = ["id", "text", "label", "probability", "label_2", "probability_2"]
    assert list(columns) == names
    assert columns["text"] == TEXTS
    assert columns["id"] == list(range(len(TEXTS)))
    ranked = zip(*(columns[name] for name in names[2:]), strict=True)
    assert [[(a, p), (b, q)] for a, p, b, q in ranked] == expected  # to the last bit
    if kind == "pandas":
        assert list(found.index) == list(given.index)
        assert "label" not in given  # the caller's frame is as it was


@pytest.mark.parametrize("kind", ["arrays", "lists", "pandas", "arrow", "record batch"])
def test_blank_cells_get_no_label_and_names_that_are_taken_a_prefix(run: Path, kind: str) -> None:
    table = {"text": ["where is my card?", None, "  "], "label": ["x", "y", "z"]}
    columns = columns_of(predictor(run)(as_kinds(table)[kind]))
    assert columns["label"] == ["x", "y", "z"]
    label, probability = columns["predicted_label"], columns["predicted_probability"]
    assert label[0] in WORDS
    assert [missing(each) for each in label] == [False, True, True]
    assert [missing(each) for each in probability] == [False, True, True]
    empty = {name: values[:0] for name, values in table.items()}
    assert not any(columns_of(predictor(run)(as_kinds(empty)[kind])).values())


def test_a_threshold_withholds_labels(run: Path) -> None:
    found = predictor(run, threshold=1.0)({"text": TEXTS[:3]})
    assert list(found["label"]) == [None] * 3
    assert all(0 < p < 1 for p in found["probability"])


def test_text_columns_are_chosen_as_predict_does(run: Path, tmp_path: Path, base: Path) -> None:
    table = {"title": ["where"], "body": ["my card?"], "number": [5]}
    with pytest.raises(DataError, match=r"the batch has no text column.* --text-column"):
        predictor(run)({name: values for name, values in table.items() if name != "body"})
    named = predictor(run, text_column=("title", "body"))(table)
    assert (
        named["probability"]
        == predictor(run)({"text": ["title: where\nbody: my card?"]})["probability"]
    )
    other = write_adapter(tmp_path / "b", base, 1)
    card = json.loads((other / "adapter" / "remora.json").read_text())
    card |= {"text_columns": ["title", "body"], "label_column": "kind"}
    (other / "adapter" / "remora.json").write_text(json.dumps(card))
    assert predictor(other)(table)["probability"] == named["probability"]
    renamed = {"x1": table["title"], "x2": table["body"]}
    by_place = predictor(other, text_column=("x1", "x2"))(renamed)
    assert by_place["probability"] == named["probability"]
    with pytest.raises(DataError, match=r"row 1 has one text, 'my card\?', and the model was trai"):
        predictor(other, text_column="x2")(renamed)
    with pytest.raises(DataError, match="the batch: row 2 has a text of type dict"):
        predictor(run)({"text": ["a", {"b": 1}]})
    with pytest.raises(DataError, match="a batch of type list has no columns; give a dict"):
        predictor(run)(["a text"])


def test_wrong_settings_and_models_are_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="no argument 'topk'; did you mean 'top_k'"):
        Predictor(run, topk=2)
    with pytest.raises(ConfigError, match="top_k is 0; give a whole number from 1"):
        Predictor(run, top_k=0)
    with pytest.raises(ConfigError, match="top_k is 9 but the model has 3 labels"):
        predictor(run, top_k=9)({"text": ["a"]})
    nowhere = predictor(tmp_path / "none")  # settings alone are not looked at
    with pytest.raises(ModelError, match="none"):
        nowhere({"text": ["a"]})


def test_it_is_pickled_without_the_model_and_works_elsewhere(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run.parent)
    made = predictor(Path(run.name))
    expected = made({"text": TEXTS[:5]})["probability"]
    pickled = pickle.dumps(made)
    assert len(pickled) < 2_000  # no weights
    (tmp_path / "pickled").write_bytes(pickled)
    code = (
        "import pickle, sys; found = pickle.load(open('pickled', 'rb'));"
        "assert 'torch' in sys.modules;"
        f"print(found({{'text': {TEXTS[:5]!r}}})['probability'].tolist())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert json.loads(done.stdout) == expected.tolist()


def test_a_process_loads_a_model_once_and_notices_another(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_adapter(tmp_path / "a", base, 1)
    loaded = []
    really = module.open_trained
    monkeypatch.setattr(module, "open_trained", lambda *a, **k: loaded.append(a) or really(*a, **k))

    # As Spark's mapInPandas: each task unpickles the function and maps an iterator of frames
    def task(pickled: bytes, frames: Iterator[pandas.DataFrame]) -> Iterator[pandas.DataFrame]:
        yield from map(pickle.loads(pickled), frames)

    pickled = pickle.dumps(predictor(run))
    frames = [pandas.DataFrame({"text": TEXTS[i : i + 7]}) for i in range(0, 21, 7)]
    first = [list(task(pickled, iter(frames))) for _ in range(2)]
    assert len(loaded) == 1
    assert [len(frame) for frame in first[0]] == [7, 7, 7]
    write_adapter(tmp_path / "a", base, 2)  # trained again in its place
    again = list(task(pickled, iter(frames)))
    assert len(loaded) == 2
    assert not again[0]["probability"].equals(first[1][0]["probability"])


def test_the_service_gives_the_same_answers(run: Path) -> None:
    with running(run, device="cpu") as service:
        body = {"texts": TEXTS[:50], "top_k": 2}
        answered = call(service.url, "/v1/classify", body).json["results"]
    found = predictor(run, top_k=2).answers(TEXTS[:50])
    assert [
        [(each["label"], each["probability"]) for each in result["labels"]] for result in answered
    ] == [[(label, round(p, 6)) for label, p in ranked] for ranked, _ in found]

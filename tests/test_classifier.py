"""`TextClassifier` behaves as scikit-learn's estimators do."""

from __future__ import annotations

import copy
import dataclasses
import io
import json
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pandas as pd
import pyarrow
import pytest
from numpy.typing import NDArray
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.metrics import accuracy_score
from sklearn.model_selection import KFold, cross_val_score
from sklearn.preprocessing import MultiLabelBinarizer
from sklearn.utils import estimator_checks

from remora import TextClassifier
from remora.config import TrainConfig
from remora.errors import ConfigError, DataError, ModelError, ResourceError
from remora.runtime import memory

TEXTS = ["my card is late", "my card never came", "refund please", "where is the refund"] * 6
LABELS = [0, 0, 1, 1] * 6
NAMES = ["card", "card", "refund", "refund"] * 6
SETS = [["card"], ["card", "late"], ["refund"], []] * 6


@pytest.fixture
def classifier(base: Path) -> TextClassifier:
    return TextClassifier(
        str(base),
        epochs=2,
        batch_size=8,
        rank=4,
        learning_rate=1e-2,
        precision="float32",
        device="cpu",
    )


OF_A_RUN = {
    *("data", "name", "output", "validation", "test", "text_column", "label_column"),
    *("test_fraction", "rows_per_class", "learning_curve", "devices", "shard", "trackers"),
    *("checkpoint_minutes", "max_time", "baselines", "embedding_model", "tolerance"),
    *("input_format", "columns", "strict", "merge_labels", "rename_labels"),
    *("multi_label", "split_labels_at", "label_columns", "corrections"),
}
"""Settings of tables, run directories, several processes, and of what is measured at the end."""


def test_every_setting_of_training_is_an_argument() -> None:
    known = {field.name for field in dataclasses.fields(TrainConfig)}
    assert set(TextClassifier().get_params()) == known - OF_A_RUN


@pytest.mark.parametrize(
    ("settings", "parameters", "scaling"),
    [
        ({"use_rslora": True}, {"lora_A", "lora_B"}, 16.0),
        ({"use_dora": True}, {"lora_A", "lora_B", "lora_magnitude_vector"}, 8.0),
        ({"init_lora_weights": "gaussian"}, {"lora_A", "lora_B"}, 8.0),
        ({"loraplus_lr_ratio": 16}, {"lora_A", "lora_B"}, 8.0),
    ],
)
def test_variants_of_lora(
    classifier: TextClassifier, settings: dict[str, Any], parameters: set[str], scaling: float
) -> None:
    plain = clone(classifier).fit(TEXTS, LABELS).predict_proba(TEXTS[:4])
    varied = classifier.set_params(**settings).fit(TEXTS, LABELS)
    trained = [name for name, p in varied.model_.named_parameters() if p.requires_grad]
    assert {part for name in trained for part in name.split(".") if "lora_" in part} == parameters
    found = {m.scaling["default"] for m in varied.model_.modules() if hasattr(m, "lora_A")}
    assert found == {scaling}
    assert not np.allclose(varied.predict_proba(TEXTS[:4]), plain)


def test_fit_predict_save_load(classifier: TextClassifier, tmp_path: Path) -> None:
    assert classifier.fit(TEXTS, LABELS) is classifier
    assert classifier.classes_.tolist() == [0, 1]
    probabilities = classifier.predict_proba(TEXTS[:4])
    assert probabilities.shape == (4, 2)
    np.testing.assert_allclose(probabilities.sum(1), 1)
    predicted = classifier.predict(np.array(TEXTS[:4]))
    assert predicted.dtype == classifier.classes_.dtype
    assert (predicted == classifier.classes_[probabilities.argmax(1)]).all()
    assert 0 <= classifier.score(TEXTS, LABELS) <= 1
    classifier.save(tmp_path / "adapter")
    loaded = TextClassifier.load(tmp_path / "adapter", precision="float32", device="cpu")
    np.testing.assert_allclose(loaded.predict_proba(TEXTS[:4]), probabilities, rtol=1e-6)


def test_two_fits_are_the_same_and_leave_the_callers_random_state(
    classifier: TextClassifier,
) -> None:
    import torch

    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first = classifier.fit(TEXTS, LABELS).predict_proba(TEXTS[:4])
    assert torch.equal(torch.rand(1), expected)
    second = clone(classifier).fit(TEXTS, LABELS).predict_proba(TEXTS[:4])
    np.testing.assert_array_equal(first, second)


def with_item(row: int, value: object, values: list[Any]) -> list[Any]:
    return [*values[:row], value, *values[row + 1 :]]


@pytest.mark.parametrize(
    ("texts", "labels", "message"),
    [
        ("one text", [0], "a single text was given; give a list of texts"),
        (b"one text", [0], "a single text was given"),
        (["a", None], [0, 1], "item 1 is of type NoneType"),
        (["a", b"b"], [0, 1], "item 1 is of type bytes"),
        (["a", " "], [0, 1], "item 1 is blank"),
        (["a", "\ud800"], [0, 1], "item 1 has half of a surrogate pair"),
        (["a", "b"], [0], "there are 2 texts and 1 labels; give a label for each text"),
        (["a", "b"], [0, 0], "at least two"),
        ([], [], "there are no texts; give"),
        (None, [0, 1], "the texts are of type NoneType; give a list of texts"),
        ({"text": TEXTS}, LABELS, "the texts are a mapping; give a list of texts"),
        (pd.DataFrame({"text": TEXTS}), LABELS, r"array of shape \(24, 1\); give one column"),
        (np.array(TEXTS).reshape(-1, 1), LABELS, r"array of shape \(24, 1\); give one column"),
        (TEXTS, None, "the labels are of type NoneType; give a list of labels"),
        (TEXTS, "card", "a single label was given; give a list of labels"),
        (TEXTS, pd.DataFrame({"a": LABELS}), r"the labels are an array of shape \(24, 1\); give a"),
        (
            TEXTS,
            [0.5, 1.5] * 12,
            r"labels such as 0.5 are no classes \(.*continuous\); give strings",
        ),
        (TEXTS, [{"a": 1}] * 24, r"labels such as \{'a': 1\} are no classes"),
    ],
)
def test_bad_input(classifier: TextClassifier, texts: Any, labels: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        classifier.fit(texts, labels)


@pytest.mark.parametrize(
    ("labels", "found"),
    [
        (pd.Series(with_item(3, np.nan, NAMES)), "nan"),
        (with_item(3, None, NAMES), "None"),
        (with_item(3, np.nan, NAMES), "nan"),  # which NumPy would write as the text nan
        (np.array(with_item(3, np.nan, LABELS)), "nan"),
        (np.array(with_item(3, np.nan, LABELS), dtype=np.float32), "nan"),
        (pd.Series(with_item(3, pd.NA, LABELS), dtype="Int64"), "<NA>"),
        (pd.Series(with_item(3, pd.NA, NAMES), dtype="string"), "<NA>"),
        (pd.Series(with_item(3, None, NAMES), dtype="category"), "nan"),
        (pd.Series(with_item(3, pd.NaT, [pd.Timestamp(2026, 1, 1)] * 24)), "NaT"),
        (with_item(3, "", NAMES), "''"),
        (with_item(3, " ", NAMES), "' '"),
        (with_item(3, ["card", None], SETS), "None"),
        (with_item(3, ["card", np.nan], SETS), "nan"),
        (with_item(3, [""], SETS), "''"),
    ],
)
def test_missing_labels_are_refused_with_their_position(
    classifier: TextClassifier, labels: Any, found: str
) -> None:
    with pytest.raises(DataError) as refused:
        classifier.fit(TEXTS, labels)
    advice = "give it one, or leave the item out"
    assert str(refused.value) == f"item 3 has the label {found}; {advice}"


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (with_item(3, 1, NAMES), "item 3 has the label 1, and item 0 'card'; give only strings or"),
        (pd.Series(with_item(3, 1, NAMES)), "item 3 has the label 1, and item 0 'card'"),
        (with_item(3, "1", LABELS), "item 3 has the label '1', and item 0 0"),
        (with_item(3, [1], SETS), "item 3 has the label 1, and item 0 'card'"),
        (with_item(3, None, SETS), "such as item 3; give a list for each"),
        ([[1, 0], [0, 1], [1, 1], [0, 1]] * 6, "item 2 has a vector of 0 and 1; .*inverse_transf"),
        ([np.array([1, 0, 0])] * 24, "item 0 has a vector of 0 and 1"),
    ],
)
def test_labels_of_several_kinds_are_refused(
    classifier: TextClassifier, labels: Any, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        classifier.fit(TEXTS, labels)


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (pd.Series(LABELS, dtype="Int64"), [0, 1]),
        (pd.Series(LABELS, dtype=object), [0, 1]),
        (pd.Series(NAMES, dtype="category"), ["card", "refund"]),
        (iter(NAMES), ["card", "refund"]),
        (pd.Series([np.array(each, dtype=object) for each in SETS]), ["card", "late", "refund"]),
    ],
)
def test_columns_of_pandas_are_taken(
    classifier: TextClassifier, labels: Any, classes: list[Any]
) -> None:
    classifier.set_params(max_steps=1).fit(pd.Series(TEXTS), labels)
    assert classifier.classes_.tolist() == classes


@pytest.mark.parametrize("texts", [None, 3, b"ab", ["\ud800"], pd.DataFrame({"text": TEXTS})])
def test_bad_texts_are_refused_in_prediction_too(classifier: TextClassifier, texts: Any) -> None:
    classifier.set_params(max_steps=1).fit(TEXTS, LABELS)
    with pytest.raises(DataError):
        classifier.predict(texts)
    assert classifier.predict_proba([]).shape == (0, 2)


def test_a_model_of_several_columns_takes_a_table_of_them(
    classifier: TextClassifier, tmp_path: Path
) -> None:
    rows = [("a", None), ("b", "my card"), (None, "c")]
    texts = ["title: a", "title: b\nbody: my card", "body: c"]
    classifier.set_params(max_steps=1).fit(TEXTS, LABELS).save(tmp_path / "saved")
    card = tmp_path / "saved" / "remora.json"
    columns = {"text_columns": ["title", "body"]}
    card.write_text(json.dumps(json.loads(card.read_text()) | columns))
    loaded = TextClassifier.load(tmp_path / "saved", precision="float32", device="cpu")
    expected = classifier.predict_proba(texts)
    frame = pd.DataFrame(rows, columns=["title", "body"])
    wide = frame[["body", "title"]].assign(more=1).convert_dtypes()
    for table in (frame, wide, pyarrow.Table.from_pandas(frame), texts):
        np.testing.assert_array_equal(loaded.predict_proba(table), expected)
    for wrong, message in (
        (["my card"], "item 0 is one text, and the model was trained on 'title', 'body'; give a"),
        (frame["body"].fillna("x"), "item 0 is one text, and the model was trained on 'title', "),
        (frame[["body"]], "the table has no column 'title'; give a table with the columns 'title'"),
        (frame.to_numpy(), r"array of shape \(3, 2\); give a table with the columns 'title', "),
        (frame.assign(title=None, body=" "), "item 0 is blank"),
        (frame.assign(body=[{"a": 1}] * 3), "item 0 has a text of type dict"),
    ):
        with pytest.raises(DataError, match=message):
            loaded.predict(wrong)


def test_class_weights_by_label(classifier: TextClassifier) -> None:
    plain = clone(classifier).fit(TEXTS, NAMES).predict_proba(TEXTS[:4])
    weighed = classifier.set_params(class_weights={"refund": 50.0})
    assert (clone(weighed).fit(TEXTS, NAMES).predict_proba(TEXTS[:4])[:, 1] > plain[:, 1]).all()
    with pytest.raises(DataError, match="has the label 'refnd', which no row has; did you mean"):
        weighed.set_params(class_weights={"refnd": 1.0}).fit(TEXTS, NAMES)


def test_label_texts_and_class_weights_by_labels_that_are_numbers(
    classifier: TextClassifier,
) -> None:
    texts, weights = {0: "card", 1: "money"}, {1: 50.0}
    classifier.set_params(max_steps=1, label_texts=texts, class_weights=weights)
    assert classifier.fit(TEXTS, LABELS).prompt_.label_texts == {"0": "card", "1": "money"}
    assert classifier.classes_.tolist() == [0, 1]


def test_target_modules_are_separated_by_commas(classifier: TextClassifier) -> None:
    classifier.set_params(max_steps=1, target_modules="q_proj,v_proj").fit(TEXTS, LABELS)
    adapted = {
        n.split(".")[-1] for n, m in classifier.model_.named_modules() if hasattr(m, "lora_A")
    }
    assert adapted == {"q_proj", "v_proj"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "x", "rank": "8"}, "^method is 'x'; give [^;]+; rank is '8'; give [^;]+$"),
        ({"precision": "fp16"}, "^precision is 'fp16'; give auto, float32, bfloat16 or float16$"),
        ({"target_modules": 5}, "^target_modules is 5; give a list of names$"),
    ],
)
def test_a_setting_that_cannot_be_is_refused(
    classifier: TextClassifier, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        classifier.set_params(**settings).fit(TEXTS, LABELS)


def test_a_separator_that_no_label_has_is_refused(classifier: TextClassifier) -> None:
    with pytest.raises(DataError, match="no label has the separator '/'"):
        classifier.set_params(label_separator="/").fit(TEXTS, NAMES)


def test_threads_get_what_they_would_get_one_after_another(classifier: TextClassifier) -> None:
    classifier.set_params(max_steps=1).fit(TEXTS, LABELS)
    chunks = [[f"card {i} {j} " * (1 + j % 4) for j in range(20)] for i in range(4)]
    expected = list(map(classifier.predict_proba, chunks))
    with ThreadPoolExecutor(4) as pool:
        for found, each in zip(pool.map(classifier.predict_proba, chunks), expected, strict=True):
            np.testing.assert_array_equal(found, each)
        copies = pool.map(lambda _: copy.deepcopy(classifier).predict_proba(chunks[0]), range(2))
        np.testing.assert_array_equal(list(copies), [expected[0]] * 2)


def test_threads_that_fit_take_turns_with_the_random_state(classifier: TextClassifier) -> None:
    def fitted(seed: int) -> NDArray[np.float64]:
        again = clone(classifier).set_params(seed=seed, dropout=0.2)
        return again.fit(TEXTS, LABELS).predict_proba(TEXTS[:4])

    expected = list(map(fitted, range(2)))
    with ThreadPoolExecutor(2) as pool:
        np.testing.assert_array_equal(list(pool.map(fitted, range(2))), expected)


@pytest.mark.parametrize(
    ("settings", "labels"),
    [
        ({}, LABELS),
        ({"answer": "classes"}, NAMES),
        ({"layout": "rows", "precision": "bfloat16"}, NAMES),
        ({"use_dora": True}, NAMES),
        ({"method": "full", "learning_rate": 1e-3}, NAMES),
        ({}, SETS),
    ],
)
def test_a_pickle_answers_the_same_to_the_bit(
    classifier: TextClassifier, settings: dict[str, Any], labels: list[Any], tmp_path: Path
) -> None:
    classifier.set_params(**settings).fit(TEXTS, labels)
    classifier.save(tmp_path / "saved")
    where = {"precision": classifier.precision, "device": "cpu"}
    loaded = TextClassifier.load(tmp_path / "saved", **where)
    for fitted in (classifier, loaded):
        expected = fitted.predict_proba(TEXTS[:4])
        file = io.BytesIO()
        joblib.dump(fitted, file)
        file.seek(0)
        for again in (pickle.loads(pickle.dumps(fitted)), joblib.load(file), copy.deepcopy(fitted)):
            np.testing.assert_array_equal(again.predict_proba(TEXTS[:4]), expected)
            np.testing.assert_array_equal(again.classes_, fitted.classes_)
            assert list(again.predict(TEXTS[:4])) == list(fitted.predict(TEXTS[:4]))
            assert again.get_params() == fitted.get_params()
            assert again.model_ is not fitted.model_


def test_a_pickle_is_opened_in_another_folder(
    classifier: TextClassifier, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(base.parent)
    pickled = pickle.dumps(classifier.set_params(model=base.name, max_steps=1).fit(TEXTS, NAMES))
    monkeypatch.chdir(tmp_path)
    again = pickle.loads(pickled)
    assert again.model == base.name
    np.testing.assert_array_equal(again.predict_proba(TEXTS), classifier.predict_proba(TEXTS))


def test_a_pickle_knows_where_a_base_has_moved(
    classifier: TextClassifier, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(base, tmp_path / "before")
    classifier.set_params(model=str(tmp_path / "before"), max_steps=1).fit(TEXTS, NAMES)
    expected = classifier.predict_proba(TEXTS[:4])
    classifier.save(tmp_path / "saved")
    pickled = pickle.dumps(classifier)
    (tmp_path / "before").rename(tmp_path / "after")
    with pytest.raises(ModelError) as refused:
        pickle.loads(pickled)
    assert str(refused.value) == (
        f"this pickled classifier cannot be opened (it was trained on {tmp_path / 'before'}, which "
        "is not there); use save, and load with model= or device="
    )
    monkeypatch.chdir(tmp_path)
    moved = TextClassifier.load("saved", model="after", precision="float32", device="cpu")
    again = pickle.dumps(moved)
    monkeypatch.chdir(tmp_path.parent)
    np.testing.assert_array_equal(pickle.loads(again).predict_proba(TEXTS[:4]), expected)


def test_a_pickle_of_a_device_that_is_not_here_is_refused(
    classifier: TextClassifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    pickled = pickle.dumps(
        classifier.set_params(max_steps=1).fit(TEXTS, LABELS).set_params(device="mps")
    )
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"\(no mps device is available\); use save, and load"):
        pickle.loads(pickled)


def test_an_unfitted_classifier_is_pickled_and_copied(classifier: TextClassifier) -> None:
    for again in (pickle.loads(pickle.dumps(classifier)), copy.deepcopy(classifier)):
        assert again.get_params() == classifier.get_params()
        with pytest.raises(NotFittedError):
            again.predict(TEXTS)


def test_score_of_lists_is_scikit_learns_subset_accuracy(classifier: TextClassifier) -> None:
    classifier.fit(TEXTS, SETS)
    true = [*SETS[4:], ["late", "card"], ["card"], [], []]  # in any order; some are wrong
    binarizer = MultiLabelBinarizer().fit(SETS)
    rows = binarizer.transform(true), binarizer.transform(classifier.predict(TEXTS))
    weights = np.arange(1, 25)
    assert 0 < accuracy_score(*rows) < 1
    assert classifier.score(TEXTS, true) == pytest.approx(accuracy_score(*rows))
    weighted = accuracy_score(*rows, sample_weight=weights)
    assert weighted != accuracy_score(*rows)
    assert classifier.score(TEXTS, true, sample_weight=weights) == pytest.approx(weighted)
    for y, message in (
        (NAMES, "the texts have one label, and the classifier gives a list of labels; give"),
        (SETS[1:], "there are 24 texts and 23 labels"),
        (with_item(3, [None], SETS), "item 3 has the label None"),
    ):
        with pytest.raises(DataError, match=message):
            classifier.score(TEXTS, y)
    with pytest.raises(DataError, match=r"sample_weight has the shape \(1,\); give a number for"):
        classifier.score(TEXTS, SETS, sample_weight=[1])


def test_score_of_labels_is_scikit_learns_accuracy(classifier: TextClassifier) -> None:
    classifier.fit(TEXTS, LABELS)
    true, weights = [0] * 12 + LABELS[12:], np.arange(1, 25)
    expected = accuracy_score(true, classifier.predict(TEXTS), sample_weight=weights)
    assert 0 < expected < 1
    assert classifier.score(TEXTS, true, sample_weight=weights) == pytest.approx(expected)
    for y, message in (
        (NAMES, "item 0 has the label 'card', and the classes are such as 0; give labels of"),
        (SETS, "the texts have lists of labels, and the classifier gives one label; give"),
    ):
        with pytest.raises(DataError, match=message):
            classifier.score(TEXTS, y)
    with pytest.raises(DataError, match="there are no texts"):
        classifier.score([], [])
    for weights in ([0, 0, 0], [3, -1, 0], [float("nan"), 1, 1], [float("inf"), 1, 1]):
        with pytest.raises(DataError, match=r"^sample_weight goes from \S+ to \S+; give numbers"):
            classifier.score(TEXTS[:3], LABELS[:3], sample_weight=weights)
    with pytest.raises(DataError, match=r"^sample_weight is of no numbers \(could not convert"):
        classifier.score(TEXTS[:3], LABELS[:3], sample_weight=["a", "b", "c"])


def test_a_save_that_fails_names_no_flag(classifier: TextClassifier, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ResourceError, match=r"free space, or give another path$"):
        classifier.fit(TEXTS, LABELS).save(tmp_path / "file" / "x")


def test_cross_validation_of_lists_takes_folds(classifier: TextClassifier) -> None:
    folds = KFold(2, shuffle=True, random_state=0)
    scores = cross_val_score(classifier, TEXTS, SETS, cv=folds)
    assert scores.shape == (2,)
    assert ((scores >= 0) & (scores <= 1)).all()


def test_columns_are_in_the_order_of_the_classes_not_of_their_names(
    classifier: TextClassifier,
) -> None:
    classifier.fit(TEXTS, [10 if label else 9 for label in LABELS])  # as text, "10" is before "9"
    assert classifier.classes_.tolist() == [9, 10]
    assert classifier.prompt_.labels == ("9", "10")
    chosen = classifier.predict_proba(TEXTS).argmax(1)
    assert (classifier.predict(TEXTS) == np.array([9, 10])[chosen]).all()


def test_what_does_not_fit_into_memory_is_refused(
    classifier: TextClassifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda _: 0)
    with pytest.raises(ResourceError, match=r"training needs .* of memory"):
        classifier.fit(TEXTS, LABELS)


def test_an_unknown_argument_is_refused_with_the_one_meant() -> None:
    with pytest.raises(TypeError, match="no argument 'epoch'; did you mean 'epochs'"):
        TextClassifier("nano", epoch=2)


def test_not_fitted(classifier: TextClassifier) -> None:
    with pytest.raises(NotFittedError):
        classifier.predict(["a"])


@pytest.mark.parametrize(
    "check",
    [
        "check_no_attributes_set_in_init",
        "check_parameters_default_constructible",
        "check_get_params_invariance",
        "check_set_params",
        "check_estimator_cloneable",
        "check_estimator_repr",
        "check_estimator_tags_renamed",
        "check_valid_tag_types",
    ],
)
def test_scikit_learns_own_checks_that_apply_to_text(check: str) -> None:
    """The others feed numbers, which are no texts."""
    getattr(estimator_checks, check)("TextClassifier", TextClassifier())

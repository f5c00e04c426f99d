"""`TextClassifier` behaves as scikit-learn's estimators do."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.utils import estimator_checks

from remora import TextClassifier
from remora.config import TrainConfig
from remora.errors import DataError, ResourceError
from remora.runtime import memory

TEXTS = ["my card is late", "my card never came", "refund please", "where is the refund"] * 6
LABELS = [0, 0, 1, 1] * 6


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
    *("multi_label", "split_labels_at", "label_columns"),
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


@pytest.mark.parametrize(
    ("texts", "labels", "message"),
    [
        ("one text", [0], "a single text"),
        (["a", None], [0, 1], "item 1 is of type NoneType"),
        (["a", " "], [0, 1], "item 1 is blank"),
        (["a", "b"], [0], "2 texts, but labels of shape"),
        (["a", "b"], [0, 0], "at least two"),
    ],
)
def test_bad_input(classifier: TextClassifier, texts, labels, message: str) -> None:
    with pytest.raises(DataError, match=message):
        classifier.fit(texts, labels)


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

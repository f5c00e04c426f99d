"""`TextClassifier`: the same functions, in scikit-learn's manner."""

from __future__ import annotations

import dataclasses
import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted

from remora.config import TrainConfig
from remora.config.several_labels import settled
from remora.data.dataset import dataset_from_lists
from remora.data.label_sets import set_text
from remora.errors import DataError
from remora.evaluation.multi_label import with_thresholds
from remora.evaluation.predictions import ScoredSets
from remora.formatting import close_match
from remora.models import saved
from remora.models.saved import open_trained
from remora.runtime.reporter import Reporter
from remora.training.loop import fit
from remora.training.session import open_session
from remora.tree.scoring import score_rows

OF_A_RUN = {
    *("data", "validation", "test", "text_column", "label_column", "test_fraction"),
    *("input_format", "columns", "strict", "merge_labels", "rename_labels"),
    *("multi_label", "split_labels_at", "label_columns"),
    *("rows_per_class", "learning_curve", "name", "output", "trackers"),
    *("baselines", "embedding_model", "tolerance"),
    *("devices", "shard", "checkpoint_minutes", "max_time"),
}
"""Settings of `remora train` that belong to its tables, its run directory, its processes, and to
what it measures at its end."""

SETTINGS = {
    field.name: field
    for field in dataclasses.fields(TrainConfig)
    if field.name not in OF_A_RUN | {"model"}
}
"""The settings that `TextClassifier` takes by name."""


def _signature() -> inspect.Signature:
    parameter = inspect.Parameter
    model = parameter(
        "model",
        parameter.POSITIONAL_OR_KEYWORD,
        default="Qwen/Qwen2.5-1.5B-Instruct",
        annotation="str",
    )
    named = (
        parameter(
            field.name, parameter.KEYWORD_ONLY, default=None, annotation=f"{field.type} | None"
        )
        for field in SETTINGS.values()
    )
    return inspect.Signature([parameter("self", parameter.POSITIONAL_ONLY), model, *named])


class TextClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """A text classifier: a frozen language model with a small trained LoRA adapter.

    With `method="full"` the language model itself trains, in all its weights.

    Every argument but the model may be None, which stands for the default of `TrainConfig`, where
    each is described.

    Attributes:
        classes_: The labels seen in `fit`, sorted, [n_classes].
        model_: PEFT's model, or the plain one where all its weights trained.
        prompt_: How messages are asked and labels are answered.

    Example:
        >>> clf = TextClassifier("Qwen/Qwen2.5-1.5B-Instruct").fit(texts, labels)  # doctest: +SKIP
        >>> clf.predict(["Where is my card?"])  # doctest: +SKIP
    """

    def __init__(self, model: str = "Qwen/Qwen2.5-1.5B-Instruct", **settings: Any) -> None:
        unknown = sorted(settings.keys() - SETTINGS.keys())
        if unknown:
            close = close_match(unknown[0], SETTINGS)
            hint = f"; did you mean {close!r}?" if close else ""
            raise TypeError(f"TextClassifier has no argument {unknown[0]!r}{hint}")
        self.model = model
        for name in SETTINGS:
            setattr(self, name, settings.get(name))

    # scikit-learn reads the names of the parameters here, and so does a person.
    __init__.__signature__ = _signature()  # type: ignore[attr-defined]

    def fit(self, X: ArrayLike, y: ArrayLike) -> TextClassifier:
        """Train on texts and their labels.

        Args:
            X: Texts, [n_samples].
            y: Their labels, [n_samples]; or a list of labels for each, where a text may have
                several or none.

        Returns:
            The classifier itself.

        Raises:
            ConfigError: If a setting is wrong.
            DataError: If the texts or labels cannot be learned from.
            ModelError: If the base model cannot be used.
            ResourceError: If memory does not suffice.
        """
        texts = _texts(X)
        if _are_sets(y):
            return self._fit_sets(texts, y)
        targets = np.asarray(y)
        check_classification_targets(targets)
        if targets.ndim != 1 or len(targets) != len(texts):
            raise DataError(
                f"there are {len(texts)} texts, but labels of shape {targets.shape}; "
                "give one label for each text"
            )
        classes = np.unique(targets)
        names = [str(value) for value in classes]
        if len(names) < 2 or len(set(names)) < len(names):
            raise DataError(
                f"the labels hold the classes {', '.join(names)}; give at least two different ones"
            )
        config = self._config()
        dataset = dataset_from_lists(
            texts,
            [str(value) for value in targets],
            validation_fraction=config.validation_fraction,
            seed=config.seed,
        )
        # In the order of the classes, where that of numbers is not that of their names
        dataset = dataclasses.replace(dataset, labels=tuple(names))
        with open_session(config, dataset) as session:
            fit(session)
        self.classes_ = classes
        self.model_, self.prompt_ = session.model, session.prompt
        self._trained = session.trained
        return self

    def _fit_sets(self, texts: list[str], y: Any) -> TextClassifier:
        """Train where a text may have several labels, or none."""
        sets = [[str(label) for label in labels] for labels in y]
        if len(sets) != len(texts):
            raise DataError(
                f"there are {len(texts)} texts and {len(sets)} lists of labels; give one list for "
                "each text"
            )
        config = self._config()
        dataset = dataset_from_lists(
            texts,
            [set_text(labels) for labels in sets],
            validation_fraction=config.validation_fraction,
            seed=config.seed,
            multi_label=True,
        )
        config = settled(config, is_multi_label=True)
        with open_session(config, dataset) as session:
            fit(session)
            trained, validation = session.trained, dataset.validation
            if len(validation):
                scored = score_rows(session.scorer(), validation, "validation", Reporter())
                fitted = with_thresholds({"validation": scored})["validation"]
                assert isinstance(fitted, ScoredSets)
                thresholds = tuple(fitted.thresholds.tolist())
                trained = replace(trained, card=replace(trained.card, thresholds=thresholds))
        kinds = {str(label): label for labels in y for label in labels}
        self.classes_ = np.array([kinds[name] for name in dataset.labels])
        self.model_, self.prompt_ = session.model, session.prompt
        self._trained = trained
        return self

    def predict_proba(self, X: ArrayLike) -> NDArray[np.float64]:
        """Return the probability of each class for each text, [n_samples, n_classes].

        The columns are in the order of `classes_`. Where a text may have several labels each is a
        probability of its own, and a row need not sum to 1.
        """
        check_is_fitted(self)
        scorer = self._trained.scorer(max_tokens=self._config().max_tokens)
        return scorer.probabilities(_texts(X))

    def predict(self, X: ArrayLike) -> NDArray[Any] | list[list[Any]]:
        """Return the likeliest class for each text, [n_samples].

        Where a text may have several labels, return the list of its labels for each text.
        """
        probabilities = self.predict_proba(X)
        card = self._trained.card
        if card.multi_label:
            given = probabilities >= np.array(card.thresholds)
            return [self.classes_[row].tolist() for row in given]
        chosen = probabilities.argmax(axis=1)
        result: NDArray[Any] = self.classes_[chosen]
        return result

    def save(self, path: str | Path) -> None:
        """Save the adapter in PEFT's format, or the model, beside what Remora needs to load it."""
        check_is_fitted(self)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        saved.save(self.model_, self.prompt_, self._trained.card, Path(path))

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        model: str | None = None,
        precision: str = "auto",
        device: str = "auto",
    ) -> TextClassifier:
        """Load a saved classifier, or what lies in a run directory.

        Args:
            path: Where it was saved, or a run directory.
            model: Base model, where it no longer is where the adapter was trained.
            precision: Arithmetic of the forward pass.
            device: Where to compute.

        Returns:
            A fitted classifier; its classes are the labels as text.

        Raises:
            ModelError: If a part is missing or broken, or the base model is another one.
        """
        config = TrainConfig("", model=model or "", precision=precision, device=device)  # type: ignore[arg-type]
        trained = open_trained(path, base=model, device=config.device, precision=config.precision)
        card = trained.card
        loaded = cls(
            model or card.base_model,
            method=card.method,
            answer=card.answer,
            precision=precision,
            device=device,
        )
        loaded.classes_ = np.array(card.labels)
        loaded.model_, loaded.prompt_ = trained.model, trained.prompt
        loaded._trained = trained
        return loaded

    def _config(self) -> TrainConfig:
        settings = {k: v for k, v in self.get_params(deep=False).items() if v is not None}
        if "target_modules" in settings:
            settings["target_modules"] = tuple(settings["target_modules"])
        return TrainConfig("", **settings)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.string = True
        tags.input_tags.two_d_array = False
        tags.target_tags.required = True
        return tags


def _are_sets(y: Any) -> bool:
    """Return whether targets are a collection of labels for each text.

    Raises:
        DataError: If they are a matrix of 0 and 1, or some are collections and others are not.
    """
    if isinstance(y, np.ndarray) and y.ndim > 1:
        raise DataError(
            f"the labels are an array of shape {y.shape}; give a label for each text, or a list of "
            "its labels (inverse_transform of a MultiLabelBinarizer gives them)"
        )
    kinds = {isinstance(each, list | tuple | set | frozenset) for each in y}
    if len(kinds) > 1:
        raise DataError("some texts have a list of labels and others none; give a list for each")
    return kinds == {True}


def _texts(X: ArrayLike) -> list[str]:
    """Return texts as a list.

    Raises:
        DataError: If they are no one-dimensional collection of texts, or one of them is blank.
    """
    if isinstance(X, str):
        raise DataError("a single text was given; give a list of texts")
    texts: list[Any] = list(np.asarray(X, dtype=object).tolist())
    for row, text in enumerate(texts):
        if not isinstance(text, str):
            raise DataError(f"item {row} is of type {type(text).__name__}; give texts only")
        if not text.strip():
            raise DataError(f"item {row} is blank; give texts only")
    return texts

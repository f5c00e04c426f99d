"""`TextClassifier`: the same functions, in scikit-learn's manner."""

from __future__ import annotations

import dataclasses
import inspect
import tempfile
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.validation import check_is_fitted

from remora.config import TrainConfig
from remora.config.several_labels import settled
from remora.data import lists
from remora.data.dataset import dataset_from_lists
from remora.data.label_sets import set_text
from remora.data.levels import hierarchy_of
from remora.errors import ConfigError, DataError, ModelError, ResourceError
from remora.evaluation.multi_label import with_thresholds
from remora.evaluation.predictions import ScoredSets
from remora.formatting import close_match
from remora.models import hub, saved
from remora.models.saved import Trained, open_trained
from remora.runtime.files import ELSEWHERE, disk_errors
from remora.runtime.reporter import Reporter
from remora.training.loop import fit
from remora.training.session import open_session
from remora.tree.scoring import score_rows

OF_A_RUN = {
    *("data", "validation", "test", "text_column", "label_column", "test_fraction"),
    *("input_format", "columns", "strict", "merge_labels", "rename_labels"),
    *("multi_label", "split_labels_at", "label_columns"),
    *("rows_per_class", "learning_curve", "name", "output", "trackers"),
    *("baselines", "embedding_model", "tolerance", "corrections"),
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

OPENED = {"model_", "prompt_", "_trained", "_lock"}
"""Attributes of a fitted classifier that are made anew from its files when it is unpickled."""

_CHANGING = threading.Lock()
"""Held while one trains or loads, which change what all threads share: torch's random state, the
filters of warnings."""


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

    Threads may share one: they take turns to compute. A pickle holds what `save` writes, without
    the base model of an adapter.

    Every argument but the model may be None, which stands for the default of `TrainConfig`, where
    each is described. `class_weights` may also be weights by their labels.

    Attributes:
        classes_: The labels seen in `fit`, sorted, [n_classes].
        model_: PEFT's model, or the plain one where all its weights trained.
        prompt_: How messages are asked and labels are answered.

    Example:
        >>> clf = TextClassifier("Qwen/Qwen2.5-1.5B-Instruct").fit(texts, labels)  # doctest: +SKIP
        >>> clf.predict(["Where is my card?"])  # doctest: +SKIP
    """

    def __init__(self, model: str = "Qwen/Qwen2.5-1.5B-Instruct", **settings: Any) -> None:
        if unknown := sorted(settings.keys() - SETTINGS.keys()):
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
        texts = lists.texts(X)
        if not texts:
            raise DataError("there are no texts; give some of at least two classes")
        labels, are_sets = lists.labels(y, len(texts))
        if are_sets:
            return self._fit_sets(texts, labels)
        targets = lists.targets(y, labels)
        classes = np.unique(targets)
        names = [str(value) for value in classes]
        if len(names) < 2 or len(set(names)) < len(names):
            raise DataError(
                f"the labels hold the classes {', '.join(names)}; give at least two different ones"
            )
        config = self._config()
        if hierarchy := hierarchy_of(names, config.label_separator):
            hierarchy.refuse_broken()
        dataset = dataset_from_lists(
            texts,
            [str(value) for value in targets],
            validation_fraction=config.validation_fraction,
            seed=config.seed,
        )
        # In the order of the classes, where that of numbers is not that of their names
        dataset = replace(dataset, labels=tuple(names))
        with _CHANGING, open_session(config, dataset) as session:
            fit(session)
        return self._keep(session.trained, classes)

    def _fit_sets(self, texts: list[str], sets: list[list[Any]]) -> TextClassifier:
        """Train where a text may have several labels, or none."""
        kinds = {str(label): label for labels in sets for label in labels}
        config = self._config()
        dataset = dataset_from_lists(
            texts,
            [set_text(map(str, labels)) for labels in sets],
            validation_fraction=config.validation_fraction,
            seed=config.seed,
            multi_label=True,
        )
        config = settled(config, is_multi_label=True)
        with _CHANGING, open_session(config, dataset) as session:
            fit(session)
            trained, validation = session.trained, dataset.validation
            if len(validation):
                scored = score_rows(session.scorer(), validation, "validation", Reporter())
                fitted = with_thresholds({"validation": scored})["validation"]
                assert isinstance(fitted, ScoredSets)
                thresholds = tuple(fitted.thresholds.tolist())
                trained = replace(trained, card=replace(trained.card, thresholds=thresholds))
        return self._keep(trained, np.array([kinds[name] for name in dataset.labels]))

    def _keep(self, trained: Trained, classes: NDArray[Any]) -> TextClassifier:
        """Become fitted."""
        self.classes_ = classes
        self.model_, self.prompt_ = trained.model, trained.prompt
        self._trained = trained
        self._lock = threading.RLock()
        return self

    def predict_proba(self, X: ArrayLike) -> NDArray[np.float64]:
        """Return the probability of each class for each text, [n_samples, n_classes].

        A model of several columns takes a table of them, or texts as it was trained on.

        The columns of the result are in the order of `classes_`. Where a text may have several
        labels each is a probability of its own, and a row need not sum to 1.
        """
        check_is_fitted(self)
        texts = lists.texts(X, self._trained.card.text_columns)
        with self._lock:
            scorer = self._trained.scorer(max_tokens=self._config().max_tokens)
            return scorer.probabilities(texts)

    def predict(self, X: ArrayLike) -> NDArray[Any] | list[list[Any]]:
        """Return the likeliest class for each text, [n_samples].

        Where a text may have several labels, return the list of its labels for each text.
        """
        probabilities = self.predict_proba(X)
        card = self._trained.card
        if card.multi_label:
            given = probabilities >= np.array(card.thresholds)
            return [self.classes_[row].tolist() for row in given]
        result: NDArray[Any] = self.classes_[probabilities.argmax(axis=1)]
        return result

    def score(self, X: ArrayLike, y: ArrayLike, sample_weight: ArrayLike | None = None) -> float:
        """Return the share of texts whose label is right.

        Where a text may have several labels all of them must be, as in scikit-learn's subset
        accuracy.

        Args:
            X: Texts, [n_samples].
            y: Their labels, as in `fit`.
            sample_weight: How much each text counts, [n_samples]; by default the same.

        Raises:
            DataError: If they are no texts, labels and weights of the same number, all weights are
                0, or the labels are of another kind than those of `fit`.
        """
        check_is_fitted(self)
        texts = lists.texts(X, self._trained.card.text_columns)
        labels, are_sets = lists.labels(y, len(texts))
        if not texts:
            raise DataError("there are no texts; give some to score")
        if are_sets != self._trained.card.multi_label:
            found = "lists of labels, and the classifier gives one label"
            if not are_sets:
                found = "one label, and the classifier gives a list of labels"
            raise DataError(f"the texts have {found}; give labels as in fit")
        weights = lists.weights(sample_weight, len(texts))
        known = self.classes_.tolist()[0]
        if not are_sets and isinstance(labels[0], str) != isinstance(known, str):
            raise DataError(
                f"item 0 has the label {labels[0]!r}, and the classes are such as {known!r}; give "
                "labels of the same type"
            )
        given = self.predict(texts)
        if are_sets:
            right = [{*map(str, a)} == {*map(str, b)} for a, b in zip(given, labels, strict=True)]
        else:
            right = [a == b for a, b in zip(given, labels, strict=True)]
        return float(np.average(right, weights=weights))

    def save(self, path: str | Path) -> None:
        """Save the adapter in PEFT's format, or the model, beside what Remora needs to load it.

        A saved classifier is replaced.

        Raises:
            ConfigError: If anything else is there.
            ResourceError: If the disk fails.
        """
        check_is_fitted(self)
        with self._lock:
            try:
                saved.save(self.model_, self.prompt_, self._trained.card, Path(path).expanduser())
            except ResourceError as error:  # nobody has flags here
                raise ResourceError(str(error).replace(ELSEWHERE, "give another path")) from error

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
            ConfigError: If there is no such precision or device.
            ModelError: If a part is missing or broken, or the base model is another one.
        """
        config = TrainConfig("", model=model or "", precision=precision, device=device)  # type: ignore[arg-type]
        with _CHANGING:
            trained = open_trained(
                path, base=model, device=config.device, precision=config.precision
            )
        card = trained.card
        if model is not None:  # what is saved or pickled from now on has its base there
            folder = hub.find(model) if Path(model).expanduser().exists() else Path(model)
            card = replace(card, base_model=hub.lasting_name(model, folder))
        loaded = cls(
            model or card.base_model,
            method=card.method,
            answer=card.answer,
            precision=precision,
            device=device,
        )
        return loaded._keep(replace(trained, card=card), np.array(card.labels))

    def __getstate__(self) -> dict[str, Any]:
        """Pickle the parameters, the classes, and the files that `save` writes."""
        state = {name: value for name, value in vars(self).items() if name not in OPENED}
        if hasattr(self, "_trained"):
            place = Path(tempfile.gettempdir())
            with (
                disk_errors(place, "set TMPDIR to another folder"),
                tempfile.TemporaryDirectory(prefix="remora-") as folder,
            ):
                self.save(Path(folder) / "saved")
                files = (Path(folder) / "saved").iterdir()
                state["_files"] = {file.name: file.read_bytes() for file in files}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Load the files of a pickle, as `load` does.

        Raises:
            ConfigError: If the device or the precision is not available here.
            ModelError: If the base model is not here, or is another one.
        """
        self.__dict__.update(state)
        files = self.__dict__.pop("_files", None)
        if files is None:
            return
        # Where a file is mapped, Windows cannot remove it yet
        with tempfile.TemporaryDirectory(prefix="remora-", ignore_cleanup_errors=True) as folder:
            with disk_errors(Path(folder), "set TMPDIR to another folder"):
                for name, content in files.items():
                    (Path(folder) / name).write_bytes(content)
            try:
                with _CHANGING:
                    trained = open_trained(
                        folder, device=self.device or "auto", precision=self.precision or "auto"
                    )
            except (ConfigError, ModelError) as error:
                found = str(error).partition(";")[0].replace(folder, "it")
                raise type(error)(
                    f"this pickled classifier cannot be opened ({found}); use save, and load with "
                    "model= or device="
                ) from error
        self._keep(trained, self.classes_)

    def _config(self) -> TrainConfig:
        given = self.get_params(deep=False).items()
        chosen = {name: value for name, value in given if value is not None or name == "model"}
        return TrainConfig("", **chosen)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.string = True
        tags.input_tags.two_d_array = False
        tags.target_tags.required = True
        return tags

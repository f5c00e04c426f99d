"""`Predictor`: a trained model that answers batches of columns, opened where it is first used.

`predict` computes with it, and so do the workers of Ray, Spark and Daft, which get it pickled: it
holds settings alone until then. `serve` scores by the same `tree.scoring` and ranks by `rank`.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from remora.config import PredictConfig
from remora.data.columns import choose_text
from remora.data.label_sets import set_text
from remora.data.levels import Hierarchy
from remora.data.parts import PEEKED_ROWS
from remora.data.table import in_trained_order, message, named
from remora.data.values import is_blank
from remora.errors import ConfigError, DataError
from remora.evaluation import calibration, predictions
from remora.formatting import close_match
from remora.models import metadata
from remora.models.metadata import AdapterCard
from remora.models.saved import Trained, open_trained
from remora.serving.label_set_columns import LabelSetColumns
from remora.serving.prediction_files import (
    Levels,
    Ranked,
    free_names,
    predicted_cells,
    predicted_names,
)
from remora.tree.scoring import Scorer

BATCH_ROWS = 64
"""Messages that are scored at a time."""

SETTINGS = {
    field.name: field
    for field in dataclasses.fields(PredictConfig)
    if field.name
    in {
        *("text_column", "top_k", "threshold", "abstain_at_accuracy", "model"),
        *("tolerance", "micro_batch_tokens", "precision", "device"),
    }
}
"""The settings of `remora predict` that `Predictor` takes by name."""


class Answer(NamedTuple):
    """What is said of one message."""

    ranked: Ranked  # the likeliest labels, none for a blank message
    label: str | None  # the one given, None if withheld
    levels: Levels = ()  # those above the likeliest label, the first one first


def rank_given(
    labels: Sequence[str],
    probabilities: NDArray[np.float64],
    thresholds: Sequence[float],
    top_k: int = 1,
) -> list[tuple[Ranked, str]]:
    """Return the labels that each message is given, as a set, beside those ranked.

    Ranked are all that are given and the `top_k` most probable ones, the most probable first.

    Args:
        labels: The names of the labels.
        probabilities: Of each label for each message, [messages, labels].
        thresholds: From which on a label is given, [labels].
        top_k: Labels to rank at least.
    """
    order = np.argsort(-probabilities, axis=1, kind="stable")
    given = probabilities >= np.asarray(thresholds)
    found = []
    for row, best, mask in zip(probabilities, order, given, strict=True):
        kept = [i for place, i in enumerate(best.tolist()) if place < top_k or mask[i]]
        ranked = [(labels[i], float(row[i])) for i in kept]
        found.append((ranked, set_text(labels[i] for i in np.flatnonzero(mask).tolist())))
    return found


def rank(labels: Sequence[str], probabilities: NDArray[np.float64], top_k: int = 1) -> list[Ranked]:
    """Return the likeliest labels of each message with their probabilities, the likeliest first.

    Args:
        labels: The names of the labels.
        probabilities: Of each label for each message, [messages, labels].
        top_k: Labels to return for each message.
    """
    order = np.argsort(-probabilities, axis=1, kind="stable")[:, :top_k]
    return [
        [(labels[i], float(row[i])) for i in best]
        for row, best in zip(probabilities, order, strict=True)
    ]


def levels_above(
    hierarchy: Hierarchy | None, probabilities: NDArray[np.float64], threshold: float | None = None
) -> list[Levels]:
    """Return the levels above the likeliest label of each message, with their probabilities.

    A level's probability is the sum over all labels below it, so that the upper levels of a message
    may be sure where its label is not.

    Args:
        hierarchy: That of the labels; None for no levels.
        probabilities: Of each label for each message, [messages, labels].
        threshold: The probability below which a level is withheld, as labels are.
    """
    if hierarchy is None:
        return [() for _ in probabilities]
    found: list[list[tuple[str | None, float]]] = [[] for _ in probabilities]
    for level in range(1, hierarchy.depth):
        names = hierarchy.names(level)
        nodes = hierarchy.places(level)[probabilities.argmax(1)]
        of_nodes = hierarchy.probabilities(level, probabilities)
        for row, node in enumerate(nodes):
            share = min(1.0, float(of_nodes[row, node]))
            sure = threshold is None or share >= threshold
            found[row].append((names[node] if sure else None, share))
    return list(found)


@dataclass(frozen=True, kw_only=True)
class _Opened:
    """A model that is loaded."""

    trained: Trained
    scorer: Scorer
    threshold: float | None  # probability below which a message gets no label
    thresholds: tuple[float, ...]  # from which on it gets each one, where it may get several


def _signature() -> inspect.Signature:
    parameter = inspect.Parameter
    named_only = [
        parameter(
            field.name, parameter.KEYWORD_ONLY, default=field.default, annotation=str(field.type)
        )
        for field in SETTINGS.values()
    ]
    adapter = parameter("adapter", parameter.POSITIONAL_OR_KEYWORD, annotation="str | Path")
    return inspect.Signature(
        [parameter("self", parameter.POSITIONAL_ONLY), adapter, *named_only],
    )


class Predictor:
    """A trained model that answers batches of columns, for engines that compute in many processes.

    It holds settings until it is first called, so it can be pickled; the model is loaded then, once
    in a process. The settings are those of `remora predict`, where each is described.

    Example:
        >>> predictor = Predictor("runs/bank", top_k=2)  # doctest: +SKIP
        >>> predictor({"text": ["Where is my card?"]})["label"]  # doctest: +SKIP
        >>> ray.data.read_parquet("in").map_batches(  # doctest: +SKIP
        ...     Predictor, fn_constructor_args=("runs/bank",), batch_size=1024, concurrency=4
        ... ).write_parquet("out")
    """

    def __init__(self, adapter: str | Path, **settings: Any) -> None:
        """Keep the settings.

        Args:
            adapter: A run directory, a folder of a trained model, or an adapter's id on the hub.
            settings: As in `remora predict`.

        Raises:
            ConfigError: If a setting is wrong.
        """
        if unknown := sorted(settings.keys() - SETTINGS.keys()):
            close = close_match(unknown[0], SETTINGS)
            hint = f"; did you mean {close!r}?" if close else ""
            raise TypeError(f"Predictor has no argument {unknown[0]!r}{hint}")
        self.config = PredictConfig(Path(adapter), **settings)
        self._opened: _Opened | None = None

    # An editor reads the names of the settings here, and so does a person.
    __init__.__signature__ = _signature()  # type: ignore[attr-defined]

    @classmethod
    def of(cls, config: PredictConfig) -> Predictor:
        """Return the predictor of a command."""
        return cls(config.adapter, **{name: getattr(config, name) for name in SETTINGS})

    def __getstate__(self) -> dict[str, Any]:
        """Pickle the settings alone, with paths that hold in another working directory."""
        adapter, model = self.config.adapter, self.config.model
        adapter = adapter.absolute() if adapter.exists() else adapter
        if model is not None and Path(model).exists():
            model = str(Path(model).absolute())
        config = dataclasses.replace(self.config, adapter=adapter, model=model)
        return {"config": config, "_opened": None}

    def __repr__(self) -> str:
        return f"Predictor({str(self.config.adapter)!r})"

    @property
    def trained(self) -> Trained:
        """The model; loads it.

        Raises:
            RemoraError: If the model, its base model or the threshold cannot be used.
        """
        return self._open().trained

    @property
    def threshold(self) -> float | None:
        """The probability below which a message gets no label, None if all get one."""
        return self._open().threshold

    def remarks(self) -> list[str]:
        """Return sentences on the messages so far: how many were too long."""
        told = self._opened and self._opened.scorer.told_cut
        return [told] if told else []

    def open(self) -> None:
        """Load the model, if it is not; raises RemoraError."""
        self._open()

    def answers(self, texts: Sequence[str | None]) -> list[tuple[Ranked, str | None]]:
        """Return the likeliest labels of each message, and the one given; None is a blank message.

        Raises:
            RemoraError: If the model or its base model cannot be used.
        """
        return [(answer.ranked, answer.label) for answer in self.classify(texts)]

    def classify(self, texts: Sequence[str | None]) -> list[Answer]:
        """Return the answer to each message; None stands for a blank one.

        Raises:
            RemoraError: If the model or its base model cannot be used.
        """
        opened = self._open()
        labels, top_k = opened.trained.prompt.labels, self.config.top_k
        found: list[Answer] = []
        for start in range(0, len(texts), BATCH_ROWS):
            batch = texts[start : start + BATCH_ROWS]
            asked = [text for text in batch if text is not None]
            probabilities = opened.scorer.probabilities(asked)
            if opened.thresholds:
                sets = iter(rank_given(labels, probabilities, opened.thresholds, top_k))
                found += [
                    Answer([], None) if text is None else Answer(*next(sets)) for text in batch
                ]
                continue
            levels = levels_above(opened.trained.card.hierarchy, probabilities, opened.threshold)
            scored = zip(rank(labels, probabilities, top_k), levels, strict=True)
            for text in batch:
                likeliest, above = ([], ()) if text is None else next(scored)
                sure = bool(likeliest) and (
                    opened.threshold is None or likeliest[0][1] >= opened.threshold
                )
                found.append(Answer(likeliest, likeliest[0][0] if sure else None, above))
        return found

    def __call__(self, batch: Any) -> Any:
        """Return a batch with the columns `label` and `probability` beside its own.

        With `top_k`, also `label_2`, `probability_2` and so on; with labels that form a hierarchy,
        `level_1`, `level_1_probability` and so on for the levels above them. Names that the batch
        has get `predicted_` before them. A blank message gets no label, and a withheld label is
        missing. Where a message may have several labels, the columns are those of
        `LabelSetColumns`.

        Args:
            batch: A dict of columns (arrays or lists), a pandas DataFrame, or a pyarrow Table.

        Returns:
            A batch of the same kind.

        Raises:
            DataError: If the batch has no text column, or a cell that is no text.
            RemoraError: If the model or its base model cannot be used.
        """
        answers = self.classify(self._texts(batch))
        card = self.trained.card
        if card.multi_label:
            of_sets = LabelSetColumns(card.labels, card.label_form, _names(batch))
            rows = [of_sets.cells(answer.ranked, answer.label) for answer in answers]
            found = list(zip(*rows, strict=True)) or [()] * len(of_sets.names)
            return _with_sets(batch, of_sets, found)
        wanted = predicted_names(self.config.top_k, card.num_upper_levels)
        names = free_names(wanted, _names(batch))
        cells = [predicted_cells(*answer) or [None] * len(names) for answer in answers]
        columns = {name: [row[place] for row in cells] for place, name in enumerate(names)}
        return _beside(batch, columns)

    def _open(self) -> _Opened:
        if self._opened is None:
            trained = _load(self.config)
            labels, card = trained.prompt.labels, trained.card
            check_top_k(self.config, labels)
            self._opened = _Opened(
                trained=trained,
                scorer=trained.scorer(
                    max_tokens=self.config.micro_batch_tokens, tolerance=self.config.tolerance
                ),
                threshold=None if card.multi_label else find_threshold(self.config, labels),
                thresholds=find_thresholds(self.config, card),
            )
        return self._opened

    def _texts(self, batch: Any) -> list[str | None]:
        """Return the message of each row, None for a blank one."""
        names = _names(batch)

        def peek() -> list[Sequence[object]]:
            columns = [_values(batch, name)[:PEEKED_ROWS] for name in names]
            return list(zip(*columns, strict=True))

        trained = self.trained.card.text_columns
        given = in_trained_order("the batch", named(self.config.text_column), trained)
        places = choose_text("the batch", given, names, peek, trained)
        chosen = [names[place] for place in places]
        texts: list[str | None] = []
        rows = zip(*(_values(batch, name) for name in chosen), strict=True)
        for row, cells in enumerate(rows, 1):
            try:
                blank = all(map(is_blank, cells))
                texts.append(None if blank else message(chosen, cells, trained))
            except DataError as error:
                raise DataError(f"the batch: row {row} has {error}") from None
        return texts


_loaded: dict[tuple[object, ...], Trained] = {}
"""The last model that a predictor of this process has loaded: Spark unpickles one for each task."""


def _load(config: PredictConfig) -> Trained:
    folder = metadata.adapter_folder(config.adapter)
    files = sorted(folder.glob("*.safetensors")) + sorted(folder.glob("remora.json"))
    if (folder / "remora.json").is_file():  # a base that was edited is told of again
        base = Path(config.model or metadata.parse_card(folder).base_model)
        files += sorted(path for path in base.glob("*") if path.is_file())
    stamps = [(str(path), path.stat().st_mtime_ns, path.stat().st_size) for path in files]
    key = (folder.resolve(), config.device, config.precision, *stamps)
    if key not in _loaded:
        _loaded.clear()  # before the next one takes its memory
        _loaded[key] = open_trained(
            config.adapter, base=config.model, device=config.device, precision=config.precision
        )
    return _loaded[key]


def check_top_k(config: PredictConfig, labels: Sequence[str]) -> None:
    """Refuse more labels for each message than there are; raises ConfigError."""
    if config.top_k > len(labels):
        raise ConfigError(
            f"top_k is {config.top_k} but the model has {len(labels)} labels; give at most"
            f" {len(labels)}"
        )


def find_thresholds(config: PredictConfig, card: AdapterCard) -> tuple[float, ...]:
    """Return the probability from which on a message gets each label; () where it gets one.

    Raises:
        ConfigError: If a setting is for models of one label a message.
    """
    if not card.multi_label:
        return ()
    if config.abstain_at_accuracy is not None:
        raise ConfigError(
            "abstain_at_accuracy is for models of one label a row, and this one gives several; "
            "leave it out, or give a --threshold for all labels"
        )
    if config.threshold is not None:
        return (config.threshold,) * len(card.labels)
    return card.thresholds


def find_threshold(config: PredictConfig, labels: Sequence[str]) -> float | None:
    """Return the probability below which a message gets no label, None if all get one.

    Raises:
        DataError: If there is none for the accuracy that is asked for.
    """
    wanted = config.abstain_at_accuracy
    if wanted is None:
        return config.threshold
    path = config.adapter / predictions.PROBABILITIES
    validation = predictions.read_probabilities(path, labels, "validation")
    if validation is None:
        raise DataError(
            f"{config.adapter} has no probabilities of validation rows to choose a threshold on;"
            " give a run directory, or a --threshold"
        )
    threshold = calibration.choose_threshold(validation, wanted)
    if threshold is None:
        raise DataError(
            f"no threshold reaches an accuracy of {wanted:.1%} on the validation rows of"
            f" {config.adapter}; ask for less, or give a --threshold"
        )
    return threshold


def _names(batch: Any) -> list[str]:
    """Return the names of a batch's columns.

    Raises:
        DataError: If it has none.
    """
    if isinstance(batch, Mapping):
        return list(batch)
    if _is_arrow(batch):
        return list(batch.column_names)
    if _is_pandas(batch):
        return list(batch.columns)
    raise DataError(
        f"a batch of type {type(batch).__name__} has no columns; give a dict of columns, a pandas"
        " DataFrame or a pyarrow Table"
    )


def _is_arrow(batch: Any) -> bool:
    return hasattr(batch, "append_column") and hasattr(batch, "column_names")


def _is_pandas(batch: Any) -> bool:
    return hasattr(batch, "assign") and hasattr(batch, "columns")


def _values(batch: Any, name: str) -> list[Any]:
    """Return a column's values as Python has them; what is missing is None."""
    if _is_arrow(batch):
        return list(batch.column(name).to_pylist())
    column = batch[name]
    if _is_pandas(batch):  # whose own value for what is missing is not comparable
        return list(column.astype(object).where(column.notna(), None).tolist())
    return list(column.tolist() if hasattr(column, "tolist") else column)


def _with_sets(batch: Any, columns: LabelSetColumns, values: Sequence[Sequence[object]]) -> Any:
    """Return a batch of the same kind with columns of several labels a row added."""
    if _is_arrow(batch):
        import pyarrow

        for field, each in zip(columns.schema(), values, strict=True):
            batch = batch.append_column(field.name, pyarrow.array(each, field.type))
        return batch
    arrays: dict[str, Any] = {}
    for name, each in zip(columns.names, values, strict=True):
        arrays[name] = np.empty(len(each), dtype=object)
        for row, value in enumerate(each):  # NumPy would take lists of one length for an array
            arrays[name][row] = value
    return {**batch, **arrays} if isinstance(batch, Mapping) else batch.assign(**arrays)


def _beside(batch: Any, columns: dict[str, list[Any]]) -> Any:
    """Return a batch of the same kind with columns of labels and probabilities added, in turn."""
    if _is_arrow(batch):
        import pyarrow

        for place, (name, values) in enumerate(columns.items()):
            kind = pyarrow.float64() if place % 2 else pyarrow.string()
            batch = batch.append_column(name, pyarrow.array(values, kind))
        return batch
    arrays = {
        name: np.array(values, dtype=np.float64 if place % 2 else object)
        for place, (name, values) in enumerate(columns.items())
    }
    return {**batch, **arrays} if isinstance(batch, Mapping) else batch.assign(**arrays)

"""Texts, labels and weights as Python hands them over: lists, arrays, columns of data frames."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from remora.data.columns import has_names
from remora.data.table import message
from remora.data.values import is_text
from remora.errors import DataError
from remora.formatting import cut, first_line, listed, one_line, quote


def texts(X: Any, columns: Sequence[str] = ()) -> list[str]:
    """Return texts as a list.

    Args:
        X: Texts, or a table with the columns.
        columns: Those that a model was trained on.

    Raises:
        DataError: If they are no one-dimensional collection of texts, or one of them is blank.
    """
    found = _read(X, columns)
    for row, text in enumerate(found):
        if not isinstance(text, str):
            raise DataError(f"item {row} is of type {type(text).__name__}; give texts only")
        if not text.strip():
            raise DataError(f"item {row} is blank; give texts only")
        if not is_text(text):
            raise DataError(
                f"item {row} has half of a surrogate pair; write the character whole or remove it"
            )
        if not has_names(text, columns):
            raise DataError(
                f"item {row} is one text, and the model was trained on {listed(columns)}; give a "
                "table with these columns"
            )
    return found


def labels(y: Any, num_texts: int) -> tuple[list[Any], bool]:
    """Return a label for each text, or a list of its labels; and whether they are lists.

    Raises:
        DataError: If a label is missing, some are text and others numbers, some are lists and
            others are not, or they are a matrix of 0 and 1.
    """
    advice = "give a label for each text, or a list of its labels"
    binarized = "(inverse_transform of a MultiLabelBinarizer gives them)"
    found = _listed(y, "label", f"{advice} {binarized}")
    if len(found) != num_texts:
        raise DataError(f"there are {num_texts} texts and {len(found)} labels; {advice}")
    are_sets = [isinstance(each, list | tuple | set | frozenset | np.ndarray) for each in found]
    if len({*are_sets}) > 1:
        raise DataError(
            "some texts have a list of labels and others none, such as item "
            f"{are_sets.index(False)}; give a list for each"
        )
    sets = [list(each) if is_set else [each] for each, is_set in zip(found, are_sets, strict=True)]
    items = [(row, label) for row, own in enumerate(sets) for label in own]
    for row, label in items:
        if _is_missing(label):
            raise DataError(
                f"item {row} has the label {label!r}; give it one, or leave the item out"
            )
        if isinstance(label, str) != isinstance(items[0][1], str):
            raise DataError(
                f"item {row} has the label {label!r}, and item {items[0][0]} {items[0][1]!r}; give "
                "only strings or only numbers"
            )
    for row, own in enumerate(sets):
        numbers = {float(label) for label in own if isinstance(label, Real)}
        if len(numbers) < len(own) and numbers and numbers <= {0, 1}:
            raise DataError(f"item {row} has a vector of 0 and 1; {advice} {binarized}")
    return (sets, True) if any(are_sets) else (found, False)


def targets(y: Any, found: list[Any]) -> NDArray[Any]:
    """Return labels as an array of what scikit-learn takes for classes.

    Raises:
        DataError: If they are none, such as measured numbers.
    """
    from sklearn.utils.multiclass import check_classification_targets

    try:
        result = np.asarray(y if hasattr(y, "dtype") else found)
        if result.dtype == object and not isinstance(found[0], str):  # numbers, of pandas
            result = np.asarray(found)
        check_classification_targets(result)
    except (TypeError, ValueError) as error:
        reason = first_line(error).partition(".")[0]
        raise DataError(
            f"labels such as {cut(repr(found[0]), 50)} are no classes ({reason}); give strings or "
            "whole numbers"
        ) from error
    return result


def weights(values: ArrayLike | None, count: int) -> NDArray[np.float64]:
    """Return how much each text counts.

    Raises:
        DataError: If they are not as many numbers, none below 0 and some above.
    """
    if values is None:
        return np.ones(count)
    try:
        found = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(f"sample_weight is of no numbers ({one_line(error)}); give some") from error
    if found.shape != (count,):
        raise DataError(
            f"there are {count} texts, and sample_weight has the shape {found.shape}; give a "
            "number for each text"
        )
    if not (found >= 0).all() or not 0 < found.sum() < np.inf:
        raise DataError(
            f"sample_weight goes from {found.min()} to {found.max()}; give numbers of 0 or "
            "more, some above it"
        )
    return found


def _read(X: Any, columns: Sequence[str]) -> list[Any]:
    """Return the rows of a table as a model of several columns reads them, or texts as they are."""
    if len(columns) < 2:
        return _listed(X, "text", "give one column, such as frame['text']")
    advice = f"give a table with the columns {listed(columns)}"
    names = getattr(X, "column_names", getattr(X, "columns", None))  # of Arrow, or of pandas
    if names is None:
        return _listed(X, "text", advice)
    if lacking := [name for name in columns if name not in names]:
        raise DataError(f"the table has no column {quote(lacking[0])}; {advice}")
    cells = [_listed(X[name], "text", "give each column one name") for name in columns]
    found = []
    for row, own in enumerate(zip(*cells, strict=True)):
        try:
            found.append(message(columns, [None if _is_missing(each) else each for each in own]))
        except DataError as error:
            raise DataError(f"item {row} has {error}") from None
    return found


def _listed(values: Any, what: str, advice: str) -> list[Any]:
    """Return a column of values as a list.

    Raises:
        DataError: If it is none.
    """
    if isinstance(values, Mapping):
        raise DataError(f"the {what}s are a mapping; give a list of {what}s")
    if isinstance(values, str | bytes):
        raise DataError(f"a single {what} was given; give a list of {what}s")
    if hasattr(values, "__array__"):  # of NumPy, pandas, Polars or Arrow
        array = np.asarray(values, dtype=object)
        if array.ndim != 1:
            raise DataError(f"the {what}s are an array of shape {array.shape}; {advice}")
        return list(array.tolist())
    try:
        return list(values)
    except TypeError:
        raise DataError(
            f"the {what}s are of type {type(values).__name__}; give a list of {what}s"
        ) from None


def _is_missing(label: Any) -> bool:
    """Return whether a label is blank, or what Python, NumPy or pandas write for a missing one."""
    if isinstance(label, str):
        return not label.strip()
    return str(label) in {"None", "nan", "NaN", "<NA>", "NaT"}

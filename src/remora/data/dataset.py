"""A source as training, validation and test rows, with a summary.

A source is a table, a folder of tables, a sample of this package or a dataset on the Hugging Face
Hub.
"""

from __future__ import annotations

import contextlib
import json
import shlex
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from remora.config import TrainConfig
from remora.config.checks import is_read_once
from remora.data import label_forms, label_sets
from remora.data.columns import UnlabelledError
from remora.data.corrections import Corrections, correct, read_corrections
from remora.data.label_sets import LabelForm
from remora.data.levels import hierarchy_of
from remora.data.parts import Part, Pick, ReadOptions, Remarks, Row
from remora.data.sources import held_out_parts, source_parts
from remora.data.splits import MAX_TEST_ROWS, MAX_VALIDATION_ROWS, check_fractions, hold_out
from remora.data.summary import DataSummary, spoken_rows, summarize
from remora.data.table import Table, read_parts
from remora.data.values import is_blank
from remora.errors import DataError, RemoraError
from remora.formatting import first_line, listed, quote


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """The splits of a source, its sorted labels, and its summary."""

    train: Table
    validation: Table  # empty without a validation table if `validation_fraction` is 0
    test: Table | None
    labels: tuple[str, ...]
    summary: DataSummary
    corrections: Corrections | None = None  # applied to the training rows

    @property
    def multi_label(self) -> bool:
        """Whether a row has several labels, or one, or none."""
        return self.train.multi_label


def load_data(settings: TrainConfig) -> Dataset:
    """Return the dataset that a run's settings name; raises as `load_dataset` does."""
    whole = load_whole(settings)
    return limited_and_corrected(whole, corrections_of(whole, settings), settings)


def load_whole(settings: TrainConfig) -> Dataset:
    """Return the same with all training rows, as the table labels them."""
    seen, remark = texts_trained_on(settings.start_from) if settings.start_from else (set(), "")
    dataset = load_dataset(
        settings.data,
        test=settings.test,
        validation=settings.validation,
        text_column=settings.text_column,
        label_column=settings.label_column,
        validation_fraction=settings.validation_fraction,
        test_fraction=settings.test_fraction,
        seed=settings.seed,
        options=ReadOptions(settings.input_format, settings.columns),
        strict=settings.strict,
        merge_labels=settings.merge_labels,
        seen=seen,
        rename_labels=settings.rename_labels,
        form=label_form(settings),
        begun_on=_text_columns_of(settings.start_from) if settings.start_from else (),
    )
    if remark and settings.test is None:
        return _remarked(dataset, remark)
    return dataset


def corrections_of(whole: Dataset, settings: TrainConfig) -> Corrections | None:
    """Return a person's decisions on the rows of a table, None if the settings name none."""
    if settings.corrections is None:
        return None
    path, names = Path(settings.corrections), settings.rename_labels
    return read_corrections(path, source_rows(whole), names)


def limited_and_corrected(
    whole: Dataset, corrections: Corrections | None, settings: TrainConfig
) -> Dataset:
    """Return the rows that a run takes of its table: a sample of each class, then corrected."""
    limited = limit_rows(whole, settings.num_per_class, settings.seed)
    if corrections is not None:
        limited = _corrected(limited, corrections)
    if hierarchy := hierarchy_of(limited.labels, settings.label_separator):
        hierarchy.refuse_broken()
        return _remarked(limited, *hierarchy.lines())
    return limited


def _remarked(dataset: Dataset, *remarks: str) -> Dataset:
    """Return the dataset with further remarks in its summary."""
    remarks = (*dataset.summary.remarks, *remarks)
    return replace(dataset, summary=replace(dataset.summary, remarks=remarks))


def label_form(settings: TrainConfig) -> LabelForm:
    """Return how the labels of a row are written, by a run's settings."""
    return LabelForm(settings.multi_label, settings.split_labels_at, settings.label_columns)


def source_rows(dataset: Dataset) -> Table:
    """Return the rows of the training table: those trained on, and those held out of it."""
    tables = [each for each in (dataset.train, dataset.validation, dataset.test) if each]
    rows = [
        row
        for table in tables
        if table.rows  # empty in a table of its own
        for row in zip(table.rows, table.texts, table.labels, strict=True)
    ]
    places, texts, labels = map(list, zip(*sorted(rows), strict=True))
    return replace(dataset.train, texts=texts, labels=labels, rows=places)


def _corrected(dataset: Dataset, corrections: Corrections) -> Dataset:
    """Return the dataset with a person's decisions applied to its training rows.

    Held-out rows stay as they are, so that the run is measured on the rows, and by the labels, of
    the run that was reviewed.

    Raises:
        DataError: If fewer than two labels are left.
    """
    train, num_corrected, num_deleted = correct(dataset.train, corrections.decisions)
    source = dataset.summary.source
    if not len(train):
        raise DataError(f"{source}: the corrections delete every training row; keep some")
    _labels(source, train)
    held_out = sum(
        corrections.decisions.get(row, label) != label
        for table in (dataset.validation, dataset.test)
        if table is not None
        for row, label in zip(table.rows, table.labels, strict=bool(table.rows))
    )
    changed = spoken_rows(num_corrected)
    remark = f"corrections: {changed} in training relabelled and {num_deleted:,} deleted"
    if held_out:
        remark += (
            f"; {spoken_rows(held_out)} held out with the label as it was, though decided otherwise"
        )
    if gone := sorted({*dataset.labels} - {*train.each_label}):
        remark += f"; no training row is left of {listed(gone)}"
    return replace(_with_train(dataset, train, remark), corrections=corrections)


def texts_trained_on(run: str) -> tuple[set[str], str]:
    """Return the texts that a run and those it began with have trained on.

    They are read from the run's table again.

    Returns:
        The texts, and a remark: why they cannot be known, or "".
    """
    try:
        text = (Path(run) / "config.toml").read_text(encoding="utf-8")
        settings = TrainConfig.from_toml(text, Path(run))
        summary = json.loads((Path(run) / "data.json").read_text(encoding="utf-8"))
        rows = load_again(settings)
        if rows.summary.sha256 != summary["sha256"]:
            raise DataError(f"{settings.data} has changed since")
    except (OSError, ValueError, KeyError, TypeError, RemoraError) as error:
        return set(), (
            f"the rows that {run} was trained on cannot be read ({first_line(error)}), so some may"
            " be among the held-out rows, and accuracy optimistic; give --test with rows that are"
            " new"
        )
    earlier, remark = texts_trained_on(settings.start_from) if settings.start_from else (set(), "")
    return earlier | set(rows.train.texts), remark


def _text_columns_of(run: str) -> tuple[str, ...]:
    """Return the text columns that a run or an adapter was trained on, none if it does not say."""
    for name in ("data.json", "remora.json"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            found = json.loads((Path(run) / name).read_text(encoding="utf-8"))["text_columns"]
            return tuple(map(str, found))
    return ()


def load_again(settings: TrainConfig) -> Dataset:
    """Return the dataset of a run that is finished.

    Raises:
        DataError: As `load_data`; or the rows came from a pipe, which can be read once.
    """
    if is_read_once(settings.data):
        raise DataError(
            f"the run was trained on {settings.data}, which cannot be read again; train it on a"
            " file"
        )
    return load_data(settings)


def limit_rows(dataset: Dataset, per_class: int | None, seed: int) -> Dataset:
    """Return the dataset with at most `per_class` training rows of each class.

    The rows are sampled by `seed`; a smaller sample is part of a larger one.
    """
    import numpy as np

    if per_class is None:
        return dataset
    rows, seen, kept = dataset.train, Counter[str](), []
    strata = rows.strata
    for row in np.random.default_rng(seed).permutation(len(rows)).tolist():
        seen[strata[row]] += 1
        if seen[strata[row]] <= per_class:
            kept.append(row)
    return _with_train(dataset, rows.take(sorted(kept)))


def _with_train(dataset: Dataset, train: Table, *remarks: str) -> Dataset:
    """Return the dataset with other training rows, its summary made again."""
    tables = {"train": train, "validation": dataset.validation}
    if dataset.test is not None:
        tables["test"] = dataset.test
    old = dataset.summary
    columns = [*old.text_columns, old.label_column]
    remarks = (*old.remarks, *remarks)
    summary = summarize(old.source, columns, tables, dataset.labels, remarks)
    return replace(dataset, train=train, summary=summary)


def load_dataset(
    source: str,
    *,
    test: str | None = None,
    validation: str | None = None,
    text_column: str | Sequence[str] | None = None,
    label_column: str | None = None,
    validation_fraction: float = 0.1,
    test_fraction: float = 0.1,
    seed: int = 0,
    options: ReadOptions | None = None,
    strict: bool = False,
    merge_labels: bool = False,
    seen: Collection[str] = (),
    rename_labels: Mapping[str, str] | None = None,
    form: LabelForm | None = None,
    begun_on: Sequence[str] = (),
) -> Dataset:
    """Read a source, check every row, and hold out the splits that it does not have.

    Args:
        source: A table, a folder with a `train` file (and `validation`, `test`), `sample:support`,
            or `hf:owner/name[:config]`, the only form that may touch the network.
        test: A table of test rows, instead of the source's own.
        validation: A table of validation rows, instead of the source's own.
        text_column: The column of the messages, or several; by default found by its usual names.
        label_column: The column of the labels; by default found by its usual names.
        validation_fraction: The share of the source's training rows to hold out, stratified by
            label, if there is no validation table. At most 2,000 rows.
        test_fraction: The same for the test table. At most 10,000 rows.
        seed: Selects the rows held out.
        options: How to read the tables, where their names do not tell; for `test` and `validation`
            their own names come first.
        strict: Whether to refuse rows with a blank text or label, instead of skipping them.
        merge_labels: Whether labels that differ only in case, spaces or Unicode form become one,
            the most frequent of them.
        seen: Texts that a model has learned, which are not held out.
        rename_labels: Names to read in place of labels, in all tables.
        form: How several labels a row are written; by default as lists.
        begun_on: Text columns of the run that training begins with, taken if none are given.

    A test or validation table of the source that has no labels is left out.

    Raises:
        ConfigError: A fraction is outside [0, 1), the two leave nothing to train on, or a label to
            rename is not there.
        DataError: A table is missing, broken, or cannot be learned from.
    """
    check_fractions(validation_fraction, test_fraction)
    parts, others = source_parts(source, options)
    given = {"validation": validation, "test": test}
    parts |= held_out_parts(given, options)
    form = form or LabelForm()
    how: dict[str, Any] = {"text_column": text_column, "label_column": label_column}
    how |= {"strict": strict, "form": form}
    remarks, forms, names = Remarks(), None, rename_labels or {}
    train, columns = read_parts(parts["train"], **how, remarks=remarks, begun_on=begun_on)
    form = replace(form, several="on" if train.multi_label else form.several)
    without_rows = label_sets.spoken_columns_of_0(form.columns, train.each_label)
    if merge_labels:
        forms = label_forms.most_frequent_forms(train.each_label)
        train = train.relabelled(partial(label_forms.merged, forms=forms))
    label_forms.refuse_unknown(names, train.each_label)
    known, train = sorted({*train.each_label, *names.values()}), _renamed(train, names)
    labels = _labels(source, train)
    how |= {"form": form, "known": known, "remarks": remarks, "trained": columns, "forms": forms}
    tables, notes = _read_held_out(parts, given, how, names)
    notes = [*_label_notes(train, form, labels), *without_rows, *notes]
    notes += _not_read(others, {"validation": validation_fraction, "test": test_fraction}, parts)
    return _assemble(
        source,
        columns,
        train,
        tables,
        validation_fraction=validation_fraction,
        test_fraction=test_fraction,
        seed=seed,
        remarks=(*remarks.lines(), *notes),
        seen=seen,
    )


def _read_held_out(
    parts: Mapping[str, list[Part]],
    given: Mapping[str, str | None],
    how: Mapping[str, Any],
    names: Mapping[str, str],
) -> tuple[dict[str, Table], list[str]]:
    """Return validation and test tables, and a note on each without labels that was not given."""
    tables, notes = {}, []
    for split in (each for each in given if each in parts):
        try:
            table = read_parts(parts[split], **how)[0]
            if table.multi_label and how["form"].several != "on":
                raise DataError(
                    f"{parts[split][0].name} has rows with several labels, and the training rows "
                    "have one each; give --multi-label on, or rows of one label"
                )
            tables[split] = _renamed(table, names)
        except UnlabelledError:
            if given[split] is not None:
                raise
            notes.append(_unlabelled(parts[split][0], split))
    return tables, notes


def _label_notes(train: Table, form: LabelForm, labels: Sequence[str]) -> list[str]:
    """Return notes on labels: on the sets of them, and on those that differ in form alone."""
    sets = [label_sets.spoken_sets(train.labels, form)] if train.multi_label else []
    return [*sets, *label_forms.spoken(label_forms.twins(labels))]


def _renamed(table: Table, names: Mapping[str, str]) -> Table:
    return table.relabelled(partial(label_forms.renamed, names=names)) if names else table


def _not_read(
    others: Mapping[str, Sequence[str]], shares: Mapping[str, float], given: Collection[str]
) -> list[str]:
    """Return a note for each split that is held out though other tables may be meant for it."""
    return [
        f"{listed(others[split])} {'is' if len(others[split]) == 1 else 'are'} not read, and rows"
        f" of the training table are held out as {split} rows; --{split} names a table of them"
        for split, share in shares.items()
        if split in others and split not in given and share > 0
    ]


def _unlabelled(part: Part, split: str) -> str:
    on_hub = part.name.startswith("hf:")
    return (
        f"{part.name} has no labels, so rows of the training table are held out as {split} rows; "
        + ("save it to a file, and " if on_hub else "")
        + f"classify it with `remora predict RUN {'FILE' if on_hub else shlex.quote(part.name)}`"
    )


def dataset_from_lists(
    texts: Sequence[str],
    labels: Sequence[str],
    *,
    validation_fraction: float,
    seed: int,
    multi_label: bool = False,
) -> Dataset:
    """Check texts and labels in memory, and hold out a validation set, but no test set.

    Args:
        texts: The messages, [N].
        labels: Their labels, [N], kept exactly as they are.
        validation_fraction: The share of the rows to hold out, stratified by label. At most 2,000.
        seed: Selects the rows held out.
        multi_label: Whether a label is a set of labels, as `label_sets` writes it.

    Raises:
        ConfigError: The fraction is outside [0, 1).
        DataError: The lists differ in length, a value is blank or no string, or there is only one
            label.
    """
    check_fractions(validation_fraction, 0)
    if len(texts) != len(labels):
        raise DataError(
            f"there are {len(texts):,} texts and {len(labels):,} labels; give one for each text"
        )
    table = Table(list(texts), list(labels), multi_label=multi_label)
    columns = ["text", "label"]

    def rows(pick: Pick, _: Remarks) -> Iterator[Row]:
        pick(columns, list)
        for row, (text, label) in enumerate(zip(table.texts, table.labels, strict=True), 1):
            for kind, value in (("text", text), ("label", label)):
                if not isinstance(value, str) and not is_blank(value):
                    raise DataError(
                        f"memory: row {row} has a {kind} of type {type(value).__name__};"
                        " make it a string"
                    )
            yield row, row, (text, label)

    form = LabelForm("on") if multi_label else None
    read_parts([Part("memory", rows)], strict=True, form=form)
    return _assemble(
        "memory",
        columns,
        table,
        {},
        validation_fraction=validation_fraction,
        test_fraction=0,
        seed=seed,
    )


def _labels(source: str, train: Table) -> tuple[str, ...]:
    labels = tuple(sorted(set(train.each_label)))
    if len(labels) < 2 and train.multi_label:
        found = f"no label but {quote(labels[0])}" if labels else "no label at all"
        raise DataError(f"{source}: the training rows have {found}; add rows with other labels")
    if len(labels) < 2:
        raise DataError(
            f"{source}: every training row has the label {quote(labels[0])};"
            " add rows of at least one other label"
        )
    if train.multi_label and len(set(train.labels)) == 1:
        advice = label_sets.advice_on_same_sets(labels, train.form)
        raise DataError(f"{source}: every training row has the labels {listed(labels)}; {advice}")
    return labels


def _assemble(
    source: str,
    columns: list[str],
    train: Table,
    given: dict[str, Table],
    *,
    validation_fraction: float,
    test_fraction: float,
    seed: int,
    remarks: tuple[str, ...] = (),
    seen: Collection[str] = (),
) -> Dataset:
    """Hold out the splits that are not given, and summarize."""
    labels = _labels(source, train)
    sizes = {
        split: min(max(1, round(fraction * len(train))), limit)
        for split, fraction, limit in (
            ("test", test_fraction, MAX_TEST_ROWS),
            ("validation", validation_fraction, MAX_VALIDATION_ROWS),
        )
        if split not in given and fraction > 0
    }
    train, held_out = hold_out(train, sizes, seed, seen)
    tables = {"train": train, "validation": train.take([]), **given, **held_out}
    return Dataset(
        train=train,
        validation=tables["validation"],
        test=tables.get("test"),
        labels=labels,
        summary=summarize(source, columns, tables, labels, remarks),
    )

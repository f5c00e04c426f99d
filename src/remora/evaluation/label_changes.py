"""Two runs on the same rows, label by label: what one of them gained over the other."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from remora.data.label_sets import labels_in
from remora.evaluation.metrics import measure
from remora.evaluation.multi_label import measure_sets
from remora.evaluation.significance import holm, mcnemar

SIGNIFICANT = 0.05


@dataclass(frozen=True, kw_only=True)
class LabelChange:
    """The figures of one label in two runs; each difference is the first minus the second."""

    label: str
    num_rows: int  # of the label; without any, both recalls are 0
    first_f1: float
    second_f1: float
    f1_difference: float
    first_recall: float  # the accuracy on the label's rows
    second_recall: float
    recall_difference: float
    only_first_right: int  # of the label's rows
    only_second_right: int
    p_value: float  # exact McNemar test on the label's rows
    adjusted_p_value: float  # over all labels, Holm (1979)


@dataclass(frozen=True, kw_only=True)
class LabelChanges:
    """Two runs label by label, the largest gain in F1 of the first one first."""

    first: str
    second: str
    labels: tuple[LabelChange, ...]

    @property
    def summary(self) -> str:
        """A sentence on which labels changed by more than chance."""
        sure = [each for each in self.labels if each.adjusted_p_value < SIGNIFICANT]
        test = f"exact McNemar test on each label's rows, adjusted for {len(self.labels):,} labels"
        if not sure:
            return f"Of no label the recall differs by more than chance ({test})."
        better = [each.label for each in sure if each.recall_difference > 0]
        worse = [each.label for each in sure if each.recall_difference < 0]
        parts = [
            f"{name} recalls {len(labels):,} {'label' if len(labels) == 1 else 'labels'} better"
            for name, labels in ((self.first, better), (self.second, worse))
            if labels
        ]
        return f"By more than chance, {' and '.join(parts)} ({test})."


def label_changes(
    names: tuple[str, str],
    labels: Sequence[str],
    true: Sequence[str],
    first: Sequence[str],
    second: Sequence[str],
    *,
    multi_label: bool = False,
) -> LabelChanges:
    """Return the figures of each label in two runs, and their differences.

    Args:
        names: The runs' names.
        labels: The closed label set, with the labels of both runs.
        true: The label of each row.
        first: The first run's prediction for each row.
        second: The second run's.
        multi_label: Whether these are sets of labels. Then a run is right about a label of a row
            if it gives the label, whatever else it gives.
    """
    rows = defaultdict(list)
    for row in zip(true, first, second, strict=True):
        if multi_label:
            of_label, *given = (set(labels_in(each)) for each in row)
            for label in of_label:
                rows[label].append((label, *(label if label in each else "" for each in given)))
        else:
            rows[row[0]].append(row)
    columns = {label: list(zip(*found, strict=True)) for label, found in rows.items()}
    p_values = [mcnemar(*columns[label]) if label in columns else 1.0 for label in labels]
    measured = measure_sets if multi_label else measure
    figures = [measured(labels, true, each).per_class for each in (first, second)]
    changes = [
        LabelChange(
            label=a.label,
            num_rows=a.support,
            first_f1=a.f1,
            second_f1=b.f1,
            f1_difference=a.f1 - b.f1,
            first_recall=a.recall,
            second_recall=b.recall,
            recall_difference=a.recall - b.recall,
            only_first_right=sum(x == t != y for t, x, y in rows[a.label]),
            only_second_right=sum(y == t != x for t, x, y in rows[a.label]),
            p_value=p_value,
            adjusted_p_value=adjusted,
        )
        for a, b, p_value, adjusted in zip(*figures, p_values, holm(p_values), strict=True)
    ]
    ordered = sorted(changes, key=lambda each: (-each.f1_difference, each.label))
    return LabelChanges(first=names[0], second=names[1], labels=tuple(ordered))

"""What a change of a run was worth: before and after on the same rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from remora.errors import DataError
from remora.evaluation.compare import refuse_other_rows
from remora.evaluation.contenders import SIGNIFICANT
from remora.evaluation.multi_label import micro_f1_difference
from remora.evaluation.results import Results
from remora.evaluation.rivals import of_figures
from remora.evaluation.significance import difference_interval, mcnemar

NUM_EXAMPLES = 3


@dataclass(frozen=True, kw_only=True)
class Message:
    """A message that one of the two runs gets right."""

    text: str
    true: str
    before: str
    after: str


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Two runs on the same rows with the same labels; of several, all have to be right."""

    num_rows: int
    before: float  # accuracy
    after: float
    interval: tuple[float, float]  # 95% of the difference, Agresti and Min (2005)
    num_now_right: int
    num_now_wrong: int
    p_value: float  # exact McNemar test

    @property
    def difference(self) -> float:
        """Accuracy after minus accuracy before."""
        return self.after - self.before

    @property
    def may_be_chance(self) -> bool:
        """Whether the test does not exclude that the difference is chance."""
        return self.p_value >= SIGNIFICANT


@dataclass(frozen=True, kw_only=True)
class MicroF1:
    """The micro-F1 of two runs on the same rows with several labels."""

    before: float
    after: float
    interval: tuple[float, float]  # 95% of the difference, paired bootstrap over rows


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """A baseline of both runs, trained on the rows of each."""

    description: str
    before: float  # accuracy
    after: float


@dataclass(frozen=True, kw_only=True)
class Change:
    """A run and the run that came of it, on the rows that both were measured on."""

    before: str  # run directories
    after: str
    measured_on: str
    figures: Figures  # with the labels as given
    corrected: Figures | None  # with the labels as decided, if any of them differs
    num_corrected: int  # rows measured on whose label a person has corrected
    num_deleted: int  # and deleted, which `corrected` is without
    baselines: tuple[Baseline, ...]  # on the same rows, with the labels as given
    now_right: tuple[Message, ...]  # some of them
    now_wrong: tuple[Message, ...]
    micro_f1: MicroF1 | None = None  # with the labels as given, where rows have several

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as JSON holds them."""
        return asdict(self)


def measure_change(
    before: Results, after: Results, decided: Sequence[str | None] | None = None
) -> Change:
    """Compare a run with the one that came of it, on the same rows with the same labels.

    Args:
        before: The results of the run.
        after: Those of the new one.
        decided: The label of each row as a person has decided, None where the row was deleted; by
            default all as given.

    Raises:
        DataError: If the two were measured on other rows.
    """
    refuse_other_rows(before, after)
    if before.figures["measured_on"] != after.figures["measured_on"]:
        raise DataError(
            f"{before.directory} was measured on {before.figures['measured_on']} rows, "
            f"{after.directory} on {after.figures['measured_on']} rows; compare runs on the same"
        )
    given = before.true
    labels = list(decided) if decided is not None else list[str | None](given)
    right, wrong = (
        [
            Message(text=text, true=true, before=old, after=new)
            for text, true, old, new in zip(
                before.texts, given, before.predicted, after.predicted, strict=True
            )
            if (new == true, old == true) == kind
        ]
        for kind in ((True, False), (False, True))
    )
    rows = [
        (label, old, new)
        for label, old, new in zip(labels, before.predicted, after.predicted, strict=True)
        if label is not None
    ]
    return Change(
        before=str(before.directory),
        after=str(after.directory),
        measured_on=before.figures["measured_on"],
        figures=_figures(list(zip(given, before.predicted, after.predicted, strict=True))),
        corrected=_figures(rows) if rows and labels != given else None,
        num_corrected=sum(
            new is not None and new != old for new, old in zip(labels, given, strict=True)
        ),
        num_deleted=labels.count(None),
        baselines=_baselines(before, after),
        now_right=tuple(right[:NUM_EXAMPLES]),
        now_wrong=tuple(wrong[:NUM_EXAMPLES]),
        micro_f1=_micro_f1(before, after) if before.multi_label else None,
    )


def _micro_f1(before: Results, after: Results) -> MicroF1:
    first, second = before.predicted, after.predicted
    _, interval = micro_f1_difference(before.labels, before.true, second, first)
    old, new = (each.figures["metrics"]["micro_f1"] for each in (before, after))
    return MicroF1(before=old, after=new, interval=interval)


def _baselines(before: Results, after: Results) -> tuple[Baseline, ...]:
    """Return the baselines that both runs trained and measured on all rows."""
    found = {
        each.description: each.accuracy
        for each in of_figures(before.figures)
        if each.num_train_rows and each.num_rows == each.num_all_rows
    }
    return tuple(
        Baseline(description=name, before=found[name], after=each.accuracy)
        for each in of_figures(after.figures)
        if (name := each.description) in found and each.num_rows == each.num_all_rows
    )


def _figures(rows: Sequence[tuple[str, str, str]]) -> Figures:
    """Measure both runs by rows of a label, the answer before and that after."""
    true, first, second = (list(column) for column in zip(*rows, strict=True))
    now_right = sum(new == label != old for label, old, new in rows)
    now_wrong = sum(old == label != new for label, old, new in rows)
    return Figures(
        num_rows=len(rows),
        before=sum(label == old for label, old, _ in rows) / len(rows),
        after=sum(label == new for label, _, new in rows) / len(rows),
        interval=difference_interval(now_right, now_wrong, len(rows)),
        num_now_right=now_right,
        num_now_wrong=now_wrong,
        p_value=mcnemar(true, first, second),
    )

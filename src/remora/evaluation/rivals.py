"""The rivals of a trained model: what a user would pick instead, on the same rows, with its time.

A run calls them baselines. Each row of their table is a `Rival`; evaluation.json has them under
`rivals`, beside the older key `baseline` of the linear SVM alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from remora.evaluation.baselines import Baseline
from remora.evaluation.metrics import Metrics, measure
from remora.evaluation.multi_label import measure_sets, micro_f1_difference
from remora.evaluation.significance import difference_interval, holm, mcnemar
from remora.formatting import spoken_time

SIGNIFICANT = 0.05
AS_GOOD = 0.01
"""A rival is as good if the 95 % interval says that it loses no more accuracy than this, or no more
micro-F1 where rows have several labels."""


@dataclass(frozen=True, kw_only=True)
class Answers:
    """The labels that a rival predicts for held-out rows, and what they cost."""

    name: str  # as --baselines calls it
    description: str
    rows: Sequence[int]  # of the held-out rows, in order
    predicted: Sequence[str]
    seconds: float
    num_bytes: int = 0  # of weights needed to predict
    num_train_rows: int = 0
    num_all_train_rows: int = 0


@dataclass(frozen=True, kw_only=True)
class Rival:
    """A rival beside the trained model, both on the rows that the rival was measured on."""

    name: str
    description: str
    num_rows: int
    num_all_rows: int  # that the trained model was measured on
    num_correct: int
    accuracy: float
    accuracy_interval: tuple[float, float]  # 95%, Wilson (1927)
    macro_f1: float
    difference: float  # its accuracy minus that of the trained model
    difference_interval: tuple[float, float] | None  # 95%; None in runs of earlier versions
    p_value: float  # exact McNemar test against the trained model
    num_train_rows: int  # 0 if it was not trained
    num_all_train_rows: int
    seconds: float  # to train and to predict
    num_bytes: int
    micro_f1: float | None = None  # where rows have several labels; accuracy is exact match there
    micro_f1_interval: tuple[float, float] | None = None  # 95%, bootstrap
    micro_f1_difference: float | None = None  # its micro-F1 minus that of the trained model
    micro_f1_difference_interval: tuple[float, float] | None = None  # 95%, paired bootstrap

    @property
    def rows(self) -> str:
        """The rows that it was trained or measured on, where they are not all; else ""."""
        parts = []
        if self.num_train_rows < self.num_all_train_rows:
            parts.append(f"trained on {self.num_train_rows:,} of {self.num_all_train_rows:,} rows")
        if self.num_rows < self.num_all_rows:
            parts.append(f"measured on {self.num_rows:,} of {self.num_all_rows:,} rows")
        return ", ".join(parts)

    @property
    def lead(self) -> float:
        """Its accuracy minus that of the trained model; micro-F1 where rows have several labels.

        That is what selects the weights of such a run. All labels of a row are rarely right, so two
        may be level in exact matches and far apart in what they miss.
        """
        return self.difference if self.micro_f1_difference is None else self.micro_f1_difference

    @property
    def lead_interval(self) -> tuple[float, float] | None:
        """The 95% interval of its lead; None in runs of earlier versions."""
        of_sets = self.micro_f1_difference_interval
        return self.difference_interval if of_sets is None else of_sets

    @property
    def side(self) -> str:
        """Where it is beside the trained model, such as 2.8 points below."""
        of_sets = self.micro_f1_difference is not None
        if not self.lead:
            return "level in micro-F1 with" if of_sets else "level with"
        measure = " of micro-F1" if of_sets else ""
        return f"{100 * abs(self.lead):.1f} points{measure} {'above' if self.lead > 0 else 'below'}"

    def is_apart(self, p_value: float) -> bool:
        """Whether its lead is not by chance.

        Args:
            p_value: Of its accuracy, adjusted; in micro-F1 the interval decides instead.
        """
        if self.micro_f1_difference_interval is None:
            return p_value < SIGNIFICANT
        low, high = self.micro_f1_difference_interval
        return not low <= 0 <= high

    def spoken_lead(self, test: str) -> str:
        """Return the interval of its lead, and the test that its accuracy was put to."""
        if self.micro_f1_difference_interval is not None:
            test = "paired bootstrap"
        if self.lead_interval is None:
            return test
        low, high = (100 * bound for bound in self.lead_interval)
        return f"95% interval {low:+.1f} to {high:+.1f}, {test}"

    def to_dict(self) -> dict[str, Any]:
        """Return the rival as JSON holds it."""
        of_sets = {"micro_f1" + end for end in ("", "_interval", "_difference")}
        of_sets.add("micro_f1_difference_interval")
        return {k: v for k, v in asdict(self).items() if v is not None or k not in of_sets}


def of_baseline(baseline: Baseline) -> Answers:
    """Return the answers of the linear SVM."""
    return Answers(
        name="svm",
        description=baseline.description,
        rows=range(len(baseline.predictions)),
        predicted=baseline.predictions,
        seconds=baseline.seconds,
        num_train_rows=baseline.num_train_rows,
        num_all_train_rows=baseline.num_all_train_rows,
    )


def rate(
    answers: Answers,
    labels: Sequence[str],
    true: Sequence[str],
    predicted: Sequence[str],
    *,
    multi_label: bool = False,
) -> Rival:
    """Measure a rival beside the trained model.

    Args:
        answers: The rival's.
        labels: The closed label set.
        true: The label of each held-out row.
        predicted: The trained model's prediction for each held-out row.
        multi_label: Whether these are sets of labels.
    """
    truth = [true[i] for i in answers.rows]
    ours = [predicted[i] for i in answers.rows]
    of_sets: dict[str, Any] = {}
    metrics: Metrics
    if multi_label:
        metrics = sets = measure_sets(labels, truth, answers.predicted)
        lead, interval = micro_f1_difference(labels, truth, answers.predicted, ours)
        of_sets = {
            "micro_f1": sets.micro_f1,
            "micro_f1_interval": sets.micro_f1_interval,
            "micro_f1_difference": lead,
            "micro_f1_difference_interval": interval,
        }
    else:
        metrics = measure(labels, truth, answers.predicted)
    only_it = sum(a == t != b for t, a, b in zip(truth, answers.predicted, ours, strict=True))
    only_ours = sum(b == t != a for t, a, b in zip(truth, answers.predicted, ours, strict=True))
    return Rival(
        name=answers.name,
        description=answers.description,
        num_rows=metrics.num_rows,
        num_all_rows=len(true),
        num_correct=metrics.num_correct,
        accuracy=metrics.accuracy,
        accuracy_interval=metrics.accuracy_interval,
        macro_f1=metrics.macro_f1,
        difference=(only_it - only_ours) / len(truth),
        difference_interval=difference_interval(only_it, only_ours, len(truth)),
        p_value=mcnemar(truth, ours, answers.predicted),
        num_train_rows=answers.num_train_rows,
        num_all_train_rows=answers.num_all_train_rows,
        seconds=answers.seconds,
        num_bytes=answers.num_bytes,
        **of_sets,
    )


def of_figures(figures: Mapping[str, Any]) -> list[Rival]:
    """Return the rivals in evaluation.json; of a run by an earlier version, its baseline alone.

    Raises:
        KeyError: If the figures are incomplete.
        TypeError: If they are of other kinds.
    """
    if figures.get("rivals"):
        return [Rival(**each) for each in figures["rivals"]]
    if figures.get("baseline") is None:
        return []
    baseline, ours = figures["baseline"], figures["metrics"]
    theirs, num_train_rows = baseline["metrics"], baseline.get("num_train_rows", 0)
    return [
        Rival(
            name="svm",
            description=baseline["description"],
            num_rows=theirs["num_rows"],
            num_all_rows=ours["num_rows"],
            num_correct=theirs["num_correct"],
            accuracy=theirs["accuracy"],
            accuracy_interval=theirs["accuracy_interval"],
            macro_f1=theirs["macro_f1"],
            difference=theirs["accuracy"] - ours["accuracy"],
            difference_interval=None,
            p_value=figures["p_value"],
            num_train_rows=num_train_rows,
            num_all_train_rows=num_train_rows,
            seconds=baseline["seconds"],
            num_bytes=0,
        )
    ]


def spoken_micro_f1(rival: Rival) -> str:
    """Return a sentence on the micro-F1 of a rival beside the trained model."""
    assert rival.micro_f1 is not None
    assert rival.micro_f1_difference is not None
    assert rival.micro_f1_difference_interval is not None
    low, high = (100 * bound for bound in rival.micro_f1_difference_interval)
    return (
        f"{rival.description}: micro-F1 {rival.micro_f1:.2%}, "
        f"{100 * rival.micro_f1_difference:+.1f} points (95% interval {low:+.1f} to {high:+.1f}, "
        "paired bootstrap)"
    )


def seconds_of(figures: Mapping[str, Any]) -> float:
    """Return the time that a run took to train and to score held-out rows."""
    return float(figures["train_seconds"] + figures.get("test_seconds", 0.0))


def verdict(rivals: Sequence[Rival], trained: str, seconds: float) -> str:
    """Return a sentence on the best rival: whether it is the better choice, as good, or worse.

    The best is the one with the largest lead over the trained model on the rows that both were
    measured on. Its p-value is adjusted for the number of rivals by Holm's method. Where rows have
    several labels, micro-F1 decides, by its interval.

    Args:
        rivals: At least one.
        trained: What was trained, "adapter" or "model".
        seconds: The time that it took to train and to score held-out rows.
    """
    adjusted = holm([each.p_value for each in rivals])
    best, p_value = max(zip(rivals, adjusted, strict=True), key=lambda each: each[0].lead)
    points = 100 * best.lead
    how = "exact McNemar test"
    if len(rivals) > 1:
        how += f", adjusted for {len(rivals)} baselines"
    p = f"p = {p_value:.2g}, {how}"
    reached, evidence = f"{best.accuracy:.1%}", p
    if best.micro_f1 is not None:
        reached, evidence = f"{best.micro_f1:.1%} micro-F1", best.spoken_lead(p)
    if best.is_apart(p_value) and points > 0:
        return (
            f"{best.description} reaches {reached} in {spoken_time(best.seconds)}, "
            f"{points:.1f} points above the {trained} ({evidence}): prefer it, or give the "
            f"{trained} more rows or epochs"
        )
    named = best.description if len(rivals) == 1 else f"the best baseline, {best.description}"
    if best.is_apart(p_value) and best.micro_f1 is not None:
        return f"{named} is {best.side} the {trained} ({evidence})"
    if best.is_apart(p_value):
        return f"the {trained} is {-points:.1f} points better than {named} ({evidence})"
    cheaper = seconds / max(best.seconds, 1e-3)
    cost = f", and {cheaper:.0f} times cheaper" if cheaper >= 2 else ""
    interval = best.lead_interval
    word = "is" if interval is not None and interval[0] >= -AS_GOOD else "may be"
    return (
        f"{best.description} {word} as good: it is {best.side} the {trained}, "
        f"which {best.num_rows:,} rows do not tell from chance ({best.spoken_lead(p)}){cost}"
    )

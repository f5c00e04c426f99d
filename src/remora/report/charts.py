"""The charts of a report, laid out for SVG that needs no script."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

WIDTH, HEIGHT = 440, 260
LEFT, RIGHT, TOP, BOTTOM = 52, 22, 12, 42
MAX_POINTS = 150

Point = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Tick:
    """A mark on an axis: its place in SVG units, and its text."""

    at: float
    text: str


@dataclass(frozen=True, kw_only=True)
class Dot:
    """A marked point."""

    x: float
    y: float
    text: str  # its tooltip


@dataclass(frozen=True, kw_only=True)
class Line:
    """A polyline in SVG units, with dots if it has few points."""

    kind: str  # CSS class
    points: str
    dots: tuple[Dot, ...]


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A chart as a template draws it."""

    name: str  # unique on a page
    title: str
    description: str  # of the picture, for screen readers
    x_label: str
    y_label: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    lines: tuple[Line, ...]
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    top: int = TOP
    bottom: int = HEIGHT - BOTTOM


@dataclass(frozen=True, kw_only=True)
class Interval:
    """An interval around a value, in SVG units along the width."""

    kind: str  # CSS class
    name: str
    text: str
    low: float
    value: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Intervals:
    """Intervals over a common axis."""

    width: int
    ticks: tuple[Tick, ...]
    rows: tuple[Interval, ...]


def intervals(rows: Sequence[tuple[str, str, float, Sequence[float]]]) -> Intervals:
    """Lay out shares with their intervals, each given as its CSS class, name, value and interval.

    The axis extends to whole steps.
    """
    bounds = [bound for *_, interval in rows for bound in interval]
    places = ticks(min(bounds), max(bounds))

    def at(x: float) -> float:
        return round(20 + (x - places[0]) / (places[-1] - places[0]) * (WIDTH - 40), 1)

    laid_out = []
    for kind, name, value, (low, high) in rows:
        text = f"{value:.2%} ({low:.1%} to {high:.1%})"
        where = {"low": at(low), "value": at(value), "high": at(high)}
        laid_out.append(Interval(kind=kind, name=name, text=text, **where))
    return Intervals(
        width=WIDTH,
        ticks=tuple(Tick(at=at(x), text=_text(x, True)) for x in places),
        rows=tuple(laid_out),
    )


def chart(
    name: str,
    title: str,
    description: str,
    lines: Sequence[tuple[str, Sequence[Point], bool]],
    *,
    x_label: str,
    y_label: str,
    x_range: Point,
    y_range: Point,
    x_percent: bool = False,
    y_percent: bool = False,
    x_places: Sequence[float] | None = None,
) -> Chart:
    """Lay out a line chart.

    Args:
        name: Its id, unique on a page.
        title: Its title.
        description: What it shows, for screen readers and the caption.
        lines: The CSS class of each line, its points, and whether they are marked with dots.
        x_label: The name of the horizontal axis.
        y_label: The name of the vertical axis.
        x_range: The values at the left and the right end.
        y_range: The range of values, which the vertical axis extends to whole steps.
        x_percent: Whether horizontal values are shown as percentages.
        y_percent: Whether vertical values are.
        x_places: Values above 0 to mark on a logarithmic horizontal axis, instead of whole steps
            on a linear one.
    """
    # Axes
    x_low, x_high = x_range if x_range[1] > x_range[0] else (x_range[0] - 1, x_range[0] + 1)
    scale = math.log if x_places else float
    if x_places is None:
        x_places = [place for place in ticks(x_low, x_high) if x_low <= place <= x_high]
    y_places = ticks(*y_range)
    y_low, y_high = y_places[0], y_places[-1]

    def x_at(x: float) -> float:
        share = (scale(x) - scale(x_low)) / (scale(x_high) - scale(x_low))
        return round(LEFT + share * (WIDTH - LEFT - RIGHT), 1)

    def y_at(y: float) -> float:
        return round(TOP + (y_high - y) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM), 1)

    # Lines
    drawn = []
    for kind, points, dotted in lines:
        dots = [
            Dot(x=x_at(x), y=y_at(y), text=f"{_text(x, x_percent)}: {_text(y, y_percent)}")
            for x, y in points
            if dotted
        ]
        places = " ".join(f"{x_at(x)},{y_at(y)}" for x, y in points)
        drawn.append(Line(kind=kind, points=places, dots=tuple(dots)))
    return Chart(
        name=name,
        title=title,
        description=description,
        x_label=x_label,
        y_label=y_label,
        x_ticks=tuple(Tick(at=x_at(x), text=_text(x, x_percent)) for x in x_places),
        y_ticks=tuple(Tick(at=y_at(y), text=_text(y, y_percent)) for y in y_places),
        lines=tuple(drawn),
    )


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Return round numbers that cover a range, about as many as wanted.

    Steps are 1, 2 or 5 times a power of ten.
    """
    if not high > low:
        low, high = low - 0.5, low + 0.5
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def thinned(points: Sequence[Point], most: int) -> tuple[list[Point], int]:
    """Return at most `most` points, each the mean of neighbouring ones, and the number averaged."""
    size = math.ceil(len(points) / most) or 1
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    means = [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]
    return means, size


def training(records: Sequence[dict[str, Any]]) -> list[Chart]:
    """Return the charts of training loss and validation accuracy, or F1, from metrics.jsonl.

    Skipped steps, whose loss is not finite, are left out.
    """
    losses = [(r["step"], r["loss"]) for r in records if math.isfinite(r.get("loss", math.nan))]
    are_sets = any(r.get("validation_micro_f1") is not None for r in records)  # of labels a row
    key, what = ("micro_f1", "micro-F1") if are_sets else ("accuracy", "accuracy")
    key = f"validation_{key}"
    accuracies = [(r["step"], r[key]) for r in records if key in r]
    if not losses:
        return []
    points, size = thinned(losses, MAX_POINTS)
    each = f"; each point averages {size} steps" if size > 1 else ""
    held_out = [
        (r["step"], r["validation_loss"])
        for r in records
        if math.isfinite(r.get("validation_loss", math.nan))
    ]
    beside, lines = "", [("loss", points, len(points) == 1)]
    if held_out:
        lines.append(("baseline", held_out, True))
        beside = (
            f" The dots are the loss on validation rows, {held_out[-1][1]:.3g} at the last "
            "evaluation."
        )
    steps = (0, losses[-1][0])
    drawn = [
        chart(
            "loss",
            "Training and validation loss" if held_out else "Training loss",
            f"From {points[0][1]:.3g} at the start to {points[-1][1]:.3g} at the end, in nats "
            f"per answer token{each}.{beside}",
            lines,
            x_label="step",
            y_label="loss",
            x_range=steps,
            y_range=(0, max(loss for _, loss in (*points, *held_out))),
        )
    ]
    if accuracies:
        best = max(accuracies, key=lambda point: point[1])
        values = [y for _, y in accuracies]
        drawn.append(
            chart(
                "validation",
                f"Validation {what}",
                f"Best of {len(values)} evaluations: {best[1]:.1%}, at step {best[0]:,}.",
                [("accuracy", accuracies, True)],
                x_label="step",
                y_label=what,
                x_range=steps,
                y_range=(max(0, min(values) - 0.02), min(1, max(values) + 0.02)),
                y_percent=True,
            )
        )
    return drawn


def calibration(reliability: Mapping[str, Any]) -> list[Chart]:
    """Return the charts of the reliability curve and of accuracy against coverage."""
    bins = [(b["confidence"], b["accuracy"]) for b in reliability["bins"]]
    coverage = [(c["coverage"], c["accuracy"]) for c in reliability["coverage"]]
    error = reliability["calibration_error"]
    return [
        chart(
            "reliability",
            "Reliability",
            f"Accuracy against confidence in {len(bins)} bins of rows; on the dashed line both are "
            f"equal. They differ by {error:.3f} on average.",
            [("ideal", [(0.0, 0.0), (1.0, 1.0)], False), ("accuracy", bins, True)],
            x_label="confidence",
            y_label="accuracy",
            x_range=(0, 1),
            y_range=(0, 1),
            x_percent=True,
            y_percent=True,
        ),
        chart(
            "coverage",
            "Accuracy of the most confident answers",
            f"Accuracy if only the most confident share of messages is answered: "
            f"{coverage[0][1]:.1%} for the top {coverage[0][0]:.0%}, "
            f"{coverage[-1][1]:.1%} for all.",
            [("accuracy", coverage, True)],
            x_label="share answered",
            y_label="accuracy",
            x_range=(0, 1),
            y_range=(min(y for _, y in coverage) - 0.01, 1),
            x_percent=True,
            y_percent=True,
        ),
    ]


def learning_curve(figures: Mapping[str, Any]) -> Chart:
    """Return the chart of accuracy against training rows from learning_curve.json."""
    sizes, further = figures["sizes"], figures["extrapolation"]
    ours = [(s["num_rows"], s["accuracy"]) for s in sizes]
    theirs = [(s["num_rows"], s["baseline_accuracy"]) for s in sizes]
    intervals = [
        ("whisker", [(s["num_rows"], bound) for bound in s["accuracy_interval"]], False)
        for s in sizes
    ]
    ahead = []
    if further:
        ahead = [("ideal", [ours[-1], (further["num_rows"], further["accuracy"])], False)]
    values = [y for _, points, _ in [("", theirs, True), *intervals, *ahead] for _, y in points]
    return chart(
        "learning-curve",
        "Accuracy by training rows",
        f"From {ours[0][1]:.1%} with {ours[0][0]:,} rows to {ours[-1][1]:.1%} with "
        f"{ours[-1][0]:,}; bars are 95% intervals, the second line is the baseline"
        + (", the dashed line the extrapolation." if further else "."),
        [*intervals, ("baseline", theirs, True), *ahead, ("accuracy", ours, True)],
        x_label="training rows",
        y_label="accuracy",
        x_range=(ours[0][0], further["num_rows"] if further else ours[-1][0]),
        y_range=(min(values), max(values)),
        y_percent=True,
        x_places=[rows for rows, _ in ours] + [points[1][0] for _, points, _ in ahead],
    )


def frontier(accuracies: Sequence[Point], cut_accuracies: Sequence[Point], least: float) -> Chart:
    """Return the chart of accuracy against how many times smaller an adapter is than the full one.

    Args:
        accuracies: Compression ratio and accuracy, for the full adapter and smaller ones.
        cut_accuracies: The same before some were fine-tuned again; empty if none was.
        least: The accuracy that suffices.
    """
    times = [x for x, _ in accuracies]
    values = [y for _, y in (*accuracies, *cut_accuracies)]
    lines = ": fine-tuned again (upper line), only truncated (lower)" if cut_accuracies else ""
    ends = (min(times), max(times))
    return chart(
        "frontier",
        f"Accuracy by adapter size{lines}",
        f"From {accuracies[0][1]:.1%} with the full adapter to {accuracies[-1][1]:.1%} with one "
        f"{times[-1]:.3g} times smaller. The dashed line is the lowest accuracy allowed.",
        [
            ("ideal", [(ends[0], least), (ends[1], least)], False),
            *([("baseline", cut_accuracies, True)] if cut_accuracies else []),
            ("accuracy", accuracies, True),
        ],
        x_label="times smaller than the full adapter",
        y_label="accuracy",
        x_range=ends,
        y_range=(min(*values, least), max(values)),
        y_percent=True,
        x_places=[2.0**i for i in range(11) if ends[0] <= 2**i <= ends[1]] or ends,
    )


def _text(value: float, percent: bool) -> str:
    return f"{100 * value:.4g}%" if percent else f"{value:,.4g}"

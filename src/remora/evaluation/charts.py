"""The charts of a report as geometry, for SVG that needs no script."""

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
    """A mark on an axis: where, in SVG units, and what stands there."""

    at: float
    text: str


@dataclass(frozen=True, kw_only=True)
class Dot:
    """A point that is drawn as one."""

    x: float
    y: float
    text: str  # shown where the pointer rests on it


@dataclass(frozen=True, kw_only=True)
class Line:
    """A polyline in SVG units, with dots on it if it has few points."""

    kind: str  # its class in the style sheet
    points: str
    dots: tuple[Dot, ...]


@dataclass(frozen=True, kw_only=True)
class Chart:
    """What a template needs to draw a chart."""

    name: str  # unique on a page
    title: str
    description: str  # what the picture shows, for who does not see it
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

    kind: str  # its class in the style sheet
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


def intervals(rows: Sequence[tuple[str, str, Mapping[str, Any]]]) -> Intervals:
    """Lay out accuracies with their intervals, each given as its class, its name and its metrics.

    The axis covers whole steps.
    """
    bounds = [bound for _, _, metrics in rows for bound in metrics["accuracy_interval"]]
    places = ticks(min(bounds), max(bounds))

    def at(x: float) -> float:
        return round(20 + (x - places[0]) / (places[-1] - places[0]) * (WIDTH - 40), 1)

    found = []
    for kind, name, metrics in rows:
        low, high = metrics["accuracy_interval"]
        text = f"{metrics['accuracy']:.2%} ({low:.1%} to {high:.1%})"
        where = {"low": at(low), "value": at(metrics["accuracy"]), "high": at(high)}
        found.append(Interval(kind=kind, name=name, text=text, **where))
    return Intervals(
        width=WIDTH,
        ticks=tuple(Tick(at=at(x), text=_text(x, True)) for x in places),
        rows=tuple(found),
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
    """Lay out a chart of lines, each given as its class, its points and whether they get dots.

    The height covers whole steps of the axis. The width does so too, unless it is given places
    above 0 to mark, which are then laid out by their logarithm.
    """
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
    """Return round numbers over a range, about as many as wanted; the outer ones may lie outside.

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
    """Return at most so many points, each the mean of some neighbours, and of how many."""
    size = math.ceil(len(points) / most) or 1
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    means = [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]
    return means, size


def training(records: Sequence[dict[str, Any]]) -> list[Chart]:
    """Return the curves of the records in metrics.jsonl.

    Steps whose loss is not finite were not taken and are left out.
    """
    losses = [(r["step"], r["loss"]) for r in records if math.isfinite(r.get("loss", math.nan))]
    accuracies = [
        (r["step"], r["validation_accuracy"]) for r in records if "validation_accuracy" in r
    ]
    if not losses:
        return []
    points, size = thinned(losses, MAX_POINTS)
    each = f"; each point is the mean of {size} steps" if size > 1 else ""
    steps = (0, losses[-1][0])
    found = [
        chart(
            "loss",
            "Training loss",
            f"From {points[0][1]:.3g} at the beginning to {points[-1][1]:.3g} at the end, in nats "
            f"for each answer token{each}.",
            [("loss", points, len(points) == 1)],
            x_label="step",
            y_label="loss",
            x_range=steps,
            y_range=(0, max(loss for _, loss in points)),
        )
    ]
    if accuracies:
        best = max(accuracies, key=lambda point: point[1])
        values = [y for _, y in accuracies]
        found.append(
            chart(
                "validation",
                "Validation accuracy",
                f"The best of {len(values)}, with {best[1]:.1%}, is that of step {best[0]:,}.",
                [("accuracy", accuracies, True)],
                x_label="step",
                y_label="accuracy",
                x_range=steps,
                y_range=(max(0, min(values) - 0.02), min(1, max(values) + 0.02)),
                y_percent=True,
            )
        )
    return found


def calibration(reliability: dict[str, Any] | None) -> list[Chart]:
    """Return the reliability curve and accuracy against coverage, if they were measured."""
    if not reliability:
        return []
    bins = [(b["confidence"], b["accuracy"]) for b in reliability["bins"]]
    coverage = [(c["coverage"], c["accuracy"]) for c in reliability["coverage"]]
    error = reliability["calibration_error"]
    return [
        chart(
            "reliability",
            "Reliability",
            f"Accuracy against confidence in {len(bins)} groups of rows; the dashed line is where "
            f"both are equal. They differ by {error:.3f} on average.",
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
            "Accuracy of the surest answers",
            "Accuracy where only the surest share of the messages is answered: from "
            f"{coverage[0][1]:.1%} for the surest {coverage[0][0]:.0%} to {coverage[-1][1]:.1%} "
            "for all.",
            [("accuracy", coverage, True)],
            x_label="share answered",
            y_label="accuracy",
            x_range=(0, 1),
            y_range=(min(y for _, y in coverage) - 0.01, 1),
            x_percent=True,
            y_percent=True,
        ),
    ]


def learning_curve(found: dict[str, Any] | None) -> Chart | None:
    """Return accuracy against training rows, as learning_curve.json has it."""
    if not found:
        return None
    sizes, further = found["sizes"], found["extrapolation"]
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
        f"{ours[-1][0]:,}; the bars are 95% intervals, the other line is the baseline"
        + (", the dashed one the extrapolation." if further else "."),
        [*intervals, ("baseline", theirs, True), *ahead, ("accuracy", ours, True)],
        x_label="training rows",
        y_label="accuracy",
        x_range=(ours[0][0], further["num_rows"] if further else ours[-1][0]),
        y_range=(min(values), max(values)),
        y_percent=True,
        x_places=[rows for rows, _ in ours] + [points[1][0] for _, points, _ in ahead],
    )


def frontier(accuracies: Sequence[Point], cut_accuracies: Sequence[Point], least: float) -> Chart:
    """Return accuracy against how many times smaller an adapter is than the whole one.

    Args:
        accuracies: How many times smaller and the accuracy, for the whole adapter and smaller ones.
        cut_accuracies: The same before some learned again; empty if none did.
        least: The accuracy that is good enough.
    """
    times = [x for x, _ in accuracies]
    values = [y for _, y in (*accuracies, *cut_accuracies)]
    learned = ": learned again (upper line), only cut (lower)" if cut_accuracies else ""
    ends = (min(times), max(times))
    return chart(
        "frontier",
        f"Accuracy by size of the adapter{learned}",
        f"From {accuracies[0][1]:.1%} with the whole adapter to {accuracies[-1][1]:.1%} with one "
        f"{times[-1]:.3g} times smaller. The dashed line is the least accuracy allowed.",
        [
            ("ideal", [(ends[0], least), (ends[1], least)], False),
            *([("baseline", cut_accuracies, True)] if cut_accuracies else []),
            ("accuracy", accuracies, True),
        ],
        x_label="times smaller than the whole adapter",
        y_label="accuracy",
        x_range=ends,
        y_range=(min(*values, least), max(values)),
        y_percent=True,
        x_places=[2.0**i for i in range(11) if ends[0] <= 2**i <= ends[1]] or ends,
    )


def _text(value: float, percent: bool) -> str:
    return f"{100 * value:.4g}%" if percent else f"{value:,.4g}"

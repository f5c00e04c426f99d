"""Geometry of the charts, by hand."""

from __future__ import annotations

import math

import pytest

from remora.report import charts


def test_ticks_are_round_and_cover_the_range() -> None:
    assert charts.ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1]
    assert charts.ticks(0, 846) == [0, 200, 400, 600, 800, 1000]
    assert charts.ticks(0.827, 0.913) == [0.82, 0.84, 0.86, 0.88, 0.9, 0.92]
    assert charts.ticks(3, 3)[0] <= 3 <= charts.ticks(3, 3)[-1]


def test_thinning_takes_means_of_neighbours() -> None:
    points = [(float(i), 2.0 * i) for i in range(7)]
    assert charts.thinned(points, 10) == (points, 1)
    means, size = charts.thinned(points, 3)
    assert size == 3
    assert means == [(1, 2), (4, 8), (6, 12)]


def test_a_chart_puts_points_where_the_axes_say() -> None:
    drawn = charts.chart(
        "name",
        "title",
        "description",
        [("line", [(0, 0), (1, 1)], True)],
        x_label="x",
        y_label="y",
        x_range=(0, 1),
        y_range=(0, 1),
        y_percent=True,
    )
    first, last = (tuple(map(float, p.split(","))) for p in drawn.lines[0].points.split())
    assert first == (drawn.left, drawn.bottom)
    assert last == (drawn.right, drawn.top)
    assert [tick.text for tick in drawn.y_ticks] == ["0%", "20%", "40%", "60%", "80%", "100%"]
    assert drawn.y_ticks[0].at == drawn.bottom
    assert drawn.lines[0].dots[1].text == "1: 100%"


def test_intervals_share_an_axis() -> None:
    found = charts.intervals([("a", "A", 0.5, [0.4, 0.6]), ("b", "B", 0.8, [0.7, 0.9])])
    first, second = found.rows
    assert first.low < first.value < first.high < second.low
    assert first.value - first.low == pytest.approx(second.high - second.value, abs=0.2)
    assert first.text == "50.00% (40.0% to 60.0%)"


def test_skipped_steps_are_left_out() -> None:
    records = [{"step": i, "loss": math.nan if i == 2 else float(i)} for i in (1, 2, 3)]
    (loss,) = charts.training(records)
    assert len(loss.lines[0].points.split()) == 2
    assert "From 1 at the start to 3 at the end" in loss.description
    assert charts.training(records[1:2]) == []


def test_a_learning_curve_is_laid_out_by_the_logarithm_of_its_rows() -> None:
    sizes = [
        {
            "num_rows": rows,
            "accuracy": 0.6,
            "accuracy_interval": (0.5, 0.7),
            "baseline_accuracy": 0.5,
        }
        for rows in (100, 200, 400)
    ]
    drawn = charts.learning_curve(
        {"sizes": sizes, "extrapolation": {"num_rows": 800, "accuracy": 0.65}}
    )
    assert drawn
    *intervals, baseline, ahead, ours = drawn.lines
    places = [dot.x for dot in ours.dots]
    assert places[1] - places[0] == pytest.approx(places[2] - places[1], abs=0.2)
    assert [dot.text for dot in ours.dots] == ["100: 60%", "200: 60%", "400: 60%"]
    assert ahead.points.split()[1].split(",")[0] == str(float(drawn.right))
    assert len(intervals) == 3
    assert [tick.text for tick in drawn.x_ticks] == ["100", "200", "400", "800"]
    assert baseline.kind == "baseline"


def test_the_frontier_has_a_line_for_what_was_only_cut() -> None:
    learned, cut = [(1.0, 0.9), (4.0, 0.9), (16.0, 0.8)], [(1.0, 0.9), (4.0, 0.9), (16.0, 0.4)]
    drawn = charts.frontier(learned, cut, 0.85)
    assert [tick.text for tick in drawn.x_ticks] == ["1", "2", "4", "8", "16"]
    ideal, lower, upper = drawn.lines
    assert ideal.points.split(",")[0] == str(float(drawn.left))
    assert upper.dots[1].y < float(ideal.points.split(",")[-1]) < upper.dots[2].y < lower.dots[2].y
    assert upper.dots[1].x == (drawn.left + drawn.right) / 2
    assert "only truncated" in drawn.title
    (_, alone) = charts.frontier(learned, [], 0.85).lines
    assert [dot.text for dot in alone.dots] == [dot.text for dot in upper.dots]

"""Runs side by side on the same test rows: does the bigger model earn its keep?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from remora.config import CompareConfig
from remora.errors import ConfigError, DataError
from remora.evaluation import results
from remora.evaluation.contenders import (
    SIGNIFICANT,
    Contender,
    Pair,
    baselines_of,
    best_and_rival,
    between,
    contender,
    labels_of,
    pairs_of,
)
from remora.evaluation.label_changes import LabelChanges, label_changes
from remora.evaluation.results import Results
from remora.evaluation.rivals import of_figures
from remora.evaluation.significance import difference_interval
from remora.formatting import one_line

NUM_SHARED = 5


@dataclass(frozen=True, kw_only=True)
class SharedMistake:
    """Rows of one label for which every run predicts the same wrong label."""

    true: str
    predicted: str
    count: int


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Contenders from the smallest to the biggest, their differences, and the conclusion."""

    num_rows: int
    measure: str  # what decides: "accuracy", or "micro-F1" where rows have several labels
    contenders: tuple[Contender, ...]
    pairs: tuple[Pair, ...]
    shared_mistakes: tuple[SharedMistake, ...]
    by_label: LabelChanges | None  # of the two best runs; None if there is only one
    answer: str
    bar: str | None
    value: str | None
    notes: tuple[str, ...]

    @property
    def runs(self) -> tuple[Contender, ...]:
        """The contenders that are runs, not baselines."""
        return tuple(each for each in self.contenders if not each.is_baseline)

    @property
    def shown_pairs(self) -> tuple[Pair, ...]:
        """The pairs of which at least one is a run; two baselines are of less interest."""
        runs = {each.name for each in self.runs}
        return tuple(each for each in self.pairs if {each.first, each.second} & runs)

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as JSON holds them."""
        return asdict(self)


def compare_runs(config: CompareConfig) -> Comparison:
    """Compare runs that were measured on the same rows, and their baselines.

    Raises:
        ConfigError: If a run is given twice.
        DataError: If a run has no predictions, or the test rows differ.
    """
    if len({path.resolve() for path in config.runs}) < len(config.runs):
        raise ConfigError("a run is given twice; give different runs")
    runs = [_read(path) for path in config.runs]
    for other in runs[1:]:
        refuse_other_rows(runs[0], other)

    # Runs and baselines, from the smallest to the biggest
    names = run_names(config.runs)
    contenders: dict[str, tuple[Contender, Sequence[str]]] = {
        name: (contender(name, each.figures), each.predicted)
        for name, each in zip(names, runs, strict=True)
    }
    baselines, notes = baselines_of(runs, names)
    contenders |= baselines
    if any(each.figures["measured_on"] != "test" for each in runs):
        notes.append("the rows also selected the weights: all figures are slightly optimistic")
    ordered = sorted(
        contenders.values(), key=lambda each: (each[0].num_bytes, each[0].train_seconds)
    )

    if runs[0].multi_label:
        notes.append("rows have several labels, so micro-F1 decides")

    # Differences, and what follows from them
    pairs = pairs_of(runs, ordered)
    ranked = [each for each, _ in ordered]
    best, rival = best_and_rival(ranked, pairs)
    by_name = dict(zip(names, runs, strict=True))
    return Comparison(
        num_rows=len(runs[0].true),
        measure=best.measure,
        contenders=tuple(ranked),
        pairs=pairs,
        shared_mistakes=_shared_mistakes(runs),
        by_label=_by_label(ranked, by_name),
        answer=_answer(ranked, best, rival, pairs),
        bar=None if config.bar is None else _clears(ranked, config.bar),
        value=_value(best, rival, pairs, config, len(runs[0].true)),
        notes=tuple(notes),
    )


def _read(path: Path) -> Results:
    run = results.read(path)
    try:
        contender("", run.figures)
        of_figures(run.figures)
    except (KeyError, TypeError) as error:
        raise DataError(
            f"the figures in {path} are broken ({one_line(error)}); train it again"
        ) from error
    return run


def refuse_other_rows(first: Results, other: Results) -> None:
    """Refuse runs that were measured on different rows; raises DataError."""
    advice = "train both with the same --test table, or the same data and --seed"
    if len(first.true) != len(other.true):
        raise DataError(
            f"{first.directory} was measured on {len(first.true):,} rows, {other.directory} on "
            f"{len(other.true):,}; {advice}"
        )
    ours, theirs = (zip(each.texts, each.true, strict=True) for each in (first, other))
    for row, (a, b) in enumerate(zip(ours, theirs, strict=True), 1):
        if a != b:
            raise DataError(
                f"the test rows of {first.directory} and {other.directory} differ, first in row "
                f"{row}; {advice}"
            )


def run_names(paths: Sequence[Path]) -> list[str]:
    """Return the runs' names, or their paths if two names are the same."""
    names = [path.resolve().name for path in paths]
    return names if len(set(names)) == len(names) else [str(path) for path in paths]


def _shared_mistakes(runs: Sequence[Results]) -> tuple[SharedMistake, ...]:
    answers = zip(*(each.predicted for each in runs), strict=True)
    counts = Counter(
        (true, given[0])
        for true, given in zip(runs[0].true, answers, strict=True)
        if len(set(given)) == 1 and given[0] != true
    )
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return tuple(SharedMistake(true=t, predicted=p, count=n) for (t, p), n in ranked[:NUM_SHARED])


def _by_label(ranked: Sequence[Contender], runs: Mapping[str, Results]) -> LabelChanges | None:
    """Compare the two best runs label by label; as in a `Pair`, the bigger one first."""
    theirs = [each for each in ranked if not each.is_baseline]
    if len(theirs) < 2:
        return None
    two = sorted(theirs, key=lambda each: -each.score)[:2]
    second, first = (each.name for each in theirs if each in two)
    run, other = runs[first], runs[second]
    return label_changes(
        (first, second),
        labels_of([run, other]),
        run.true,
        run.predicted,
        other.predicted,
        multi_label=run.multi_label,
    )


def spoken_lead(pair: Pair, best: Contender) -> str:
    """Return the lead of the best one of a pair with its interval and p-value."""
    low, high = (100 * bound for bound in pair.difference_interval)
    return (
        f"{100 * pair.difference:+.1f} {best.points}, 95% interval {low:+.1f} to {high:+.1f}, "
        f"p = {pair.adjusted_p_value:.2g}"
    )


def _answer(
    ranked: Sequence[Contender], best: Contender, rival: Contender | None, pairs: Sequence[Pair]
) -> str:
    """Say whether the bigger model earns its keep."""
    if len(ranked) == 1:
        return f"There is nothing to compare {best.name} with."
    last = ranked[-1]
    bigger = "" if last is best else f" {_behind(between(pairs, last, best), last, best)}"
    if rival is None:
        keeps = "No bigger model earns its keep" if _is_bigger(last, best) else "None is bigger"
        return f"{keeps}: {best.name} {best.is_best}, and none is smaller.{bigger}"
    pair = between(pairs, best, rival)
    alike = not _is_bigger(best, rival)
    if pair.adjusted_p_value >= SIGNIFICANT:
        keeps = "Neither is bigger" if alike else "The bigger model does not earn its keep"
        smaller = "" if alike else "the smaller "
        return (
            f"{keeps}: the lead of {best.name} over {smaller}{rival.name} may be chance "
            f"({spoken_lead(pair, best)}).{bigger}"
        )
    keeps = "Neither is bigger, and one is better" if alike else "The bigger model earns its keep"
    others = [each for each in ranked[: ranked.index(best)] if each is not rival]
    are_smaller = all(_is_bigger(best, each) for each in (*others, rival))
    also = f" and every other {'smaller one' if are_smaller else 'one that is no bigger'}"
    return (
        f"{keeps}: {best.name} is better than {rival.name}{also if others else ''} "
        f"({spoken_lead(pair, best)}).{bigger}"
    )


def _is_bigger(one: Contender, other: Contender) -> bool:
    """Whether a contender takes more than a tenth more bytes: adapters of one base do not."""
    return one.num_bytes > 1.1 * other.num_bytes


def _behind(pair: Pair, last: Contender, best: Contender) -> str:
    """Return a sentence on the last contender, which is behind the most accurate one."""
    about = "" if last.num_bytes == best.num_bytes else "about "
    size = "bigger still" if _is_bigger(last, best) else f"of {about}the same size"
    if not pair.difference:
        return f"{last.name}, {size}, is no better."
    is_chance = pair.adjusted_p_value >= SIGNIFICANT
    chance = f", which may be chance (p = {pair.adjusted_p_value:.2g})" if is_chance else ""
    return f"{last.name}, {size}, is {-100 * pair.difference:.1f} {best.points} worse{chance}."


def _clears(ranked: Sequence[Contender], bar: float) -> str:
    """Name the smallest contender that reaches the bar."""
    what = "" if ranked[0].measure == "accuracy" else f" {ranked[0].measure}"
    reach = [each for each in ranked if each.score >= bar]
    if not reach:
        best = max(ranked, key=lambda each: each.score)
        return f"None reaches {bar:.1%}{what}; {best.name} comes closest with {best.score:.2%}."
    first = reach[0]
    low = first.score_interval[0]
    sure = "" if low >= bar else f", but its 95% interval starts at {low:.1%}"
    is_only = all(each.num_bytes > first.num_bytes for each in reach[1:])
    which = "the smallest that reaches" if is_only else "one of the smallest that reach"
    return f"{first.name} is {which} {bar:.1%}{what}: {first.score:.2%}{sure}."


def _value(
    best: Contender,
    rival: Contender | None,
    pairs: Sequence[Pair],
    config: CompareConfig,
    num_rows: int,
) -> str | None:
    """Say how many more messages the best gets right than its smaller rival, and their value."""
    if config.volume is None or rival is None:
        return None
    pair = between(pairs, best, rival)
    only = pair.only_first_right, pair.only_second_right
    interval = difference_interval(*only, num_rows)
    errors = [config.volume * d for d in ((only[0] - only[1]) / num_rows, *interval)]
    right = "right" if best.measure == "accuracy" else "right in all labels"
    text = (
        f"Of {config.volume:,} messages, {best.name} gets {errors[0]:,.0f} more {right} than "
        f"{rival.name} (95% interval {errors[1]:,.0f} to {errors[2]:,.0f})"
    )
    if config.cost_per_error is not None:
        worth = [config.cost_per_error * count for count in errors]
        text += f", which is worth {worth[0]:,.2f} ({worth[1]:,.2f} to {worth[2]:,.2f})"
    return text + "."

"""Runs side by side on the same test rows: does the bigger model earn its keep?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from remora.config import CompareConfig
from remora.errors import ConfigError, DataError
from remora.evaluation import results
from remora.evaluation.label_changes import LabelChanges, label_changes
from remora.evaluation.results import Results
from remora.evaluation.rivals import Rival, of_figures
from remora.evaluation.significance import difference_interval, holm, mcnemar
from remora.formatting import one_line

SIGNIFICANT = 0.05
NUM_SHARED = 5


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A run or a baseline, with its accuracy and its costs."""

    name: str
    accuracy: float
    accuracy_interval: tuple[float, float]  # 95%, Wilson (1927)
    macro_f1: float
    train_seconds: float
    num_bytes: int = 0  # of weights needed to predict; 0 for the linear SVM
    artifact_bytes: int | None = None  # of the adapter or model that the run has saved
    trainable_share: float | None = None
    examples_per_second: float | None = None  # of training, if it was measured
    peak_memory_bytes: int | None = None

    @property
    def is_baseline(self) -> bool:
        """Whether this is a baseline, not a run."""
        return self.artifact_bytes is None


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two contenders on the same rows; `second` is no bigger than `first`.

    Of two of one size, `first` is the one that took longer to train.
    """

    first: str
    second: str
    difference: float  # accuracy of the first minus that of the second
    difference_interval: tuple[float, float]  # 95%, Agresti and Min (2005)
    only_first_right: int
    only_second_right: int
    p_value: float  # exact McNemar test
    adjusted_p_value: float  # over all pairs, Holm (1979)
    both_wrong: int
    both_wrong_by_chance: float  # expected if they erred independently
    error_consistency: float | None  # kappa of being right; None if one is always right or wrong
    same_wrong_label: int  # of the rows that both get wrong


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
    contenders: tuple[Contender, ...]
    pairs: tuple[Pair, ...]
    shared_mistakes: tuple[SharedMistake, ...]
    by_label: LabelChanges | None  # of the two most accurate runs; None if there is only one
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
    baselines, notes = _baselines(runs, names)
    contenders |= baselines
    if any(each.figures["measured_on"] != "test" for each in runs):
        notes.append("the rows also selected the weights: all figures are slightly optimistic")
    ordered = sorted(
        contenders.values(), key=lambda each: (each[0].num_bytes, each[0].train_seconds)
    )

    if runs[0].multi_label:
        notes.append(
            "rows have several labels, and accuracy is the share of rows with all of them right; "
            + ", ".join(_micro_f1(runs, names))
        )

    # Differences, and what follows from them
    pairs = _pairs(runs[0].true, ordered)
    ranked = [each for each, _ in ordered]
    best, rival = best_and_rival(ranked, pairs)
    by_name = dict(zip(names, runs, strict=True))
    return Comparison(
        num_rows=len(runs[0].true),
        contenders=tuple(ranked),
        pairs=pairs,
        shared_mistakes=_shared_mistakes(runs),
        by_label=_by_label(ranked, by_name),
        answer=_answer(ranked, best, rival, pairs),
        bar=None if config.bar is None else _clears(ranked, config.bar),
        value=_value(best, rival, pairs, config),
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


def contender(name: str, figures: dict[str, Any]) -> Contender:
    """Return a run by the figures in its evaluation.json."""
    metrics = figures["metrics"]
    parameters = figures["parameters"]
    # An adapter needs its base model, a fully fine-tuned model does not.
    base_bytes = 0 if figures.get("method") == "full" else figures["base_bytes"]
    return Contender(
        name=name,
        accuracy=metrics["accuracy"],
        accuracy_interval=tuple(metrics["accuracy_interval"]),
        macro_f1=metrics["macro_f1"],
        train_seconds=figures["train_seconds"],
        num_bytes=base_bytes + figures["adapter_bytes"],
        artifact_bytes=figures["adapter_bytes"],
        trainable_share=parameters["trainable"] / parameters["total"],
        examples_per_second=figures["examples_per_second"] or None,
        peak_memory_bytes=figures["peak_memory_bytes"],
    )


def _micro_f1(runs: Sequence[Results], names: Sequence[str]) -> list[str]:
    """Return the micro-F1 of runs with several labels a row, and of the first one's baselines."""
    found = {name: each.figures["metrics"] for name, each in zip(names, runs, strict=True)}
    found |= {each.description: vars(each) for each in of_figures(runs[0].figures)}
    return [f"{name} has {each['micro_f1']:.2%} micro-F1" for name, each in found.items()]


def _baselines(
    runs: Sequence[Results], names: Sequence[str]
) -> tuple[dict[str, tuple[Contender, Sequence[str]]], list[str]]:
    """Return the baselines of all runs with their predictions by name, and notes on them.

    Of those with one description that of the first run which has it is taken.
    """
    found: dict[str, tuple[Contender, Sequence[str]]] = {}
    partial: dict[str, str] = {}  # a note on each that no run measured on all rows
    notes = []
    if not any(run.baseline for run in runs):
        notes.append("no run has predictions of the SVM, which is left out")
    for run, name in zip(runs, names, strict=True):
        for rival in of_figures(run.figures):
            given = run.baseline if rival.name == "svm" else run.rivals.get(rival.name)
            whole = [each for each in given or () if each is not None]
            if len(whole) < len(run.true):
                if whole:
                    partial.setdefault(
                        rival.description,
                        f"{rival.description} is left out: {name} measured it on {len(whole):,} "
                        f"of {len(run.true):,} rows",
                    )
            elif rival.description not in found:
                found[rival.description] = (_of_rival(rival), whole)
            elif found[rival.description][1] != whole:
                notes.append(f"{rival.description} is not that of {name}, where it differs")
    return found, [*notes, *(note for name, note in partial.items() if name not in found)]


def _of_rival(rival: Rival) -> Contender:
    return Contender(
        name=rival.description,
        accuracy=rival.accuracy,
        accuracy_interval=rival.accuracy_interval,
        macro_f1=rival.macro_f1,
        train_seconds=rival.seconds,
        num_bytes=rival.num_bytes,
    )


def _pairs(
    true: Sequence[str], ordered: Sequence[tuple[Contender, Sequence[str]]]
) -> tuple[Pair, ...]:
    """Compare every two contenders; the bigger one is the first of the pair."""
    matches = list(combinations(ordered, 2))
    p_values = [mcnemar(true, big[1], small[1]) for small, big in matches]
    adjusted = holm(p_values)
    answers = np.array(true)
    return tuple(
        _pair(answers, big, small, p, q)
        for (small, big), p, q in zip(matches, p_values, adjusted, strict=True)
    )


def _pair(
    true: NDArray[np.str_],
    big: tuple[Contender, Sequence[str]],
    small: tuple[Contender, Sequence[str]],
    p_value: float,
    adjusted: float,
) -> Pair:
    first, second = np.array(big[1]), np.array(small[1])
    wrong_first, wrong_second = first != true, second != true
    num_rows = len(true)
    only_first = int((wrong_second & ~wrong_first).sum())
    only_second = int((wrong_first & ~wrong_second).sum())
    both = wrong_first & wrong_second
    rates = float(wrong_first.mean()), float(wrong_second.mean())
    agreement = float((wrong_first == wrong_second).mean())
    chance = rates[0] * rates[1] + (1 - rates[0]) * (1 - rates[1])
    return Pair(
        first=big[0].name,
        second=small[0].name,
        difference=(only_first - only_second) / num_rows,
        difference_interval=difference_interval(only_first, only_second, num_rows),
        only_first_right=only_first,
        only_second_right=only_second,
        p_value=p_value,
        adjusted_p_value=adjusted,
        both_wrong=int(both.sum()),
        both_wrong_by_chance=rates[0] * rates[1] * num_rows,
        # Geirhos et al. 2020, https://arxiv.org/abs/2006.16736
        error_consistency=None if chance == 1 else (agreement - chance) / (1 - chance),
        same_wrong_label=int((both & (first == second)).sum()),
    )


def _shared_mistakes(runs: Sequence[Results]) -> tuple[SharedMistake, ...]:
    answers = zip(*(each.predicted for each in runs), strict=True)
    counts = Counter(
        (true, given[0])
        for true, given in zip(runs[0].true, answers, strict=True)
        if len(set(given)) == 1 and given[0] != true
    )
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return tuple(SharedMistake(true=t, predicted=p, count=n) for (t, p), n in ranked[:NUM_SHARED])


def between(pairs: Sequence[Pair], first: Contender, second: Contender) -> Pair:
    """Return the pair of two contenders, the bigger one given first."""
    return next(p for p in pairs if (p.first, p.second) == (first.name, second.name))


def best_and_rival(
    ranked: Sequence[Contender], pairs: Sequence[Pair]
) -> tuple[Contender, Contender | None]:
    """Return the most accurate contender, and the smaller one that it must justify itself against.

    That is the smallest one whose difference may be chance, else the most accurate smaller one.
    """
    best = max(ranked, key=lambda each: each.accuracy)
    smaller = ranked[: ranked.index(best)]
    if not smaller:
        return best, None
    alike = [each for each in smaller if between(pairs, best, each).adjusted_p_value >= SIGNIFICANT]
    return best, alike[0] if alike else max(smaller, key=lambda each: each.accuracy)


def _by_label(ranked: Sequence[Contender], runs: Mapping[str, Results]) -> LabelChanges | None:
    """Compare the two most accurate runs label by label; as in a `Pair`, the bigger one first."""
    theirs = [each for each in ranked if not each.is_baseline]
    if len(theirs) < 2:
        return None
    two = sorted(theirs, key=lambda each: -each.accuracy)[:2]
    second, first = (each.name for each in theirs if each in two)
    run, other = runs[first], runs[second]
    return label_changes(
        (first, second),
        labels_of_both(run, other),
        run.true,
        run.predicted,
        other.predicted,
        multi_label=run.multi_label,
    )


def labels_of_both(first: Results, second: Results) -> list[str]:
    """Return the labels of two runs in order; one may have begun with the other and know more."""
    return sorted({*first.labels, *second.labels})


def spoken_lead(pair: Pair) -> str:
    """Return the difference of a pair with its interval and p-value."""
    low, high = (100 * bound for bound in pair.difference_interval)
    return (
        f"{100 * pair.difference:+.1f} points, 95% interval {low:+.1f} to {high:+.1f}, "
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
        return f"{keeps}: {best.name} is the most accurate, and none is smaller.{bigger}"
    pair = between(pairs, best, rival)
    alike = not _is_bigger(best, rival)
    if pair.adjusted_p_value >= SIGNIFICANT:
        keeps = "Neither is bigger" if alike else "The bigger model does not earn its keep"
        smaller = "" if alike else "the smaller "
        return (
            f"{keeps}: the lead of {best.name} over {smaller}{rival.name} may be chance "
            f"({spoken_lead(pair)}).{bigger}"
        )
    keeps = "Neither is bigger, and one is better" if alike else "The bigger model earns its keep"
    others = [each for each in ranked[: ranked.index(best)] if each is not rival]
    are_smaller = all(_is_bigger(best, each) for each in (*others, rival))
    also = f" and every other {'smaller one' if are_smaller else 'one that is no bigger'}"
    return (
        f"{keeps}: {best.name} is better than {rival.name}{also if others else ''} "
        f"({spoken_lead(pair)}).{bigger}"
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
    return f"{last.name}, {size}, is {-100 * pair.difference:.1f} points worse{chance}."


def _clears(ranked: Sequence[Contender], bar: float) -> str:
    """Name the smallest contender that reaches the bar."""
    reach = [each for each in ranked if each.accuracy >= bar]
    if not reach:
        best = max(ranked, key=lambda each: each.accuracy)
        return f"None reaches {bar:.1%}; {best.name} comes closest with {best.accuracy:.2%}."
    first = reach[0]
    low = first.accuracy_interval[0]
    sure = "" if low >= bar else f", but its 95% interval starts at {low:.1%}"
    is_only = all(each.num_bytes > first.num_bytes for each in reach[1:])
    which = "the smallest that reaches" if is_only else "one of the smallest that reach"
    return f"{first.name} is {which} {bar:.1%}: {first.accuracy:.2%}{sure}."


def _value(
    best: Contender, rival: Contender | None, pairs: Sequence[Pair], config: CompareConfig
) -> str | None:
    """Say how many more messages the best gets right than its smaller rival, and their value."""
    if config.volume is None or rival is None:
        return None
    pair = between(pairs, best, rival)
    errors = [config.volume * d for d in (pair.difference, *pair.difference_interval)]
    text = (
        f"Of {config.volume:,} messages, {best.name} gets {errors[0]:,.0f} more right than "
        f"{rival.name} (95% interval {errors[1]:,.0f} to {errors[2]:,.0f})"
    )
    if config.cost_per_error is not None:
        worth = [config.cost_per_error * count for count in errors]
        text += f", which is worth {worth[0]:,.2f} ({worth[1]:,.2f} to {worth[2]:,.2f})"
    return text + "."

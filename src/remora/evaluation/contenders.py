"""Runs and their baselines as contenders on the same rows, and every two of them tested."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from remora.evaluation.multi_label import measure_sets, micro_f1_difference, micro_f1_p_value
from remora.evaluation.results import Results
from remora.evaluation.rivals import Rival, of_figures
from remora.evaluation.significance import difference_interval, holm, mcnemar

SIGNIFICANT = 0.05


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
    micro_f1: float | None = None  # where rows have several labels; accuracy is exact match there
    micro_f1_interval: tuple[float, float] | None = None  # 95%, bootstrap

    @property
    def measure(self) -> str:
        """What decides: "accuracy", or "micro-F1" where rows have several labels."""
        return "accuracy" if self.micro_f1 is None else "micro-F1"

    @property
    def points(self) -> str:
        """What a hundredth of it is called."""
        return "points" if self.micro_f1 is None else "points of micro-F1"

    @property
    def is_best(self) -> str:
        """What is said of the best one."""
        return "is the most accurate" if self.micro_f1 is None else "has the best micro-F1"

    @property
    def test(self) -> str:
        """The name of the test of two of them."""
        is_exact = self.micro_f1 is None
        return "exact McNemar test" if is_exact else "approximate randomization test"

    @property
    def score(self) -> float:
        """The accuracy or micro-F1, whichever decides."""
        return self.accuracy if self.micro_f1 is None else self.micro_f1

    @property
    def score_interval(self) -> tuple[float, float]:
        """Its 95% interval."""
        return self.micro_f1_interval or self.accuracy_interval

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
    difference: float  # accuracy, or micro-F1 of several labels, of first minus second
    difference_interval: tuple[float, float]  # 95%, Agresti and Min (2005), or paired bootstrap
    only_first_right: int
    only_second_right: int
    p_value: float  # exact McNemar test, or approximate randomization test of micro-F1
    adjusted_p_value: float  # over all pairs, Holm (1979)
    both_wrong: int
    both_wrong_by_chance: float  # expected if they erred independently
    error_consistency: float | None  # kappa of being right; None if one is always right or wrong
    same_wrong_label: int  # of the rows that both get wrong


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
        **_micro_f1(metrics),
    )


def _micro_f1(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return micro-F1 and its interval as a contender has them, of figures that may have none."""
    found, interval = metrics.get("micro_f1"), metrics.get("micro_f1_interval")
    return {"micro_f1": found, "micro_f1_interval": interval and tuple(interval)}


def baselines_of(
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
                found[rival.description] = (_of_rival(rival, run, whole), whole)
            elif found[rival.description][1] != whole:
                notes.append(f"{rival.description} is not that of {name}, where it differs")
    return found, [*notes, *(note for name, note in partial.items() if name not in found)]


def _of_rival(rival: Rival, run: Results, predicted: Sequence[str]) -> Contender:
    figures: Mapping[str, Any] = vars(rival)
    if run.multi_label and rival.micro_f1 is None:  # by an earlier version
        figures = vars(measure_sets(run.labels, run.true, predicted))
    return Contender(
        name=rival.description,
        accuracy=rival.accuracy,
        accuracy_interval=rival.accuracy_interval,
        macro_f1=rival.macro_f1,
        train_seconds=rival.seconds,
        num_bytes=rival.num_bytes,
        **_micro_f1(figures),
    )


def pairs_of(
    runs: Sequence[Results], ordered: Sequence[tuple[Contender, Sequence[str]]]
) -> tuple[Pair, ...]:
    """Compare every two contenders; the bigger one is the first of the pair."""
    true, is_multi_label = runs[0].true, runs[0].multi_label
    labels = labels_of(runs)
    matches = [(big, small) for small, big in combinations(ordered, 2)]
    test = partial(micro_f1_p_value, labels) if is_multi_label else mcnemar
    p_values = [test(true, big[1], small[1]) for big, small in matches]
    adjusted = holm(p_values)
    answers = np.array(true)
    pairs = [
        _pair(answers, big, small, p, q)
        for (big, small), p, q in zip(matches, p_values, adjusted, strict=True)
    ]
    if is_multi_label:
        leads = [micro_f1_difference(labels, true, big[1], small[1]) for big, small in matches]
        pairs = [
            replace(pair, difference=lead, difference_interval=interval)
            for pair, (lead, interval) in zip(pairs, leads, strict=True)
        ]
    return tuple(pairs)


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


def between(pairs: Sequence[Pair], first: Contender, second: Contender) -> Pair:
    """Return the pair of two contenders, the bigger one given first."""
    return next(p for p in pairs if (p.first, p.second) == (first.name, second.name))


def best_and_rival(
    ranked: Sequence[Contender], pairs: Sequence[Pair]
) -> tuple[Contender, Contender | None]:
    """Return the best contender, and the smaller one that it must justify itself against.

    The best has the highest accuracy, or micro-F1 where rows have several labels. The other is the
    smallest one whose difference may be chance, else the best of the smaller ones.
    """
    best = max(ranked, key=lambda each: each.score)
    smaller = ranked[: ranked.index(best)]
    if not smaller:
        return best, None
    alike = [each for each in smaller if between(pairs, best, each).adjusted_p_value >= SIGNIFICANT]
    return best, alike[0] if alike else max(smaller, key=lambda each: each.score)


def labels_of(runs: Sequence[Results]) -> list[str]:
    """Return the labels of runs in order; one may have begun with another and know more."""
    return sorted({label for run in runs for label in run.labels})

"""What to do next: at most three steps after a run or a comparison, ranked by their worth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeAlias

from remora.errors import RemoraError
from remora.evaluation import findings, label_findings, run_commands
from remora.evaluation.compare import Comparison, run_names
from remora.evaluation.contenders import best_and_rival, between
from remora.evaluation.findings import NextStep
from remora.evaluation.results import of_this_version
from remora.evaluation.run_facts import SIGNIFICANT, RunFacts, read_facts
from remora.formatting import one_line

NUM_STEPS = 3
LEAST_WORTH = 0.005
"""Share of the held-out rows below which a finding is not worth a person's time."""

WIDE = 0.1
"""Width of a 95 % interval from which on the held-out rows say little."""

Find: TypeAlias = "Callable[[RunFacts], NextStep | None]"

ALWAYS: tuple[Find, ...] = (
    findings.undertrained,
    findings.better_rival,
    label_findings.suspect_labels,
    label_findings.unexplained_mistakes,
)
ONCE_TRAINED: tuple[Find, ...] = (
    label_findings.overlapping_labels,
    label_findings.too_few_rows,
    findings.larger_model,
    findings.abstaining,
    findings.miscalibrated,
    findings.smaller_model,
)
"""Findings that longer training may change, so that they wait for it."""
OF_SEVERAL_LABELS = (
    findings.undertrained,
    findings.better_rival,
    label_findings.suspect_labels,
    label_findings.unexplained_mistakes,
    findings.larger_model,
    findings.smaller_model,
)
"""Findings that hold where rows have several labels; the others look at rows with one."""


def find_next_steps(directory: Path) -> tuple[NextStep, ...]:
    """Return what to do after a run, the most worthwhile first.

    There is at least one step: if nothing is worth doing, it says so.

    Raises:
        DataError: If the run is not finished, or its files are broken.
    """
    return after_run(read_facts(directory))


def after_run(facts: RunFacts) -> tuple[NextStep, ...]:
    """Return what to do after a run by what it knows, as `find_next_steps` does.

    Raises:
        DataError: If its files are broken.
    """
    with of_this_version(facts.directory):
        return _ranked(facts) or (_all_well(facts),)


def told_next_steps(
    find: Callable[[], tuple[NextStep, ...]], say: Callable[[str], None]
) -> tuple[NextStep, ...]:
    """Return the next steps that `find` finds; say so and return none if files do not allow it."""
    try:
        return find()
    except RemoraError as error:
        say(f"there are no next steps, since {one_line(error)}")
        return ()


def after_comparison(comparison: Comparison, runs: Sequence[Path]) -> tuple[NextStep, ...]:
    """Return what to do after a comparison: which contender to take, then how to improve a run.

    That is the run to take, or the best one if a baseline is the one to take.

    Args:
        comparison: As `compare_runs` returns it.
        runs: Their directories, in the order in which they were compared.

    Raises:
        DataError: If the files of a run are broken.
    """
    directories = dict(zip(run_names(runs), runs, strict=True))
    ranked = comparison.contenders
    best, rival = best_and_rival(ranked, comparison.pairs)
    chosen, why = best, f"{best.name} {best.is_best}, and none is smaller"
    if rival is not None:
        pair = between(comparison.pairs, best, rival)
        low, high = (100 * bound for bound in pair.difference_interval)
        is_chance = pair.adjusted_p_value >= SIGNIFICANT
        chosen = rival if is_chance else best
        lead = "may lead" if is_chance else "leads"
        by_chance = " by chance" if is_chance else ""
        why = (
            f"{best.name} {lead} {rival.name}{by_chance}: {100 * pair.difference:+.1f} "
            f"{best.points} (95% interval {low:+.1f} to {high:+.1f}, p = "
            f"{pair.adjusted_p_value:.2g}, {best.test}, adjusted for all pairs)"
        )
    if chosen.is_baseline:
        improved = max((each for each in ranked if not each.is_baseline), key=lambda c: c.score)
        command = run_commands.command(
            "compare", *runs, "--report", runs[0].parent / "comparison.html"
        )
    else:
        improved = chosen
        command = run_commands.command("predict", directories[chosen.name])
    taken = NextStep(
        kind="take", sentence=f"Take {chosen.name}.", evidence=(why,), command=command, worth=1.0
    )
    others = find_next_steps(directories[improved.name])
    kept = [each for each in others if each.kind not in {"rival", "all_well"}]
    return (taken, *kept[: NUM_STEPS - 1])


def _ranked(facts: RunFacts) -> tuple[NextStep, ...]:
    always, once_trained = ALWAYS, ONCE_TRAINED
    if facts.run.multi_label:
        always, once_trained = (
            tuple(find for find in each if find in OF_SEVERAL_LABELS)
            for each in (always, once_trained)
        )
    found = [step for find in always if (step := find(facts))]
    if not any(step.kind == "train_longer" and step.worth >= LEAST_WORTH for step in found):
        found += [step for find in once_trained if (step := find(facts))]
    worthwhile = [step for step in found if step.worth >= LEAST_WORTH]
    if any(step.kind == "abstain" for step in worthwhile):  # its threshold needs no calibration
        worthwhile = [step for step in worthwhile if step.kind != "calibrate"]
    return tuple(sorted(worthwhile, key=lambda step: -step.worth)[:NUM_STEPS])


def _all_well(facts: RunFacts) -> NextStep:
    low, high = facts.metrics["accuracy_interval"]
    what = "of the rows with all labels right" if facts.run.multi_label else "accuracy"
    measured_on = facts.run.figures["measured_on"]
    rows = f"{facts.num_rows:,} {measured_on} row{'s' * (facts.num_rows != 1)}"
    sentence = "All is well: nothing stands out that would be worth doing. Use it."
    if high - low > WIDE:
        say = "say" if facts.num_rows != 1 else "says"
        sentence = (
            f"Nothing stands out, but {rows} {say} little: check its answers to more messages "
            "before you rely on it."
        )
    evidence = [
        f"{facts.metrics['accuracy']:.1%} {what} (95% interval {low:.1%} to {high:.1%}) on {rows}"
    ]
    if facts.rivals:
        evidence.append(findings.lead(*facts.rivals[0], facts.trained))
    if len(facts.evaluations) > 1 and not findings.rise(facts):
        evidence.append("validation had levelled off at the end of training")
    return NextStep(
        kind="all_well",
        sentence=sentence,
        evidence=tuple(evidence),
        command=run_commands.command("predict", facts.directory),
        worth=0.0,
    )

"""What may be worth doing about training, base model and confidence: one function for each.

Each takes what the run knows and returns a finding, or None where the evidence is not enough. Its
`worth` is a rough share of the held-out rows that it may put right. It ranks findings; it is no
forecast, and nobody is shown it. What is shown is the evidence: figures with their intervals and
exact tests.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from remora.evaluation import calibration, run_commands
from remora.evaluation.rivals import AS_GOOD, Rival, seconds_of
from remora.evaluation.run_facts import RunFacts
from remora.formatting import spoken_time

Kind = Literal[
    "all_well",
    "take",
    "rival",
    "train_longer",
    "diagnose",
    "review",
    "apply",
    "merge_labels",
    "more_rows",
    "larger_model",
    "smaller_model",
    "abstain",
    "calibrate",
]

LEAST_RISE_ROWS = 6
"""With fewer rows more right no exact McNemar test can reach p < 0.05, whatever rows they are."""
LEAST_RISE = 0.01
WORTH_DOUBLING = 0.01
"""Accuracy that doubling the rows must add to be worth the labelling, as in a learning curve."""
GOOD = 0.95
"""From this accuracy on no message needs to be withheld."""
WANTED = (0.99, 0.98, 0.95, 0.9, 0.85, 0.8)


@dataclass(frozen=True, kw_only=True)
class NextStep:
    """Something to do after a run."""

    kind: Kind
    sentence: str
    evidence: tuple[str, ...]  # figures, a clause each
    command: str  # for a shell
    worth: float  # rough share of the held-out rows that it may put right; it ranks

    def to_dict(self) -> dict[str, Any]:
        """Return the step as JSON holds it."""
        return asdict(self) | {"evidence": list(self.evidence)}


def undertrained(facts: RunFacts) -> NextStep | None:
    """Find out whether longer training is likely to help.

    Validation that still rises is evidence; so are fewer epochs than usual, unless validation has
    levelled off. Where the epochs are less than half of the usual number, levelling off is none
    against it: the learning rate decays to zero over few steps too.
    """
    if facts.stopped_early:
        return None
    epochs, usual, rising = facts.epochs, facts.default_epochs, rise(facts)
    share = 1.0 if not epochs or not usual else epochs / usual
    behind = facts.better_rival
    is_short = share < 0.5 or (share < 0.95 and (behind or len(facts.evaluations) < 2))
    if not rising and not is_short:
        return None
    evidence = []
    if epochs and usual and share < 0.95:
        spoken = f"{epochs:.1f} epochs"
        batch_size = int(facts.settings.get("batch_size", 32))
        unseen = 1 - facts.num_steps * batch_size / (facts.num_train_rows or 1)
        if unseen > 0:
            spoken += f", so {unseen:.0%} of the training rows were never seen"
        evidence.append(f"{spoken}; by default {facts.num_train_rows:,} rows get {usual:.1f}")
    if rising:
        evidence.append(rising[1])
    if behind:
        evidence.append(lead(*behind, facts.trained))
    worth = max(
        facts.error * (1 - share) / 2 if is_short else 0.0,
        rising[0] / 2 if rising else 0.0,
        1.01 * behind[0].lead if behind else 0.0,  # just before the rival itself
    )
    why = "it has had few epochs" if is_short else "validation still rose at the end"
    return NextStep(
        kind="train_longer",
        sentence=f"Train longer: {why}.",
        evidence=tuple(evidence),
        command=run_commands.train_longer(facts),
        worth=worth,
    )


def rise(facts: RunFacts) -> tuple[float, str] | None:
    """Return by how much validation accuracy rose in the last quarter, if it still did."""
    found = facts.evaluations
    if not found or found[-1]["step"] < facts.num_steps or not found[-1]["validation_best"]:
        return None
    last, num_rows = found[-1], found[-1].get("validation_rows", 0)
    earlier = [each for each in found if each["step"] <= 0.75 * last["step"]]
    if not earlier:
        return None
    before = max(earlier, key=lambda each: each["validation_accuracy"])
    gain = last["validation_accuracy"] - before["validation_accuracy"]
    if gain < LEAST_RISE or round(gain * num_rows) < LEAST_RISE_ROWS:
        return None
    if last.get("validation_loss", 0.0) > before.get("validation_loss", math.inf):
        return None
    what = "exact matches in validation" if facts.run.multi_label else "validation accuracy"
    return gain, (
        f"{what} rose from {before['validation_accuracy']:.1%} at step "
        f"{before['step']:,} to {last['validation_accuracy']:.1%} at step {last['step']:,}, the "
        f"last ({num_rows:,} rows)"
    )


def better_rival(facts: RunFacts) -> NextStep | None:
    """Find a baseline that is the better choice: better, or as good and far cheaper."""
    found = facts.better_rival
    if not found:
        return _as_good_rival(facts)
    rival, p_value = found
    larger = run_commands.larger_model(facts)
    peak_rate = max((each.get("learning_rate", 0.0) for each in facts.records), default=0.0)
    if rival.name == "zero-shot" and peak_rate:
        sentence = (
            "Lower the learning rate: training made the base model worse than it was. Until then "
            "use it as it is."
        )
        command = run_commands.train_again(facts, "--learning-rate", f"{peak_rate / 3:.1g}")
    elif larger and not undertrained(facts):
        sentence = (
            f"Use {rival.description} instead of this {facts.trained}. A larger base model may "
            "overtake it."
        )
        command = run_commands.train_again(facts, "--model", larger)
    else:
        sentence = f"Use {rival.description} until the {facts.trained} is better than it."
        command = _comparison(facts)
    return NextStep(
        kind="rival",
        sentence=sentence,
        evidence=(lead(rival, p_value, facts.trained), *_price(rival, facts)),
        command=command,
        worth=rival.lead,
    )


def _as_good_rival(facts: RunFacts) -> NextStep | None:
    """Find a baseline that loses at most a point, by its 95 % interval, and is far cheaper."""
    for rival, p_value in facts.rivals:
        interval = rival.lead_interval
        if interval is None or interval[0] < -AS_GOOD or not _price(rival, facts):
            continue
        return NextStep(
            kind="rival",
            sentence=f"Use {rival.description} instead: it is as good, and far cheaper.",
            evidence=(lead(rival, p_value, facts.trained), *_price(rival, facts)),
            command=_comparison(facts),
            worth=0.01 + facts.error / 10,  # just before a larger model
        )
    return None


def _comparison(facts: RunFacts) -> str:
    page = facts.directory / "comparison.html"
    return run_commands.command("compare", facts.directory, "--report", page)


def lead(rival: Rival, p_value: float, trained: str) -> str:
    """Return a clause on a baseline beside the model: points, interval and test."""
    where = f" on {rival.num_rows:,} rows" if rival.num_rows < rival.num_all_rows else ""
    evidence = rival.spoken_lead(f"p = {p_value:.2g}, exact McNemar test")
    return f"{rival.description} is {rival.side} the {trained}{where} ({evidence})"


def _price(rival: Rival, facts: RunFacts) -> tuple[str, ...]:
    """Return a clause on the time that a baseline takes, if it is far cheaper."""
    times = seconds_of(facts.run.figures) / max(rival.seconds, 1e-3)
    if times < 10:
        return ()
    return (f"it takes {spoken_time(rival.seconds)}, {times:,.0f} times less",)


def per_doubling(facts: RunFacts) -> tuple[float, float, float] | None:
    """Return what doubling the rows changes by a learning curve, with its 95 % interval."""
    if not facts.curve:
        return None
    before, last = facts.curve["sizes"][-2:]
    doublings = math.log2(last["num_rows"] / before["num_rows"])
    gain, (low, high) = facts.curve["gain"], facts.curve["gain_interval"]
    return gain / doublings, low / doublings, high / doublings


def larger_model(facts: RunFacts) -> NextStep | None:
    """Find out whether the base model is what limits accuracy."""
    model = run_commands.larger_model(facts)
    if not model or facts.better_rival or facts.error < 0.02:
        return None
    found: list[tuple[float, str]] = []
    ceiling, (_, high) = (facts.diagnosis or {}).get("ceiling"), facts.metrics["accuracy_interval"]
    wrong = (facts.diagnosis or {}).get("wrong", 0.0)  # of training labels, which cost as much
    if ceiling and ceiling["interval"][0] - high - wrong >= 0.02:
        accuracy = facts.metrics["accuracy"]
        found.append(
            (
                0.1 * (ceiling["accuracy"] - accuracy - wrong),
                f"labels that are wrong or overlap would allow {ceiling['accuracy']:.1%} accuracy "
                f"(95% interval {ceiling['interval'][0]:.1%} to {ceiling['interval'][1]:.1%}), "
                f"and {accuracy:.1%} is reached",
            )
        )
    doubling = per_doubling(facts)
    if doubling and doubling[2] < WORTH_DOUBLING:
        found.append(
            (
                0.1 * facts.error,
                f"doubling the rows adds at most {100 * doubling[2]:.1f} points, by the 95% "
                "interval of the learning curve",
            )
        )
    best = facts.rivals[0] if facts.rivals else None
    if best and facts.error >= 0.05 and not best[0].is_apart(best[1]):
        found.append((0.1 * facts.error, lead(*best, facts.trained)))
    if not found:
        return None
    return NextStep(
        kind="larger_model",
        sentence=f"Try a larger base model, such as {model}.",
        evidence=tuple(clause for _, clause in found),
        command=run_commands.train_again(facts, "--model", model),
        worth=max(worth for worth, _ in found),
    )


def smaller_model(facts: RunFacts) -> NextStep | None:
    """Find out whether a smaller base model may do: the task is easy, as a baseline shows."""
    low, _ = facts.metrics["accuracy_interval"]
    model = run_commands.smaller_model(facts)
    if not model or low < GOOD or not facts.rivals or facts.rivals[0][0].lead < -0.03:
        return None
    return NextStep(
        kind="smaller_model",
        sentence=f"Try a smaller base model, such as {model}: the task is easy.",
        evidence=(
            f"{facts.metrics['accuracy']:.1%} accuracy (95% interval from {low:.1%})",
            lead(*facts.rivals[0], facts.trained),
        ),
        command=run_commands.train_again(facts, "--model", model),
        worth=0.005,
    )


def abstaining(facts: RunFacts) -> NextStep | None:
    """Find a confidence threshold that separates most messages from most mistakes.

    It is chosen on the validation rows; what it brings is measured on the others.
    """
    accuracy, validation, measured = facts.metrics["accuracy"], facts.validation, facts.measured
    if accuracy >= GOOD or validation is None or measured is None or len(validation.true) < 50:
        return None
    for wanted in WANTED:
        if wanted < accuracy + 0.02:
            return None
        found = calibration.abstain(measured, validation, wanted)
        if found.threshold is None or found.coverage < 0.5 or not found.accuracy_interval:
            continue
        low, high = found.accuracy_interval
        if low <= accuracy or found.accuracy is None:
            continue
        threshold = math.floor(10_000 * found.threshold) / 10_000  # no row is lost by rounding
        answered_wrong = found.coverage * (1 - found.accuracy)
        return NextStep(
            kind="abstain",
            sentence=(
                f"Answer only where the confidence is at least {threshold}; send the rest to a "
                "person."
            ),
            evidence=(
                f"that answers {found.coverage:.0%} of the {facts.num_rows:,} held-out rows, "
                f"{found.accuracy:.1%} of them correctly (95% interval {low:.1%} to {high:.1%}) "
                f"instead of {accuracy:.1%}",
                f"chosen for {wanted:.0%} on {found.num_chosen_on:,} validation rows",
            ),
            command=run_commands.command("predict", facts.directory, "--threshold", threshold),
            worth=(facts.error - answered_wrong) / 10,  # it makes no answer better
        )
    return None


def miscalibrated(facts: RunFacts) -> NextStep | None:
    """Find a mean confidence outside of the accuracy's interval, and at least 5 points off."""
    reliability, validation = facts.run.figures.get("reliability"), facts.validation
    if not reliability or not reliability["bins"] or validation is None:
        return None
    total = sum(each["num_rows"] for each in reliability["bins"])
    mean = sum(each["confidence"] * each["num_rows"] for each in reliability["bins"]) / total
    gap, (low, high) = mean - facts.metrics["accuracy"], facts.metrics["accuracy_interval"]
    wanted = next((w for w in WANTED if calibration.choose_threshold(validation, w)), None)
    if low <= mean <= high or abs(gap) < 0.05 or wanted is None:
        return None
    evidence = [
        f"mean confidence {mean:.1%}, accuracy {facts.metrics['accuracy']:.1%} (95% interval "
        f"{low:.1%} to {high:.1%})"
    ]
    error, scaled = reliability["calibration_error"], reliability["scaled_calibration_error"]
    if scaled is not None and scaled < error:
        evidence.append(
            f"the calibration error of {error:.3f} would be {scaled:.3f} at temperature "
            f"{reliability['temperature']:.2f}"
        )
    return NextStep(
        kind="calibrate",
        sentence=(
            f"Do not read its confidence as a probability: it is {100 * abs(gap):.0f} points too "
            f"{'high' if gap > 0 else 'low'}. Choose thresholds by accuracy instead."
        ),
        evidence=tuple(evidence),
        command=run_commands.command("predict", facts.directory, "--abstain-at-accuracy", wanted),
        worth=abs(gap) / 10,
    )

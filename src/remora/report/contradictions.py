"""Figures of a run that seem to contradict each other, explained where they stand in a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

SIGNIFICANT = 0.01
"""Stricter than elsewhere, since every report makes these comparisons."""


def of_validation(records: Sequence[Mapping[str, Any]], figures: Mapping[str, Any]) -> str | None:
    """Return a sentence on validation and test accuracy, None if there is only one of them."""
    found = [each for each in records if each.get("validation_best") and "validation_rows" in each]
    if not found or figures["measured_on"] != "test":
        return None
    best, metrics = found[-1], figures["metrics"]
    rate, num_rows = best["validation_accuracy"], best["validation_rows"]
    p_value = _fisher(round(rate * num_rows), num_rows, metrics["num_correct"], metrics["num_rows"])
    text = (
        f"The weights that were kept had {rate:.1%} accuracy on {num_rows:,} validation rows and "
        f"have {metrics['accuracy']:.1%} on {metrics['num_rows']:,} test rows"
    )
    if p_value >= SIGNIFICANT:
        return f"{text}; the difference may be chance (p = {p_value:.3g}, Fisher's exact test)."
    if rate > metrics["accuracy"]:
        why = (
            "validation chose the weights, and so is optimistic, or the test rows are of another "
            "kind"
        )
    else:
        why = "the test rows are easier, or labelled with more care"
    return (
        f"{text}, which is more than chance (p = {p_value:.3g}, Fisher's exact test): {why}. Trust "
        "the test rows."
    )


def of_confidence(figures: Mapping[str, Any]) -> tuple[str, list[str]]:
    """Return a sentence on confidence beside accuracy, and notes on the temperature."""
    reliability, metrics = figures["reliability"], figures["metrics"]
    total = sum(each["num_rows"] for each in reliability["bins"])
    mean = sum(each["confidence"] * each["num_rows"] for each in reliability["bins"]) / total
    low, high = metrics["accuracy_interval"]
    text = f"Mean confidence is {mean:.1%}, accuracy {metrics['accuracy']:.1%} (95% interval "
    text += f"{low:.1%} to {high:.1%}): "
    if low <= mean <= high:
        text += "on average it is as right as it is confident."
    else:
        too = "too confident" if mean > high else "not confident enough"
        text += f"it is {too}, so read its confidence as an order, not as a probability."
    error, scaled = reliability["calibration_error"], reliability["scaled_calibration_error"]
    notes = []
    if scaled is not None and scaled > error:
        notes.append(
            f"The temperature makes it worse on these rows: it was fitted on "
            f"{reliability['num_validation']:,} others, to the log-loss rather than to this error. "
            "Leave it out."
        )
    return text, notes


def diagnosis_summary(diagnosis: Mapping[str, Any]) -> str:
    """Return a sentence on what a diagnosis has found: suspects, and verdicts on pairs."""
    verdicts = [each["verdict"] for each in diagnosis["pairs"]]
    counts = [
        (verdicts.count("labels overlap"), "overlapping"),
        (verdicts.count("rows mislabelled"), "with mislabelled rows"),
        (verdicts.count("too few examples"), "with too few rows"),
        (verdicts.count("undertrained"), "undertrained"),
        (verdicts.count("undecided"), "undecided"),
    ]
    told = ", ".join(f"{count} {what}" for count, what in counts if count)
    text = f"{diagnosis['suspects']:,} of {diagnosis['num_rows']:,} rows may be mislabelled"
    if told:
        text += f"; of the {len(verdicts)} most confused pairs of labels: {told}"
    return f"{text}."


def of_diagnosis(diagnosis: Mapping[str, Any], figures: Mapping[str, Any]) -> list[str]:
    """Return notes on judges that beat the run, and on a run above its ceiling."""
    notes, metrics = [], figures["metrics"]
    rate, num_rows = diagnosis["out_of_sample_accuracy"], diagnosis["num_rows"]
    p_value = _fisher(round(rate * num_rows), num_rows, metrics["num_correct"], metrics["num_rows"])
    if rate > metrics["accuracy"] and p_value < SIGNIFICANT:
        notes.append(
            f"The judges have {rate:.1%} accuracy and this run {metrics['accuracy']:.1%}, on other "
            f"rows; that is more than chance (p = {p_value:.3g}, Fisher's exact test). They are "
            "regressions on the base model's features and on words: a run that has trained for "
            "long enough should not be worse."
        )
    ceiling = diagnosis.get("ceiling")
    if ceiling and metrics["accuracy"] > ceiling["accuracy"]:
        notes.append(
            "The run is above the ceiling, which is an estimate: it may have learned the habits of "
            "the annotators, or fewer labels are wrong than estimated."
        )
    return notes


def _fisher(first_right: int, first_rows: int, second_right: int, second_rows: int) -> float:
    """Return the p-value of Fisher's exact test for two shares of different rows."""
    from scipy.stats import fisher_exact

    table = [
        [first_right, first_rows - first_right],
        [second_right, second_rows - second_right],
    ]
    return float(fisher_exact(table).pvalue)

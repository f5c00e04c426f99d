"""What may be worth doing about labels and rows: one function for each kind of finding."""

from __future__ import annotations

import json
import math
from typing import Any

from remora.evaluation import run_commands
from remora.evaluation.findings import WORTH_DOUBLING, NextStep, per_doubling
from remora.evaluation.run_facts import SIGNIFICANT, RunFacts
from remora.formatting import quote

FEW_ROWS = 15
"""Training rows of a label that are few, as in the verdicts of a diagnosis."""
SMALL_TABLE = 30
"""Training rows per label on average below which the table is small."""
NUM_NAMED = 5  # labels


def unexplained_mistakes(facts: RunFacts) -> NextStep | None:
    """Find mistakes that a diagnosis may explain, if there is none yet.

    Rows to which trained baselines give the same wrong label, too, are mislabelled, of overlapping
    classes, or hard; a diagnosis tells them apart.
    """
    if facts.diagnosis or not facts.can_read_again or facts.num_wrong < 10:
        return None
    alike = facts.num_alike or 0
    if alike >= 5 and alike >= 0.01 * facts.num_rows:
        evidence = (
            f"{alike:,} of the {facts.num_wrong:,} mistakes get the same wrong label from every "
            "trained baseline, so the rows may be mislabelled, or their labels overlap"
        )
    elif facts.num_wrong >= 20 and facts.error >= 0.1:
        evidence = f"{facts.num_wrong:,} of {facts.num_rows:,} held-out rows are wrong"
        alike = 0
    else:
        return None
    return NextStep(
        kind="diagnose",
        sentence="Find out why it errs, and which rows may carry a wrong label.",
        evidence=(evidence,),
        command=run_commands.command("diagnose", facts.directory),
        worth=alike / facts.num_rows / 2 + facts.error / 20,
    )


def suspect_labels(facts: RunFacts) -> NextStep | None:
    """Find rows that are probably mislabelled and wait for a person, or decisions to apply."""
    if not facts.diagnosis or not facts.suspects:
        return None
    suspects, num_rows = facts.suspects, facts.diagnosis["num_rows"]
    wrong = facts.diagnosis.get("wrong")
    evidence = []
    if wrong is not None:
        low, high = facts.diagnosis["wrong_interval"]
        evidence.append(
            f"an estimated {wrong:.1%} of the training labels are wrong (95% interval {low:.1%} "
            f"to {high:.1%})"
        )
    missing = facts.diagnosis.get("missing", 0.0)  # where rows have several labels
    if missing >= 0.005:
        evidence.append(
            f"rows lack labels that belong to them, {missing:.1%} of the number that is given"
        )
    held_out = 0.0
    if ceiling := facts.diagnosis.get("ceiling"):
        held_out = ceiling["wrong"]
        if held_out >= 0.005:
            evidence.append(
                f"so are {held_out:.1%} of the held-out ones, which no model gets right"
            )
    share = suspects.num_likely / num_rows if wrong is None else wrong + missing
    worth = (min(facts.error, share) + min(facts.error, held_out)) / 2
    if suspects.num_likely < max(5, 0.005 * num_rows):
        if not suspects.num_changed:
            return None
        return NextStep(
            kind="apply",
            sentence=f"Train again on the corrected rows: {suspects.num_changed:,} are decided.",
            evidence=tuple(evidence),
            command=run_commands.command("retrain", facts.directory),
            worth=worth,
        )
    others = suspects.num_undecided - suspects.num_likely
    more = f"; {others:,} more are listed, probably right" if others else ""
    return NextStep(
        kind="review",
        sentence=f"Review {suspects.num_likely:,} rows that are probably mislabelled{more}.",
        evidence=tuple(evidence),
        command=run_commands.command("review", facts.directory),
        worth=worth,
    )


def overlapping_labels(facts: RunFacts) -> NextStep | None:
    """Find pairs of labels that a diagnosis says overlap, and what merging them would do."""
    pairs: list[dict[str, Any]] = []
    for each in (facts.diagnosis or {}).get("pairs", ()):
        named = {each["first"], each["second"]}
        taken = {label for pair in pairs for label in (pair["first"], pair["second"])}
        if each["verdict"] == "labels overlap" and not named & taken:
            pairs.append(each)
    accuracy = facts.metrics["accuracy"]
    gains = [each["accuracy_if_merged"] - accuracy for each in pairs]
    if not pairs or not facts.can_read_again:
        return None
    if str(facts.settings.get("class_weights") or "balanced") != "balanced":
        return None  # a table that names labels as they are
    into: dict[str, str] = {}
    for each in pairs:
        both = _merged_name(each["first"], each["second"], facts.settings.get("label_separator"))
        into |= {each["first"]: both, each["second"]: both}
    before = facts.settings.get("rename_labels", {})
    into |= {label: into.get(name, name) for label, name in before.items()}
    spoken = "; ".join(f"{quote(p['first'])} and {quote(p['second'])}" for p in pairs)
    return NextStep(
        kind="merge_labels",
        sentence=f"Merge labels that overlap, or define them more sharply: {spoken}.",
        evidence=tuple(
            f"merged into one label, accuracy would be {pair['accuracy_if_merged']:.1%} instead of "
            f"{accuracy:.1%}; {pair['reason']}"
            for pair in pairs[:1]
        ),
        command=run_commands.train_again(facts, *_renaming(facts, into)),
        worth=sum(gains),
    )


def _merged_name(first: str, second: str, separator: str | None) -> str:
    """Return a name for two labels together; in a hierarchy below the parent that both have."""
    if not separator:
        return f"{first} or {second}"
    one, other = ([part.strip() for part in each.split(separator)] for each in (first, second))
    shared = 0
    while shared < min(len(one), len(other)) and one[shared] == other[shared]:
        shared += 1
    rests = [" ".join(rest) for rest in (one[shared:], other[shared:]) if rest]
    below = [" or ".join(rests)] if len(rests) == 2 else []  # one of them is the parent
    return separator.join([*one[:shared], *below])


def _renaming(facts: RunFacts, into: dict[str, str]) -> list[str]:
    """Return the flags that rename labels, and leave out the texts of those that are gone."""
    flags = ["--rename-labels", json.dumps(into, ensure_ascii=False)]
    texts = facts.settings.get("label_texts") or {}
    if texts.keys() & into.keys():
        kept = {label: text for label, text in texts.items() if label not in into}
        flags += ["--label-texts", json.dumps(kept, ensure_ascii=False)]
    return flags


def too_few_rows(facts: RunFacts) -> NextStep | None:
    """Find out whether more training rows are likely to help, and of which labels."""
    found = [each for each in (_by_curve(facts), _by_label(facts), _by_pairs(facts)) if each]
    labels = list(dict.fromkeys(label for _, _, names in found for label in names))[:NUM_NAMED]
    if found:
        named = f" of {', '.join(map(quote, labels))}" if labels else ""
        return NextStep(
            kind="more_rows",
            sentence=f"Label more rows{named}, add them to the table, and train again.",
            evidence=tuple(clause for _, clause, _ in found),
            command=run_commands.train_again(facts),
            worth=max(worth for worth, _, _ in found),
        )
    return _small_table(facts)


def _by_curve(facts: RunFacts) -> tuple[float, str, list[str]] | None:
    gain = per_doubling(facts)
    if not gain or not facts.curve or gain[0] < WORTH_DOUBLING or gain[1] <= 0:
        return None
    each, low, high = (100 * x for x in gain)
    before, last = facts.curve["sizes"][-2:]
    clause = (
        f"from {before['num_rows']:,} to {last['num_rows']:,} rows, accuracy changed by "
        f"{each:+.1f} points per doubling (95% interval {low:+.1f} to {high:+.1f})"
    )
    worst = sorted(facts.metrics["per_class"], key=lambda row: (row["recall"], row["label"]))
    return gain[0], clause, [row["label"] for row in worst[:NUM_NAMED] if row["recall"] < 1]


def _by_label(facts: RunFacts) -> tuple[float, str, list[str]] | None:
    """Compare labels of few training rows with the others: Fisher's exact test on their recall."""
    from scipy.stats import fisher_exact

    counts = facts.rows_per_label
    if not counts:
        return None
    usual = sum(counts.values()) / len(counts)
    few = {label for label, count in counts.items() if count < max(FEW_ROWS, usual / 4)}
    sides = [[0, 0], [0, 0]]  # few, others: wrong, right
    wrong: dict[str, int] = {}
    for row in facts.metrics["per_class"]:
        right = round(row["recall"] * row["support"])
        side = sides[row["label"] not in few]
        side[0] += row["support"] - right
        side[1] += right
        if row["label"] in few and row["support"] > right:
            wrong[row["label"]] = row["support"] - right
    (few_wrong, few_right), (other_wrong, other_right) = sides
    if not few_wrong or not other_right:
        return None
    p_value = float(fisher_exact(sides, alternative="greater").pvalue)
    if p_value >= SIGNIFICANT:
        return None
    num_few, num_others = few_wrong + few_right, other_wrong + other_right
    most = max(counts.get(label, 0) for label in few)
    clause = (
        f"{few_wrong:,} of {num_few:,} rows of labels with at most {most:,} training rows are "
        f"wrong, {other_wrong:,} of {num_others:,} others (p = {p_value:.2g}, Fisher's exact test)"
    )
    excess = few_wrong - num_few * other_wrong / num_others
    return excess / facts.num_rows, clause, sorted(wrong, key=lambda label: -wrong[label])


def _by_pairs(facts: RunFacts) -> tuple[float, str, list[str]] | None:
    pairs = [
        each
        for each in (facts.diagnosis or {}).get("pairs", ())
        if each["verdict"] == "too few examples"
    ]
    if not pairs:
        return None
    accuracy = facts.metrics["accuracy"]
    worth = sum(each["accuracy_if_merged"] - accuracy for each in pairs) / 2
    first = pairs[0]
    clause = f"{quote(first['first'])} / {quote(first['second'])}: {first['reason']}"
    return worth, clause, [label for each in pairs for label in (each["first"], each["second"])]


def _small_table(facts: RunFacts) -> NextStep | None:
    """Find a table that is small for its labels, whose rows are learned by heart."""
    num_labels, num_rows = len(facts.run.labels), facts.num_train_rows
    more = _more_rows(facts)
    if facts.curve or not num_rows or not more or not facts.can_read_again or facts.error < 0.05:
        return None
    sentence, flags = more
    per_label = num_rows / num_labels
    losses = [each["loss"] for each in facts.records if math.isfinite(each.get("loss", math.nan))]
    held_out = [each["validation_loss"] for each in facts.evaluations if "validation_loss" in each]
    evidence = [f"{per_label:.0f} training rows for each of {num_labels:,} labels on average"]
    by_heart = False
    if losses and held_out:
        recent = losses[-10:]
        loss = sum(recent) / len(recent)
        by_heart = loss <= held_out[-1] / 4
        if by_heart:
            evidence.append(
                f"the loss is {loss:.3f} on training rows and {held_out[-1]:.3f} on validation "
                "rows, so it knows its rows by heart"
            )
    if per_label >= FEW_ROWS and not (by_heart and per_label < SMALL_TABLE):
        return None
    return NextStep(
        kind="more_rows",
        sentence=sentence,
        evidence=tuple(evidence),
        command=run_commands.train_again(facts, *flags),
        worth=facts.error * 0.3,
    )


def _more_rows(facts: RunFacts) -> tuple[str, tuple[object, ...]] | None:
    """Return how to get more rows, and flags that go with the run's settings.

    None if a learning curve does not go with them, or no label has rows for two sizes.
    """
    settings, most = facts.settings, max(facts.rows_per_label.values(), default=0)
    if per_class := settings.get("rows_per_class"):
        if most < per_class:  # all rows are used
            return None
        sentence = f"Use more rows: it got {per_class:,} of each label."
        return sentence, ("--rows-per-class", 4 * per_class)
    sizes = run_commands.curve_sizes(facts)
    if not sizes or settings.get("start_from") or settings.get("devices", 1) != 1:
        return None
    svm = () if {"svm", "auto"} & {*settings.get("baselines", ["auto"])} else ("--baselines", "svm")
    sentence = "Label more rows; a learning curve measures first what they would bring."
    return sentence, ("--learning-curve", sizes, *svm)

"""Bad runs, reviews and corrections."""

from __future__ import annotations

import finished
from bad_input.workshop import (
    GOOD_ROWS,
    Case,
    Workshop,
    broken_run,
    listed,
    of_unfinished,
    of_validated,
    several,
    table,
    train,
)
from conftest import WORDS


def measured(shop: Workshop, texts: list[str]) -> str:
    """Write a finished run of other test rows than those of runs/good."""
    labels, true = list(WORDS), [0] * len(texts)
    finished.write(shop.folder / "copy", labels=labels, texts=texts, true=true, predicted=true)
    return "copy"


def other_rows(shop: Workshop) -> str:
    lines = (shop.run / "predictions.csv").read_text().splitlines()
    return measured(shop, ["another text"] * len(lines[1:]))


def changed_table(shop: Workshop, *command: str) -> list[str]:
    shop.write("changed.csv", table(GOOD_ROWS[1:]))
    settings = (shop.run / "config.toml").read_text()
    assert '"good.csv"' in settings
    return broken_run(shop, "config.toml", settings.replace("good.csv", "changed.csv"), *command)


def relabelled(shop: Workshop, *row: str) -> list[str]:
    shop.write("relabel.csv", "row,text,label,decision\n" + ",".join(row) + "\n")
    return ["diagnose", "runs/good", "--apply", "relabel.csv"]


def review_of_changed_table(shop: Workshop) -> list[str]:
    command = changed_table(shop, "review", "copy")
    settings = (shop.folder / "copy" / "config.toml").read_text()
    listed(shop)  # copies the run again
    (shop.folder / "copy" / "config.toml").write_text(settings)
    return command


def several_relabelled(shop: Workshop, decision: str) -> list[str]:
    """Train on rows with several labels, with a decision on one of them."""
    row = f'2,a 1,"[""x""]","{decision}"'
    shop.write("sets.csv", f"row,text,label,decision\n{row}\n")
    return train(several(shop), "--corrections", "sets.csv")


CASES: list[Case] = [
    (
        "corrections written over the table",
        2,
        lambda s: [*relabelled(s, "1", "x", "y", ""), "--output", "good.csv"],
    ),
    (
        "corrections to a file that is no CSV",
        2,
        lambda s: [*relabelled(s, "1", "x", "y", ""), "--output", "x.parquet"],
    ),
    ("a retraining of nothing", 3, lambda s: ["retrain", "runs/none"]),
    ("an export of no run", 3, lambda s: ["export", "runs/none", "--merge"]),
    (
        "a prediction of a validated run",
        4,
        lambda s: of_validated(s, "predict", "good.csv"),
    ),
    ("an evaluation of a validated run", 4, lambda s: of_validated(s, "eval", "good.csv")),
    ("an export of an unfinished run", 3, lambda s: of_unfinished(s, "export", "--merge")),
    ("a comparison with no run", 3, lambda s: ["compare", "runs/good", "runs/none"]),
    (
        "a comparison with an unfinished run",
        3,
        lambda s: ["compare", "runs/good", *of_unfinished(s)],
    ),
    (
        "a comparison over different numbers of rows",
        3,
        lambda s: ["compare", "runs/good", measured(s, ["one text"])],
    ),
    ("a comparison over different rows", 3, lambda s: ["compare", "runs/good", other_rows(s)]),
    (
        "an evaluation.json that is not JSON",
        3,
        lambda s: broken_run(s, "evaluation.json", "{", "compare", "runs/good", "copy"),
    ),
    (
        "an evaluation.json without figures",
        3,
        lambda s: broken_run(s, "evaluation.json", "{}", "compare", "runs/good", "copy"),
    ),
    ("a diagnosis of no run", 3, lambda s: ["diagnose", "runs/none"]),
    ("a diagnosis of an unfinished run", 3, lambda s: of_unfinished(s, "diagnose")),
    ("a diagnosis whose table has changed", 3, lambda s: changed_table(s, "diagnose", "copy")),
    (
        "an export whose table has changed",
        3,
        lambda s: changed_table(s, "export", "copy", "--compress"),
    ),
    (
        "decisions for no run",
        3,
        lambda s: ["diagnose", "runs/none", "--apply", "relabel.csv"],
    ),
    (
        "missing decisions",
        3,
        lambda s: ["diagnose", "runs/good", "--apply", "none.csv"],
    ),
    (
        "a decision for an unknown label",
        3,
        lambda s: relabelled(s, "1", *GOOD_ROWS[0], "refunds"),
    ),
    (
        "decisions whose rows have moved",
        3,
        lambda s: relabelled(s, "2", *GOOD_ROWS[0], "refund"),
    ),
    (
        "a decision for a missing row",
        3,
        lambda s: relabelled(s, "99", *GOOD_ROWS[0], "refund"),
    ),
    ("a review of no run", 3, lambda s: ["review", "runs/none"]),
    ("a review of a run without a diagnosis", 3, lambda s: ["review", "runs/good"]),
    ("a review whose table has changed", 3, review_of_changed_table),
    ("a review whose rows have moved", 3, lambda s: ["review", listed(s, "2")]),
    (
        "a review of a list that a spreadsheet has broken",
        3,
        lambda s: ["review", listed(s, "1", "too", "many")],
    ),
    ("a new run of a run without a diagnosis", 3, lambda s: ["retrain", "runs/good"]),
    ("a new run of a run that nothing was decided on", 3, lambda s: ["retrain", listed(s)]),
    (
        "corrections that are not there",
        3,
        lambda s: train("good.csv", "--corrections", "none.csv"),
    ),
    (
        "corrections of other rows",
        3,
        lambda s: train("good.csv", "--corrections", f"{listed(s, text='other')}/relabel.csv"),
    ),
    ("a report of no run", 3, lambda s: ["report", "runs/none"]),
    ("a report of an unfinished run", 3, lambda s: of_unfinished(s, "report")),
    (
        "a report of a broken run",
        3,
        lambda s: broken_run(s, "data.json", "{", "report", "copy"),
    ),
    (
        "a decision with a label that is none, of several labels a row",
        3,
        lambda s: several_relabelled(s, "['x', 'other']"),
    ),
    (
        "a decision without commas, of several labels a row",
        3,
        lambda s: several_relabelled(s, "['x' 'y']"),
    ),
]

"""The report of a run: its figures, its safety, and what happens where it cannot be made.

Also covers remora.report.sections, run_tables, rendering and confusion_matrix.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import sklearn.metrics

import finished
import hostile
from remora import formatting
from remora.cli import main
from remora.config import DiagnoseConfig, ReportConfig
from remora.errors import ResourceError
from remora.evaluation import next_steps
from remora.evaluation.predictions import PROBABILITIES
from remora.models import model_card
from remora.report import confusion_matrix, pages, run_tables
from remora.training import finish
from reporting import LABELS, PREDICTED, TRUE, Read, table, write, write_hostile


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("report") / "run")


@pytest.fixture(scope="module")
def read(run: Path) -> Read:
    return Read(pages.page(run))


def test_the_figures_are_those_of_evaluation_json(run: Path, read: Read) -> None:
    figures = json.loads((run / "evaluation.json").read_text())
    ours, theirs = figures["metrics"], figures["baseline"]["metrics"]
    text = " ".join(read.text.split())
    low, high = ours["accuracy_interval"]
    assert f"Accuracy {ours['accuracy']:.2%} (95% interval {low:.1%} to {high:.1%})" in text
    assert "on 100 test rows" in text
    difference = 100 * (ours["accuracy"] - theirs["accuracy"])
    low, high = theirs["accuracy_interval"]
    assert table(read, "Baselines: what could be used instead, on the same rows")[1:] == [
        [
            "TF-IDF + linear SVM",
            f"{theirs['accuracy']:.2%}",
            f"{low:.1%} to {high:.1%}",
            f"{theirs['macro_f1']:.2%}",
            "0.5 s",
            f"{-difference:+.1f}",
            f"{figures['p_value']:.2g}",
        ]
    ]
    assert f"The adapter is {difference:.1f} points better than TF-IDF + linear SVM (p = " in text
    assert f"(p = {figures['p_value']:.2g}, exact McNemar test)" in text
    assert f"macro-F1{ours['macro_f1']:.2%}" in text
    assert f"log-loss{ours['log_loss']:.3f}" in text
    assert f"calibration error{figures['reliability']['calibration_error']:.3f}" in text
    worst_first = sorted(ours["per_class"], key=lambda each: each["f1"])
    for row, each in zip(table(read, "Figures by label")[1:], worst_first, strict=True):
        place = LABELS.index(each["label"])
        missed = sum(t == place != p for t, p in zip(TRUE, PREDICTED, strict=True))
        wrongly = sum(p == place != t for t, p in zip(TRUE, PREDICTED, strict=True))
        assert row[5:7] == [str(missed), str(wrongly)]
        shares = [f"{100 * each[name]:.1f}%" for name in ("precision", "recall", "f1")]
        assert row[:5] == [each["label"], *shares, str(each["support"])]
    for row, each in zip(table(read, "Largest confusions")[1:], ours["confusions"], strict=True):
        share = f"{100 * each['share']:.0f}%"
        assert row == [str(each["count"]), each["true"], each["predicted"], share]
    bins = table(read, "Bins of rows by confidence")[1:]
    assert len(bins) == len(figures["reliability"]["bins"])


def test_the_matrix_is_scikit_learns(run: Path, read: Read) -> None:
    *rows, totals = table(read, "Confusion matrix")
    order = rows[0][1:-1]
    assert sorted(order) == sorted(LABELS)
    true, predicted = ([LABELS[i] for i in places] for places in (TRUE, PREDICTED))
    expected = sklearn.metrics.confusion_matrix(true, predicted, labels=order).tolist()
    assert [[int(cell or 0) for cell in row[1:-1]] for row in rows[1:]] == expected
    assert [int(row[-1]) for row in rows[1:]] == [true.count(label) for label in order]
    assert [int(cell) for cell in totals[1:]] == [*map(predicted.count, order), 100]
    assert [row[0] for row in rows[1:]] == order


def test_labels_that_are_confused_are_neighbours(read: Read) -> None:
    order = table(read, "Confusion matrix")[0][1:-1]
    for first, second in (("pin", "refund"), ("card arrival", "limit")):
        assert abs(order.index(first) - order.index(second)) == 1
    assert order[-1] == "top up"  # it has no mistakes


def test_only_code_of_the_package_may_run_and_nothing_be_fetched(read: Read) -> None:
    (policy,) = (v for k, v in read.attributes if k == "content" and "default-src" in (v or ""))
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    allowed = re.findall(r"'sha256-([^']+)'", policy)
    style, _, script = read.code
    hashes = [
        base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
        for code in (style, script)
    ]
    assert allowed == hashes
    assert "unsafe" not in policy
    names = {name for name, _ in read.attributes}
    assert not names & {"src", "srcset", "action", "style", "data", "poster", "background"}
    assert not [name for name in names if name.startswith("on")]
    links = [value for name, value in read.attributes if name == "href"]
    assert all(link.startswith("#") for link in links)
    assert "http" not in "".join(read.code)


def test_hostile_words_stay_words(tmp_path: Path) -> None:
    assert len(set(hostile.TEXTS)) > 100
    attacked, harmless = write_hostile(tmp_path)
    html = pages.page(attacked)
    found, expected = Read(html), Read(pages.page(harmless))
    assert found.tags == expected.tags
    assert [k for k, _ in found.attributes] == [k for k, _ in expected.attributes]
    assert found.code[0] == expected.code[0]
    assert found.code[2] == expected.code[2]
    data = json.loads(found.code[1])
    assert not set(found.code[1]) & set("<>&\u2028\u2029")
    assert data["labels"] == hostile.LABELS
    kept = {message["row"] - 1: message["text"] for message in data["messages"]}
    for row, text in enumerate(hostile.TEXTS):
        assert kept[row] == (text if text != "'=1" else "=1")  # as a spreadsheet's guard is undone
    assert "\0" not in html
    figures = table(found, "Figures by label")[1:]
    named = sorted(x.replace("\0", "\ufffd") for x in hostile.LABELS)
    assert sorted(row[0] for row in figures) == named
    assert f"{hostile.ATTACKS[0]}. Merged into one label" in found.text
    assert ["instruction", hostile.ATTACKS[0]] in table(found, "config.toml")


def test_a_page_holds_no_more_than_it_can(run: Path, monkeypatch) -> None:
    monkeypatch.setattr(run_tables, "MAX_CHARS", 200)
    monkeypatch.setattr(formatting, "MAX_MESSAGE_CHARS", 9)
    found = Read(pages.page(run))
    messages = json.loads(found.code[1])["messages"]
    assert len(messages) == 18  # of 9 characters and the mark of a cut
    assert {len(m["text"]) for m in messages} == {9, 11}
    wrong = [m["label"] != m["predicted"] for m in messages]
    assert wrong == sorted(wrong, reverse=True)
    surest = [m["probability"] for m in messages if m["label"] != m["predicted"]]
    assert surest == sorted(surest, reverse=True)
    assert "This page holds 18 of 100 messages, mistakes first" in found.text
    monkeypatch.setattr(run_tables, "MAX_MESSAGES", 5)
    assert len(json.loads(Read(pages.page(run)).code[1])["messages"]) == 5


def test_a_large_run_makes_a_small_page(tmp_path: Path) -> None:
    """The size of Banking77: 77 labels and 3,080 rows."""
    count = 3080
    true = [i % 77 for i in range(count)]
    run = finished.write(
        tmp_path / "run",
        labels=[f"a_label_of_the_usual_length_{i}" for i in range(77)],
        texts=[
            "a message of sixty characters, as they are on the average" + str(i)
            for i in range(count)
        ],
        true=true,
        predicted=[(t + i % 7) % 77 if i % 6 == 0 else t for i, t in enumerate(true)],
    )
    assert pages.write(run).stat().st_size < 3_000_000


def test_too_many_labels_for_a_matrix(run: Path, monkeypatch) -> None:
    monkeypatch.setattr(confusion_matrix, "MAX_MATRIX_LABELS", 2)
    read = Read(pages.page(run))
    rows = table(
        read, "Confusion matrix: rows are true labels, columns are predictions; the 2 of 5 labels"
    )
    assert len(rows) == 4  # the heading and the totals among them
    assert "top up" not in rows[0]
    assert len(table(read, "Figures by label")) == 6


def test_a_run_can_do_without_what_is_not_its_result(tmp_path: Path) -> None:
    run = write(tmp_path / "run")
    whole = Read(pages.page(run))
    assert {"Evaluations as a table", "Plan"} <= set(whole.text.splitlines())
    assert ["command", shlex.join(sys.argv)] in table(whole, "Environment")
    for name in ("plan.json", "metrics.jsonl", "environment.json", "data.json"):
        (run / name).unlink()
    bare = Read(pages.page(run))
    assert not {"Evaluations as a table", "Plan"} & set(bare.text.splitlines())
    assert "remora diagnose" in bare.text
    finished.diagnose(run, LABELS, "7 of 9 rows, <b>")
    shown = Read(pages.page(run))
    assert "card arrival / refund: labels overlap" in shown.text
    assert "<b>. Merged into one label, accuracy would be 91.25%; with the" in shown.text
    assert "boundary that the judges draw, 90.75%." in shown.text
    assert "exceed 93.0% accuracy on these test rows (95% interval 90.0% to 95.0%)" in shown.text
    assert (
        "It could be lower: another 2.0%, which every classifier gives the same other label"
        in shown.text
    )
    assert table(shown, "Names, numbers")[1] == ["7 of 9 rows, <b>", "refund", "5"]
    assert "The first 2 rows of relabel.csv" in shown.text
    assert "\n=alabel card arrival suggested refund row 1" in shown.text
    (run / "relabel.csv").write_text("row,text\n1", encoding="utf-8")
    diagnosis = json.loads((run / "diagnosis.json").read_text(encoding="utf-8"))
    del diagnosis["ceiling"], diagnosis["tied_tokens"]
    (run / "diagnosis.json").write_text(json.dumps(diagnosis), encoding="utf-8")
    bare = Read(pages.page(run))
    assert "relabel.csv" in bare.text
    assert "The first" not in bare.text


def test_a_torn_log_is_shown_as_far_as_it_goes(tmp_path: Path) -> None:
    run = write(tmp_path / "run")
    before = table(Read(pages.page(run)), "On the validation rows")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')
    assert table(Read(pages.page(run)), "On the validation rows") == before
    assert before[1] == ["3", "50.00%", "1.0000", "yes"]


def remora(*arguments: str | Path) -> int:
    """Run the command line in this process."""
    try:
        return main([*map(str, arguments)])
    except SystemExit as done:
        return int(done.code or 0)


def test_diagnose_writes_it_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from remora.diagnosis import diagnose

    class Found:
        to_dict = dict

    def diagnosed(config: DiagnoseConfig, reporter: object) -> Found:
        finished.diagnose(config.run, LABELS, "because of this")
        return Found()

    monkeypatch.setattr(diagnose, "diagnose_run", diagnosed)
    run = write(tmp_path / "run")
    pages.write(run)
    assert "because of this" not in (run / "report.html").read_text(encoding="utf-8")
    assert remora("diagnose", run, "--json") == 0
    assert "because of this" in (run / "report.html").read_text(encoding="utf-8")


def test_the_learning_curve_is_shown_where_there_is_one(tmp_path: Path) -> None:
    run = write(tmp_path / "run")
    assert "Learning curve" not in Read(pages.page(run)).text
    finished.learn(run)
    read = Read(pages.page(run))
    assert "Label more rows: from 200 to 400 rows" in read.text
    assert table(read, "Accuracy by rows per class")[-1] == [
        "all 2 classes have fewer",
        *("400", "80.00%", "78.0% to 82.0%", "75.00%", "0.01"),
    ]
    assert "800 rows should give 82.5% (80.0% to 85.0%)" in read.text


def test_the_verb_writes_it_again(run: Path, tmp_path: Path, capsys) -> None:
    assert remora("report", run) == 0
    assert capsys.readouterr().out.strip() == f"report in {run / 'report.html'}"
    elsewhere = tmp_path / "there.html"
    assert remora("report", run, "--output", elsewhere, "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"report": str(elsewhere)}
    assert elsewhere.read_bytes() == (run / "report.html").read_bytes()


def test_a_speed_that_was_not_measured_is_left_out(run: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(run, tmp_path / "copied")
    assert "12.5 examples/s" in " ".join(Read(pages.page(copied)).text.split())
    path = copied / "evaluation.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"examples_per_second": 0.0}))
    assert "examples/s" not in Read(pages.page(copied)).text


def test_what_cannot_be_reported_is_one_line(run: Path, tmp_path: Path, capsys) -> None:
    broken = write(tmp_path / "broken")
    (broken / "predictions.csv").unlink()
    other = write(tmp_path / "other")
    (other / "plan.json").write_text('{"why": 1}')
    for arguments, code, told in (
        ((broken,), 3, "has no predictions.csv; give the directory of a finished run"),
        ((tmp_path,), 3, "has no evaluation.json; give the directory of a finished run"),
        ((tmp_path / "nothing",), 3, "there is no folder"),
        ((other,), 3, "do not fit this version of Remora"),
        ((run, "--output", tmp_path), 2, "is a folder; give a file with --output"),
        ((run, "--output", tmp_path / "no" / "x.html"), 5, "cannot write to"),
    ):
        before = sorted(tmp_path.rglob("*"))
        assert remora("report", *arguments) == code
        captured = capsys.readouterr()
        assert captured.out == ""
        assert re.fullmatch(rf"error: .*{re.escape(told)}.*\n", captured.err)
        assert sorted(tmp_path.rglob("*")) == before


def test_a_protected_file_stays(run: Path, tmp_path: Path, monkeypatch) -> None:
    old = tmp_path / "old.html"
    old.write_text("old")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anything
    with pytest.raises(ResourceError, match="is write-protected; give another file"):
        pages.write_report(ReportConfig(run, output=old))
    assert old.read_text() == "old"


def test_a_full_disk_leaves_the_old_report_and_nothing_else(
    run: Path, tmp_path: Path, monkeypatch
) -> None:
    old = tmp_path / "old.html"
    old.write_text("old")

    def fill(self: Path, text: str, **options: str) -> None:
        self.write_bytes(text.encode()[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", fill)
    with pytest.raises(ResourceError, match="No space left on device"):
        pages.write(run, old)
    assert old.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["old.html"]


def test_a_report_that_fails_does_not_lose_the_run(tmp_path: Path, monkeypatch) -> None:
    run = write(tmp_path / "run")
    told: list[str] = []

    def fail(directory: Path) -> str:
        raise RuntimeError("something\nunforeseen")

    monkeypatch.setattr(pages, "page", fail)
    finish.write_pages(run, told.append)
    assert told == [
        "report.html could not be written (something unforeseen); the rest of the run is complete, "
        f"`remora report {run}` writes it"
    ]
    assert (run / "README.md").is_file()
    monkeypatch.undo()
    monkeypatch.setattr(model_card, "card", fail)
    finish.write_pages(run, told.append)
    assert told[1].startswith("README.md could not be written (something unforeseen)")
    assert (run / "report.html").is_file()


def test_next_steps_come_first(run: Path, tmp_path: Path) -> None:
    html = pages.page(run)
    assert html.index("What to do next") < html.index('<h2 id="result-heading">')
    steps = next_steps.find_next_steps(run)
    text = Read(html).text
    for step in steps:
        for words in (step.sentence, *step.evidence, step.command):
            assert words in text
    for content in ("broken", None):  # a report needs no probabilities
        other = write(tmp_path / str(content))
        (other / PROBABILITIES).unlink()
        if content:
            (other / PROBABILITIES).write_text(content)
        assert "What to do next" in pages.page(other)


def test_settings_are_those_that_the_run_has_chosen(tmp_path: Path) -> None:
    run = write(tmp_path / "run")
    modules = {"target_modules": ["v_proj", "q_proj"]}
    (run / "adapter" / "adapter_config.json").write_text(json.dumps(modules))
    plan = finished.PLAN | {"layout": "tree", "shard": False}
    (run / "plan.json").write_text(json.dumps(plan))
    rows = table(Read(pages.page(run)), "config.toml")
    assert ["learning rate", "0.001 (by default)"] in rows
    assert ["target modules", "q_proj, v_proj (by default)"] in rows
    assert ["epochs", "2.0 (by default)"] in rows
    assert ["checkpointing", "off (by default)"] in rows
    assert ["rank", "16"] in rows
    assert not [row for row in rows if row[1] == "auto" and row[0] != "baselines"]


def test_undecided_pairs_are_folded_below_the_others(tmp_path: Path) -> None:
    run = write(tmp_path / "run")
    finished.diagnose(run, LABELS, "no evidence")
    path = run / "diagnosis.json"
    diagnosis = json.loads(path.read_text(encoding="utf-8"))
    (decided,) = diagnosis["pairs"]
    undecided = decided | {"verdict": "undecided", "first": LABELS[2]}
    path.write_text(json.dumps(diagnosis | {"pairs": [undecided, decided, undecided]}))
    html = pages.page(run)
    text = " ".join(Read(html).text.split())
    assert (
        "7 of 90 rows may be mislabelled; of the 3 most confused pairs of labels: 1 overlapping"
        in text
    )
    folded = html.index("2 confused pairs of labels without evidence for one cause")
    shown = html.index("Most confused label pairs, with the cause")
    assert shown < html.index("<bdi>card arrival</bdi> / <bdi>refund</bdi>") < folded
    path.write_text(json.dumps(diagnosis | {"pairs": [undecided]}))
    html = pages.page(run)
    assert "1 confused pair of labels without evidence" in html
    assert "Most confused label pairs" not in html

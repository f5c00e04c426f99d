"""The page of a comparison: its figures, and that nothing hostile in it comes alive."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from sklearn.metrics import f1_score

import chromium
import finished
import hostile
from evaluation.test_compare import remora
from remora.config import CompareConfig
from remora.evaluation import compare
from remora.report import pages
from remora.report.run_tables import NUM_STATIC_MESSAGES
from reporting import LABELS, PREDICTED, TRUE, Read, table

EXECUTABLE = chromium.find()
needs_browser = pytest.mark.skipif(
    EXECUTABLE is None, reason=f"needs a browser, one of {', '.join(chromium.NAMES)}"
)
RUNS = "lora", "full"
LISTS = "first", "second"
LISTED = "document.querySelectorAll('#messages-{} li').length"
CUT_OFF = (  # what is wider than the box that hides the rest of it
    "[...document.querySelectorAll('body *')].filter(e => e.scrollWidth > e.clientWidth + 1 &&"
    " !['visible', 'clip'].includes(getComputedStyle(e).overflowX) &&"
    " getComputedStyle(e).display !== 'inline').map(e => e.outerHTML.slice(0, 80))"
)
TAGS = "[...document.querySelectorAll('body *')].map(e => e.tagName)"


def write_runs(folder: Path) -> tuple[Path, Path]:
    """An adapter, and a whole model that gets 17 other rows wrong and 5 more right."""
    texts = [f"message {i}" for i in range(100)]
    other = [TRUE[i] if i in {8, 28, 48, 68, 88} else p for i, p in enumerate(PREDICTED)]
    for row in range(2, 19):
        other[row] = (TRUE[row] + 1) % 5
    shape = {"labels": LABELS, "texts": texts, "true": TRUE}
    runs = (
        finished.write(folder / "lora", predicted=PREDICTED, **shape),
        finished.write(folder / "full", predicted=other, method="full", note="other", **shape),
    )
    pages.write(runs[0])
    return runs


def write_hostile_pages(folder: Path) -> list[Path]:
    """The page of hostile runs, and one of the same shape whose words are harmless."""
    count, num_labels = len(hostile.TEXTS), len(hostile.LABELS)
    true = [i % num_labels for i in range(count)]
    predicted = [(t + i % 2) % num_labels for i, t in enumerate(true)]
    harmless = [f"text {i}" for i in range(count)], [f"label {i}" for i in range(num_labels)]
    made = []
    for kind, (texts, labels), notes in (
        ("harmless", harmless, ("note", "other")),
        (hostile.ATTACKS[1].replace("/", ""), (hostile.TEXTS, hostile.LABELS), hostile.ATTACKS),
    ):
        runs = [
            finished.write(
                folder / f"{kind}{i}",
                labels=labels,
                texts=texts,
                note=notes[i],
                true=true,
                predicted=[p if i or row % 3 else true[row] for row, p in enumerate(predicted)],
            )
            for i in range(2)
        ]
        pages.write(runs[0])
        made.append(folder / f"{len(made)}.html")
        assert remora("compare", *runs, "--report", made[-1]) == 0
    return made


def read_rows(run: Path) -> list[dict[str, str]]:
    with (run / "predictions.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("comparison")
    path = folder / "comparison.html"
    assert remora("compare", *write_runs(folder), "--bar", "0.85", "--report", path) == 0
    return path


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[chromium.Page]:
    assert EXECUTABLE is not None
    with chromium.Page(EXECUTABLE, tmp_path / "profile") as opened:
        yield opened


def test_its_figures_are_those_of_compare(page: Path) -> None:
    read = Read(page.read_text(encoding="utf-8"))
    found = compare.compare_runs(
        CompareConfig((page.parent / "lora", page.parent / "full"), bar=0.85)
    )
    assert found.answer in read.text
    assert found.bar is not None
    assert found.bar in read.text
    _, *rows = table(read, "On 100 rows")
    assert rows == [
        [c.name, f"{c.accuracy:.2%}", f"{low:.1%} to {high:.1%}", f"{c.macro_f1:.2%}"]
        for c in found.contenders
        for low, high in [c.accuracy_interval]
    ]
    _, *pairs = table(read, "Pairwise differences")
    assert [row[0] for row in pairs] == [f"{p.first} over {p.second}" for p in found.pairs]
    assert [row[5] for row in pairs] == [f"{p.p_value:.2g}" for p in found.pairs]
    assert [row[3:5] for row in pairs] == [
        [str(p.only_first_right), str(p.only_second_right)] for p in found.pairs
    ]
    assert [row[7:10] for row in pairs] == [
        [str(p.both_wrong), f"{p.both_wrong_by_chance:.1f}", str(p.same_wrong_label)]
        for p in found.pairs
    ]
    _, *costs = table(read, "Costs of each run")
    assert {row[0]: row[1:3] for row in costs}["full"] == ["0.50%", "1.7 MB"]
    assert ["instruction", "a note", "other"] in table(read, "Settings that differ")
    assert "6 rows get the same wrong label from every run" in read.text
    (title,) = re.findall("<h2.*?>(.*?)</h2>", page.read_text(encoding="utf-8"))[:1]
    assert title == "What to do next"
    assert "Take lora." in read.text


def test_a_note_that_begins_with_the_name_of_a_file_keeps_it(page: Path) -> None:
    runs = page.parent / "lora", page.parent / "full"
    notes = "gemma-3.gguf, zero-shot is left out", "the rows also selected the weights"
    found = replace(compare.compare_runs(CompareConfig(runs)), notes=notes)
    read = Read(pages.comparison_page(found, runs))
    assert "gemma-3.gguf, zero-shot is left out." in read.text
    assert "The rows also selected the weights." in read.text


def test_messages_that_only_one_gets_right_are_listed_both_ways(page: Path) -> None:
    lora, full = ({r["text"]: r for r in read_rows(page.parent / name)} for name in RUNS)
    data = json.loads(Read(page.read_text(encoding="utf-8")).code[-2])
    for better, worse, listed in ((lora, full, data["lists"][0]), (full, lora, data["lists"][1])):
        rows = [
            text
            for text, row in better.items()
            if row["predicted"] == row["label"] != worse[text]["predicted"]
        ]
        assert {each["text"] for each in listed} == set(rows)
        assert [each["wrong"] for each in listed] == sorted(
            (round(float(worse[text]["probability"]), 4) for text in rows), reverse=True
        )
    assert [len(each) for each in data["lists"]] == [16, 4]


def test_labels_stand_with_their_change_the_largest_gain_first(page: Path) -> None:
    lora, full = (read_rows(page.parent / name) for name in RUNS)
    true = [row["label"] for row in lora]
    first, second = (
        f1_score(true, [row["predicted"] for row in run], labels=LABELS, average=None)
        for run in (lora, full)
    )
    gains = dict(zip(LABELS, zip(first, second, first - second, strict=True), strict=True))
    _, *rows = table(Read(page.read_text(encoding="utf-8")), "A: lora, B: full")
    assert [row[0] for row in rows] == sorted(LABELS, key=lambda label: -gains[label][2])
    for label, *cells in rows:
        a, b, gain = gains[label]
        assert cells[:4] == ["20", f"{a:.1%}", f"{b:.1%}", f"{100 * gain:+.1f}"]
        recalls = [
            sum(r["label"] == label == r["predicted"] for r in run) / 20 for run in (lora, full)
        ]
        assert cells[4:6] == [f"{each:.1%}" for each in recalls]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_run_may_know_labels_that_the_other_one_lacks(
    order: tuple[int, int], tmp_path: Path
) -> None:
    """As after `--from`; one of them is predicted, and no row has it."""
    texts, true = [f"message {i}" for i in range(20)], [i % 2 for i in range(20)]
    few, more = LABELS[:3], ["another label", *LABELS[:3]]
    runs = (
        finished.write(
            tmp_path / "before", labels=few, texts=texts, true=true, predicted=[0, *true[1:]]
        ),
        finished.write(
            tmp_path / "after",
            labels=more,
            texts=texts,
            true=[t + 1 for t in true],
            predicted=[t + 1 if i else 0 for i, t in enumerate(true)],
        ),
    )
    path = tmp_path / "comparison.html"
    assert remora("compare", *(runs[i] for i in order), "--report", path) == 0
    data = json.loads(Read(path.read_text(encoding="utf-8")).code[-2])
    assert data["labels"] == sorted(more)
    (only,) = (each for listed in data["lists"] for each in listed)
    assert only["text"] == "message 0"
    assert data["labels"][only["predicted"]] == "another label"


def test_the_page_links_the_reports_there_are(page: Path, tmp_path: Path) -> None:
    read = Read(page.read_text(encoding="utf-8"))
    links = [v for name, v in read.attributes if name == "href" and not str(v).startswith("#")]
    assert links == ["lora/report.html"]
    assert "full has none" in read.text
    assert remora("compare", *(page.parent / r for r in RUNS), "--report", tmp_path / "x.html") == 0
    (link,) = re.findall(r'href="([^#"]+)"', (tmp_path / "x.html").read_text(encoding="utf-8"))
    assert (tmp_path / link).resolve() == (page.parent / "lora" / "report.html").resolve()


def test_what_was_compared_is_told_beside_where_the_page_is(page: Path, capsys) -> None:
    runs = page.parent / "lora", page.parent / "full"
    assert remora("compare", *runs, "--json", "--report", page.with_name("again.html")) == 0
    assert len(json.loads(capsys.readouterr().out)["pairs"]) == 3
    again = page.with_name("again.html").read_text(encoding="utf-8")
    assert "smallest that reaches" in page.read_text(encoding="utf-8")
    assert "smallest that reaches" not in again
    assert remora("compare", *runs, "--report", page.parent) == 2
    assert "is a folder; give a file with --report" in capsys.readouterr().err
    assert remora("compare", *runs, "--report", page.parent / "no" / "x.html") == 5
    assert "no; make it, or give another file with --report" in capsys.readouterr().err
    assert remora("compare", runs[0], "--report", page.with_name("one.html")) == 0


def test_nothing_hostile_is_markup(tmp_path: Path) -> None:
    harmless, attacked = (
        Read(path.read_text(encoding="utf-8")) for path in write_hostile_pages(tmp_path)
    )
    assert attacked.tags == harmless.tags
    names = {name for name, _ in attacked.attributes}
    assert not {name for name in names if name.startswith("on")} | (names & {"src", "srcdoc"})
    links = [str(v) for name, v in attacked.attributes if name == "href"]
    assert all(re.fullmatch(r"#\w+|[\w./%~-]+/report\.html", link) for link in links)
    (policy,) = (v for name, v in attacked.attributes if name == "content" and "default" in str(v))
    assert re.fullmatch(
        r"default-src 'none'; style-src 'sha256-[\w+/=]+'; script-src 'sha256-[\w+/=]+'; "
        "base-uri 'none'; form-action 'none'",
        str(policy),
    )


@needs_browser
def test_nothing_hostile_comes_alive(browser: chromium.Page, tmp_path: Path) -> None:
    harmless, attacked = write_hostile_pages(tmp_path)
    browser.open(harmless)
    expected = browser.run(TAGS)
    browser.requests.clear()
    browser.open(attacked)
    assert browser.run(TAGS) == expected
    assert browser.run("window.pwned") is None
    assert browser.run("location.href") == attacked.as_uri()
    assert browser.dialogs == []
    assert browser.console == []
    assert browser.requests == [attacked.as_uri()]
    shown = browser.run("[...document.querySelectorAll('.text')].map(e => e.textContent)")
    assert len(shown) > NUM_STATIC_MESSAGES
    assert set(shown) <= {*hostile.TEXTS, "=1"}
    for button in range(0, browser.run("document.querySelectorAll('table button').length"), 3):
        browser.run(f"document.querySelectorAll('table button')[{button}].click()")
    assert browser.run("window.pwned") is None
    assert browser.run("location.href.split('#')[0]") == attacked.as_uri()
    assert browser.requests == [attacked.as_uri()]


@needs_browser
@pytest.mark.parametrize("width", [390, 1440])
def test_it_fits_the_screen_is_dark_and_light_on_paper(
    browser: chromium.Page, page: Path, width: int
) -> None:
    browser.resize(width)
    browser.open(page)
    assert browser.run("document.documentElement.scrollWidth") <= width
    assert browser.run(CUT_OFF) == []
    for scheme in ("light", "dark"):
        browser.prefer(scheme)
        assert browser.violations() == []
    ground = "getComputedStyle(document.querySelector('section')).backgroundColor"
    browser.prefer("light")
    light = browser.run(ground)
    browser.prefer("dark")
    assert browser.run(ground) != light
    browser.prefer("dark", "print")
    assert browser.run(ground) == light
    assert browser.console == []


@needs_browser
def test_figures_stand_below_their_headings(browser: chromium.Page, page: Path) -> None:
    browser.resize(1440)
    browser.open(page)
    assert (
        browser.run(
            "[...document.querySelectorAll('tbody td.number')].filter(e => { const head ="
            " e.closest('table').tHead.rows[0].cells[e.cellIndex];"
            " const [a, b] = [head, e].map(x => x.getBoundingClientRect().right);"
            " const [s, t] = [head, e].map(x => getComputedStyle(x).textAlign);"
            " return Math.abs(a - b) > 1 || s !== t }).length"
        )
        == 0
    )


@needs_browser
def test_a_phone_begins_with_ten_messages_and_shows_more(
    browser: chromium.Page, page: Path
) -> None:
    browser.resize(390)
    browser.open(page)
    assert [browser.run(LISTED.format(name)) for name in LISTS] == [10, 4]
    assert browser.run("document.getElementById('more-second').hidden")
    browser.click("document.getElementById('more-first')")
    assert browser.run(LISTED.format("first")) == 16
    assert browser.run("document.getElementById('more-first').hidden")
    assert browser.console == []


@needs_browser
def test_a_label_leads_to_its_messages_and_back(browser: chromium.Page, page: Path) -> None:
    browser.open(page)
    button = (
        "[...document.querySelectorAll('#label-table tbody tr')]"
        ".find(e => e.cells[0].textContent === 'pin').querySelector('.only-second button')"
    )
    browser.run(f"{button}.focus()")
    browser.press("Enter")
    assert browser.run("location.hash") == "#messages?label=pin"
    assert browser.run("document.activeElement.id") == "heading-second"
    shown = "[...document.querySelectorAll('#messages-second [data-slot=text]')]"
    texts = browser.run(f"{shown}.map(e => e.textContent)")
    assert sorted(texts) == ["message 28", "message 48", "message 68", "message 88"]
    browser.click("document.getElementById('message-back')")
    browser.wait(f"document.activeElement === {button}")
    assert browser.run("location.hash") == ""
    assert browser.run(LISTED.format("first")) == 16
    browser.open("about:blank")
    browser.open(page.as_uri() + "#messages?label=card+arrival")
    assert browser.run("document.getElementById('status-first').textContent") == "3 messages"
    browser.click("document.querySelectorAll('#label-table thead button')[0]")
    labels = "[...document.querySelectorAll('#label-table tbody th')].map(e => e.textContent)"
    assert browser.run(labels) == sorted(LABELS)


@needs_browser
def test_it_reads_without_scripts(browser: chromium.Page, page: Path) -> None:
    browser.send("Emulation.setScriptExecutionDisabled", value=True)
    browser.open(page)
    browser.send("Emulation.setScriptExecutionDisabled", value=False)
    assert [browser.run(LISTED.format(name)) for name in LISTS] == [16, 4]
    assert browser.run("[...document.querySelectorAll('form, button')].every(e => !e.offsetParent)")


@needs_browser
def test_a_screen_reader_finds_its_way(browser: chromium.Page, page: Path) -> None:
    """Every table has a caption and headings, every picture a name, every section a heading."""
    browser.open(page)
    for what, must in (
        ("table", "e.caption.textContent && e.querySelector('thead th[scope=col]')"),
        ("tbody tr", "e.querySelector('th[scope=row]')"),
        ("svg", "document.getElementById(e.getAttribute('aria-labelledby').split(' ')[1])"),
        ("section", "document.getElementById(e.getAttribute('aria-labelledby')).textContent"),
        ("nav a", "document.querySelector(e.getAttribute('href'))"),
        (".scroll", "e.tabIndex === 0 && e.getAttribute('aria-label')"),
    ):
        found = browser.run(f"[...document.querySelectorAll('{what}')].map(e => !!({must}))")
        assert found, what
        assert all(found), what
    assert browser.run("document.querySelectorAll('h1').length") == 1

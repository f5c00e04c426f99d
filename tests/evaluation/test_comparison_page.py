"""The page of a comparison: its figures, and that nothing hostile in it comes alive."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import chromium
import finished
import hostile
from evaluation.test_compare import remora
from evaluation.test_report import LABELS, PREDICTED, TRUE, Read, table
from remora.config import CompareConfig
from remora.evaluation import compare
from remora.evaluation.run_files import NUM_STATIC_MESSAGES

EXECUTABLE = chromium.find()
needs_browser = pytest.mark.skipif(
    EXECUTABLE is None, reason=f"needs a browser, one of {', '.join(chromium.NAMES)}"
)
TAGS = "[...document.querySelectorAll('body *')].map(e => e.tagName)"


def write_runs(folder: Path) -> tuple[Path, Path]:
    """An adapter, and a whole model that gets five more rows right."""
    texts = [f"message {i}" for i in range(100)]
    better = [TRUE[i] if i in {8, 28, 48, 68, 88} else p for i, p in enumerate(PREDICTED)]
    shape = {"labels": LABELS, "texts": texts, "true": TRUE}
    return (
        finished.write(folder / "lora", predicted=PREDICTED, **shape),
        finished.write(folder / "full", predicted=better, method="full", note="other", **shape),
    )


def write_hostile_pages(folder: Path) -> list[Path]:
    """The page of hostile runs, and one of the same shape whose words are harmless."""
    count, num_labels = len(hostile.TEXTS), len(hostile.LABELS)
    true = [i % num_labels for i in range(count)]
    predicted = [(t + i % 2) % num_labels for i, t in enumerate(true)]
    harmless = [f"text {i}" for i in range(count)], [f"label {i}" for i in range(num_labels)]
    pages = []
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
                predicted=predicted,
            )
            for i in range(2)
        ]
        pages.append(folder / f"{len(pages)}.html")
        assert remora("compare", *runs, "--report", pages[-1]) == 0
    return pages


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("comparison")
    path = folder / "comparison.html"
    assert remora("compare", *write_runs(folder), "--bar", "0.9", "--report", path) == 0
    return path


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[chromium.Page]:
    assert EXECUTABLE is not None
    with chromium.Page(EXECUTABLE, tmp_path / "profile") as opened:
        yield opened


def test_its_figures_are_those_of_compare(page: Path) -> None:
    read = Read(page.read_text(encoding="utf-8"))
    found = compare.compare_runs(
        CompareConfig((page.parent / "lora", page.parent / "full"), bar=0.9)
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
    assert [row[4] for row in pairs] == [f"{p.p_value:.2g}" for p in found.pairs]
    assert [row[6:9] for row in pairs] == [
        [str(p.both_wrong), f"{p.both_wrong_by_chance:.1f}", str(p.same_wrong_label)]
        for p in found.pairs
    ]
    _, *costs = table(read, "Costs of each run")
    assert {row[0]: row[1:3] for row in costs}["full"] == ["0.50%", "1.7 MB"]
    assert ["instruction", "a note", "other"] in table(read, "Settings that differ")
    alike = sum(t != p for t, p in zip(TRUE, PREDICTED, strict=True)) - 5
    assert f"{alike} rows get the same wrong label from every run" in read.text


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
    assert remora("compare", runs[0], "--report", page.with_name("one.html")) == 0


def test_nothing_hostile_is_markup(tmp_path: Path) -> None:
    harmless, attacked = (
        Read(path.read_text(encoding="utf-8")) for path in write_hostile_pages(tmp_path)
    )
    assert attacked.tags == harmless.tags
    names = {name for name, _ in attacked.attributes}
    assert not {name for name in names if name.startswith("on")} | (names & {"src", "srcdoc"})
    assert all((v or "").startswith("#") for name, v in attacked.attributes if name == "href")
    (policy,) = (v for name, v in attacked.attributes if name == "content" and "default" in str(v))
    assert re.fullmatch(
        r"default-src 'none'; style-src 'sha256-[\w+/=]+'; base-uri 'none'; form-action 'none'",
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
    assert len(shown) == NUM_STATIC_MESSAGES
    assert set(shown) <= {*hostile.TEXTS, "=1"}


@needs_browser
@pytest.mark.parametrize("width", [360, 1280])
def test_it_fits_the_screen_is_dark_and_light_on_paper(
    browser: chromium.Page, page: Path, width: int
) -> None:
    browser.resize(width)
    browser.open(page)
    assert browser.run("document.documentElement.scrollWidth") <= width
    ground = "getComputedStyle(document.querySelector('section')).backgroundColor"
    browser.prefer("light")
    light = browser.run(ground)
    browser.prefer("dark")
    assert browser.run(ground) != light
    browser.prefer("dark", "print")
    assert browser.run(ground) == light
    assert browser.console == []


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

"""The report in a real browser: what a person clicks works, and nothing hostile comes alive."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import chromium
import finished
import hostile
from remora.evaluation import predictions
from remora.report import pages
from reporting import LABELS, PREDICTED, TRUE, write, write_hostile

EXECUTABLE = chromium.find()
pytestmark = pytest.mark.skipif(
    EXECUTABLE is None, reason=f"needs a browser, one of {', '.join(chromium.NAMES)}"
)

TAGS = (
    "JSON.stringify(Object.entries([...document.querySelectorAll('*')].reduce("
    "(all, e) => ({...all, [e.tagName]: (all[e.tagName] || 0) + 1}), {})).sort())"
)
SHOWN = "[...document.querySelectorAll('#message-list [data-slot=text]')].map(e => e.textContent)"
STATUS = "document.getElementById('message-status').textContent"
ORDER = "[...document.querySelectorAll('#matrix tbody th')].map(e => e.textContent)"
COLUMNS = "[...document.querySelectorAll('#matrix thead th:not(.total)')].map(e => e.textContent)"
LABEL_FIELD = "document.getElementById('message-true')"
LABEL_ROWS = "[...document.querySelector('table.sortable').tBodies[0].rows]"


def cell(label: str, predicted: str) -> str:
    """Where the number of a label and a prediction is."""
    return (
        f"(([rows, columns]) => rows[{ORDER}.indexOf('{label}')]"
        f".cells[{COLUMNS}.indexOf('{predicted}') + 1].firstElementChild)"
        "([document.querySelector('#matrix tbody').rows])"
    )


def choose(page: chromium.Page, name: str, value: str) -> None:
    """Set a field as typing or choosing does."""
    page.run(
        f"(e => {{ e.type === 'checkbox' ? e.checked = {value} : e.value = {value};"
        f" e.dispatchEvent(new Event('input')) }})(document.getElementById('{name}'))"
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = write(tmp_path_factory.mktemp("browser") / "run")
    finished.learn(run)
    pages.write(run)
    return run


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[chromium.Page]:
    assert EXECUTABLE is not None
    with chromium.Page(EXECUTABLE, tmp_path / "profile") as page:
        yield page


@pytest.fixture
def page(browser: chromium.Page, run: Path) -> Iterator[chromium.Page]:
    """The report of a run, opened; it must have been quiet."""
    browser.open(run / "report.html")
    yield browser
    assert browser.console == []
    assert browser.requests == [(run / "report.html").as_uri()]


def test_a_number_shows_its_messages(page: chromium.Page) -> None:
    page.click(cell("pin", "refund"))
    assert page.run(STATUS) == "5 mistakes"
    assert set(page.run(SHOWN)) == {f"message {i}" for i in (8, 28, 48, 68, 88)}
    assert page.run("document.activeElement.id") == "messages-heading"
    page.click("document.getElementById('message-back')")
    page.wait(f"document.activeElement === {cell('pin', 'refund')}")
    page.click(cell("top up", "top up"))
    assert page.run(STATUS) == "20 messages"
    page.click("document.querySelector('table.worst tbody button')")
    assert page.run(STATUS) == "5 mistakes"
    page.click("document.querySelector('table.sortable tbody button')")  # card arrival
    assert page.run(STATUS) == "3 mistakes"
    choose(page, "message-wrong", "false")
    assert page.run(STATUS) == "20 messages"


def test_the_keyboard_does_what_the_mouse_does(page: chromium.Page) -> None:
    page.run("document.querySelector('#matrix button[tabindex=\"0\"]').focus()")
    where = "document.activeElement.getAttribute('aria-label')"
    num_numbers = page.run("document.querySelectorAll('#matrix button').length")
    assert num_numbers == 8
    seen = [page.run(where)]
    for _ in range(num_numbers):
        page.press("ArrowRight")
        seen.append(page.run(where))
    assert len(set(seen)) == num_numbers
    page.press("ArrowLeft")
    assert page.run(where) == seen[-3]
    page.run(f"{cell('pin', 'pin')}.focus()")
    is_first = page.run(ORDER).index("pin") < page.run(ORDER).index("refund")
    page.press("ArrowRight" if is_first else "ArrowLeft")
    assert "pin\u2069 predicted as \u2068refund" in page.run(where)
    page.press("ArrowDown" if is_first else "ArrowUp")
    assert "refund\u2069 correct" in page.run(where)
    assert page.run("document.activeElement.tabIndex") == 0
    assert page.run("document.querySelectorAll('#matrix button[tabindex=\"0\"]').length") == 1
    page.press("Enter")
    assert page.run("document.activeElement.id") == "messages-heading"


def test_the_matrix_is_ordered_and_filtered(page: chromium.Page) -> None:
    together = page.run(ORDER)
    choose(page, "matrix-order", "'name'")
    assert page.run(ORDER) == page.run(COLUMNS) == sorted(LABELS)
    numbers = "document.querySelector('#matrix').tBodies[0].rows[3].cells[5].textContent"
    assert page.run(numbers) == ""
    assert page.run(f"{cell('pin', 'refund')}.textContent") == "5"
    choose(page, "matrix-order", "'mistakes'")
    assert page.run(ORDER) == ["refund", "limit", "pin", "card arrival", "top up"]
    choose(page, "matrix-order", "'rows'")
    assert page.run(ORDER) == together  # they have the same number of rows
    choose(page, "matrix-order", "'alike'")
    assert page.run(ORDER) == together
    choose(page, "matrix-wrong", "true")
    assert "top up" not in page.run(ORDER)
    choose(page, "matrix-wrong", "false")
    choose(page, "matrix-filter", "'PIN'")
    assert sorted(page.run(ORDER)) == ["pin", "refund"]
    status = page.run("document.getElementById('matrix-status').textContent")
    assert status == "2 of 5 labels, including those they are confused with"


def test_messages_are_filtered_ordered_and_shown_in_parts(page: chromium.Page) -> None:
    page.click("document.getElementById('message-clear')")
    assert page.run(STATUS) == "100 messages"
    assert len(page.run(SHOWN)) == 50
    page.click("document.getElementById('message-more')")
    assert len(set(page.run(SHOWN))) == 100
    choose(page, "message-order", "'row'")
    assert page.run(SHOWN)[:3] == ["message 0", "message 1", "message 2"]
    choose(page, "message-filter", "'SAGE 7'")
    assert page.run(SHOWN) == ["message 7", *(f"message {i}" for i in range(70, 80))]
    slots = "[...document.querySelectorAll('#message-list [data-slot=probability]')]"
    shares = f"{slots}.map(e => parseFloat(e.textContent))"
    choose(page, "message-order", "'unsure'")
    assert page.run(shares) == sorted(page.run(shares))


def test_a_heading_sorts_the_labels(page: chromium.Page) -> None:
    labels = "[...document.querySelectorAll('table.sortable tbody th')].map(e => e.textContent)"
    heading = "document.querySelectorAll('table.sortable thead button')[{}]"
    page.click(heading.format(3))
    assert page.run(labels)[0] == "top up"  # F1, the best first
    assert page.run(f"{heading.format(3)}.parentNode.ariaSort") == "descending"
    page.click(heading.format(3))
    assert page.run(labels)[-1] == "top up"
    page.click(heading.format(0))
    assert page.run(labels) == sorted(LABELS)


def test_every_view_has_a_link_and_back_works(page: chromium.Page, run: Path) -> None:
    page.click(cell("pin", "refund"))
    assert page.run("location.hash") == "#messages?label=pin&predicted=refund"
    page.click(f"{LABEL_ROWS}[0].querySelector('.wrongly button')")  # refund, the worst
    assert page.run("location.hash") == "#messages?predicted=refund"
    assert page.run(STATUS) == "5 mistakes"
    page.run("history.back()")
    page.wait("location.hash === '#messages?label=pin&predicted=refund'")
    page.wait("document.getElementById('message-true').selectedOptions[0].text === 'pin'")
    page.run("history.back()")
    page.wait("location.hash === ''")
    page.wait(f"{STATUS} === '11 mistakes'")
    choose(page, "matrix-order", "'name'")
    assert page.run("location.hash") == "#confusion?order=name"
    page.click("document.querySelectorAll('table.sortable thead button')[0]")
    link = page.run("location.href")
    assert link.endswith("#labels?sort=0&rises=yes")
    for address, found, told in (
        (link, f"{LABEL_ROWS}.map(e => e.cells[0].textContent)", sorted(LABELS)),
        ("#messages?label=top+up&mistakes=no", STATUS, "20 messages"),
        ("#messages?label=nothing&predicted=no", STATUS, "11 mistakes"),  # of another report
        ("#messages?label=nothing", f"{LABEL_FIELD}.selectedOptions[0]?.text", "any"),
        ("#confusion?order=name&percent=yes", f"{cell('pin', 'refund')}.textContent", "25%"),
        ("#calibration?threshold=100", "document.getElementById('threshold').value", "100"),
    ):
        page.open("about:blank")
        page.open((run / "report.html").as_uri() + address[address.index("#") :])
        assert page.run(found) == told
    page.requests[:] = [page.requests[0]]


def test_messages_wrongly_predicted_as_a_label_are_found_from_it(page: chromium.Page) -> None:
    page.click(f"{LABEL_ROWS}.find(e => e.cells[0].textContent === 'limit').cells[6].firstChild")
    assert page.run(STATUS) == "6 mistakes"
    page.click(f"{LABEL_ROWS}.find(e => e.cells[0].textContent === 'pin').cells[5].firstChild")
    assert page.run(STATUS) == "5 mistakes"


def test_a_threshold_shows_what_is_answered(page: chromium.Page, run: Path) -> None:
    found = predictions.read_predictions(run / "predictions.csv", LABELS)
    for percent in (30, 45, 60):
        choose(page, "threshold", f"'{percent}'")
        rows = [i for i, p in enumerate(found.probability) if p >= percent / 100]
        right = sum(found.true[i] == found.predicted[i] for i in rows)
        assert page.run("document.getElementById('threshold-status').textContent") == (
            f"{len(rows)} of 100 messages are answered ({len(rows):.1f}%), "
            f"{100 * right / len(rows):.1f}% of them correctly; {100 - len(rows)} go to a person."
        )
    choose(page, "threshold", "'100'")
    assert "No message" in page.run("document.getElementById('threshold-status').textContent")


def test_three_labels_stand_beside_a_message(page: chromium.Page, run: Path) -> None:
    choose(page, "message-order", "'row'")
    scored = predictions.read_probabilities(run / predictions.PROBABILITIES, LABELS, "test")
    second, third = np.argsort(-scored.probabilities[0])[1:3]  # row 1 is a mistake
    told = page.run("document.querySelector('#message-list [data-slot=others]').textContent")
    shares = [f"{LABELS[i]} {100 * scored.probabilities[0, i]:.1f}%" for i in (second, third)]
    assert told.replace("\u2068", "").replace("\u2069", "") == f", then {' and '.join(shares)}"


def test_the_nearest_training_texts_stand_below_a_mistake(page: chromium.Page, run: Path) -> None:
    choose(page, "message-order", "'row'")
    item = "document.querySelector('#message-list li')"  # row 1 is a mistake
    assert not page.run(f"{item}.querySelector('.nearest').open")
    told = page.run(f"{item}.querySelector('summary').textContent").replace("\u2068", "")
    assert told.replace("\u2069", "") == "nearest training texts: 1 card arrival, 1 refund, 1 pin"
    page.click(f"{item}.querySelector('summary')")
    texts = f"[...{item}.querySelectorAll('.nearest li')].map(e => e.innerText)"
    assert page.run(texts) == [
        "message 0 label card arrival, row 7",
        "message 1 label refund, row 8",
        "message 8 label pin, row 15",
    ]
    choose(page, "message-wrong", "false")
    right = "[...document.querySelectorAll('#message-list li')].find(e => /message 2$/m.test("
    right += "e.innerText))"
    assert page.run(f"{right}.querySelector('.nearest')") is None


def test_a_phone_begins_with_ten_messages_and_says_what_is_outside(page: chromium.Page) -> None:
    cue = "document.getElementById('matrix-cue')"
    assert page.run(f"{cue}.hidden")
    page.resize(390, 200)
    page.reload()
    page.requests.pop()
    assert len(page.run(SHOWN)) == 10
    page.wait(f"!{cue}.hidden")
    assert page.run(f"{cue}.textContent").startswith("Scroll inside the matrix for ")


@pytest.mark.parametrize("width", [390, 1440])
def test_axe_finds_nothing(page: chromium.Page, width: int) -> None:
    page.resize(width)
    for scheme in ("light", "dark"):
        page.prefer(scheme)
        assert page.violations() == []


def test_hostile_words_do_not_come_alive(browser: chromium.Page, tmp_path: Path) -> None:
    attacked, harmless = (pages.write(run) for run in write_hostile(tmp_path))
    browser.open(harmless)
    browser.click("document.getElementById('message-clear')")
    expected = browser.run(TAGS)
    browser.requests.clear()
    browser.open(attacked)
    browser.click("document.getElementById('message-clear')")
    assert browser.run(TAGS) == expected
    browser.run(
        "while (!document.getElementById('message-more').hidden)"
        " document.getElementById('message-more').click()"
    )
    shown = browser.run(SHOWN)
    assert sorted(shown) == sorted({*hostile.TEXTS} - {"'=1"} | {"=1"})
    options = "[...document.querySelectorAll('#message-true option')].map(e => e.text)"
    assert len(browser.run(options)) == len(hostile.LABELS) + 1
    for button in range(0, browser.run("document.querySelectorAll('table button').length"), 5):
        browser.run(f"document.querySelectorAll('table button')[{button}].click()")
    choose(browser, "matrix-filter", "'<'")
    assert browser.run("window.pwned") is None
    assert browser.run("location.href.split('#')[0]") == attacked.as_uri()
    assert browser.dialogs == []
    assert browser.console == []
    assert browser.requests == [attacked.as_uri()]


def test_it_reads_without_scripts(browser: chromium.Page, run: Path) -> None:
    browser.send("Emulation.setScriptExecutionDisabled", value=True)
    browser.open(run / "report.html")
    browser.send("Emulation.setScriptExecutionDisabled", value=False)
    assert browser.run("document.querySelectorAll('#matrix tbody tr').length") == 5
    num_wrong = sum(t != p for t, p in zip(TRUE, PREDICTED, strict=True))
    assert browser.run(f"{SHOWN}.length") == num_wrong
    assert browser.run("document.querySelectorAll('#message-list .nearest').length") == num_wrong
    assert browser.run("document.querySelectorAll('svg').length") == 6
    assert browser.run("[...document.querySelectorAll('form, button')].every(e => !e.offsetParent)")


@pytest.mark.parametrize("width", [360, 1280])
def test_no_page_is_wider_than_the_screen(page: chromium.Page, width: int) -> None:
    page.resize(width)
    assert page.run("document.documentElement.scrollWidth") <= width


def test_it_is_dark_where_dark_is_preferred_and_light_on_paper(page: chromium.Page) -> None:
    ground = "getComputedStyle(document.querySelector('section')).backgroundColor"
    page.prefer("light")
    light = page.run(ground)
    page.prefer("dark")
    assert page.run(ground) != light
    page.prefer("dark", "print")
    assert page.run(ground) == light
    assert page.run("getComputedStyle(document.querySelector('form')).display") == "none"

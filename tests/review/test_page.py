"""The page of a review in a real browser: by keyboard alone, on any screen, with hostile texts."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import chromium
import hostile
from remora.data.table import Table
from reviewing import decisions, reviewing, write_run

EXECUTABLE = chromium.find()
pytestmark = pytest.mark.skipif(
    EXECUTABLE is None, reason=f"needs a browser, one of {', '.join(chromium.NAMES)}"
)


def text_of(name: str) -> str:
    return f"document.getElementById({name!r}).textContent"


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[chromium.Page]:
    assert EXECUTABLE is not None
    with chromium.Page(EXECUTABLE, tmp_path / "profile") as page:
        yield page


def open_at(browser: chromium.Page, url: str, message: str) -> None:
    browser.open(url)
    wait_for(browser, message)


def wait_for(browser: chromium.Page, message: str) -> None:
    browser.wait(f"!isBusy && {text_of('message')}.startsWith({json.dumps(message)})")


def wait_for_the_end(browser: chromium.Page) -> None:
    browser.wait("!isBusy && !document.getElementById('ending').hidden")


def test_everything_by_keyboard_and_going_on_after_a_reload(
    tmp_path: Path, browser: chromium.Page
) -> None:
    run = write_run(tmp_path)
    with reviewing(run) as review:
        open_at(browser, review.url, "my card is late")
        assert browser.run(text_of("batch")).startswith("Almost surely wrong")
        assert "1 of 2" in browser.run(text_of("batch"))
        browser.press("a")
        wait_for(browser, "=refund(1)")
        assert decisions(run)[2] == "card"
        assert browser.run(text_of("said")) == "Now card. 3 rows left."
        browser.press("u")
        wait_for(browser, "my card is late")
        assert decisions(run)[2] == ""
        browser.press("k")
        wait_for(browser, "=refund(1)")
        assert decisions(run)[2] == "refund"
        browser.press("s")
        wait_for(browser, "refund me")
        browser.press("o")
        browser.type("ca")
        assert browser.run("document.querySelector('[aria-selected=true]').textContent") == "card"
        browser.press("Enter")
        wait_for(browser, "no top up again")
        assert decisions(run) == {2: "refund", 5: "card", 6: "", 8: "", 10: ""}
        open_at(browser, review.url, "=refund(1)")  # what was skipped comes again
        assert browser.run(text_of("count")) == "2 of 4"
        browser.press("d")
        wait_for(browser, "no top up again")
        browser.press("1")  # a label of a neighbour that is neither of the two
        wait_for_the_end(browser)
        assert browser.run(text_of("outcome")) == "All decided"
        assert decisions(run) == {2: "refund", 5: "card", 6: "delete", 8: "card", 10: ""}
        tiles = browser.run("[...document.querySelectorAll('#tiles dd')].map(e => e.textContent)")
        assert tiles == ["2", "1", "1", "0"]  # relabelled, kept, deleted, left
        assert browser.run(text_of("command")) == f"remora retrain {run}"
        # The row that is probably right, only when asked for
        while "more that" not in browser.run("document.activeElement.textContent"):
            browser.press("Tab")
        browser.press("Enter")
        wait_for(browser, "card?")
        browser.press("ArrowLeft")
        wait_for_the_end(browser)
        assert decisions(run)[10] == "card"
        # A decision changed, and the end
        while browser.run("document.activeElement.getAttribute('aria-label')") != "Change row 5":
            browser.press("Tab")
        browser.press("Enter")
        wait_for(browser, "refund me")
        browser.press("ArrowRight")
        wait_for_the_end(browser)
        assert decisions(run)[5] == "refund"
        while browser.run("document.activeElement.id") != "end":
            browser.press("Tab")
        browser.press("Enter")
        browser.wait("document.body.textContent.includes('The review has ended')")
        assert browser.dialogs == browser.console == []
        start = review.url.rsplit("/", 2)[0]
        assert all(each.startswith((start, "data:,")) for each in browser.requests)


def test_keys_can_be_turned_off_and_fast_ones_decide_nothing_unseen(
    tmp_path: Path, browser: chromium.Page
) -> None:
    run = write_run(tmp_path)
    with reviewing(run) as review:
        open_at(browser, review.url, "my card is late")
        browser.run(
            "for (const key of 'aaaa') document.dispatchEvent(new KeyboardEvent('keydown', {key}))"
        )
        wait_for(browser, "=refund(1)")
        time.sleep(0.2)
        assert [row for row, decision in decisions(run).items() if decision] == [2]
        browser.click("document.getElementById('keys')")
        browser.press("a")
        time.sleep(0.2)
        assert [row for row, decision in decisions(run).items() if decision] == [2]


def test_a_decision_that_is_not_saved_is_said_and_stays_open(
    tmp_path: Path, browser: chromium.Page
) -> None:
    run = write_run(tmp_path)
    path = run / "relabel.csv"
    with reviewing(run) as review:
        open_at(browser, review.url, "my card is late")
        whole = path.read_text()
        path.write_text(whole + "5,broken\n")
        browser.press("a")
        told = browser.wait(text_of("problem"))
        assert "too few or too many fields" in told
        assert browser.run(text_of("message")) == "my card is late"
        path.write_text(whole)
        browser.press("a")
        wait_for(browser, "=refund(1)")
        assert browser.run("document.getElementById('problem').hidden")
    browser.press("a")
    told = browser.wait(f"{text_of('problem')}.includes('has ended') && {text_of('problem')}")
    assert told.endswith(f"run it again: remora review {run}")
    assert decisions(run)[6] == ""


LABELS = (
    "<img src=x onerror='window.pwned = 1'>",
    "</script><script>window.pwned = 1</script>",
    "a_label_" + "that_is_long_" * 8,
)
TEXTS = (
    *hostile.ATTACKS,
    "\u202eabc\u202c javascript:window.pwned=1",
    "x" * 3000,
    "many words " * 500,
    "{{ 7 * 7 }} ${window.pwned = 1}",
)


def test_it_fits_is_accessible_and_no_text_runs(tmp_path: Path, browser: chromium.Page) -> None:
    table = Table([*TEXTS, *TEXTS], [LABELS[i % 3] for i in range(2 * len(TEXTS))])
    suspects = [(row, LABELS[(row + 1) % 3], 0.95) for row in range(1, 15)]
    run = write_run(tmp_path, table, suspects)
    with reviewing(run) as review:
        for width, scheme in ((1440, "light"), (1440, "dark"), (390, "light"), (390, "dark")):
            browser.resize(width)
            browser.prefer(scheme)
            open_at(browser, review.url, "")
            browser.wait("document.getElementById('near').children.length")
            check(browser)
            browser.run("document.getElementById('other').focus()")
            browser.type("a")
            browser.wait("document.getElementById('matches').children.length")
            check(browser)
            browser.press("Escape")
            browser.press("a")
            browser.wait(f"!isBusy && {text_of('said')}")
            browser.click("document.getElementById('finish')")
            wait_for_the_end(browser)
            check(browser)
        assert sum(map(bool, decisions(run).values())) == 4
        start = review.url.rsplit("/", 2)[0]
        assert all(each.startswith((start, "data:,")) for each in browser.requests)
    assert browser.dialogs == browser.console == []


def check(browser: chromium.Page) -> None:
    assert browser.run("document.documentElement.scrollWidth <= innerWidth")
    assert browser.violations() == []
    assert browser.run("typeof window.pwned") == "undefined"
    assert browser.run("document.querySelectorAll('img, script').length") == 1  # the page's own

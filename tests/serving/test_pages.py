"""The pages of the service in a real browser."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import chromium
from remora.serving.server import Service
from service import call, predicted, running, write_adapter

EXECUTABLE = chromium.find()
pytestmark = pytest.mark.skipif(
    EXECUTABLE is None, reason=f"needs a browser, one of {', '.join(chromium.NAMES)}"
)
LABELS = ["<img src=x onerror=alert(1)>", "refund", "a_label_" + "that_is_long_" * 8]
TEXT = "Where is my card?"
SHOWN = (
    "[...document.querySelectorAll('#answer li .name')]"
    ".map(e => [...e.children].map(c => c.textContent))"
)


@pytest.fixture(scope="module")
def folder(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(tmp_path_factory.mktemp("adapters") / "bank", base, 1, LABELS)


@pytest.fixture(scope="module")
def service(folder: Path) -> Iterator[Service]:
    with running(folder) as made:
        yield made


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[chromium.Page]:
    assert EXECUTABLE is not None
    with chromium.Page(EXECUTABLE, tmp_path / "profile") as page:
        yield page


def test_a_message_is_tried_by_keyboard(
    service: Service, folder: Path, browser: chromium.Page
) -> None:
    browser.open(service.url + "/")
    browser.type(TEXT)  # the field has the focus
    browser.press("Tab")
    browser.press("Enter")
    browser.wait(f"{SHOWN}.length")
    found = browser.run(SHOWN)
    (wanted,) = predicted(folder, [TEXT], top_k=3)
    assert found == [[label, f"{100 * p:.1f} %"] for label, p in wanted]
    told = browser.run("document.querySelector('#answer .note').textContent")
    assert told.startswith("by bank (")
    assert told.endswith(" ms")
    assert browser.dialogs == browser.console == []
    assert all(each.startswith((service.url, "data:,")) for each in browser.requests)


def test_several_columns_have_a_field_each(
    folder: Path, base: Path, browser: chromium.Page, tmp_path: Path
) -> None:
    plain = write_adapter(tmp_path / "plain", base, 2)
    several = shutil.copytree(folder, tmp_path / "several")
    card = several / "adapter" / "remora.json"
    columns = ["title", "<b>body</b>"]
    card.write_text(json.dumps(json.loads(card.read_text()) | {"text_columns": columns}))
    names = "[...document.querySelectorAll('#message label')].map(e => e.textContent)"
    with running(several, plain) as service:
        browser.open(service.url + "/")
        assert browser.wait(f"{names}.length > 1 && {names}") == columns
        browser.type("card")  # the first field has the focus
        browser.press("Tab")
        browser.type("lost")
        assert browser.violations() == []
        browser.click("document.querySelector('button')")
        found = browser.wait(f"{SHOWN}.length && {SHOWN}")
        texts = [{"title": "card", "<b>body</b>": "lost"}]
        body = {"texts": texts, "top_k": 3, "adapter": "several"}
        (wanted,) = call(service.url, "/v1/classify", body).json["results"]
        shown = [[e["label"], f"{100 * e['probability']:.1f} %"] for e in wanted["labels"]]
        assert found == shown
        # Another adapter has one field, with what was typed in the first.
        browser.run(
            "const e = document.getElementById('adapter'); e.value = 'plain';"
            "e.dispatchEvent(new Event('change'))"
        )
        assert browser.run(names) == ["Message"]
        assert browser.run("document.getElementById('text').value") == "card"
        browser.click("document.querySelector('button')")
        browser.wait("document.querySelector('#answer .note')?.textContent.startsWith('by plain')")
        assert browser.dialogs == browser.console == []


@pytest.mark.parametrize("width", [1440, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("path", ["/", "/docs"])
def test_it_is_accessible_and_fits(
    service: Service, browser: chromium.Page, width: int, scheme: str, path: str
) -> None:
    browser.resize(width)
    browser.prefer(scheme)
    browser.open(service.url + path)
    if path == "/":
        browser.type(TEXT)
        browser.click("document.querySelector('button')")
        browser.wait(f"{SHOWN}.length")
    assert browser.run("document.documentElement.scrollWidth <= innerWidth")
    assert browser.violations() == []


def test_a_refusal_is_shown_and_the_token_is_asked_for(
    folder: Path, browser: chromium.Page, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REMORA_TOKEN", "correct-horse")
    with running(folder) as service:
        browser.open(service.url + "/")
        browser.wait("!document.getElementById('secret').hidden")
        browser.type(TEXT)
        browser.click("document.querySelector('button')")
        assert "token" in browser.wait("document.querySelector('#answer .problem')?.textContent")
        browser.run("document.getElementById('token').focus()")
        browser.type("correct-horse")
        browser.click("document.querySelector('button')")
        assert len(browser.wait(f"{SHOWN}.length && {SHOWN}")) == 3
        assert "correct-horse" not in call(service.url, "/").body.decode()


def test_the_box_of_a_route_sends(service: Service, browser: chromium.Page) -> None:
    browser.open(service.url + "/docs")
    form = "document.querySelector('form[data-path=\"/v1/classify\"]')"
    browser.click(f"{form}.querySelector('button')")
    shown = browser.wait(f"{form}.querySelector('output').textContent")
    assert shown.startswith("200\n")
    assert len(json.loads(shown.partition("\n")[2])["results"]) == 1
    lines = browser.run("[...document.querySelectorAll('pre')].map(e => e.textContent)")
    (line,) = [each for each in lines if each.endswith("/v1/classify")]
    done = subprocess.run([*shlex.split(line), "-s"], capture_output=True, check=True)
    assert len(json.loads(done.stdout)["results"]) == 1

"""The page of a review where rows have several labels, in a real browser."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import chromium
from remora.data.label_sets import set_text
from remora.data.table import Table
from reviewing import decisions, reviewing, write_run

EXECUTABLE = chromium.find()
pytestmark = pytest.mark.skipif(
    EXECUTABLE is None, reason=f"needs a browser, one of {', '.join(chromium.NAMES)}"
)

ROWS = Table(
    ["where is my card, and my refund", "a refund please", "hello there", "my card is late"],
    [set_text(labels) for labels in (["card"], ["card"], ["card"], ["card", "refund"])],
    multi_label=True,
)
SUSPECTS = [
    (1, set_text(["card", "refund"]), 0.99),
    (2, set_text(["refund"]), 0.95),
    (3, "[]", 0.6),
]


def test_a_set_is_accepted_or_typed_and_what_is_none_is_told(tmp_path: Path) -> None:
    assert EXECUTABLE is not None
    run = write_run(tmp_path, ROWS, SUSPECTS, multi_label="on")
    with reviewing(run) as review, chromium.Page(EXECUTABLE, tmp_path / "profile") as page:

        def shown(message: str) -> None:
            text = "document.getElementById('message').textContent"
            page.wait(f"!isBusy && {text}.startsWith({json.dumps(message)})")

        def typed(text: str) -> None:
            page.press("o")
            page.run(
                f"(() => {{ const box = document.getElementById('other'); box.value = {text!r};"
                " box.dispatchEvent(new Event('input')); })()"
            )
            page.press("Enter")

        page.open(review.url)
        shown("where is my card")
        assert "all labels, such as [" in page.run("document.getElementById('other').placeholder")
        page.press("a")
        shown("a refund please")
        assert decisions(run)[1] == '["card", "refund"]'
        typed("[refund")
        page.wait("!isBusy && !document.getElementById('problem').hidden")
        assert "which is no label" in page.run("document.getElementById('problem').textContent")
        assert decisions(run)[2] == ""
        typed("['refund', 'card']")
        shown("hello there")
        assert decisions(run)[2] == '["card", "refund"]'  # as the table writes it
        assert page.run("document.getElementById('said').textContent").startswith(
            'Now ["card", "refund"].'
        )
        page.press("a")
        page.wait("!isBusy && !document.getElementById('ending').hidden")
        assert decisions(run)[3] == "[]"

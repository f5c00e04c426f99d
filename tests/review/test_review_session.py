"""The process of a review: its address, its lock, its end, and what it answers to whom."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
import webbrowser
from pathlib import Path

import pytest

from remora.config import ReviewConfig
from remora.data.corrections import RELABEL
from remora.diagnosis import suspect_list
from remora.errors import ConfigError, DataError
from remora.review import Review, session
from reviewing import ROWS, decisions, reviewing, write_run
from service import call


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path)


def base_of(review: Review) -> tuple[str, str]:
    """The address of the service, and the path of its page."""
    start, token = review.url.rstrip("/").rsplit("/", 1)
    return start, f"/{token}/"


def test_what_is_sent_is_decided_and_nothing_without_the_token(run: Path) -> None:
    with reviewing(run) as review:
        url, page = base_of(review)
        assert url.startswith("http://127.0.0.1:")
        assert len(page) > 20
        answer = call(url, page)
        assert answer.status == 200
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; style-src 'sha256-")
        assert answer.headers["referrer-policy"] == "no-referrer"
        found = call(url, page + "rows").json
        assert [each["row"] for each in found["items"]] == [2, 6, 5, 8, 10]
        assert call(url, page + "rows/2").json["text"] == "my card is late"
        told = call(url, page + "decisions", {"row": 2, "label": "card"})
        assert (told.status, told.json["num_relabelled"]) == (200, 1)
        for path in ("/", "/x/", "/x/rows", page[:-2] + "/rows", "/" + "a" * 22 + "/decisions"):
            assert call(url, path).status == 404
        assert call(url, page, headers={"host": "evil.example"}).status == 403
        assert call(url, page, headers={"host": "localhost:1"}).status == 200
    assert decisions(run)[2] == "card"


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"row": 2, "label": "crad"}, 409),
        ({"row": 1, "label": "card"}, 409),
        ({"row": "2", "label": "card"}, 400),
        ({"row": 2, "label": "card", "more": 1}, 400),
        ({}, 400),
        (b'{"row": 2, "row": 5}', 400),
        (b"\xff", 400),
        (b'{"row": 2, "label": "' + b"a" * 2_000_000 + b'"}', 413),
    ],
)
def test_bad_requests_decide_nothing(run: Path, body: object, status: int) -> None:
    before = (run / RELABEL).read_bytes()
    with reviewing(run) as review:
        url, page = base_of(review)
        answer = call(url, page + "decisions", body)
        assert answer.status == status
        assert len(answer.json["error"].splitlines()) == 1
        assert call(url, page + "rows/99").status == 409
        assert call(url, page + "nothing").status == 404
    assert (run / RELABEL).read_bytes() == before


def test_it_is_ended_on_the_page(run: Path) -> None:
    with reviewing(run) as review:
        url, page = base_of(review)
        assert call(url, page + "end", {}).status == 200
        end = time.monotonic() + 10
        while time.monotonic() < end:
            try:
                call(url, page)
            except ConnectionError:
                break
            time.sleep(0.05)
        else:
            raise AssertionError("it goes on")


def test_a_second_reviewer_is_told_and_a_later_one_goes_on(run: Path) -> None:
    with reviewing(run) as review:
        review.queue.decide(2, "card")
        with pytest.raises(ConfigError, match=rf"reviewed or written by process {os.getpid()} on"):
            Review(ReviewConfig(run))
        with pytest.raises(ConfigError, match="go on there, or stop that"), suspect_list.hold(run):
            raise AssertionError
    with reviewing(run) as review:
        assert review.queue.summary().num_relabelled == 1


def test_a_port_that_is_taken_leaves_the_run_free(run: Path) -> None:
    with reviewing(run) as review:
        port = int(review.url.split(":")[2].split("/")[0])
        other = write_run(run.parent / "other")
        with pytest.raises(ConfigError, match=rf"port {port} .*; choose another --port, or leave"):
            Review(ReviewConfig(other, port=port))
    with reviewing(other):
        pass


def test_rows_that_changed_are_refused(run: Path) -> None:
    text = (run.parent / "data.csv").read_text()
    (run.parent / "data.csv").write_text(text.replace("card gone", "card lost"))
    with pytest.raises(DataError, match="have changed since"):
        Review(ReviewConfig(run))
    (run.parent / "data.csv").write_text(text)
    path = run / RELABEL
    path.write_text(path.read_text().replace("\n2,", "\n3,"))
    with pytest.raises(DataError, match="line 2 no longer matches row 3"):
        Review(ReviewConfig(run))
    path.unlink()
    with pytest.raises(DataError, match=r"no relabel.csv; run `remora diagnose .*` first"):
        Review(ReviewConfig(run))


def test_a_list_of_nothing_is_over_at_once(run: Path) -> None:
    suspect_list.write(run / RELABEL, [])
    said: list[str] = []
    summary = Review(ReviewConfig(run), say=said.append).run()
    assert (summary.num_rows, summary.num_open) == (0, 0)
    assert said == [f"no row of {run} is listed, so there is nothing to review"]


def test_a_browser_is_opened_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr(webbrowser, "open", lambda url: bool(opened.append(url)) or True)
    monkeypatch.setattr(sys, "platform", "linux")
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    assert not session.open_browser("http://a")  # it would be one of the terminal's
    monkeypatch.setenv("DISPLAY", ":0")
    assert session.open_browser("http://b")
    assert opened == ["http://b"]

    def missing(url: str) -> bool:
        raise webbrowser.Error("could not locate runnable browser")

    monkeypatch.setattr(webbrowser, "open", missing)
    assert not session.open_browser("http://c")


@pytest.mark.skipif(sys.platform == "win32", reason="needs signals")
def test_ctrl_c_ends_it_with_a_summary(run: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = [sys.executable, "-m", "remora", "review", str(run), "--no-browser"]
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=file, text=True)
        try:
            end = time.monotonic() + 60
            while "Ctrl-C" not in log.read_text():
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < end
                time.sleep(0.05)
            (address,) = [word for word in log.read_text().split() if word.startswith("http://")]
            url, page = address.rstrip("/").rsplit("/", 1)
            call(url, f"/{page}/decisions", {"row": 2, "label": "card"})
            call(url, f"/{page}/decisions", {"row": 8, "delete": True})
            process.send_signal(signal.SIGINT)
            shown, _ = process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode == 0
    assert "open this address in a browser" in log.read_text()
    assert shown.splitlines() == [
        "decided    2 of 5 rows: 1 relabelled, 0 kept, 1 deleted",
        f"left       2; go on with `remora review {run}`",
        f"next       remora retrain {run}",
    ]
    assert decisions(run) == {2: "card", 5: "", 6: "", 8: "delete", 10: ""}


def test_commands_are_quoted_for_the_shell(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from conftest import call as remora

    hard = run.rename(run.with_name("my run's"))
    suspect_list.write(hard / RELABEL, [])
    assert remora("review", hard, "--no-browser", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert shlex.split(found["again"]) == ["remora", "review", str(hard)]
    assert shlex.split(found["next"]) == ["remora", "retrain", str(hard)]
    (hard / RELABEL).unlink()
    assert remora("review", hard, "--no-browser") == 3
    told = capsys.readouterr().err
    assert f"run `remora diagnose {shlex.quote(str(hard))}` first" in told


def test_the_summary_as_json(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from conftest import call as remora

    suspect_list.write(run / RELABEL, [])
    assert remora("review", run, "--no-browser", "--json") == 0
    assert json.loads(capsys.readouterr().out)["num_rows"] == 0
    assert len(ROWS) == 12

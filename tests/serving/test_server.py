"""The process: what it needs to start, how it ends, and what the system lets it have."""

from __future__ import annotations

import gc
import re
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from remora.cli import main
from remora.config import ServeConfig
from remora.errors import ConfigError
from remora.serving import server as module
from remora.serving.server import Service
from service import Process, call, process, running, wait, write_adapter, write_adapters

TEXTS = ["Where is my card?", "the refund again"]


@pytest.fixture(scope="module")
def folders(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_adapters(tmp_path_factory.mktemp("adapters"), base)


@pytest.fixture(scope="module")
def server(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    place = tmp_path_factory.mktemp("process")
    shutil.copytree(folders["bank"], place / "live")
    with process(place / "log", folders["bank"], place / "live") as made:
        yield made


# What it needs to start


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as other:
        yield other.getsockname()[1]


def test_bad_input_is_one_line_and_an_exit_code(
    folders: dict[str, Path],
    base: Path,
    tmp_path: Path,
    taken: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("REMORA_TOKEN", raising=False)
    other = write_adapter(tmp_path / "other", base, 3, base_sha256="0" * 64)
    (tmp_path / "empty").write_text("\n")
    bank = str(folders["bank"])
    cases: list[tuple[list[str], int, str]] = [
        ([bank, "--port", str(taken)], 2, f"port {taken} .*in use.*--port"),
        ([bank, "--host", "0.0.0.0"], 2, "no token; set REMORA_TOKEN or give --token-file"),
        ([bank, "--host", "::"], 2, "no token"),
        ([bank, "--host", "203.0.113.1"], 2, "no token"),
        ([bank, "--host", "no.such.host.invalid"], 2, "cannot listen"),
        ([bank, "--token-file", str(tmp_path / "none")], 2, "No such file.*--token-file"),
        ([bank, "--token-file", str(tmp_path / "empty")], 2, "empty"),
        ([bank, f"bank={bank}"], 2, "two adapters are named bank"),
        ([f"a b={bank}"], 2, "named 'a b'"),
        ([], 2, "needs ADAPTERS"),
        ([bank, "--port", "70000", "--max-texts", "0"], 2, "port is 70000.*max_texts is 0"),
        ([bank, "--max-body", "much"], 2, "max_body is 'much'"),
        ([bank, "--max-queue", "5"], 2, "max_queue is 5; give at least max_texts"),
        ([bank, str(other), "--port", "0"], 4, "other was trained on other base weights"),
        ([str(other), "--port", "0"], 4, "other base weights"),
        ([str(tmp_path), "--port", "0"], 4, "not an adapter of Remora"),
        ([str(tmp_path / "nowhere"), "--port", "0"], 4, "there is no folder"),
        ([bank, "--model", str(tmp_path), "--port", "0"], 4, "config.json"),
    ]
    for arguments, code, wanted in cases:
        assert main(["serve", *arguments]) == code, arguments
        captured = capsys.readouterr()
        assert captured.out == ""
        (line,) = captured.err.strip().splitlines()
        assert line.startswith("error: ")
        assert re.search(wanted, line), line


def test_adapters_are_named_by_their_run_or_as_told(tmp_path: Path) -> None:
    config = ServeConfig(("runs/bank", "runs/mail/adapter", "x=some/where", str(tmp_path / "a.1")))
    assert list(config.folders()) == ["bank", "mail", "x", "a.1"]
    odd = tmp_path / "lr=2"
    assert ServeConfig((f"y={odd}",)).folders() == {"y": odd}
    with pytest.raises(ConfigError, match="named 'lr=2'"):
        ServeConfig((str(odd),))


def test_without_its_packages_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "remora.serving.server")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(ConfigError, match=r"pip install 'remora\[serve\]'"):
        __import__("remora.serving.server")


# How it ends


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGTERM, which ends a process there")
def test_sigterm_answers_what_was_taken_and_ends_with_0(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    with process(tmp_path / "log", folders["bank"]) as server:
        place = urlsplit(server.url)
        idle = socket.create_connection((place.hostname, place.port))
        many = {"texts": [f"card {i}" for i in range(256)]}
        with ThreadPoolExecutor(4) as pool:
            answers = [pool.submit(call, server.url, "/v1/classify", many) for _ in range(4)]
            wait(lambda: b"remora_queue_texts 0.0" not in call(server.url, "/metrics").body)
            server.popen.send_signal(signal.SIGTERM)
            for answer in answers:
                assert len(answer.result().json["results"]) == 256
        assert server.popen.wait(10) == 0
        assert idle.recv(1000) == b""
        idle.close()
        assert "Traceback" not in server.log.read_text()


def test_while_it_stops_it_says_so(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from remora.tree.scoring import Scorer

    score = Scorer.probabilities
    begun = threading.Event()

    def slowly(self: Scorer, messages: list[str]) -> Any:
        begun.set()
        time.sleep(1.5)
        return score(self, messages)

    monkeypatch.setattr(Scorer, "probabilities", slowly)
    with running(folders["bank"]) as service, ThreadPoolExecutor(1) as pool:
        assert call(service.url, "/ready").json == {"status": "ready"}
        taken = pool.submit(call, service.url, "/v1/classify", {"texts": TEXTS})
        begun.wait()
        service.stop()
        time.sleep(0.5)
        assert call(service.url, "/health").status == 200
        ready = call(service.url, "/ready")
        assert (ready.status, ready.json) == (503, {"status": "stopping"})
        refused = call(service.url, "/v1/classify", {"texts": ["x"]})
        assert (refused.status, refused.headers["retry-after"]) == (503, "1")
        assert len(taken.result().json["results"]) == len(TEXTS)


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="needs SIGHUP")
def test_sighup_reads_the_adapters_again(server: Process, base: Path) -> None:
    live = server.log.parent / "live"

    def served(name: str = "live") -> str:
        return str(call(server.url, f"/v1/labels?adapter={name}").json["sha256"])

    first, bank = served(), served("bank")
    for seed in (5, 6):
        before = served()
        write_adapter(live, base, seed)
        server.popen.send_signal(signal.SIGHUP)
        wait(lambda before=before: served() != before)
    assert served() != first
    assert served("bank") == bank
    (live / "adapter" / "remora.json").unlink()
    server.popen.send_signal(signal.SIGHUP)
    wait(lambda: "warning" in server.log.read_text())
    assert call(server.url, "/v1/classify", {"texts": TEXTS, "adapter": "live"}).status == 200
    assert "Traceback" not in server.log.read_text()


# What the system lets it have


def test_signals_that_the_system_lacks_are_left_out(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on Windows, where there is no SIGHUP but SIGBREAK."""
    monkeypatch.delattr(signal, "SIGHUP", raising=False)
    monkeypatch.setattr(signal, "SIGBREAK", signal.SIGTERM, raising=False)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    service = Service(ServeConfig((str(folders["bank"]),), port=0))
    stopped: list[str] = []
    monkeypatch.setattr(service, "stop", lambda: stopped.append("stop"))
    with service._signals():
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
    assert stopped == ["stop", "stop"]
    assert {number: signal.getsignal(number) for number in before} == before
    service._socket.close()
    service._engine.stop()


def test_loaded_objects_are_left_out_of_collections_while_it_serves() -> None:
    gc.unfreeze()  # what the service of another test in this process has left out
    with module._without_long_collections():
        assert gc.get_freeze_count() > 100_000  # torch alone has more
    assert gc.get_freeze_count() == 0


class OpenFiles:
    """The module `resource` of a system whose kernel allows fewer files than the hard limit."""

    RLIMIT_NOFILE = 7

    def __init__(self, soft: int, hard: int, most: int) -> None:
        self.limits, self.most = (soft, hard), most

    def getrlimit(self, kind: int) -> tuple[int, int]:
        assert kind == self.RLIMIT_NOFILE
        return self.limits

    def setrlimit(self, kind: int, limits: tuple[int, int]) -> None:
        assert kind == self.RLIMIT_NOFILE
        if limits[0] > self.most:
            raise ValueError("current limit exceeds maximum limit")
        self.limits = limits


INFINITE = 2**63 - 1  # resource.RLIM_INFINITY on macOS


@pytest.mark.parametrize(
    ("soft", "hard", "most", "expected"),
    [
        (1_000, 50_000, 10**9, 50_000),  # Linux
        (256, INFINITE, 10_240, 10_240),  # macOS
        (20_000, INFINITE, 10_240, 20_000),  # raised there already: never lowered
        (256, 4_096, 100, 256),  # refused both times
    ],
)
def test_open_files_are_raised_as_far_as_the_system_allows(
    soft: int, hard: int, most: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    system = OpenFiles(soft, hard, most)
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setitem(sys.modules, "resource", system)
    module._raise_file_limit()
    assert system.limits == (expected, hard)


def test_windows_has_no_limit_of_open_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setitem(sys.modules, "resource", None)
    module._raise_file_limit()


@pytest.mark.skipif(not Path("/proc/self/limits").exists(), reason="needs /proc")
def test_the_limit_of_open_files_is_raised(server: Process) -> None:
    limits = Path(f"/proc/{server.popen.pid}/limits").read_text()
    soft, hard = re.search(r"Max open files +(\d+) +(\d+)", limits).groups()  # type: ignore[union-attr]
    assert soft == hard  # it was started with fewer

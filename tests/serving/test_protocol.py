"""Clients that mean it ill: slow ones, large bodies, many connections.

Also covers the limits of remora.serving.limits on bodies.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import re
import socket
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from remora.serving.server import Service
from service import Process, call, process, running, wait, write_adapters

TEXTS = ["Where is my card?", "the refund again"]
ASK = {"texts": TEXTS, "adapter": "bank"}

needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")


@pytest.fixture(scope="module")
def folders(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_adapters(tmp_path_factory.mktemp("adapters"), base)


@pytest.fixture(scope="module")
def service(folders: dict[str, Path]) -> Iterator[Service]:
    with running(folders["bank"], read_seconds=0.5) as made:
        yield made


@pytest.fixture(scope="module")
def server(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    log = tmp_path_factory.mktemp("process") / "log"
    with process(log, folders["bank"]) as made:
        yield made


HEAD = b"POST /v1/classify HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
SLOW = {
    "idle": (b"", b""),
    "slow headers": (b"GET /health HTTP/1.1\r\n", b"a"),
    "slow body": (HEAD + b"content-length: 900\r\n\r\n", b" "),
    "slow chunks": (HEAD + b"transfer-encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
    "idle after a request": (b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n", b""),
    "slow second headers": (b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\nGET /", b"a"),
    "a body that nobody reads": (
        b"GET /health HTTP/1.1\r\nhost: localhost\r\ncontent-length: 900\r\n\r\n",
        b" ",
    ),
}


def closed_after(url: str, start: bytes, drip: bytes, limit: float) -> tuple[float, bytes]:
    """Send something slowly; return the seconds until the service closed, and what it said."""
    place = urlsplit(url)
    began, said = time.monotonic(), b""
    with socket.create_connection((place.hostname, place.port)) as connection:
        connection.sendall(start)
        connection.settimeout(0.05)
        while time.monotonic() - began < limit:
            try:
                received = connection.recv(10_000)
                said += received
                if not received:
                    return time.monotonic() - began, said
            except TimeoutError:
                with contextlib.suppress(ConnectionError):
                    connection.sendall(drip)
            except ConnectionError:
                return time.monotonic() - began, said
    raise AssertionError(f"still open after {limit} seconds")


@pytest.mark.parametrize("name", SLOW)
def test_slow_clients_are_cut_off(service: Service, name: str) -> None:
    seconds, said = closed_after(service.url, *SLOW[name], limit=3)
    assert 0.4 < seconds < 1.2
    if name in {"slow headers", "slow body", "slow chunks"}:
        assert said.startswith(b"HTTP/1.1 408 ")


def test_who_is_slow_while_the_service_is_behind_is_not_cut_off(service: Service) -> None:
    place = urlsplit(service.url)
    with socket.create_connection((place.hostname, place.port), timeout=5) as connection:
        time.sleep(0.2)
        assert service._loop is not None
        service._loop.call_soon_threadsafe(time.sleep, 1)
        time.sleep(1.2)
        connection.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 200 ")


def test_by_default_it_takes_less_than_5_seconds(server: Process) -> None:
    with ThreadPoolExecutor(len(SLOW)) as pool:
        each = list(pool.map(lambda slow: closed_after(server.url, *slow, limit=8), SLOW.values()))
    assert max(seconds for seconds, _ in each) < 5


def test_who_takes_no_answer_is_cut_off(service: Service) -> None:
    place = urlsplit(service.url)
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect((place.hostname, place.port))
        connection.settimeout(0.3)
        began = time.monotonic()
        with contextlib.suppress(TimeoutError, ConnectionError):  # cut off while it still sends
            while True:
                connection.sendall(b"GET /openapi.json HTTP/1.1\r\nhost: localhost\r\n\r\n" * 50)
        wait(lambda: not service._server.server_state.connections, 10)
        assert time.monotonic() - began < 5


def send_body(server: Process, num_bytes: int, head: bytes, chunked: bool) -> tuple[bytes, int]:
    """Send a body of blanks; return the answer's beginning and the server's growth in bytes."""
    place = urlsplit(server.url)
    before = most = server.memory_bytes
    piece = b" " * 65_536
    framed = b"10000\r\n" + piece + b"\r\n" if chunked else piece
    with socket.create_connection((place.hostname, place.port)) as connection:
        connection.sendall(head)
        with contextlib.suppress(ConnectionError):
            for number in range(num_bytes // len(piece)):
                connection.sendall(framed)
                if number % 64 == 0:
                    most = max(most, server.memory_bytes)
        connection.settimeout(5)
        said = connection.recv(100)
    return said, max(most, server.memory_bytes) - before


def large_bodies(server: Process, num_bytes: int) -> None:
    call(server.url, "/v1/classify", ASK)
    told = HEAD + f"content-length: {num_bytes}\r\n\r\n".encode()
    for head, chunked in ((told, False), (HEAD + b"transfer-encoding: chunked\r\n\r\n", True)):
        said, grown = send_body(server, num_bytes, head, chunked)
        assert said.startswith(b"HTTP/1.1 413 ")
        assert grown <= 10_000_000
    assert call(server.url, "/v1/classify", ASK).status == 200


@needs_proc
def test_a_large_body_is_refused_and_not_held(server: Process) -> None:
    large_bodies(server, 30_000_000)


def test_a_body_that_says_it_is_large_is_refused_before_it_comes(service: Service) -> None:
    place = urlsplit(service.url)
    with socket.create_connection((place.hostname, place.port), timeout=5) as connection:
        connection.sendall(HEAD + b"expect: 100-continue\r\ncontent-length: 200000000\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 413 ")


@needs_proc
@pytest.mark.durability
def test_a_body_of_200_MB_is_refused_and_not_held(server: Process) -> None:  # noqa: N802
    large_bodies(server, 200_000_000)


def times(url: str, count: int) -> list[float]:
    found = []
    for _ in range(count):
        began = time.perf_counter()
        assert call(url, "/v1/classify", ASK).status == 200
        found.append(time.perf_counter() - began)
    return found


def stuck_connections(server: Process, num_stuck: int, num_requests: int) -> None:
    """Check that a client's 99th percentile stays within 0.5 s of what it is without the others."""
    place = urlsplit(server.url)
    times(server.url, 5)
    normal = statistics.quantiles(times(server.url, num_requests), n=100)[-1]
    kinds = list(SLOW.values())
    stuck: list[socket.socket] = []

    def hold(number: int) -> None:
        connection = socket.create_connection((place.hostname, place.port))
        stuck.append(connection)
        with contextlib.suppress(ConnectionError):
            connection.sendall(kinds[number % len(kinds)][0])

    began = time.monotonic()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(hold, range(num_stuck)))
        assert len(stuck) == num_stuck
        assert time.monotonic() - began < 4, "the first were cut off before the last were there"
        found = statistics.quantiles(times(server.url, num_requests), n=100)[-1]
    for connection in stuck:
        connection.close()
    assert found < normal + 0.5


def test_stuck_connections_do_not_slow_others(server: Process) -> None:
    stuck_connections(server, 200, 50)


@pytest.mark.durability
def test_3000_stuck_connections_do_not_slow_others(server: Process) -> None:
    stuck_connections(server, 3_000, 200)


async def ask_at_once(url: str, num_requests: int) -> list[int]:
    """Send requests at once, each on a connection of its own; return the statuses."""
    place = urlsplit(url)
    body = b'{"texts": ["Where is my card?"], "adapter": "bank"}'
    request = HEAD + f"content-length: {len(body)}\r\nconnection: close\r\n\r\n".encode() + body

    async def ask() -> int:
        reader, writer = await asyncio.open_connection(place.hostname, place.port)
        writer.write(request)
        try:
            answer = await reader.read()
        except ConnectionError:
            return -1  # reset
        finally:
            writer.close()
        if not answer:
            return 0  # closed without an answer
        head, _, rest = answer.partition(b"\r\n\r\n")
        length = int(re.search(rb"content-length: (\d+)", head)[1])  # type: ignore[index]
        assert len(rest) == length
        status = int(head.split()[1])
        assert status == 200 or b"retry-after: " in head
        return status

    return list(await asyncio.gather(*[ask() for _ in range(num_requests)]))


def requests_at_once(server: Process, num_requests: int) -> None:
    found = asyncio.run(ask_at_once(server.url, num_requests))
    assert len(found) == num_requests
    assert set(found) <= {200, 429, 503}, collections.Counter(found)
    assert found.count(200) >= min(num_requests, 1024) // 2


def test_requests_at_once_are_all_answered(server: Process) -> None:
    requests_at_once(server, 300)


@pytest.mark.durability
def test_10_000_requests_at_once_are_all_answered(server: Process) -> None:
    requests_at_once(server, min(10_000, open_files() - 500))


def open_files() -> int:
    resource = pytest.importorskip("resource", reason="needs a limit of open files")
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    return most


def test_too_many_bodies_at_once_are_refused(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from remora.serving import limits

    monkeypatch.setattr(limits, "HELD_BODIES", 2)
    with running(folders["bank"], max_body="100kB") as service:
        place = urlsplit(service.url)
        with contextlib.ExitStack() as stack:
            for _ in range(2):
                connection = stack.enter_context(
                    socket.create_connection((place.hostname, place.port))
                )
                connection.sendall(HEAD + b"content-length: 100000\r\n\r\n" + b" " * 99_000)
            time.sleep(0.2)
            answer = call(service.url, "/v1/classify", b" " * 50_000)
            assert (answer.status, answer.headers["retry-after"]) == (503, "1")
        wait(lambda: call(service.url, "/v1/classify", {"texts": ["x" * 10_000]}).status == 200)

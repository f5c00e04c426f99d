"""Services for tests: random adapters, a service in a thread or a process, an HTTP client."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch

import forked
from conftest import WORDS, randomize_adapter
from remora.config import PredictConfig, ServeConfig
from remora.models import loading, lora, metadata, saved
from remora.runtime import files
from remora.serving.predict import predict_stream
from remora.serving.server import Service


def write_adapter(
    folder: Path,
    base: Path,
    seed: int,
    labels: Sequence[str] = tuple(WORDS),
    modules: Sequence[str] = (),
    base_sha256: str | None = None,
) -> Path:
    """Write a run directory with an adapter of random weights; return it."""
    torch.manual_seed(seed)
    adapted = lora.add_adapter(
        loading.load(base, torch.float32), rank=4, alpha=32, dropout=0.0, modules=modules
    )
    randomize_adapter(adapted, seed)
    card = metadata.AdapterCard(
        base_model=str(base),
        base_sha256=base_sha256 or files.weights_sha256(base),
        labels=tuple(labels),
        instruction="Classify the message.",
        list_labels=False,
        label_texts={},
        max_length=200,
    )
    folder.mkdir(parents=True, exist_ok=True)
    saved.save_adapter(adapted, card, folder / "adapter")
    return folder


def predicted(
    adapter: Path, texts: Sequence[str], top_k: int, **settings: Any
) -> list[list[tuple[str, float]]]:
    """Return the answers of `remora predict` for some texts."""
    table = adapter / "texts.jsonl"
    table.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    config = PredictConfig(
        adapter=adapter, source=str(table), top_k=top_k, precision="float32", **settings
    )
    return [best for _, best in predict_stream(config)]


@dataclass(frozen=True)
class Response:
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def call(
    url: str,
    path: str,
    body: Any = None,
    *,
    method: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """Send one request; a body that is not bytes is sent as JSON."""
    place = urlsplit(url)
    connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=60)
    raw = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    sent = {"content-type": "application/json"} if body is not None else {}
    try:
        connection.request(
            method or ("GET" if body is None else "POST"), path, raw, {**sent, **(headers or {})}
        )
        answer = connection.getresponse()
        names = {name.lower(): value for name, value in answer.getheaders()}
        return Response(answer.status, names, answer.read())
    finally:
        connection.close()


@contextlib.contextmanager
def running(*adapters: str | Path, **settings: Any) -> Iterator[Service]:
    """Serve in a thread of this process."""
    config = ServeConfig(
        tuple(map(str, adapters)), **{"port": 0, "precision": "float32", **settings}
    )
    service = Service(config)
    thread = threading.Thread(target=service.run)
    thread.start()
    try:
        wait(lambda: call(service.url, "/health").status == 200)
        yield service
    finally:
        if not service._state.is_draining:
            service.stop()
        thread.join(30)
        assert not thread.is_alive()


@dataclass(frozen=True)
class Process:
    """A service in its own process."""

    popen: forked.Child | subprocess.Popen[str]
    url: str
    log: Path

    @property
    def memory_bytes(self) -> int:
        """The resident memory of the process."""
        status = Path(f"/proc/{self.popen.pid}/status").read_text()
        return 1024 * int(status.split("VmRSS:")[1].split()[0])


@contextlib.contextmanager
def process(log: Path, *arguments: str | Path) -> Iterator[Process]:
    """Run `remora serve`; it is killed if it still runs at the end."""
    program = forked.remora("serve", "--port", 0, "--precision", "float32", *arguments)
    few_files = "import resource\nhard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]\n"
    few_files += "resource.setrlimit(resource.RLIMIT_NOFILE, (1_000, hard))\n"
    with log.open("w") as file:
        popen = forked.start(few_files + program if os.name == "posix" else program, file)
        try:
            wait(lambda: "serving" in log.read_text() or popen.poll() is not None)
            assert popen.poll() is None, log.read_text()
            words = log.read_text().split()
            yield Process(popen, next(w for w in words if w.startswith("http://")).rstrip(","), log)
        finally:
            if popen.poll() is None:
                popen.kill()
                popen.wait()


def wait(done: Any, seconds: float = 60) -> None:
    """Wait until a condition holds; a connection that is refused counts as not yet."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(ConnectionError):
            if done():
                return
        time.sleep(0.02)
    raise AssertionError("it took too long")


def write_adapters(parent: Path, base: Path) -> dict[str, Path]:
    """Write two adapters for the same base, with different labels."""
    return {
        "bank": write_adapter(parent / "bank", base, 1),
        "mail": write_adapter(parent / "mail", base, 2, ["spam", "ham"]),
    }

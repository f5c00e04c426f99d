"""Requests per second and latency of `remora serve`, against generate() behind the same framework.

The base model in the package with an adapter trained on Banking77, float32. Six services answer
the same requests of one message each, from clients that send the next as soon as they are answered:

- `remora serve`, with probabilities to 0.01;
- `remora serve --tolerance 1`, which makes sure of the likeliest label only;
- the same of base and adapter merged into one model;
- FastAPI and uvicorn around `model.generate()` of the merged model, one request at a time, the text
  matched to a label;
- the same, but what waits is generated together, padded, up to 64 at a time;
- that with the cache of what all prompts begin with, computed once and copied for each batch.

Each service is a process of its own, the clients are in this one.

    python benchmarks/serving.py
    python benchmarks/serving.py --list-labels
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import queue
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np

import scoring
import workload

OURS = ("remora", "remora, tolerance 1", "remora, tolerance 1, merged")
THEIRS = ("generate, one at a time", "generate, batched", "generate, prefix kept")
ARMS = (*OURS, *THEIRS)
LARGEST_BATCH = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    scoring.add_arguments(parser)
    parser.add_argument("--requests", type=int, default=1_024)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.arm:
        generate(options.folder, options.port, options.arm)
        return
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        texts, true = train(folder, options)
        name = "serving-labels-listed" if options.list_labels else "serving"
        few = slice(options.requests)
        compare(name, folder, texts[few], true[few], options.clients)


def train(folder: Path, options: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Train an adapter or take the run's, save it and the merged model; return the test rows."""
    from remora.models import hub, metadata, saved
    from remora.runtime import files

    base = hub.find(options.model)
    adapted, prompt, dataset = scoring.adapter(options)
    card = metadata.AdapterCard(
        base_model=str(base),
        base_sha256=files.weights_sha256(base),
        labels=prompt.labels,
        instruction=prompt.instruction,
        list_labels=prompt.list_labels,
        label_texts=prompt.label_texts,
        max_length=prompt.max_length,
    )
    saved.save_adapter(adapted, card, folder / "adapter")
    merged = adapted.merge_and_unload()
    saved.write_model(merged, prompt, card, folder / "merged")
    return list(dataset.test.texts), list(dataset.test.labels)


def compare(name: str, folder: Path, texts: list[str], true: list[str], clients: list[int]) -> None:
    results: dict[str, Any] = {"requests": len(texts)}
    answers: dict[str, list[str | None]] = {}
    rows = []
    for arm in ARMS:
        with service(arm, folder) as port:
            asyncio.run(load(port, texts[:16], 4))  # warm-up
            for number in clients:
                seconds, each, answers[arm] = asyncio.run(load(port, texts, number))
                p50, p99 = np.percentile(each, [50, 99])
                figures = {
                    "per_second": len(texts) / seconds,
                    "p50_seconds": p50,
                    "p99_seconds": p99,
                }
                results[f"{arm}, {number} clients"] = figures
                rows.append(
                    [
                        arm,
                        str(number),
                        f"{len(texts) / seconds:.0f}",
                        f"{1e3 * p50:.0f}",
                        f"{1e3 * p99:.0f}",
                    ]
                )
    workload.print_table(["service", "clients", "requests/s", "p50 ms", "p99 ms"], rows)
    ours = answers[ARMS[0]]
    for arm in ARMS:
        same = sum(a == b for a, b in zip(answers[arm], ours, strict=True))
        right = sum(a == b for a, b in zip(answers[arm], true, strict=True))
        results[f"{arm}, answers"] = {"as_remora": same, "right": right}
        print(f"{arm}: the answer of remora serve on {same} of {len(texts)} rows, right on {right}")
    workload.write(name, results)


@contextlib.contextmanager
def service(arm: str, folder: Path) -> Iterator[int]:
    """Start a service in a process of its own; give its port once it is ready."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    served = folder / ("merged" if arm == OURS[2] else "adapter")
    ours = ["-m", "remora", "serve", str(served), "--precision", "float32", "--device", "cpu"]
    ours += ["--tolerance", "0.01" if arm == OURS[0] else "1"]
    theirs = [__file__, "--arm", arm, "--folder", str(folder / "merged")]
    command = [sys.executable, *(ours if arm in OURS else theirs), "--port", str(port)]
    process = subprocess.Popen(command)
    try:
        while True:
            with (
                contextlib.suppress(ConnectionError),
                socket.create_connection(("127.0.0.1", port)),
            ):
                break
            if process.poll() is not None:
                raise SystemExit(f"error: the service ended: {' '.join(command)}")
            time.sleep(0.1)
        yield port
    finally:
        process.terminate()
        process.wait(30)


async def load(
    port: int, texts: list[str], num_clients: int
) -> tuple[float, list[float], list[str | None]]:
    """Send the texts from some clients; return the seconds in all and for each, and the labels."""
    waiting = iter(enumerate(texts))
    seconds = [0.0] * len(texts)
    labels: list[str | None] = [None] * len(texts)

    async def client() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for place, text in waiting:
            body = json.dumps({"texts": [text]}).encode()
            head = (
                "POST /v1/classify HTTP/1.1\r\nhost: 127.0.0.1\r\n"
                f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
            )
            began = time.perf_counter()
            writer.write(head.encode() + body)
            answer = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            assert answer.startswith("http/1.1 200 "), answer
            length = int(answer.split("content-length: ")[1].split("\r\n")[0])
            found = json.loads(await reader.readexactly(length))
            seconds[place] = time.perf_counter() - began
            labels[place] = found["results"][0]["labels"][0]["label"]
        writer.close()
        await writer.wait_closed()

    began = time.perf_counter()
    await asyncio.gather(*[client() for _ in range(num_clients)])
    return time.perf_counter() - began, seconds, labels


def generate(merged: Path, port: int, arm: str) -> None:
    """Serve generate() in the ordinary way: a thread takes what waits, and writes labels."""
    import torch
    import uvicorn
    from fastapi import FastAPI

    from remora.models import saved

    model, prompt, _ = saved.load_adapter(
        merged, base=None, dtype=torch.float32, device=torch.device("cpu")
    )
    one_at_a_time, _, prefix_kept = THEIRS
    batched = arm != one_at_a_time
    write = scoring.generating(model, prompt, LARGEST_BATCH, keep_prefix=arm == prefix_kept)
    waiting: queue.Queue[tuple[str, Future[str | None]]] = queue.Queue()

    def work() -> None:
        while True:
            taken = [waiting.get()]
            with contextlib.suppress(queue.Empty):
                while batched and len(taken) < LARGEST_BATCH:
                    taken.append(waiting.get_nowait())
            labels = write([text for text, _ in taken])
            for (_, future), label in zip(taken, labels, strict=True):
                future.set_result(label)

    threading.Thread(target=work, daemon=True).start()
    app = FastAPI()

    @app.post("/v1/classify")
    async def classify(body: dict[str, list[str]]) -> dict[str, Any]:
        futures: list[Future[str | None]] = [Future() for _ in body["texts"]]
        for text, future in zip(body["texts"], futures, strict=True):
            waiting.put((text, future))
        labels = [await asyncio.wrap_future(future) for future in futures]
        return {"results": [{"labels": [{"label": label}]} for label in labels]}

    uvicorn.run(app, port=port, log_level="error", access_log=False)


if __name__ == "__main__":
    main()

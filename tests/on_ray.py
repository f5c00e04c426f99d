"""Tables, parts, and a stand-in for Ray, for the tests of `predict --engine ray`."""

from __future__ import annotations

import csv
import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from conftest import WAYS, call
from remora.serving.part_files import JOURNAL

NUM_ROWS = 600


def write_rows(path: Path, first: int = 0, num_rows: int = NUM_ROWS) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "text", "note"])
        for i in range(first, first + num_rows):
            writer.writerow([i, "" if i % 97 == 5 else WAYS[i % 5].format(i), f'a "b",\n{i}'])
    return path


def rows_of(text: str) -> list[list[str]]:
    return list(csv.reader(io.StringIO(text, newline="")))


def read_parts(folder: Path) -> list[list[str]]:
    """The rows of all parts of CSV in their order, the header once."""
    parts = [rows_of(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("part-*"))]
    assert all(part[0] == parts[0][0] and len(part) > 1 for part in parts)
    return parts[0][:1] + [row for part in parts for row in part[1:]]


def journal(folder: Path) -> Any:
    return json.loads((folder / JOURNAL).read_text())


def plain(run: Path, source: Path, tmp_path: Path, *more: str) -> list[list[str]]:
    out = tmp_path / "plain.csv"
    assert call("predict", run, source, "--device", "cpu", "--output", out, *more) == 0
    return rows_of(out.read_text(encoding="utf-8"))


class RayError(Exception): ...


class RayTaskError(RayError):
    cause: BaseException


class StandIn:
    """What is used of Ray: calls are computed when they are waited for, in a random order."""

    exceptions = SimpleNamespace(RayError=RayError, RayTaskError=RayTaskError)

    def __init__(self, dies: Callable[[int], bool] = lambda number: False) -> None:
        self.dies, self.num_calls, self.num_actors = dies, 0, 0
        self.random = random.Random(0)
        self.resources = {"CPU": 2.0, "memory": 9e9}

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": self.resources}, {"Alive": False, "Resources": {}}]

    def remote(self, kind: Any) -> Any:
        return SimpleNamespace(
            options=lambda **_: SimpleNamespace(remote=lambda *given: self._actor(kind(*given)))
        )

    def _actor(self, actor: Any) -> Any:
        self.num_actors += 1
        state = {"dead": False}

        def method(name: str) -> Any:
            def call(*given: Any) -> Any:
                return SimpleNamespace(run=lambda: getattr(actor, name)(*given), state=state)

            return SimpleNamespace(remote=lambda *given: Reference(call(*given)))

        return SimpleNamespace(open=method("open"), answers=method("answers"))

    def wait(self, references: list[Any], num_returns: int, timeout: float) -> Any:
        if timeout == 0 and self.random.random() < 0.5:
            return [], references
        # An actor answers its calls in their order.
        by_actor: dict[int, list[Any]] = {}
        for each in references:
            by_actor.setdefault(id(each.call.state), []).append(each)
        queues, ready = list(by_actor.values()), list[Any]()
        for _ in range(self.random.randint(1, num_returns)):
            queue = self.random.choice(queues)
            ready.append(queue.pop(0))
            queues = [each for each in queues if each]
        return ready, [each for each in references if each not in ready]

    def get(self, reference: Any) -> Any:
        self.num_calls += 1
        state = reference.call.state
        state["dead"] |= self.dies(self.num_calls)
        if state["dead"]:
            raise RayError("the worker is dead")
        try:
            return reference.call.run()
        except Exception as error:
            failed = RayTaskError("a long traceback")
            failed.cause = error
            raise failed from error


class Reference:
    def __init__(self, call: Any) -> None:
        self.call = call

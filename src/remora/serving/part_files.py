"""A folder of predictions in parts: each written whole or not at all, and listed in a journal.

The journal is the truth: it names the parts that are whole, with the rows of each, and what they
were computed from. A part is written first and listed then, so a process that is killed between the
two leaves a part that its successor replaces. The name begins with an underscore, by which Spark,
pandas and Arrow know that it is no part of the table.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from remora.data import locations
from remora.data.locations import Location
from remora.errors import ConfigError, DataError, ResourceError
from remora.formatting import one_line, quote
from remora.runtime import files
from remora.serving.prediction_files import Writer, check_format
from remora.serving.predictor import Answer

JOURNAL, LOCK = "_remora.json", "_remora.lock"
SCHEMA = 1
PART_SECONDS = 600.0
"""Time after which a part ends, so that a killed process loses no more than this."""

Row = tuple[str | None, list[object]]
"""The message of a row, None if it is blank, and the values to keep."""


@dataclass
class Journal:
    """What a folder holds."""

    settings: dict[str, Any]  # that its rows depend on
    sources: list[Location]
    parts: list[dict[str, Any]] = field(default_factory=list)  # name, source, rows, withheld
    finished: bool = False

    def num_rows(self, source: int | None = None) -> int:
        """Return the rows of all parts, or of those of one source."""
        return sum(p["rows"] for p in self.parts if source is None or p["source"] == source)

    @property
    def num_withheld(self) -> int:
        """The rows below the threshold."""
        return sum(part["withheld"] for part in self.parts)

    def to_dict(self) -> dict[str, Any]:
        """Return the journal as JSON has it."""
        return {
            "schema": SCHEMA,
            "settings": self.settings,
            "sources": [each.to_dict() for each in self.sources],
            "parts": self.parts,
            "finished": self.finished,
        }


class PartFolder:
    """The folder of one command's predictions, which may hold finished parts of it already."""

    def __init__(self, url: str, settings: dict[str, Any], sources: Sequence[Location]) -> None:
        """Open or make the folder.

        Args:
            url: A path, or a URL that fsspec knows.
            settings: What the rows depend on, as JSON has it.
            sources: The files that are read.

        Raises:
            ConfigError: If it is no folder, or holds anything else than parts of this command.
            DataError: If a source has changed since the first part, or a part is missing.
            ResourceError: If it cannot be made.
        """
        self.url = url.rstrip("/")
        self.suffix = check_format(self.url)
        self._system, self._path = locations.open_file_system(self.url)
        self.journal = Journal(json.loads(json.dumps(settings)), list(sources))
        with self._writing():
            there = self._names()
            if JOURNAL in there:
                self._check(self._read(), there)
            elif others := sorted(name for name in there if not _is_left_at_start(name)):
                raise ConfigError(
                    f"{url} holds {quote(others[0])}, and no predictions in parts; give another"
                    " --output"
                )
            self._system.makedirs(self._path, exist_ok=True)
        if not self.journal.parts:
            self._save()

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder against other processes of this machine; raises ConfigError."""
        from filelock import FileLock, Timeout

        if locations.is_url(self.url):  # whose writes are whole; two would write the same
            yield
            return
        with self._writing():
            lock = FileLock(Path(self._path) / LOCK)
            try:
                lock.acquire(blocking=False)
            except Timeout:
                raise ConfigError(
                    f"another process writes to {self.url}; wait for it, or give another --output"
                ) from None
        try:
            yield
        finally:
            lock.release()
            with contextlib.suppress(OSError):
                (Path(self._path) / LOCK).unlink(missing_ok=True)

    def write(
        self,
        answered: Iterator[tuple[int, list[Row], list[Answer]]],
        part_rows: int,
        opened: Callable[[Path], contextlib.AbstractContextManager[Writer]],
        advance: Callable[[int], object] = lambda num_rows: None,
    ) -> None:
        """Write the parts that are not there yet.

        What was answered before an error becomes a part too, as it does on an interrupt.

        Args:
            answered: The source of each batch, its rows and their answers, in order.
            part_rows: Rows after which a part ends.
            opened: Opens what writes a part to a path.
            advance: Called with the number of rows that are written now.

        Raises:
            DataError: If the format cannot hold the input's values.
            ResourceError: If the disk fails.
        """
        batch, error = _next(answered)
        while batch is not None:
            source = batch[0]
            began, num_rows, num_withheld = time.monotonic(), 0, 0
            with self._part(opened) as (name, writer):
                while batch is not None and batch[0] == source:
                    _, rows, answers = batch
                    for (_, values), answer in zip(rows, answers, strict=True):
                        writer.write(values, *answer)
                        num_withheld += bool(answer.ranked) and answer.label is None
                    num_rows += len(rows)
                    advance(len(rows))
                    batch, error = _next(answered)
                    if num_rows >= part_rows or time.monotonic() - began > PART_SECONDS:
                        break
            self.journal.parts.append(
                {"name": name, "source": source, "rows": num_rows, "withheld": num_withheld}
            )
            self._save()
        if error is not None:
            raise error

    def finish(self) -> None:
        """Note that every row of every source is there."""
        self.journal.finished = True
        self._save()

    @contextlib.contextmanager
    def _part(
        self, opened: Callable[[Path], contextlib.AbstractContextManager[Writer]]
    ) -> Iterator[tuple[str, Writer]]:
        """Open the writer of the next part; it is in its place when the context ends."""
        name = f"part-{len(self.journal.parts):05}{self.suffix}"
        if not locations.is_url(self.url):
            path = Path(self._path) / name
            with opened(path) as writer:
                yield name, writer
            return
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / name
            with opened(path) as writer:
                yield name, writer
            with self._writing():
                self._system.put_file(str(path), f"{self._path}/{name}")

    def _names(self) -> set[str]:
        """Return the names of the files in the folder."""
        self._system.invalidate_cache()
        if not self._system.exists(self._path):
            return set()
        if not self._system.isdir(self._path):
            raise ConfigError(
                f"{self.url} is a file, and the parts need a folder; give another --output"
            )
        return {Path(each).name for each in self._system.ls(self._path, detail=False)}

    def _read(self) -> Journal:
        """Return the journal in the folder."""
        try:
            values = json.loads(self._system.cat_file(f"{self._path}/{JOURNAL}"))
            if values["schema"] != SCHEMA:
                raise ValueError(f"schema {values['schema']}, where {SCHEMA} is known")
            sources = [Location(**each) for each in values["sources"]]
            return Journal(values["settings"], sources, values["parts"], values["finished"])
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{self.url}/{JOURNAL} cannot be read ({one_line(error)}); give another --output"
            ) from error

    def _check(self, found: Journal, there: Iterable[str]) -> None:
        """Take over the parts that are there, if they are parts of this command."""
        for name, value in self.journal.settings.items():
            if (other := found.settings.get(name)) != value:
                raise ConfigError(
                    f"{self.url} holds predictions of another run, with {name} {other!r} where"
                    f" this has {value!r}; give another --output"
                )
        before = {each.name: each for each in found.sources}
        for location in self.journal.sources:
            if location.name not in before:
                raise DataError(
                    f"{location.name} was not there when {self.url} was begun; give another"
                    " --output"
                )
            if location != before.pop(location.name):
                raise DataError(
                    f"{location.name} has changed since {self.url} was begun; give another"
                    " --output, or restore the file"
                )
        for name in before:
            raise DataError(
                f"{name} is gone since {self.url} was begun; give another --output, or restore it"
            )
        if missing := [part["name"] for part in found.parts if part["name"] not in there]:
            raise DataError(
                f"{self.url} lacks {missing[0]}, which was finished; restore it, or give another"
                " --output"
            )
        self.journal = found

    def _save(self) -> None:
        text = json.dumps(self.journal.to_dict(), indent=1, ensure_ascii=False) + "\n"
        if locations.is_url(self.url):
            with self._writing():
                self._system.pipe_file(f"{self._path}/{JOURNAL}", text.encode())
        else:
            files.write_text(Path(self._path) / JOURNAL, text)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Raise what a file system fails with as a ResourceError."""
        try:
            yield
        except (ConfigError, DataError, ResourceError):
            raise
        except Exception as error:
            reason = getattr(error, "strerror", None) or one_line(error)
            raise ResourceError(
                f"cannot write to {self.url} ({reason}); free space, check the access, or give"
                " another --output"
            ) from error


def _is_left_at_start(name: str) -> bool:
    """Whether a process that was killed before its first journal stood may have left a file."""
    return files.final_name(name).removesuffix(".tmp") in (JOURNAL, LOCK)


def _next(
    answered: Iterator[tuple[int, list[Row], list[Answer]]],
) -> tuple[tuple[int, list[Row], list[Answer]] | None, BaseException | None]:
    """Return the next batch, None at the end, or the error in its place."""
    try:
        return next(answered, None), None
    except BaseException as error:
        return None, error

"""Runs to review, made up: what training and a diagnosis leave, without either."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from conftest import write_rows
from remora.config import ReviewConfig, TrainConfig
from remora.data.corrections import RELABEL
from remora.data.dataset import load_data
from remora.data.table import Table
from remora.diagnosis import suspect_list
from remora.diagnosis.suspect_list import Suspect
from remora.review import Review, Summary
from remora.runtime import files

ROWS = Table(
    [
        *("where is my card", "my card is late", "card gone", "a refund please"),
        *("refund me", "=refund(1) where is it", "top up failed", "no top up again"),
        *("my card, still no card", "card?", "give me my refund", "the top up is not there"),
    ],
    [
        *("card", "refund", "card", "refund"),
        *("top up", "card", "top up", "refund"),
        *("card", "card", "refund", "top up"),
    ],
)
SUSPECTS = (  # row, suggested, p_wrong
    (2, "card", 0.99),
    (5, "refund", 0.95),
    (6, "refund", 0.92),
    (8, "top up", 0.6),
    (10, "refund", 0.3),
)


def write_run(
    folder: Path,
    table: Table = ROWS,
    suspects: Sequence[tuple[int, str, float]] = SUSPECTS,
    **settings: object,
) -> Path:
    """Write a run directory whose table is `table` and whose relabel.csv lists the suspects."""
    folder.mkdir(parents=True, exist_ok=True)
    data = write_rows(folder / "data.csv", table.texts, table.labels)
    config = TrainConfig(str(data), model="nano", **{"test_fraction": 0.0, **settings})
    run = folder / "run"
    run.mkdir()
    files.write_text(run / "config.toml", config.to_toml())
    files.write_json(run / "data.json", load_data(config).summary.to_dict())
    suspect_list.write(run / RELABEL, [suspect(table, *each) for each in suspects])
    return run


def suspect(table: Table, row: int, suggested: str, p_wrong: float) -> Suspect:
    return Suspect(
        row=row,
        text=table.texts[row - 1],
        label=table.labels[row - 1],
        suggested=suggested,
        p_wrong=p_wrong,
        p_label=0.1,
        p_suggested=0.8,
        neighbours=3,
    )


def decisions(run: Path, name: str = RELABEL) -> dict[int, str]:
    """The column `decision` of a run's sheet by row, read as a person's spreadsheet would."""
    import csv

    with (run / name).open(encoding="utf-8", newline="") as file:
        return {int(each["row"]): each["decision"] for each in csv.DictReader(file)}


@contextlib.contextmanager
def reviewing(run: Path) -> Iterator[Review]:
    """Review a run in a thread of this process."""
    review, said, ended = Review(ReviewConfig(run, browser=False)), threading.Event(), []
    review._say = lambda line: said.set()

    def serve() -> None:
        ended.append(review.run())

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        assert said.wait(30)
        yield review
    finally:
        if thread.is_alive():
            review.stop()
        thread.join(30)
        assert not thread.is_alive()
        assert isinstance(ended[0], Summary)

"""A finished run to export, with its base model and its table, and the verb's command line."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import pytest

from conftest import WAYS, WORDS, made_once
from remora.cli import main
from remora.config import PredictConfig, TrainConfig
from remora.serving import predict
from remora.training.run import train

MESSAGES = [way.format(word) for way in WAYS for word in WORDS.values()]


@pytest.fixture(scope="session")
def original(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, its base model and its table in one folder, to be copied."""
    return made_once(tmp_path_factory, "original", lambda place: write_run(base, place))


def write_run(base: Path, place: Path) -> None:
    shutil.copytree(base, place / "base")
    with (place / "data.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for i in range(8):
            for label, word in WORDS.items():
                writer.writerows([f"{way.format(word)} {i}", label] for way in WAYS)
    config = TrainConfig(
        str(place / "data.csv"),
        model=str(place / "base"),
        output=place,
        name="run",
        learning_rate=1e-2,
        epochs=6,
        batch_size=8,
        rank=8,
        precision="float32",
        device="cpu",
    )
    result = train(config)
    assert result.metrics.accuracy == 1


@pytest.fixture
def place(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy that a test may change; the paths in it lead there."""
    copied = shutil.copytree(original, tmp_path / "place")
    for path in (copied / "run" / "config.toml", copied / "run" / "adapter" / "remora.json"):
        path.write_text(path.read_text().replace(str(original), str(copied)))
    monkeypatch.chdir(copied)
    return copied


def remora(*arguments: str | Path, verb: str = "export") -> int:
    """Run the command line in this process."""
    try:
        return main([verb, *map(str, arguments), "--device", "cpu"])
    except SystemExit as done:
        return int(done.code or 0)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def refused(place: Path, capsys, code: int, wanted: str, *arguments: str | Path) -> None:
    """An export ends with one line and a code, and leaves every file and folder as it was."""
    before, folders = contents(place), sorted(place.rglob("*"))
    assert remora(*arguments) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = (line for line in captured.err.splitlines() if line.strip())
    (line,) = (line for line in lines if not line.startswith(("merging ", "writing ")))
    assert line.startswith("error: ")
    assert wanted in line
    assert contents(place) == before
    assert sorted(place.rglob("*")) == folders


def labels(path: Path) -> list[tuple[str, float]]:
    config = PredictConfig(path, precision="float32", device="cpu", source="messages.txt")
    Path("messages.txt").write_text("\n".join(MESSAGES))
    return [best[0] for _, best in predict.predict_stream(config)]

"""The real commands where a system is another: locale, console, line ends, home, missing modules.

One process for each place trains, predicts and shows help, since most of its time is its imports.
The fast tests put several places into one process; those of `-m durability` take each by itself.
"""

from __future__ import annotations

import csv
import io
import json
import multiprocessing
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from conftest import build_tokenizer, tiny_model
from remora.config import TrainConfig
from remora.errors import ConfigError
from remora.runtime import files
from remora.serving.predictor import Predictor
from service import write_adapter

LABELS = {"Rückfrage 😀": "Überweisung", "ошибка": "карта", "plain": "card"}
SRC = Path(__file__).parents[1] / "src"

COMMANDS = """
import json, sys
import psutil  # which has its own way on each system
for name in json.loads(sys.argv[2]):
    sys.modules[name] = None
if "no /proc" in sys.argv[3:]:
    import builtins, io
    real = io.open
    def refuse(path, *given, **more):
        if str(path).startswith("/proc"):
            raise FileNotFoundError(path)
        return real(path, *given, **more)
    io.open = builtins.open = psutil._pslinux.open_binary = refuse
from remora import cli
for line in json.loads(sys.argv[1]):
    cli.app.config = ()
    try:
        code = cli.main(line)
    except SystemExit as end:
        code = end.code or 0
    print("code", code, flush=True)
"""

C_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
PLACES: dict[str, dict[str, Any]] = {
    "the C locale": {"environment": C_LOCALE},
    "a console of Windows": {"environment": {"PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0"}},
    "lines that end as on Windows": {"line_end": "\r\n"},
    "a home that cannot be written": {"environment": {"HOME": "/dev/null"}},
    "no home": {"environment": {"HOME": None}},
    "no resource and no fcntl": {"missing": ("resource", "fcntl")},
    "no /proc": {"hide_proc": True},
}
TOGETHER = [
    ["the C locale", "no home", "no /proc"],
    [
        "a console of Windows",
        "lines that end as on Windows",
        "a home that cannot be written",
        "no resource and no fcntl",
    ],
]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has learned nothing."""
    folder = tmp_path_factory.mktemp("small")
    tokenizer = build_tokenizer()
    tiny_model("qwen2", scale=1, vocabulary=len(tokenizer)).float().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write(path: Path, rows: list[tuple[str, ...]], line_end: str) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator=line_end).writerows(rows)
    return path


def use(
    folder: Path,
    base: Path,
    to_file: bool,
    environment: dict[str, str | None] | None = None,
    line_end: str = "\n",
    missing: tuple[str, ...] = (),
    hide_proc: bool = False,
) -> None:
    """Train for two steps, predict to the output and to a file, show the help of a verb."""
    texts = [
        (f"Où est ma {word} {i}? 😱", label) for i in range(8) for label, word in LABELS.items()
    ]
    write(folder / "in.csv", [("text", "label"), *texts], line_end)
    settings = ['name = "größer"', "max_steps = 2", 'device = "cpu"', 'precision = "float32"']
    settings += ['answer = "classes"', 'baselines = ["none"]', f"model = {json.dumps(str(base))}"]
    settings += ['output = "runs"', 'instruction = "Où 😀?"']
    path = folder / "settings.toml"
    path.write_text(line_end.join([*settings, ""]), encoding="utf-8", newline="")
    # In the C locale the name of the run cannot be typed, but found
    lines = [
        ["train", "in.csv", "--config", "settings.toml", "--name", "run"],
        ["predict", "runs/run", "in.csv", "--device", "cpu"],
        ["predict", "runs/run", "in.csv", "--device", "cpu", "--output", "out.csv"],
        ["predict", "--help"],
    ]
    given = [json.dumps(lines), json.dumps(missing), *(["no /proc"] if hide_proc else [])]
    place = {
        **os.environ,
        **{"PYTHONPATH": str(SRC), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default"},
        **(environment or {}),
    }
    with (folder / "said").open("wb") as file:
        done = subprocess.run(
            [sys.executable, "-c", COMMANDS, *given],
            stdout=file if to_file else subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={name: value for name, value in place.items() if value is not None},
            cwd=folder,
            check=False,
        )
    said = ((folder / "said").read_bytes() if to_file else done.stdout).decode("utf-8")
    told = done.stderr.decode("ascii", "backslashreplace")
    assert done.returncode == 0, told
    assert said.count("code 0\n") == len(lines), said + told
    assert "Traceback" not in told
    measured, printed, _, shown = said.split("code 0\n")[:4]
    assert "Rückfrage 😀" in measured
    rows = list(csv.reader(io.StringIO(printed, newline="")))
    assert [tuple(row[:2]) for row in rows[1:]] == texts
    assert {row[2] for row in rows[1:]} <= LABELS.keys()
    assert (folder / "out.csv").read_bytes().decode("utf-8") == printed
    assert "--spreadsheet-safe" in shown
    card = (folder / "runs/run/adapter/remora.json").read_text(encoding="utf-8")
    assert json.loads(card)["instruction"] == "Où 😀?"
    assert "ошибка" in (folder / "runs/run/report.html").read_text(encoding="utf-8")


def all_of(names: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {"environment": {}}
    for name in names:
        place = PLACES[name]
        found["environment"] |= place.get("environment", {})
        found |= {key: value for key, value in place.items() if key != "environment"}
    return found


@pytest.mark.parametrize("names", TOGETHER, ids=lambda names: names[0])
def test_the_commands_in_several_places_at_once(
    names: list[str], small: Path, tmp_path: Path
) -> None:
    use(tmp_path, small, names is TOGETHER[0], **all_of(names))


@pytest.mark.durability
@pytest.mark.parametrize("to_file", [False, True], ids=["pipe", "file"])
@pytest.mark.parametrize("name", PLACES)
def test_the_commands_in_each_place(name: str, to_file: bool, small: Path, tmp_path: Path) -> None:
    use(tmp_path, small, to_file, **all_of([name]))


@pytest.mark.durability
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_predictor_in_processes_that_share_nothing(
    method: str, base: Path, tmp_path: Path
) -> None:
    """The default of Windows and macOS, and of Linux from Python 3.14 on."""
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"no {method} on this system")
    predictor = Predictor(write_adapter(tmp_path, base, 1), device="cpu", precision="float32")
    texts = ["Where is my card? 😀", None, "Où est la Überweisung?"]
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context(method)) as pool:
        found = pool.submit(predictor.answers, texts).result()
    assert found == predictor.answers(texts)


def test_settings_that_are_no_utf8_are_refused_and_json_keeps_them(tmp_path: Path) -> None:
    """A run keeps its settings as TOML, which has no form for such a path; JSON has one."""
    name = b"\xfcben.csv".decode("utf-8", "surrogateescape")
    with pytest.raises(ConfigError, match=r"data is '\\udcfcben.csv', which is no UTF-8; rename"):
        TrainConfig(name, model="nano")
    with pytest.raises(ConfigError, match=r"output is '\\udcfcben.csv', .* set PYTHONUTF8=1"):
        TrainConfig("a.csv", model="nano", output=Path(name))
    files.write_json(tmp_path / "a.json", {"command": ["predict", name]})
    found = json.loads((tmp_path / "a.json").read_bytes().decode("utf-8"))
    assert found == {"command": ["predict", name]}
    files.write_csv(tmp_path / "a.csv", ["file"], [[name]])
    assert (tmp_path / "a.csv").read_bytes() == b"file\r\n\\udcfcben.csv\r\n"

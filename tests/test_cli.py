"""The command line: instant help, one line for an error, and the exit codes."""

from __future__ import annotations

import os
import re
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from remora import cli
from remora.config import help_pages

MODULES = ("torch", "transformers", "peft", "sklearn", "numpy", "pyarrow", "datasets")


def remora(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "remora", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def cpu_seconds(*command: str) -> float:
    """The CPU time of a process, so that other work on the machine counts little."""
    resource = pytest.importorskip("resource", reason="not on Windows")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *command], capture_output=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_help_is_instant() -> None:
    """It costs little more than the libraries that parse and print it, on any machine."""
    libraries, ours = [], []
    for _ in range(5):  # in turn, as a machine's speed drifts
        libraries.append(cpu_seconds("-c", "import cyclopts, rich.markdown"))
        ours.append(cpu_seconds("-m", "remora", "--help"))
    assert statistics.median(ours) < 2 * statistics.median(libraries)


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["--version"]])
def test_nothing_heavy_is_imported_for_help(arguments: list[str]) -> None:
    code = (
        "import sys; from remora.cli import main\n"
        f"try: main({arguments!r})\n"
        "except SystemExit: pass\n"
        f"print([m for m in {MODULES!r} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("streams", [("stdout",), ("stderr",), ("stdout", "stderr")])
def test_a_full_disk_behind_an_output_is_one_line(streams: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("text,label\n" + "my card,a\nmy refund,b\n" * 10)
    command = [sys.executable, "-m", "remora", "plan", "t.csv", "--model", "nano"]
    with Path("/dev/full").open("w") as full:
        given = dict.fromkeys(("stdout", "stderr"), subprocess.PIPE) | dict.fromkeys(streams, full)
        done = subprocess.run(command, cwd=tmp_path, text=True, check=False, **given)
    assert done.returncode == (5 if "stdout" in streams else 0)
    if streams == ("stdout",):
        assert done.stderr.splitlines()[-1] == (
            "error: cannot write to standard output (No space left on device); free space"
        )
    if streams == ("stderr",):
        assert "peak memory" in done.stdout


TABLE = "text,label\nmy card,a\nmy refund,b\n"

BAD = {
    "unknown verb": (["trian", "x"], 2, "Did you mean"),
    "unknown flag": (["train", "t.csv", "--model", "m", "--rnak", "3"], 2, "rank"),
    "not a number": (["train", "t.csv", "--model", "m", "--rank", "many"], 2, "many"),
    "every wrong setting": (
        ["train", "t.csv", "--model", "m", "--rank", "0", "--epochs", "-1"],
        2,
        "rank is 0.*epochs is -1",
    ),
    "no settings file": (["train", "t.csv", "--model", "m", "--config", "no.toml"], 2, "no.toml"),
    "unknown key": (["train", "t.csv", "--model", "m", "--config", "bad.toml"], 2, "rnak"),
    "no table": (["train", "no.csv", "--model", "m"], 3, "no.csv"),
    "missing column": (["train", "odd.csv", "--model", "m"], 3, "--label-column"),
    "empty file": (["train", "empty.csv", "--model", "m"], 3, "empty"),
    "one class": (["train", "one.csv", "--model", "m"], 3, "at least one other label"),
    "blank text": (["train", "blank.csv", "--model", "m", "--strict"], 3, "row 2"),
    "blank label": (["train", "blank_label.csv", "--model", "m", "--strict"], 3, "row 2"),
    "broken row": (["train", "broken.csv", "--model", "m"], 3, "row 2|line 3"),
    "wrong encoding": (["train", "latin.csv", "--model", "m"], 3, "UTF-8"),
    "unknown label in the test table": (
        ["train", "t.csv", "--test", "other.csv", "--model", "m"],
        3,
        "refnd",
    ),
    "no model": (["train", "t.csv", "--model", "./no-model"], 4, "no folder"),
    "no model folder": (["train", "t.csv", "--model", "folder"], 4, "config.json"),
    "no adapter": (["predict", "folder", "t.csv"], 4, "remora.json"),
    "no adapter to measure": (["eval", "folder", "t.csv"], 4, "remora.json"),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bad")
    many = TABLE + "another card,a\nanother refund,b\n" * 5
    (folder / "t.csv").write_text(many)
    (folder / "odd.csv").write_text(
        "text,colour\nmy card,a\nmy refund,b\n".replace("colour", "n,m")
    )
    (folder / "empty.csv").write_text("")
    (folder / "one.csv").write_text("text,label\nx,a\ny,a\n")
    (folder / "blank.csv").write_text("text,label\nx,a\n  ,b\n")
    (folder / "blank_label.csv").write_text("text,label\nx,a\ny, \n")
    (folder / "broken.csv").write_text("text,label\nx,a\ny\nz,b\n")
    (folder / "latin.csv").write_bytes("text,label\nx,a\ncafé,b\n".encode("latin-1"))
    (folder / "other.csv").write_text("text,label\nx,refnd\n")
    (folder / "bad.toml").write_text("rnak = 3\n")
    (folder / "folder").mkdir()
    return folder


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_an_exit_code(
    name: str, place: Path, monkeypatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from remora.cli import app, main

    monkeypatch.chdir(place)
    monkeypatch.setattr(app, "config", ())
    arguments, code, wanted = BAD[name]
    assert main(arguments) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.strip().splitlines()
    assert len([line for line in lines if line.startswith("error: ")]) == 1
    assert lines[-1].startswith("error: ")
    assert re.search(wanted, lines[-1])
    assert not (place / "runs").exists()


def test_debug_shows_the_traceback(place: Path) -> None:
    done = remora("train", place / "no.csv", "--model", "m", "--debug")
    assert done.returncode != 0
    assert "Traceback" in done.stderr


def shown(width: int, *arguments: str) -> str:
    """Return what the command line prints in a terminal of a width."""
    environment = {**os.environ, "COLUMNS": str(width), "NO_COLOR": "1"}
    command = [sys.executable, "-m", "remora", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return "".join(f"{line.rstrip()}\n" for line in done.stdout.splitlines())


@pytest.mark.parametrize("width", [80, 60])
def test_help_of_train_looks_as_it_did(width: int) -> None:
    """To write it again after a change of a setting: REMORA_WRITE_DOCS=1."""
    path = Path(__file__).with_name("help") / f"train-{width}.txt"
    help_ = shown(width, "train", "--help")
    if "REMORA_WRITE_DOCS" in os.environ:
        path.parent.mkdir(exist_ok=True)
        path.write_text(help_, encoding="utf-8")
    assert help_ == path.read_text(encoding="utf-8")
    assert max(map(len, help_.splitlines())) <= width


def test_help_has_the_settings_in_groups_and_the_verbs_in_the_order_of_use() -> None:
    train = shown(80, "train", "--help")
    titles = re.findall(r"╭─ ([\w ]+) ─", train)
    assert titles == [*(each for each in help_pages.GROUPS if each != "Choice"), "Other"]
    for title, first in {"Data": "DATA", "Model": "--model", "Training": "--epochs"}.items():
        assert re.search(rf"╭─ {title} ─.*\n│[ *]+{first} ", train)
    verbs = re.findall(r"^│ (\w+) ", shown(80, "--help"), re.MULTILINE)
    assert verbs == list(help_pages.EXAMPLES)


@pytest.mark.parametrize("verb", help_pages.EXAMPLES)
def test_examples_of_a_verb_are_commands(verb: str) -> None:
    """They are parsed by the real command line, and fit into 60 columns."""
    commands = help_pages.EXAMPLES[verb]
    assert len(commands) == (2 if verb == "report" else 3)
    for command in commands:
        assert len(command) <= 58
        words = shlex.split(command.split("| ")[-1])
        assert words[:2] == ["remora", verb]
        assert cli.app.parse_args(words[1:], exit_on_error=False, print_error=False)


def test_completion_is_installed_for_a_shell(tmp_path: Path) -> None:
    environment = {**os.environ, "HOME": str(tmp_path), "SHELL": "/bin/bash"}
    command = [sys.executable, "-m", "remora", "--install-completion"]
    subprocess.run(["bash", "-c", f"{shlex.join(command)}; true"], check=True, env=environment)
    (script,) = (path for path in tmp_path.rglob("*") if path.name == "remora")
    assert "diagnose" in script.read_text()
    assert "--rows-per-class" in script.read_text()


@pytest.mark.parametrize(
    ("given", "parsed"),
    [
        (["train", "-", "--model", "nano"], ["train", "--model", "nano", "--", "-"]),
        (["eval", "run", "-"], ["eval", "run", "--", "-"]),
        (["predict", "run", "--json"], ["predict", "run", "--json"]),
        (["predict", "run", "--", "-"], ["predict", "run", "--", "-"]),
    ],
)
def test_a_dash_is_no_flag(given: list[str], parsed: list[str]) -> None:
    assert cli._with_dashes_last(given) == parsed

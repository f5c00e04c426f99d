"""Every bad input exits with its code and one line; docs/errors.md is the table of them.

python -m pytest tests/test_bad_input.py        # compares
REMORA_WRITE_DOCS=1 python -m pytest tests/test_bad_input.py    # writes
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bad_input import machine, models, runs, settings, tables
from bad_input.workshop import GOOD_ROWS, Workshop, table
from conftest import call

DOCS = Path(__file__).parents[1] / "docs" / "errors.md"
HEAD = (
    "# Bad input\n\n"
    "Mistakes in the input, each with its exit code and its line on standard error. "
    "`tests/test_bad_input.py` makes each of them on the command line and writes this table. "
    "Folder names are shortened; a port and a size are examples.\n\n"
)
CASES = [
    *settings.CASES,
    *tables.CASES,
    *runs.CASES,
    *models.CASES,
    *machine.CASES,
]
WRITE = bool(os.environ.get("REMORA_WRITE_DOCS"))


@pytest.fixture(scope="module")
def shop(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    folder = tmp_path_factory.mktemp("shop")
    before = Path.cwd()
    os.chdir(folder)
    shutil.copytree(base, folder / "base")
    made = Workshop(folder, folder / "base", folder / "runs" / "good")
    made.write("good.csv", table(GOOD_ROWS))
    settings = ["--model", "base", "--device", "cpu", "--max-steps", "1", "--name", "good"]
    assert call(*["train", "good.csv", *settings]) == 0
    yield made
    os.chdir(before)


@pytest.fixture(scope="module")
def rows() -> Iterator[list[str]]:
    """The rows of docs/errors.md; written at the end where that is asked for."""
    made: list[str] = []
    yield made
    if WRITE:
        text = HEAD + "| input | exit code | line |\n|---|---:|---|\n" + "".join(made)
        DOCS.write_text(text, encoding="utf-8")


def test_the_page_has_a_row_for_each_input() -> None:
    documented = re.findall(r"^\| (.+?) \| \d+ \|", DOCS.read_text(encoding="utf-8"), re.MULTILINE)
    assert WRITE or documented == [what for what, _, _ in CASES]


def shortened(line: str, folder: Path) -> str:
    line = line.replace(f"{folder}/", "").replace(str(folder), ".")
    line = re.sub(r"port \d+", "port 8000", line)
    line = re.sub(r"process \d+", "process 4711", line)
    line = re.sub(r"takes [\d,]+;", "takes 2,000;", line)  # the size depends on folder names
    return line.replace("|", "\\|").replace("<", "\\<")


@pytest.mark.parametrize(("what", "code", "command"), CASES, ids=[c[0] for c in CASES])
def test_it_ends_with_its_code_and_one_line(
    what: str,
    code: int,
    command: Callable[[Workshop], list[str]],
    shop: Workshop,
    rows: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.rmtree(shop.folder / "copy", ignore_errors=True)
    arguments = command(shop)
    capsys.readouterr()
    with shop.held:
        assert call(*arguments) == code
    shown = capsys.readouterr().err.strip().splitlines()
    errors = [line for line in shown if line.startswith("error: ")]
    assert len(errors) == 1, shown
    assert errors[0] == shown[-1]
    assert "Traceback" not in "\n".join(shown)
    told = shortened(errors[0], shop.folder)
    row = f"| {what} | {code} | {f'`` {told} ``' if '`' in told else f'`{told}`'} |\n"
    rows.append(row)
    assert WRITE or row in DOCS.read_text(encoding="utf-8"), "run it with REMORA_WRITE_DOCS=1"

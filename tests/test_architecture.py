"""The packages of docs/architecture.md: their order, their sizes, and what they make public."""

from __future__ import annotations

import ast
import importlib
import re
import statistics
import subprocess
import sys
from pathlib import Path
from types import FrameType

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "remora"
MAX_LINES, MEDIAN_LINES, MAX_FUNCTION_LINES = 500, 200, 80

MODULES = sorted(path for path in SOURCE.rglob("*.py") if path.name != "__init__.py")
PACKAGES = sorted(path.parent.name for path in SOURCE.glob("*/__init__.py"))


def order() -> dict[str, int]:
    """The place of each package and root module in the line of docs/architecture.md."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"^    (errors, formatting < .*)$", text, re.MULTILINE)
    steps = line.split(" < ")
    return {name: place for place, step in enumerate(steps) for name in step.split(", ")}


def room(path: Path) -> str:
    """The package that a file is in, or the name of a root module."""
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """The packages and root modules that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "remora":
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("remora."):
            found.add(node.module.split(".")[1])
    return found


@pytest.mark.parametrize("package", [*PACKAGES, "classifier", "cli", "display", "formatting"])
def test_imports_point_one_way(package: str) -> None:
    place = order()
    against = {
        (path.relative_to(SOURCE).as_posix(), other)
        for path in MODULES
        if room(path) == package
        for other in imported(path) & place.keys() - {package}
        if place[other] >= place[package]
    }
    assert not against


def test_every_room_is_in_the_order() -> None:
    assert {room(path) for path in MODULES} - {"__main__"} == set(order())


def test_every_module_is_named_in_the_section_of_its_package() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").split("\n## ")[1]
    parts = re.split(r"^### `(\w+)`", text, flags=re.MULTILINE)[1:]
    sections = dict(zip(parts[::2], parts[1::2], strict=True))
    assert sorted(sections) == PACKAGES
    for package, section in sections.items():
        modules = {path.stem for path in MODULES if path.parent == SOURCE / package}
        assert modules <= set(re.findall(r"`(\w+)`", section)), package
        assert set(re.findall(r"^\| `(\w+)` \| ", section, re.MULTILINE)) <= modules, package


def test_the_tree_for_contributors_names_every_package() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^[├└]── (\w+)/ ", text, re.MULTILINE)) == PACKAGES


def test_modules_and_functions_are_small() -> None:
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in MODULES}
    assert statistics.median(lines.values()) <= MEDIAN_LINES
    assert not [path.name for path, count in lines.items() if count > MAX_LINES]
    long = [
        f"{path.name}: {node.name}"
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno - node.lineno >= MAX_FUNCTION_LINES
    ]
    assert not long


@pytest.mark.parametrize("package", PACKAGES)
def test_public_names_are_there_and_hide_no_module(package: str) -> None:
    found = importlib.import_module(f"remora.{package}")
    modules = {path.stem for path in (SOURCE / package).glob("*.py")}
    assert not modules & set(found.__all__)
    for name in found.__all__:
        assert getattr(found, name) is not None


def test_packages_are_imported_without_what_is_heavy() -> None:
    names = ", ".join(f"remora.{package}" for package in PACKAGES)
    code = f"import sys, {names}; print(sorted({{'torch', 'numpy'}} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_tests_lie_where_their_modules_do() -> None:
    folders = {path.parent.name for path in (ROOT / "tests").glob("*/test_*.py")}
    assert folders <= set(PACKAGES)


def test_settings_reach_the_loop_through_a_dozen_files(
    base: Path, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The modules outside `config` that are handed the settings before the first step."""
    from remora.config import TrainConfig
    from remora.training import run

    class ReachedError(Exception):
        """The loop was reached."""

    def reached(*args: object, **kwargs: object) -> None:
        raise ReachedError

    handed = set()

    def watch(frame: FrameType, event: str, arg: object) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(str(SOURCE)):
            names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
            if any(isinstance(frame.f_locals.get(name), TrainConfig) for name in names):
                handed.add(Path(code.co_filename).relative_to(SOURCE))

    monkeypatch.setattr(run, "fit", reached)
    config = TrainConfig(str(table), model=str(base), output=tmp_path)
    sys.setprofile(watch)
    try:
        with pytest.raises(ReachedError):
            run.train(config)
    finally:
        sys.setprofile(None)
    outside = {path.as_posix() for path in handed if path.parts[0] != "config"}
    assert {"training/run.py", "training/session.py"} <= outside
    assert len(outside) <= 12, sorted(outside)

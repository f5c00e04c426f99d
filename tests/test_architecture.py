"""docs/architecture.md names every module, each above what it imports."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "remora"


def imported(module: str) -> set[str]:
    """The modules of Remora that a module imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse((SOURCE / f"{module}.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "remora":
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("remora."):
            found.add(node.module.split(".")[1])
    return found


def test_modules_are_listed_above_those_that_they_import() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `(\w+)` \| ", text, re.MULTILINE)
    modules = {path.stem for path in SOURCE.glob("[!_]*.py")}
    assert set(listed) == modules
    assert len(listed) == len(modules)
    place = {module: i for i, module in enumerate(listed)}
    above = {
        (module, other)
        for module in listed
        for other in imported(module) & modules
        if place[other] <= place[module]
    }
    assert not above

"""Settings of Sphinx; `make docs` builds the pages into build/docs without a network."""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

import remora

project = "Remora"
author = "The Remora authors"
project_copyright = author
version = release = remora.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["images/*"]
html_theme = "furo"
html_title = f"Remora {version}"
html_show_sphinx = False
html_static_path = ["_static"]
html_css_files = ["remora.css"]
html_copy_source = False
highlight_language = "text"

myst_heading_anchors = 4

default_role = "code"  # docstrings write code in single backticks
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_type_aliases = {"ArrayLike": "ArrayLike"}
autodoc_typehints_description_target = "documented"
# Types of other packages have no pages here, and none are fetched.
nitpick_ignore_regex = [
    (r"py:.*", r"(numpy|np|sklearn|collections|pathlib)\..*|optional|ArrayLike")
]


def setup(app: Any) -> None:
    """Leave out the docstrings of modules; the pages say what they are about."""
    app.connect("autodoc-process-docstring", _without_module)


def _without_module(
    app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    if what == "module":
        lines.clear()

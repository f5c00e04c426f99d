"""Jinja templates rendered to HTML in which every text is escaped."""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
import json
from collections.abc import Mapping
from typing import Any

from remora.formatting import spoken_bytes, spoken_seconds, spoken_time


def rendered(name: str, context: Mapping[str, Any], **code: str) -> str:
    """Return a page of a template; everything in the context is escaped except `Markup`."""
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(template_text),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "bytes": spoken_bytes,
        "seconds": spoken_seconds,
        "time": spoken_time,
        "percent": percent,
        "points": points,
        "count": "{:,}".format,
        "isolated": isolated,
    }
    style = template_text("report.css")
    html = environment.get_template(name).render(
        **context, **code, style=Markup(style), style_hash=csp_hash(style)
    )
    return html.encode("utf-8", "replace").decode("utf-8").replace("\0", "\ufffd")


def template_text(name: str) -> str:
    """Return a file of the folder `templates`."""
    return (importlib.resources.files("remora") / "templates" / name).read_text("utf-8")


def csp_hash(code: str) -> str:
    """Return the Content-Security-Policy source that allows exactly this code."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(code.encode('utf-8')).digest()).decode()}'"


def json_for_html(value: Any) -> str:
    """Return JSON that cannot end its HTML element, whatever texts it holds.

    Dataclasses become objects with their fields' names.
    """
    text = json.dumps(
        value, ensure_ascii=False, separators=(",", ":"), allow_nan=False, default=vars
    )
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def percent(share: float, digits: int = 1) -> str:
    """Return a share as a percentage."""
    return f"{100 * share:.{digits}f}%"


def points(difference: float) -> str:
    """Return a difference of two shares as percentage points; zero has no sign."""
    text = f"{100 * difference:+.1f}"
    return "0.0" if float(text) == 0 else text


def isolated(text: str) -> str:
    """Return a text in Unicode isolates, so that its writing direction affects nothing else."""
    return f"\u2068{text}\u2069"

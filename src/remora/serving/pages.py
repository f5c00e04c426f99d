"""The pages of the service: one to try a message, and the API's description.

Their script is named by its hash, and nothing else is loaded or sent anywhere but to the service.
"""

from __future__ import annotations

import json
from typing import Any

from fastapi import APIRouter, Request, Response

from remora.report.rendering import csp_hash, template_text

router = APIRouter(include_in_schema=False)


@router.get("/")
async def page() -> Response:
    """Show a page to try a message."""
    return render_page("try.html", "try.css", "try.js")


@router.get("/docs")
async def docs(request: Request) -> Response:
    """Show the OpenAPI description as a page, with a box that sends."""
    description = request.app.openapi()
    examples = {
        path: json.dumps(_example(route["post"], description), indent=2)
        for path, route in description["paths"].items()
        if "requestBody" in route.get("post", {})
    }
    return render_page(
        "openapi.html",
        "openapi.css",
        "openapi.js",
        description=description,
        examples=examples,
        address=str(request.base_url).rstrip("/"),
    )


def _example(route: dict[str, Any], description: dict[str, Any]) -> dict[str, Any]:
    """Return a body of a route: what it must have, by the examples of its description."""
    content = route["requestBody"]["content"]["application/json"]
    name = content["schema"]["$ref"].rsplit("/", 1)[-1]
    schema = description["components"]["schemas"][name]
    return {
        field: schema["properties"][field].get("examples", ["NAME"])[0]
        for field in schema["required"]
    }


def render_page(name: str, style: str, script: str, **context: Any) -> Response:
    """Return a page of a template that runs one script, and speaks to no one but its service."""
    from jinja2 import Environment, PackageLoader
    from markupsafe import Markup

    styles, code = template_text(style), template_text(script)
    environment = Environment(loader=PackageLoader("remora"), autoescape=True)
    page = environment.get_template(name).render(
        **context, style=Markup(styles), script=Markup(code)
    )
    headers = {
        "content-security-policy": (
            f"default-src 'none'; style-src {csp_hash(styles)}; script-src {csp_hash(code)}; "
            "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
            "frame-ancestors 'none'"
        ),
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
    }
    return Response(page, headers=headers, media_type="text/html")

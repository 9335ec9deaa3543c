"""Serves the pages. Knows file names and what a browser may do with them; nothing of what the pages ask the API."""

from __future__ import annotations

from pathlib import Path

import fastapi_offline
from fastapi import APIRouter
from fastapi.openapi.docs import get_swagger_ui_html
from starlette.responses import FileResponse, HTMLResponse

_OURS = Path(__file__).parent
_SWAGGER = Path(fastapi_offline.__file__).parent / "static"

# Media types are written out: Windows' registry may call a script plain text, and then no browser runs it.
_FILES = {
    "/": (_OURS / "index.html", "text/html"),
    "/chat.css": (_OURS / "chat.css", "text/css"),
    "/chat.js": (_OURS / "chat.js", "text/javascript"),
    "/docs/swagger-ui.css": (_SWAGGER / "swagger-ui.css", "text/css"),
    "/docs/swagger-ui.js": (_SWAGGER / "swagger-ui-bundle.js", "text/javascript"),
}
PATHS = frozenset([*_FILES, "/docs"])

_POLICY = (
    "default-src 'none'; connect-src 'self'; img-src data:; script-src 'self'{inline}; style-src 'self'{inline}; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def page_routes() -> APIRouter:
    """The pages and what they load. They hold no secrets, so they need no key."""
    router = APIRouter(include_in_schema=False)
    for path, (file, media_type) in _FILES.items():
        # HEAD of "/" is how Ollama's clients ask whether anybody is there.
        router.add_api_route(path, _sender(file, media_type), methods=["GET", "HEAD"])

    # All paths in pages are relative, so that they also work behind a proxy that has a prefix before them.
    @router.get("/docs")
    async def docs() -> HTMLResponse:
        page = get_swagger_ui_html(
            openapi_url="openapi.json",
            title="petals-win API",
            swagger_js_url="docs/swagger-ui.js",
            swagger_css_url="docs/swagger-ui.css",
            swagger_favicon_url="data:,",
        )
        # Swagger UI writes styles into its elements and is started by a script in the page.
        page.headers["Content-Security-Policy"] = _POLICY.format(inline=" 'unsafe-inline'")
        return page

    return router


def _sender(file: Path, media_type: str):
    headers = {
        "Cache-Control": "no-cache",
        "Content-Security-Policy": _POLICY.format(inline=""),
        "Referrer-Policy": "no-referrer",
    }

    async def send() -> FileResponse:
        return FileResponse(file, media_type=media_type, headers=headers)

    return send

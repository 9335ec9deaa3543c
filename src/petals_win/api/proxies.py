"""What proxies do to a request: the prefix that they put before paths, and the headers by which they say who really asked.

Knows raw requests and WebSockets only. Each is an ASGI middleware.
"""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.responses import RedirectResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from petals_win.api.settings import Settings


class Forwarded:
    """Believes the forwarded headers of trusted proxies, and of nobody else.

    X-Forwarded-Host becomes the host of the request. Of several, the last one counts, which the proxy next to us has seen.
    """

    def __init__(self, app: ASGIApp, settings: Settings):
        self._app = app
        self._settings = settings
        # It compares addresses, too, and replaces client and scheme.
        self._replacing = ProxyHeadersMiddleware(app, list(settings.trusted_proxies))  # type: ignore[arg-type]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        client = scope.get("client")
        if scope["type"] not in ("http", "websocket") or not client or not self._settings.trusts(client[0]):
            await self._app(scope, receive, send)
            return
        if host := Headers(scope=scope).getlist("x-forwarded-host"):
            last = host[-1].rpartition(",")[2].strip()
            others = [(name, value) for name, value in scope["headers"] if name != b"host"]
            scope = {**scope, "headers": [*others, (b"host", last.encode("latin-1"))]}
        await self._replacing(scope, receive, send)  # type: ignore[arg-type]


class Prefix:
    """Takes the prefix from paths, where the proxy has left it. Pages go by relative paths, and so need not know it."""

    def __init__(self, app: ASGIApp, prefix: str):
        self._app = app
        self._prefix = prefix

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path: str = scope.get("path", "")
        if scope["type"] == "http" and path == self._prefix:
            # Relative paths of a page are seen from its last slash.
            await RedirectResponse(f"{self._prefix}/", 308)(scope, receive, send)
            return
        if path.startswith(f"{self._prefix}/"):
            raw: bytes = scope.get("raw_path") or b""
            prefix = self._prefix.encode()
            scope = {**scope, "path": path[len(self._prefix) :]}
            if raw.startswith(prefix):
                scope["raw_path"] = raw[len(prefix) :]
        await self._app(scope, receive, send)

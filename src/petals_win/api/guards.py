"""What stands before the routes: which host and page may ask, the key, the size of head and body.

Knows raw requests and WebSockets only. Each guard is an ASGI middleware that answers by itself or passes the request on.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from petals_win.api import callers
from petals_win.api.callers import Caller
from petals_win.api.errors import ApiError
from petals_win.api.settings import Settings, is_address
from petals_win.host.addresses import is_loopback_host

BODY_DEADLINE_S = 60.0
_MOST_HEADERS = 100
_MOST_HEAD_BYTES = 32 * 1024

# What Docker and Podman call the machine that a container runs on. A page cannot have such a name resolved to this
# machine and pass as ours: the domain "internal" is reserved and never given to anybody, so its owner would have to be
# whoever runs the visitor's name server; and the origin of a page of that name is not taken for our own (below), since
# programs in containers ask under these names, and people open the page as 127.0.0.1.
_CONTAINER_HOSTS = frozenset(("host.docker.internal", "host.containers.internal"))
# Names that routers, systems and VPNs give to the PCs of a network, and that nobody else can have resolved to one of them.
_LOCAL_DOMAINS = (".internal", ".local", ".lan", ".home.arpa", ".fritz.box", ".ts.net")


class TrustedPages:
    """Refuses requests that a foreign web page makes through its visitor's browser.

    A page may ask if it comes from this server or if its origin is allowed. Without keys the Host header is
    checked too: otherwise a page could have its own name resolved to this machine and pass as coming from it.
    """

    def __init__(self, app: ASGIApp, settings: Settings):
        self._app = app
        self._settings = settings
        self._named = {name.lower() for name in (settings.host, *settings.allow_hosts)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        name = _name_in(host)
        origin = headers.get("origin")
        if not self._settings.needs_key and not self._host_is_ours(name):
            refusal = ApiError(
                403,
                f"This API does not answer under the name {host!r}. Use http://127.0.0.1, "
                f"or start it with --allow-host {name or 'NAME'} to allow it.",
            )
            await refusal.response()(scope, receive, send)
        elif origin is not None and not self._origin_is_allowed(origin, host, name):
            refusal = ApiError(
                403, f"Pages of {origin} may not use this API. Start it with --cors-origin {origin} to allow them."
            )
            await refusal.response()(scope, receive, send)
        else:
            await self._app(scope, receive, _with_header(send, "X-Content-Type-Options", "nosniff"))

    def _host_is_ours(self, name: str) -> bool:
        if is_loopback_host(name) or name in self._named or name in _CONTAINER_HOSTS:
            return True
        if is_loopback_host(self._settings.host):
            return False
        # Open to the local network by --insecure: an address or a local name cannot be a stranger's domain.
        return is_address(name) or "." not in name or name.endswith(_LOCAL_DOMAINS)

    def _origin_is_allowed(self, origin: str, host: str, name: str) -> bool:
        if origin in self._settings.cors_origins:
            return True
        return name not in _CONTAINER_HOSTS and origin in (f"http://{host}", f"https://{host}")


class Cors(CORSMiddleware):
    """CORS for the origins that are named, also to browsers that ask in the way of Chrome before 142.

    Those add a header that asks for access to the private network, take no answer for a yes, and starlette refuses it. Since
    then browsers ask their users instead.
    """

    def preflight_response(self, request_headers: Headers) -> Response:
        outdated = b"access-control-request-private-network"
        return super().preflight_response(Headers(raw=[each for each in request_headers.raw if each[0] != outdated]))


class RequireKey:
    """Asks for one of the keys everywhere except on the open paths, and notes whose limits count.

    A key comes as OpenAI's clients send it (Authorization: Bearer KEY) or as Anthropic's do (X-Api-Key: KEY).
    """

    def __init__(self, app: ASGIApp, settings: Settings, open_paths: Collection[str]):
        self._app = app
        self._settings = settings
        self._open_paths = open_paths
        self._callers: dict[str, Caller] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        guarded = scope["type"] in ("http", "websocket") and self._settings.needs_key
        if not guarded or scope["path"] in self._open_paths:
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        scheme, _, key = headers.get("authorization", "").partition(" ")
        given = key.strip() if scheme.lower() == "bearer" else ""
        given = given or headers.get("x-api-key", "").strip()
        if given and self._admits(given.encode("latin-1")):
            await self._app(scope, receive, send)
            return
        problem = "This API key is not valid." if given or key else "This API needs a key."
        refusal = ApiError(
            401,
            f"{problem} Send 'Authorization: Bearer KEY' with a key of this server.",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )
        await refusal.response()(scope, receive, send)

    def _admits(self, given: bytes) -> bool:
        # Every key is compared, so that the time taken does not tell which one was nearly right.
        if any([hmac.compare_digest(given, key.encode()) for key in self._settings.keys()]):
            return True
        created = self._settings.created_keys
        found = created.find(given) if created else None
        if created is None or found is None:
            return False
        if found.sha256 not in self._callers:
            valid = {key.sha256 for key in created.all()}
            self._callers = {sha256: caller for sha256, caller in self._callers.items() if sha256 in valid}
            self._callers[found.sha256] = Caller(found)
        # Of this request alone: the server has a task for each.
        callers.current.set(self._callers[found.sha256])
        return True


class LimitHead:
    """Refuses heads with more headers, or longer, than any client sends."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket"):
            headers = scope["headers"]
            size = sum(len(name) + len(value) for name, value in headers)
            size += len(scope["path"]) + len(scope["query_string"])
            if len(headers) > _MOST_HEADERS or size > _MOST_HEAD_BYTES:
                refusal = ApiError(
                    431,
                    f"The request has {len(headers)} headers of {size} bytes with its address; {_MOST_HEADERS} and "
                    f"{_MOST_HEAD_BYTES} bytes are allowed.",
                )
                await refusal.response()(scope, receive, send)
                return
        await self._app(scope, receive, send)


class LimitBody:
    """Reads the body before the routes do: up to a size, within a deadline."""

    def __init__(self, app: ASGIApp, settings: Settings):
        self._app = app
        self._max_bytes = settings.max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            if int(Headers(scope=scope).get("content-length", "0")) > self._max_bytes:
                raise self._too_large()
            body = await asyncio.wait_for(self._read(receive), BODY_DEADLINE_S)
        except ApiError as refusal:
            # The server goes on to discard what still comes: a client that is cut off would not see the answer.
            await refusal.response()(scope, receive, send)
            return
        except TimeoutError:
            refusal = ApiError(408, f"The request was not complete after {BODY_DEADLINE_S:.0f} s.")
            await refusal.response()(scope, receive, send)
            return
        except ClientDisconnect:
            return
        messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return messages.pop() if messages else await receive()

        await self._app(scope, replay, send)

    async def _read(self, receive: Receive) -> bytes:
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            body += message.get("body", b"")
            if len(body) > self._max_bytes:
                raise self._too_large()
            if not message.get("more_body", False):
                return bytes(body)

    def _too_large(self) -> ApiError:
        return ApiError(413, f"The request is larger than {self._max_bytes / 2**20:g} MiB. Shorten the prompt.")


def _name_in(host: str) -> str:
    """The name or address in a Host header, in lower case, without its port; empty if there is none."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _with_header(send: Send, name: str, value: str) -> Send:
    async def wrapped(message: Message) -> None:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message)[name] = value
        await send(message)

    return wrapped

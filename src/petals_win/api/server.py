"""Listening and serving until told to stop. Knows sockets, uvicorn and how long a connection may be idle; no routes."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import json
import logging
import socket
import sys
from collections.abc import Callable, Iterator
from typing import Any, cast

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from petals_win.api.errors import ApiError
from petals_win.api.guards import BODY_DEADLINE_S
from petals_win.api.settings import Settings
from petals_win.errors import UserError
from petals_win.host.addresses import is_loopback_host

logger = logging.getLogger(__name__)

_GRACE_S = 5
# Longer than clients and proxies keep a connection that they mean to use again (.NET and nginx 60 s, Go 90 s, Caddy 120 s):
# whoever closes first must be the client, or its next request may meet a connection that has just been closed.
KEEP_ALIVE_S = 125
HEAD_DEADLINE_S = 15.0


class PortInUse(UserError):
    """Another program listens there already."""

    def __init__(self, host: str, port: int):
        super().__init__(
            f"Port {port} on {host} is in use by another program, perhaps another petals-win. "
            "Stop that program, or choose another port with --port."
        )
        self.port = port


class ApiServer:
    """An address that listens from the moment it is made, before any app is there: a port in use shows at once.

    Raises PortInUse, or UserError for an address that this machine does not have.
    """

    def __init__(self, settings: Settings):
        self._settings = settings
        self._sockets = _listen(settings.host, settings.port)
        self._uvicorn: _Uvicorn | None = None
        self._stopped = False
        self.port: int = self._sockets[0].getsockname()[1]
        # Where a browser on this machine finds it.
        host = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)
        scheme = "https" if settings.tls else "http"
        self.url = f"{scheme}://[{host}]:{self.port}" if ":" in host else f"{scheme}://{host}:{self.port}"
        self._settings = settings

    async def serve(self, app: FastAPI, on_ready: Callable[[], None] | None = None) -> None:
        """Answer requests with `app` until `stop()`, then return. To be called once. Signals are the caller's business.

        `on_ready` is called once, on the event loop, when requests are answered; it must not block.
        """
        tls = self._settings.tls
        config = uvicorn.Config(
            app,
            http=functools.partial(_Connection, settings=self._settings),  # type: ignore[arg-type]
            ssl_certfile=tls.cert if tls else None,
            ssl_keyfile=tls.key if tls else None,
            ws="wsproto",
            ws_max_size=self._settings.max_body_bytes,
            ws_per_message_deflate=False,  # a small frame could become a huge message
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=_GRACE_S,
        )
        self._uvicorn = _Uvicorn(config, app, on_ready)
        self._uvicorn.should_exit = self._stopped
        await self._uvicorn.serve(self._sockets)

    def stop(self) -> None:
        """End `serve()` soon, from any thread: running answers break off with an error, connections close."""
        self._stopped = True
        if self._uvicorn:
            self._uvicorn.should_exit = True

    def close(self) -> None:
        """Stop listening, if `serve()` was never called."""
        for listener in self._sockets:
            listener.close()


class _Connection(H11Protocol):
    """uvicorn's HTTP connection, with what uvicorn has not: a deadline for the head of a request, and a limit of connections.

    Otherwise whoever opens connections and never completes a request could hold them until there are no more.
    """

    _deadline: asyncio.TimerHandle | None = None
    _upgraded = False  # to a WebSocket, whose deadlines are the app's and uvicorn's pings

    def __init__(self, *args: Any, settings: Settings, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._settings = settings

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        transport = cast(asyncio.Transport, _Gathering(transport))
        super().connection_made(transport)
        if self._too_many():
            transport.write(_too_many_connections())
            transport.close()
        self._set_deadline()

    def _too_many(self) -> bool:
        if len(self.connections) > self._settings.max_connections:
            return True
        address = self.client[0] if self.client else ""
        if is_loopback_host(address) or self._settings.trusts(address):
            return False
        others = (getattr(each, "client", None) for each in self.connections)
        same = sum(1 for other in others if other and other[0] == address)
        return same > self._settings.max_connections_each

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._upgraded or (self.cycle is not None and not self.cycle.response_complete):
            self._clear_deadline()  # the head is complete: from here on the deadlines are the app's
        elif self._deadline is None:
            self._set_deadline()

    def handle_websocket_upgrade(self, event: Any) -> None:
        self._upgraded = True
        super().handle_websocket_upgrade(event)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        # The beginning of the next request may have come with the one before, or a request was refused before its end.
        if self.cycle.response_complete and (self.conn.trailing_data[0] or self.cycle.more_body):
            self._set_deadline()

    def connection_lost(self, exc: Exception | None) -> None:
        self._clear_deadline()
        super().connection_lost(exc)

    def _set_deadline(self) -> None:
        self._clear_deadline()
        refused = self.cycle is not None and self.cycle.more_body  # its body may still be on its way
        seconds = BODY_DEADLINE_S if refused else HEAD_DEADLINE_S
        self._deadline = self.loop.call_later(seconds, self._give_up)

    def _clear_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _give_up(self) -> None:
        # Not close(), which waits until everything has been sent.
        self.transport.abort()


class _Gathering:
    """A transport that sends what is written in one turn of the event loop by one system call: an answer's head with its beginning.

    Each call wakes the client, and on a busy PC that may get the core on which the event loop was about to go on.
    """

    def __init__(self, transport: asyncio.Transport):
        self._transport = transport
        self._held: list[bytes] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        if not self._held:
            asyncio.get_running_loop().call_soon(self._flush)
        self._held.append(data)

    def close(self) -> None:
        self._flush()
        self._transport.close()

    def _flush(self) -> None:
        if self._held:
            data = b"".join(self._held)
            self._held.clear()
            self._transport.write(data)


def _too_many_connections() -> bytes:
    """A whole answer, for whoever has not said anything yet."""
    refusal = ApiError(503, "There are too many open connections. Close some, or try again in a moment.")
    body = json.dumps(refusal.body()).encode()
    head = (
        "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 5\r\nConnection: close\r\n"
    )
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


class _Uvicorn(uvicorn.Server):
    """uvicorn, leaving signals alone, and ending the answers before it waits for connections to close."""

    def __init__(self, config: uvicorn.Config, app: FastAPI, on_ready: Callable[[], None] | None):
        super().__init__(config)
        self._app = app
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self._on_ready:
            self._on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._app.state.generations.stop()
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _listen(host: str, port: int) -> list[socket.socket]:
    """One listening socket for each address of the host: "localhost" may be 127.0.0.1, ::1 or both."""
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except socket.gaierror as error:
        raise UserError(
            f"{host!r} is no address of this PC. Give --host an IP address of it, or 0.0.0.0 for all."
        ) from error
    listeners: list[socket.socket] = []
    refused: OSError | None = None
    for family, kind, protocol, _, address in dict.fromkeys(found):
        listener = socket.socket(family, kind, protocol)
        try:
            if sys.platform == "win32":
                # Without it, Windows lets a second program take over a port that is in use.
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
            else:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            # With port 0, all addresses get the port that the first one was given.
            chosen = listeners[0].getsockname()[1] if listeners else port
            listener.bind((address[0], chosen, *address[2:]))
            listener.listen(socket.SOMAXCONN)
        except OSError as error:
            listener.close()
            if error.errno == errno.EADDRINUSE:
                for other in listeners:
                    other.close()
                raise PortInUse(host, port) from error
            refused = error
            logger.debug("Cannot listen on %s: %s", address, error)
            continue
        listeners.append(listener)
    if not listeners:
        raise UserError(
            f"This PC does not let petals-win listen on {host}, port {port}: {refused}. "
            "Choose another with --host or --port."
        ) from refused
    return listeners

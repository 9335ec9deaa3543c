"""The local sockets between Python and p2pd.

Knows which kind of socket the system has, where it lies and who may open it. Does not know what is said over it.

POSIX: Unix sockets in a folder of this user alone. Windows: TCP on 127.0.0.1, since Windows Python has no Unix
sockets. Any user of the PC can connect there, so each TCP connection opens with a secret: see src/p2pd/README.md.
PETALS_WIN_CONTROL=tcp takes the TCP way on POSIX too, where the tests cover it.
"""

import asyncio
import hashlib
import hmac
import logging
import os
import re
import secrets
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import cache
from pathlib import Path

import psutil

from petals_win.host.folders import private_folder, run_folder

logger = logging.getLogger(__name__)

_SOCKET_NAME = re.compile(r"[a-z0-9]+-(\d+)-[\w-]+\.sock")
_LONGEST_SOCKET_PATH = 103  # macOS: 104 bytes with the final NUL; Linux has 108
_CONNECT_TIMEOUT_S = 10.0
_SECRET_TIMEOUT_S = 10.0
# Separates what p2pd shows to us from what we show to it: whoever takes over the port of a listener that is gone
# learns nothing that opens the daemon's own.
_HANDLER_LABEL = "petals-win p2pd stream handler\n"

StreamHandler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@cache
def daemon_secret() -> str:
    """What opens TCP connections to the daemons of this process: 256 bits in hexadecimal, new in each process."""
    return secrets.token_hex(32)


def control_address(kind: str, token: str) -> str:
    """A multiaddr for a new local socket: p2pd's own (`kind` "p2pd"), or that of a client that p2pd connects to.

    :param token: letters, digits, "-" and "_" that make it unique
    """
    if sys.platform == "win32" or os.environ.get("PETALS_WIN_CONTROL") == "tcp":
        return "/ip4/127.0.0.1/tcp/0"  # whoever binds it tells the port
    name = f"{kind}-{os.getpid()}-{token}.sock"
    folder = run_folder()
    if len(os.fsencode(folder / name)) > _LONGEST_SOCKET_PATH:
        folder = private_folder(Path(f"/tmp/petals-win-{os.getuid()}"))
    _clean(folder)
    return f"/unix{folder / name}"


def remove_control_socket(address: str) -> None:
    """Delete what a Unix socket leaves on the disk, if it is still there."""
    if address.startswith("/unix/"):
        Path(address.removeprefix("/unix")).unlink(missing_ok=True)


async def open_control(address: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Connect to a local socket; raises OSError, TimeoutError after 10 seconds, ValueError for any other address."""
    where = _parse(address)
    if isinstance(where, int):
        connecting = _open_with_secret(where)
    else:
        assert sys.platform != "win32"
        connecting = asyncio.open_unix_connection(where)
    try:
        return await asyncio.wait_for(connecting, _CONNECT_TIMEOUT_S)
    except TimeoutError:
        raise TimeoutError(f"p2pd does not accept a connection at {address}") from None


@asynccontextmanager
async def serve_control(address: str, handler: StreamHandler) -> AsyncIterator[str]:
    """Accept connections at a local address for the length of a with block; yields it with the port that was bound."""
    where = _parse(address)
    if isinstance(where, int):
        server = await asyncio.start_server(_behind_secret(handler), "127.0.0.1", where)
        address = f"/ip4/127.0.0.1/tcp/{server.sockets[0].getsockname()[1]}"
    else:
        assert sys.platform != "win32"
        server = await asyncio.start_unix_server(handler, where)
    try:
        yield address
    finally:
        # Open connections belong to their handlers: waiting for them here could take for ever.
        server.close()
        remove_control_socket(address)


async def _open_with_secret(port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(daemon_secret().encode())
    return reader, writer


def _behind_secret(handler: StreamHandler) -> StreamHandler:
    """The handler, for connections that open with the daemon's half of the secret; others are closed and logged."""
    expected = hashlib.sha256((_HANDLER_LABEL + daemon_secret()).encode()).hexdigest().encode()

    async def check(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            shown = await asyncio.wait_for(reader.readexactly(len(expected)), _SECRET_TIMEOUT_S)
        except (TimeoutError, asyncio.IncompleteReadError, ConnectionError):
            shown = b""
        if hmac.compare_digest(shown, expected):
            await handler(reader, writer)
        else:
            logger.warning("Closed a connection that did not open with the secret of p2pd")
            writer.close()

    return check


def _parse(address: str) -> Path | int:
    """The path of a /unix address or the port of a /ip4/127.0.0.1/tcp one."""
    if sys.platform != "win32" and address.startswith("/unix/"):
        return Path(address.removeprefix("/unix"))
    port = re.fullmatch(r"/ip4/127\.0\.0\.1/tcp/(\d+)", address)
    if port is None:
        raise ValueError(f"{address} is no local socket: /unix/… or /ip4/127.0.0.1/tcp/… is expected")
    return int(port[1])


@cache
def _clean(folder: Path) -> None:
    """Delete sockets of processes that are gone, once in the life of this one."""
    for socket in folder.glob("*.sock"):
        owner = _SOCKET_NAME.fullmatch(socket.name)
        if owner is not None and not psutil.pid_exists(int(owner[1])):
            logger.debug("Deleting %s, left by a process that has ended", socket)
            socket.unlink(missing_ok=True)

"""The local sockets between Python and p2pd.

Knows which kind of socket the system has, where it lies and who may open it. Does not know what is said over it.

POSIX: Unix sockets in a folder of this user alone. Windows: TCP on 127.0.0.1, since Windows Python has no Unix
sockets. PETALS_WIN_CONTROL=tcp takes the TCP way on POSIX too, where the tests cover it.
"""

import asyncio
import logging
import os
import re
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import cache
from pathlib import Path

import psutil

from petals_win.host.folders import private_folder, run_folder
from petals_win.host.ports import free_loopback_port

logger = logging.getLogger(__name__)

DAEMON = "p2pd"
_SOCKET_NAME = re.compile(r"[a-z0-9]+-(\d+)-[\w-]+\.sock")
_LONGEST_SOCKET_PATH = 103  # macOS: 104 bytes with the final NUL; Linux has 108
_CONNECT_TIMEOUT_S = 10.0

StreamHandler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def control_address(kind: str, token: str) -> str:
    """A multiaddr for a new local socket: p2pd's own (`kind` "p2pd"), or that of a client that p2pd connects to.

    :param token: letters, digits, "-" and "_" that make it unique
    """
    if sys.platform == "win32" or os.environ.get("PETALS_WIN_CONTROL") == "tcp":
        # A client's listener is bound before its address is told. Upstream's p2pd does not say which port it has
        # bound, so its port is chosen beforehand.
        return f"/ip4/127.0.0.1/tcp/{free_loopback_port() if kind == DAEMON else 0}"
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
        connecting = asyncio.open_connection("127.0.0.1", where)
    else:
        assert sys.platform != "win32"
        connecting = asyncio.open_unix_connection(where)
    try:
        return await asyncio.wait_for(connecting, _CONNECT_TIMEOUT_S)
    except asyncio.TimeoutError:
        raise TimeoutError(f"p2pd does not accept a connection at {address}") from None


@asynccontextmanager
async def serve_control(address: str, handler: StreamHandler) -> AsyncIterator[str]:
    """Accept connections at a local address for the length of a with block; yields it with the port that was bound."""
    where = _parse(address)
    if isinstance(where, int):
        server = await asyncio.start_server(handler, "127.0.0.1", where)
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

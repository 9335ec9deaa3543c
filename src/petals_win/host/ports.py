"""TCP ports of this machine.

Knows which are free. Does not know what listens on them.
"""

import errno
import socket
import sys

import psutil

from petals_win.errors import UserError


def check_port_free(host: str, port: int) -> None:
    """Raise UserError when nothing can listen on TCP `port` of the local address `host`; names whoever does."""
    if not 0 <= port <= 65535:
        raise UserError(f"{port} is no port. Choose one between 1024 and 65535 with --port.")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except socket.gaierror as e:
        raise UserError(f"{host} is no address of this PC ({e.strerror}). Use 127.0.0.1, or 0.0.0.0 for all.") from e
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        if sys.platform == "win32":
            # Without it Windows lets two programs share a port, and one of them gets nothing.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
        else:
            # Connections of a server that has just ended do not count.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except PermissionError as e:
            raise UserError(f"This user may not listen on port {port}. Choose another with --port.") from e
        except OSError as e:
            if e.errno == errno.EADDRNOTAVAIL:
                raise UserError(f"{host} is no address of this PC. Use 127.0.0.1, or 0.0.0.0 for all.") from e
            user = _listener(port)
            if user is None and e.errno != errno.EADDRINUSE:
                raise UserError(f"Nothing can listen on {host}, port {port}: {e.strerror}.") from e
            raise UserError(
                f"Port {port} is in use by {user or 'another program'}. Stop that program or choose another with --port."
            ) from e


def _listener(port: int) -> str | None:
    """Name and id of the process that listens on `port`, as far as this user may see it."""
    try:
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr and connection.laddr.port == port:
                return (
                    f"{psutil.Process(connection.pid).name()} (process {connection.pid})" if connection.pid else None
                )
    except psutil.Error:
        return None  # macOS shows other processes' connections to root only
    return None

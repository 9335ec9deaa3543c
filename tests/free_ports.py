"""Ports for programs that have to be told one."""

from __future__ import annotations

import contextlib
import secrets
import socket


def free_port() -> int:
    """Below those that a system gives to whoever names none: nobody else gets it before it is used."""
    while True:
        port = 20_000 + secrets.randbelow(11_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port

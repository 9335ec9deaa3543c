"""What a transport is: a door that takes calls, and a link that makes them. Both carry bytes, and know nothing of what they mean.

Knows addresses, and which module has which transport; imports the package of a transport when it is used.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from typing import Protocol

from petals_win.errors import UserError
from petals_win.jobs.keys import OwnSecrets

CONNECT_S = 5.0  # until a link is there, or is given up
HANDSHAKE_S = 5.0  # a stranger who connects is given so long
CLOSE_S = 5.0
MOST_CALLS = 512  # at a door, all callers together
_TRANSPORTS = {"grpc": ("petals_win.jobs.grpc_transport", "grpcio"), "zmq": ("petals_win.jobs.zmq_transport", "pyzmq")}
_ADDRESS = re.compile(r"(\w+)://(\[[0-9a-fA-F:.%\w]+\]|[^/:#\[\]\s]+):(\d{1,5})(?:#([0-9a-fA-F:]*))?")

# What answers the calls at a door: method, request and peer (an address for people) to any number of replies.
# It raises nothing but what is a defect; its consumer may stop at any point.
Answer = Callable[[str, bytes, str], AsyncGenerator[bytes, None]]


@dataclass(frozen=True)
class Address:
    """Where a worker listens. pin: what its certificate or public key is known by, 64 hexadecimal digits, or None."""

    scheme: str
    host: str
    port: int
    pin: str | None = None

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}"

    @property
    def pinned(self) -> str:
        """The address as --workers takes it."""
        return f"{self}#{self.pin}" if self.pin else str(self)


def parse_address(text: str) -> Address:
    """Raises UserError for what is no address of a worker."""
    found = _ADDRESS.fullmatch(text.strip())
    pin = (found[4] or "").replace(":", "").lower() if found else ""
    if not found or found[1] not in _TRANSPORTS or int(found[3]) > 65535 or len(pin) not in (0, 64):
        raise UserError(
            f"{text[:200]!r} is no address of a worker. Write grpc://HOST:PORT or zmq://HOST:PORT, for --workers with the # and what "
            "follows it as 'petals-win worker' prints them."
        )
    return Address(found[1], found[2].strip("[]"), int(found[3]), pin or None)


class Door(Protocol):
    """Where a worker takes calls."""

    pin: str

    async def open(self, host: str, port: int, answer: Answer) -> int:
        """Listen; returns the port, which for 0 the system has chosen. Raises UserError if that is not possible."""
        ...

    async def drain(self) -> None:
        """Say, where the transport has a way, that no new questions are taken."""
        ...

    async def close(self) -> None:
        """Break off what is running, and close. May be called twice."""
        ...


class Link(Protocol):
    """A connection to a worker that has let this side in."""

    def call(self, method: str, request: bytes, seconds: float) -> AsyncGenerator[bytes, None]:
        """Yield the replies to a call. Whoever consumes it may stop at any point, by which the call is cancelled.

        seconds: until the last reply. Raises LinkLost, at once when it is known, and LinkRefused.
        """
        ...

    async def close(self) -> None:
        """All calls raise LinkLost. May be called twice."""
        ...


def new_door(scheme: str, secrets: OwnSecrets) -> Door:
    """Raises UserError if the transport's package is not installed."""
    return _transport(scheme).new_door(secrets)


async def connect(address: Address, key: str) -> Link:
    """Raises LinkLost, LinkRefused, and UserError if the transport's package is not installed."""
    return await _transport(address.scheme).connect(address, key)


def check_installed(scheme: str) -> None:
    """Raises UserError, which says what to install, if the transport's package is not there."""
    _transport(scheme)


def _transport(scheme: str):
    module, package = _TRANSPORTS[scheme]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as e:
        if (e.name or "").startswith("petals_win"):
            raise
        raise UserError(
            f"{scheme}:// needs the package {package}. Install it with: pip install petals-win[jobs]"
        ) from e

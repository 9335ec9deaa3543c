"""How the API is reached and by whom. Knows addresses, keys and origins; not how requests are answered."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, field
from pathlib import Path

from petals_win.errors import UserError

_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://(\[[0-9a-f:.]+\]|[^\s/?#@:\[\]]+)(:\d+)?")


@dataclass(frozen=True)
class Settings:
    """Checked when made: raises UserError for a combination that would open the API to strangers.

    host, port: where to listen; port 0 takes a free one.
    api_keys: whoever sends one of them may ask; empty: everybody who reaches the address may.
    insecure: the user accepts that a host other than loopback answers without a key.
    cors_origins: pages of these origins, and no others, may ask from a browser.
    max_body_bytes: larger requests are refused (413). max_running, max_waiting: requests answered at a time,
    and in line behind them; more are refused (429).
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    insecure: bool = False
    cors_origins: tuple[str, ...] = ()
    max_body_bytes: int = 4 * 2**20
    max_running: int = 4
    max_waiting: int = 32

    def __post_init__(self) -> None:
        if not (is_loopback(self.host) or self.api_keys or self.insecure):
            raise UserError(
                f"On {self.host} everybody in your network could use this API. Give --api-key-file FILE "
                "(one key a line), or --insecure if that is what you want, or leave --host out."
            )
        if not 0 <= self.port < 2**16:
            raise UserError(f"{self.port} is no port. Give --port a number from 1 to 65535, or 0 for a free one.")
        for origin in self.cors_origins:
            if not _ORIGIN.fullmatch(origin) or origin != origin.lower():
                raise UserError(
                    f"{origin!r} is not an origin that a browser would send. "
                    "Write --cors-origin as https://example.org or http://localhost:3000: in lower case, without a path."
                )


def is_loopback(host: str) -> bool:
    """Whether the name or address can only mean this machine."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def read_api_keys(path: Path) -> tuple[str, ...]:
    """Read keys from a text file, one a line; empty lines and lines that begin with # do not count.

    Raises UserError if the file cannot be read, holds no key, or a key that no HTTP header could carry.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"The key file {path} cannot be read: {error.strerror}.") from error
    # Windows' own editors and shells put a byte order mark first, and PowerShell's ">" writes UTF-16.
    encoding = "utf-16" if content.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    try:
        lines = content.decode(encoding).splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"The key file {path} is not a text file. Write one key a line.") from error
    keys = []
    for number, line in enumerate(lines, start=1):
        key = line.strip()
        if not key or key.startswith("#"):
            continue
        if not re.fullmatch(r"[!-~]+", key):
            raise UserError(
                f"Line {number} of the key file {path} is not a key: only ASCII letters, digits and signs, no blanks."
            )
        keys.append(key)
    if not keys:
        raise UserError(f"The key file {path} holds no key. Write one key a line.")
    return tuple(keys)

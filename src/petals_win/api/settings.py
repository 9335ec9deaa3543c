"""How the API is reached and by whom. Knows addresses, keys, origins and proxies; not how requests are answered."""

from __future__ import annotations

import ipaddress
import logging
import re
import time
from dataclasses import dataclass, field
from pathlib import Path

from petals_win.api.created_keys import CreatedKeys
from petals_win.errors import UserError
from petals_win.host.addresses import is_loopback_host
from petals_win.host.tls import Tls

logger = logging.getLogger(__name__)

_KEYS_FRESH_S = 1.0

_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://(\[[0-9a-f:.]+\]|[^\s/?#@:\[\]]+)(:\d+)?")
_PREFIX = re.compile(r"(/[A-Za-z0-9._~-]+)+")
_HOST_NAME = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?")


@dataclass(frozen=True)
class Settings:
    """Checked when made: raises UserError for a combination that would open the API to strangers.

    host, port: where to listen; port 0 takes a free one.
    api_keys, key_file, created_keys: whoever sends one of these keys may ask; with none of the three, everybody who reaches
    the address may.
    insecure: the user accepts that a host other than loopback answers without a key.
    cors_origins: pages of these origins, and no others, may ask from a browser.
    allow_hosts: names or addresses under which the API answers without a key, besides those of this PC.
    root_path: what stands before all paths at a proxy, as "/llm"; the proxy may take it away or leave it.
    trusted_proxies: addresses or networks whose X-Forwarded-For, -Proto and -Host are believed.
    tls: certificate and key for HTTPS; None is HTTP.
    max_body_bytes: larger requests are refused (413). max_running, max_waiting: requests answered at a time,
    and in line behind them; more are refused (429). max_connections, max_connections_each: open at a time, in all and
    for each address but this PC's own and the trusted proxies'.
    and in line behind them; more are refused (429).
    aliases: further names of the model. any_model: it is meant whatever the name.
    blanks_ahead: whole answers that take long begin with blanks, for proxies that give up on a silent server.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    key_file: KeyFile | None = None
    created_keys: CreatedKeys | None = None
    insecure: bool = False
    cors_origins: tuple[str, ...] = ()
    allow_hosts: tuple[str, ...] = ()
    root_path: str = ""
    trusted_proxies: tuple[str, ...] = ()
    tls: Tls | None = None
    max_body_bytes: int = 4 * 2**20
    max_running: int = 16
    max_waiting: int = 32
    max_connections: int = 512
    max_connections_each: int = 128
    aliases: tuple[str, ...] = ()
    any_model: bool = False
    blanks_ahead: bool = False

    def __post_init__(self) -> None:
        if not (is_loopback_host(self.host) or self.needs_key or self.insecure):
            raise UserError(
                f"On {self.host} everybody in your network could use this API. Give --api-key-file FILE "
                "(one key a line), make keys with 'petals-win key create NAME', or --insecure if that is what you want, "
                "or leave --host out."
            )
        if not 0 <= self.port < 2**16:
            raise UserError(f"{self.port} is no port. Give --port a number from 1 to 65535, or 0 for a free one.")
        for origin in self.cors_origins:
            if not _ORIGIN.fullmatch(origin) or origin != origin.lower():
                raise UserError(
                    f"{origin!r} is not an origin that a browser would send. "
                    "Write --cors-origin as https://example.org or http://localhost:3000: in lower case, without a path."
                )
        for name in self.allow_hosts:
            if not (_HOST_NAME.fullmatch(name) or is_address(name)):
                raise UserError(
                    f"{name!r} is not the name of a host. "
                    "Write --allow-host as llm.example.org or 192.168.1.5: without http://, port and path."
                )
        if self.root_path and not _PREFIX.fullmatch(self.root_path):
            raise UserError(
                f"{self.root_path!r} cannot stand before paths. Write --root-path as /llm: without http://, name and last slash."
            )
        for address in self.trusted_proxies:
            if _network(address) is None:
                raise UserError(
                    f"{address!r} is no address. Write --trusted-proxy as 192.168.1.5, or as a network: 172.16.0.0/12."
                )
        for alias in self.aliases:
            if not re.fullmatch(r"[^\s\x00-\x1f\x7f]{1,200}", alias):
                raise UserError(
                    f"{alias[:200]!r} is not the name of a model. Write --alias as gpt-4o or owner/name: without blanks."
                )

    @property
    def needs_key(self) -> bool:
        """Whether a key is asked for; also while none is valid."""
        return bool(self.api_keys) or self.key_file is not None or self.created_keys is not None

    def trusts(self, address: str) -> bool:
        """Whether an address is that of a proxy whose forwarded headers are believed."""
        found = _network(address)
        networks = [network for proxy in self.trusted_proxies if (network := _network(proxy)) is not None]
        return found is not None and any(found[0] in network for network in networks)

    def keys(self) -> tuple[str, ...]:
        """The keys that are valid now, but for created ones, of which only hashes are known."""
        return self.api_keys + (self.key_file.keys() if self.key_file else ())


class KeyFile:
    """The keys in a file, as they are now: it is read again when it is used, at most once a second.

    A key whose line was removed is no longer valid, and if no line is left, none is. While the file cannot be read,
    perhaps because an editor is writing it, the keys that were read last stay valid.
    """

    def __init__(self, path: Path):
        """Raises UserError for a file that `read_api_keys` does not take."""
        self._path = path
        self._keys = read_api_keys(path)
        self._read_at = time.monotonic()
        self._warned = ""

    def keys(self) -> tuple[str, ...]:
        if time.monotonic() - self._read_at >= _KEYS_FRESH_S:
            problem = self._read_again()
            if problem and problem != self._warned:
                logger.warning(problem)
            self._warned = problem
        return self._keys

    def _read_again(self) -> str:
        """Read the file; returns what is wrong with it, or an empty text."""
        # A file that is not as it should be is read again at the next use: it may have been half written.
        try:
            keys, bad_lines = _parse_keys(self._path)
        except UserError as error:
            return f"{error} The keys that were read before stay valid."
        self._keys = keys
        if bad_lines:
            return f"{_bad_line(self._path, bad_lines[0])} The other lines count."
        if not keys:
            return f"The key file {self._path} holds no key any more: nobody can use the API."
        self._read_at = time.monotonic()
        return ""


def _network(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network | None:
    try:
        return ipaddress.ip_network(text)
    except ValueError:
        return None


def is_address(host: str) -> bool:
    """Whether it is an IP address and no name."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def read_api_keys(path: Path) -> tuple[str, ...]:
    """Read keys from a text file, one a line; empty lines and lines that begin with # do not count.

    Raises UserError if the file cannot be read, holds no key, or a key that no HTTP header could carry.
    """
    keys, bad_lines = _parse_keys(path)
    if bad_lines:
        raise UserError(_bad_line(path, bad_lines[0]))
    if not keys:
        raise UserError(f"The key file {path} holds no key. Write one key a line.")
    return keys


def _bad_line(path: Path, number: int) -> str:
    return f"Line {number} of the key file {path} is not a key: only ASCII letters, digits and signs, no blanks."


def _parse_keys(path: Path) -> tuple[tuple[str, ...], list[int]]:
    """The keys in a file, and the numbers of the lines that should be keys and are none. Raises UserError."""
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
    keys, bad_lines = [], []
    for number, line in enumerate(lines, start=1):
        key = line.strip()
        if not key or key.startswith("#"):
            continue
        if re.fullmatch(r"[!-~]+", key):
            keys.append(key)
        else:
            bad_lines.append(number)
    return tuple(keys), bad_lines

"""This PC's own addresses: which of them another PC is most likely to reach, and how one to listen on is written.

Knows networks, adapters and multiaddrs as text. Does not know who listens.
"""

from __future__ import annotations

import ipaddress
import logging
import re
import socket
from collections.abc import Collection, Mapping, Sequence

import psutil

from petals_win.errors import UserError

logger = logging.getLogger(__name__)

# Nobody has these: they only choose a route, and nothing is sent to them.
_FAR_AWAY = ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1"))
# Adapters without a cable, by the names that systems and their makers give them.
_VIRTUAL = re.compile(
    r"docker|^br-|^veth|virbr|vmnet|vboxnet|virtualbox|vmware|vethernet|hyper-v|wsl|default switch|^lxc|^cni|^podman"
    r"|host-only|^bridge|^awdl|^llw",
    re.IGNORECASE,
)
_VPN = re.compile(r"^tun|^tap|^wg|^utun|^ppp|^zt|tailscale|zerotier|wireguard|vpn", re.IGNORECASE)
# What Docker and VirtualBox give to theirs, which on Windows are named like any other.
_VIRTUAL_NETWORKS = (ipaddress.ip_network("172.17.0.0/16"), ipaddress.ip_network("192.168.56.0/24"))

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def listen_maddr(host: str, port: int) -> str:
    """The multiaddr for listening on TCP `port` of an address of this PC; port 0 takes a free one.

    Raises UserError for what is no address: names of hosts, since they may mean several addresses or another PC.
    """
    address = _parse(host.strip().removeprefix("[").removesuffix("]"))
    if host.strip().lower() == "localhost":
        address = ipaddress.IPv4Address("127.0.0.1")
    if address is None or getattr(address, "scope_id", None):
        raise UserError(
            f"{host!r} is no address that a node can listen on. Give --host an IP address of this PC such as 192.168.1.5 or ::1; "
            "0.0.0.0 stands for all of them, and is what you get without --host."
        )
    return f"/ip{address.version}/{address}/tcp/{port}"


def is_loopback(maddr: str) -> bool:
    """Whether only this PC reaches the multiaddr."""
    address = _address_of(maddr)
    return address is not None and address.is_loopback


def is_loopback_host(host: str) -> bool:
    """Whether the name or address can only mean this machine."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def most_useful(maddrs: Sequence[str]) -> list[str]:
    """Multiaddrs of this PC, the one first by which other PCs most likely reach it; without those by which none does."""
    return order(maddrs, default=default_addresses(), adapters=adapters())


def order(maddrs: Sequence[str], *, default: Collection[str], adapters: Mapping[str, str]) -> list[str]:
    """As `most_useful`, with what it asks the system for.

    :param default: the addresses by which this PC reaches other networks
    :param adapters: the adapter's name of each address
    """

    def rank(maddr: str) -> tuple[int, int]:
        address = _address_of(maddr)
        if address is None or "/p2p-circuit" in maddr:
            return 5, 0
        return _rank(address, default, adapters.get(str(address), "")), address.version

    ranked = sorted(dict.fromkeys(maddrs), key=rank)
    reachable = [maddr for maddr in ranked if rank(maddr)[0] < _LINK_LOCAL]
    return reachable or ranked


_LINK_LOCAL, _LOOPBACK = 6, 7


def _rank(address: _Address, default: Collection[str], adapter: str) -> int:
    if address.is_loopback:
        return _LOOPBACK
    if address.is_link_local or address.is_unspecified:
        return _LINK_LOCAL
    vpn = _VPN.search(adapter) is not None
    if str(address) in default and not vpn:
        return 0
    if vpn or _VIRTUAL.search(adapter) or any(address in network for network in _VIRTUAL_NETWORKS):
        return 4 if str(address) not in default else 3
    return 1 if address.is_private else 2


def default_addresses() -> set[str]:
    """The IPv4 and the IPv6 address with which packets leave this PC for the internet; without a route there, none."""
    found = set()
    for family, target in _FAR_AWAY:
        try:
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.connect((target, 9))
                found.add(str(ipaddress.ip_address(probe.getsockname()[0].partition("%")[0])))
        except OSError as e:
            logger.debug("No route to %s: %s", target, e)
    return found


def adapters() -> dict[str, str]:
    """The name of the adapter of each address of this PC, as far as the system tells."""
    names = {}
    try:
        for name, entries in psutil.net_if_addrs().items():
            for entry in entries:
                if (address := _parse(entry.address.partition("%")[0])) is not None:
                    names[str(address)] = name
    except OSError as e:
        logger.debug("The adapters of this PC cannot be listed: %s", e)
    return names


def _address_of(maddr: str) -> _Address | None:
    found = re.match(r"/ip[46]/([^/]+)/", maddr)
    return _parse(found[1]) if found else None


def _parse(text: str) -> _Address | None:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None

"""From what the user typed to workers and to the engine over them. Knows addresses, the shared key and who is on this PC."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from petals_win.errors import UserError
from petals_win.host.addresses import adapters, most_useful
from petals_win.jobs.keys import OwnSecrets, shared_key
from petals_win.jobs.links import Address, Door, check_installed, connect, new_door, parse_address
from petals_win.jobs.router import RoutedEngine

_THIS_PC = ("127.0.0.1", "::1", "localhost")
_EVERYWHERE = {"0.0.0.0": 4, "::": 6}


def open_workers(named: Sequence[str], key_file: Path | None) -> RoutedEngine:
    """The engine over the workers with these addresses, several of which may stand in one text with commas between.

    Raises UserError for an address that is none or lacks what it is pinned by, without the key, and without the package.
    """
    addresses = list(dict.fromkeys(parse_address(part) for text in named for part in text.split(",") if part.strip()))
    if not addresses:
        raise UserError("--workers names no worker. Give the address that 'petals-win worker' prints.")
    key = shared_key(key_file, make=False)
    for address in addresses:
        check_installed(address.scheme)

    return RoutedEngine([_pinned(address, key) for address in addresses], lambda address: connect(address, key))


def _pinned(address: Address, key: str) -> Address:
    if address.pin is None and address.host in _THIS_PC:
        return replace(address, pin=OwnSecrets.kept(key).pin(address.scheme))
    if address.pin is None:
        raise UserError(
            f"{address} lacks what its worker is known by. Give the whole address as 'petals-win worker' prints it there, with the # and "
            "what follows."
        )
    return address


def open_doors(listen: Sequence[str], key_file: Path | None) -> list[tuple[Address, Door]]:
    """Where a worker shall listen, and the doors, not opened yet; the key and the worker's own secrets are made if there are none.

    Raises UserError for an address that is none, and without the package.
    """
    addresses = [parse_address(part) for text in listen for part in text.split(",") if part.strip()]
    if not addresses:
        raise UserError("--listen names no address. Write grpc://0.0.0.0:31400, say.")
    for address in addresses:
        check_installed(address.scheme)
    own = OwnSecrets.kept(shared_key(key_file, make=True))
    return [(address, new_door(address.scheme, own)) for address in addresses]


def reached_at(address: Address, port: int, pin: str) -> str:
    """What other PCs write for a door of this one."""
    host = address.host
    if (version := _EVERYWHERE.get(host)) is not None:
        mine = [f"/ip{6 if ':' in each else 4}/{each}/tcp/{port}" for each in adapters()]
        if same := [maddr for maddr in mine if maddr.startswith(f"/ip{version}/")]:
            host = most_useful(same)[0].split("/")[2]
    return Address(address.scheme, host, port, pin).pinned

"""What may be believed of the announcements that peers put into the DHT.

Knows the shape of Petals' announcements as plain values. Does not import petals, which imports this.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

from petals_win.dht.entries import LONGEST_TEXT, MOST_ENTRIES, BadRecord, skipped

P = TypeVar("P")
S = TypeVar("S")

_MOST_BLOCKS = 10_000
_SLOWEST, _FASTEST = 1e-6, 1e9  # tokens per second of one block
_BASE58 = frozenset("123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz")
_OFFLINE, _ONLINE = 0, 2


def read_servers(uid: str, found: Any, make: Callable[[str, tuple], tuple[P, S]]) -> dict[P, S]:
    """The servers that announce themselves below a key, without the announcements that make no sense.

    :param uid: the key, e.g. "prefix.7" for one block; a key without a number is that of whole nodes
    :param found: what the DHT has for it: None, or an object whose `value` is a dictionary
    :param make: of a peer id in base58 and a checked announcement; may raise TypeError or ValueError for one it refuses
    """
    if found is None:
        return {}
    entries = found.value
    if not isinstance(entries, dict):
        skipped.add(uid, f"it is no dictionary but {type(entries).__name__}")
        return {}
    servers = {}
    _, dot, last = uid.rpartition(".")
    block = int(last) if dot and last.isdecimal() else None
    for number, (peer, entry) in enumerate(entries.items()):
        if number == MOST_ENTRIES:
            skipped.add(uid, f"it has {len(entries)} entries", len(entries) - number)
            break
        try:
            check_peer_id(peer)
            info = getattr(entry, "value", None)
            check_announcement(info, block)
            key, server = make(peer, tuple(info))  # pyright: ignore[reportArgumentType]
        except (TypeError, ValueError) as e:
            skipped.add(f"{uid}, {peer!r}", e)
        else:
            servers[key] = server
    return servers


def check_peer_id(text: object) -> None:
    """Raise BadRecord unless this is a peer id in base58: a SHA-256 multihash, or a public key within an identity one."""
    if not isinstance(text, str) or not 40 <= len(text) <= 64 or not _BASE58.issuperset(text):
        raise BadRecord("it does not come from a peer")
    # 34 bytes that begin with 12 20 are Qm…; an Ed25519 key, 38 bytes that begin with 00 24 08 01 12 20, is 12D3Koo…; a
    # Secp256k1 key, 39 bytes that begin with 00 25 08 02 12 21, is 16Uiu2HA….
    for start, length in (("Qm", 46), ("12D3Koo", 52), ("16Uiu2HA", 53)):
        if text.startswith(start) and len(text) == length:
            return
    raise BadRecord("it does not come from a peer")


def check_announcement(info: object, block: int | None) -> None:
    """Raise BadRecord unless this is what a server of `block`, None for any, would announce: (state, throughput, the rest by name)."""
    if not isinstance(info, list | tuple) or not 2 <= len(info) <= 3:
        raise BadRecord("it is no announcement")
    state, throughput = info[:2]
    _whole("state", state, _OFFLINE, _ONLINE)
    _number("throughput", throughput, 0.0, _FASTEST)
    more = info[2] if len(info) == 3 else {}
    if not isinstance(more, dict) or not all(isinstance(name, str) for name in more):
        raise BadRecord("its details have no names")
    _check_range(more.get("start_block"), more.get("end_block"), block)
    for name in ("network_rps", "forward_rps", "inference_rps"):
        if more.get(name) is not None:
            _number(name, more[name], _SLOWEST, _FASTEST)
    for name in ("public_name", "version", "torch_dtype", "quant_type"):
        if more.get(name) is not None:
            _text(name, more[name])
    adapters = more.get("adapters", ())
    if not isinstance(adapters, list | tuple) or len(adapters) > MOST_ENTRIES:
        raise BadRecord("adapters is no list of names")
    for adapter in adapters:
        _text("adapters", adapter)
    if more.get("using_relay") not in (None, True, False):
        raise BadRecord("using_relay is neither true nor false")
    if more.get("cache_tokens_left") is not None:
        _whole("cache_tokens_left", more["cache_tokens_left"], 0, 2**63)
    if more.get("protocol") is not None:
        _whole("protocol", more["protocol"], 0, 2**31)
    if more.get("content_id") is not None:
        _text("content_id", more["content_id"])
    addresses = more.get("addresses", ())
    if not isinstance(addresses, list | tuple) or len(addresses) > MOST_ENTRIES:
        raise BadRecord("addresses is no list")
    for address in addresses:
        _text("addresses", address)
    if more.get("next_pings") is not None:
        _check_pings(more["next_pings"])


def _check_range(start: object, end: object, block: int | None) -> None:
    if start is None and end is None:
        return
    _whole("start_block", start, 0, _MOST_BLOCKS)
    _whole("end_block", end, 1, _MOST_BLOCKS)
    if not start < end or block is not None and not start <= block < end:  # pyright: ignore[reportOperatorIssue]
        raise BadRecord(f"its blocks {start}:{end} do not hold the block {block}")


def _check_pings(pings: object) -> None:
    if not isinstance(pings, dict) or len(pings) > MOST_ENTRIES:
        raise BadRecord("next_pings is no table of times")
    for peer, seconds in pings.items():
        _text("next_pings", peer)
        _number("next_pings", seconds, 0.0, math.inf)  # infinite: that peer did not answer


def _number(name: str, value: object, least: float, most: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise BadRecord(f"{name} is no number from {least:g} to {most:g}")


def _whole(name: str, value: object, least: int, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise BadRecord(f"{name} is no whole number from {least} to {most}")


def _text(name: str, value: object) -> None:
    if not isinstance(value, str) or len(value) > LONGEST_TEXT or not value.isprintable():
        raise BadRecord(f"{name} is no text of at most {LONGEST_TEXT} characters")

"""The bytes of p2pd's control protocol, written by hand: varints, protobuf fields, frames, multiaddrs, peer IDs.

Knows encodings. Does not know sockets or processes.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable

# Request.type
IDENTIFY, CONNECT, STREAM_OPEN, STREAM_HANDLER, DHT, LIST_PEERS = range(6)
CONNMANAGER, DISCONNECT, PUBSUB, UPGRADE, REMOVE_STREAM_HANDLER = range(6, 11)

# PersistentConnectionRequest's oneof
ADD_UNARY, CALL_UNARY, UNARY_RESPONSE, CANCEL, REMOVE_UNARY = range(2, 7)
# PersistentConnectionResponse's oneof
CALL_RESPONSE, HANDLING, DAEMON_ERROR, CANCELLED = range(2, 6)

OK_FRAME = bytes.fromhex("020800")

Fields = dict[int, list]


def varint(number: int) -> bytes:
    """Unsigned LEB128; a negative number as protobuf writes an int64."""
    number &= (1 << 64) - 1
    out = bytearray()
    while number >= 0x80:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes(out) + bytes([number])


def read_varint(data: bytes, at: int = 0) -> tuple[int, int]:
    """The number at an offset, and the offset behind it. Raises IndexError when it is cut off."""
    number = shift = 0
    while True:
        byte = data[at]
        number |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return number, at


def message(*fields: tuple[int, int | bool | str | bytes]) -> bytes:
    """Protobuf fields in the given order: numbers as varints, text and bytes length-delimited."""
    out = b""
    for number, content in fields:
        if isinstance(content, int):
            out += varint(number << 3) + varint(int(content))
        else:
            raw = content.encode() if isinstance(content, str) else content
            out += varint(number << 3 | 2) + varint(len(raw)) + raw
    return out


def parse(data: bytes) -> Fields:
    """All fields by number; raises ValueError for anything but varints and length-delimited fields."""
    fields: Fields = {}
    at = 0
    while at < len(data):
        tag, at = read_varint(data, at)
        if tag & 7 == 0:
            content, at = read_varint(data, at)
        elif tag & 7 == 2:
            length, at = read_varint(data, at)
            content = data[at : at + length]
            if len(content) != length:
                raise ValueError("cut off")
            at += length
        else:
            raise ValueError(f"unexpected wire type {tag & 7}")
        fields.setdefault(tag >> 3, []).append(content)
    return fields


def one(fields: Fields, *path: int):
    """The content of a field, through nested messages."""
    for number in path[:-1]:
        fields = parse(fields[number][-1])
    return fields[path[-1]][-1]


def frame(payload: bytes) -> bytes:
    return varint(len(payload)) + payload


def request(kind: int, parameters: bytes | None = None) -> bytes:
    """A Request; parameters go to the field that belongs to its type."""
    field = {
        CONNECT: 2, STREAM_OPEN: 3, STREAM_HANDLER: 4, DHT: 5, CONNMANAGER: 6, DISCONNECT: 7, PUBSUB: 8,
        REMOVE_STREAM_HANDLER: 9,
    }  # fmt: skip
    return message((1, kind), *([(field[kind], parameters)] if parameters is not None else []))


def with_protocols(first: bytes, protocols: Iterable[str], *more: tuple[int, int]) -> bytes:
    """Field 1, then field 2 repeated: what stream requests have in common."""
    return message((1, first), *((2, name) for name in protocols), *more)


_ALPHABET = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"


def base58(raw: bytes) -> str:
    number = int.from_bytes(raw, "big")
    text = ""
    while number:
        number, digit = divmod(number, 58)
        text = _ALPHABET[digit] + text
    return "1" * (len(raw) - len(raw.lstrip(b"\0"))) + text


def from_base58(text: str) -> bytes:
    number = 0
    for char in text:
        number = number * 58 + _ALPHABET.index(char)
    zeros = len(text) - len(text.lstrip("1"))
    return bytes(zeros) + number.to_bytes((number.bit_length() + 7) // 8, "big")


# name: (code, bytes of the value; None: preceded by its length)
_PROTOCOLS: dict[str, tuple[int, int | None]] = {
    "ip4": (4, 4), "tcp": (6, 2), "ip6": (41, 16), "dns": (53, None), "dns4": (54, None), "dns6": (55, None),
    "dnsaddr": (56, None), "udp": (273, 2), "p2p-circuit": (290, 0), "unix": (400, None), "p2p": (421, None),
    "quic-v1": (461, 0), "ws": (477, 0),
}  # fmt: skip
_NAMES = {code: (name, size) for name, (code, size) in _PROTOCOLS.items()}


def address(text: str) -> bytes:
    """A binary multiaddr."""
    if text.startswith("/unix/"):
        path = text.removeprefix("/unix").encode()
        return varint(400) + varint(len(path)) + path
    out = b""
    parts = iter(text.split("/")[1:])
    for name in parts:
        code, size = _PROTOCOLS[name]
        out += varint(code)
        if size == 0:
            continue
        value = next(parts)
        if name in ("ip4", "ip6"):
            out += ipaddress.ip_address(value).packed
        elif name in ("tcp", "udp"):
            out += int(value).to_bytes(2, "big")
        else:
            raw = from_base58(value) if name == "p2p" else value.encode()
            out += varint(len(raw)) + raw
    return out


def address_text(raw: bytes) -> str:
    """A multiaddr as text; raises KeyError for a protocol that hivemind does not know either."""
    text, at = "", 0
    while at < len(raw):
        code, at = read_varint(raw, at)
        name, size = _NAMES[code]
        if size is None:
            size, at = read_varint(raw, at)
        value, at = raw[at : at + size], at + size
        text += f"/{name}"
        if name in ("ip4", "ip6"):
            text += f"/{ipaddress.ip_address(value)}"
        elif name in ("tcp", "udp"):
            text += f"/{int.from_bytes(value, 'big')}"
        elif name == "p2p":
            text += f"/{base58(value)}"
        elif name == "unix":
            text += value.decode()
        elif size:
            text += f"/{value.decode()}"
    return text

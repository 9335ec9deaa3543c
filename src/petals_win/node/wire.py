"""Petals' messages as tensors, and back: what a request says about itself is checked before it takes memory.

Knows hivemind's protobufs, its compression of tensors, and Petals' way of packing arguments. Does not know what is computed.
"""

from __future__ import annotations

import math
import re
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from hivemind import MSGPackSerializer, deserialize_torch_tensor, serialize_torch_tensor
from hivemind.p2p.p2p_daemon import DEFAULT_MAX_MSG_SIZE
from hivemind.utils.streaming import combine_from_streaming, split_for_streaming

from petals_win.errors import NodeRefused

if TYPE_CHECKING:  # they are made at run time, where no type checker looks

    class Message:
        def __init__(self, **fields: Any): ...
        def __getattr__(self, name: str) -> Any: ...
        @classmethod
        def FromString(cls, message: bytes) -> Any: ...

    class ExpertInfo(Message): ...

    class ExpertRequest(Message): ...

    class ExpertResponse(Message): ...

    class ExpertUID(Message): ...

    class WireTensor(Message): ...

    CompressionType: Any = None
else:
    from hivemind.proto.runtime_pb2 import CompressionType, ExpertInfo, ExpertRequest, ExpertResponse, ExpertUID
    from hivemind.proto.runtime_pb2 import Tensor as WireTensor

__all__ = ["ExpertInfo", "ExpertRequest", "ExpertResponse", "ExpertUID", "WireTensor"]

COMPRESSIONS: frozenset[int] = frozenset(CompressionType.values())

_MASK = re.compile(rb"__T(\d{1,6})")  # in the place of an argument: which of the message's tensors it is
_WIDEST = 8  # bytes of one value as it travels: an int64


def read_metadata(message: ExpertRequest) -> dict[str, Any]:
    """What goes along with a request. Raises NodeRefused if that is not a table of named values."""
    try:
        metadata = MSGPackSerializer.loads(message.metadata) if message.metadata else {}
    except Exception as e:  # msgpack's own errors are many, and these are a stranger's bytes
        raise NodeRefused("The metadata of the request cannot be read.") from e
    if not isinstance(metadata, dict):
        raise NodeRefused("The metadata of the request are no table.")
    return metadata


def arguments(tensors: Sequence[WireTensor], structure: object) -> list[WireTensor]:
    """The message's tensors in the order of the call's arguments, which `structure`, if it is there, tells.

    It is a pair of the positional arguments, each a mark that counts the tensors, and the named ones, which Petals does not use.
    """
    if structure is None:
        return list(tensors)
    marks = structure[0] if isinstance(structure, list | tuple) and structure else None
    found = [_tensor_of(mark, tensors) for mark in marks] if isinstance(marks, list | tuple) else [None]
    if None in found:
        raise NodeRefused("The request's tensors are not those that its args_structure speaks of.")
    return [tensor for tensor in found if tensor is not None]


def _tensor_of(mark: object, tensors: Sequence[WireTensor]) -> WireTensor | None:
    number = _MASK.fullmatch(mark) if isinstance(mark, bytes) else None
    return tensors[int(number[1])] if number is not None and int(number[1]) < len(tensors) else None


def read_tensor(tensor: WireTensor) -> torch.Tensor:
    """Raises NodeRefused for one whose bytes are not what it says."""
    try:
        return deserialize_torch_tensor(tensor)
    except Exception as e:  # numpy's, torch's and Python's: these are a stranger's bytes
        raise NodeRefused(f"A tensor of the request cannot be read: {e}.") from e


def read_optional(tensors: Sequence[WireTensor], index: int) -> torch.Tensor | None:
    """The argument of that number; None if it is not there, or empty, which is how Petals leaves one out."""
    if index >= len(tensors) or math.prod(tensors[index].size) == 0:
        return None
    return read_tensor(tensors[index])


async def gather(
    messages: AsyncIterator[ExpertRequest], most_bytes: int
) -> tuple[str, dict[str, Any], list[WireTensor]]:
    """A request that came in pieces: uid, metadata and whole tensors. Refused beyond `most_bytes`, before it is all here."""
    uid, metadata, done, parts, size = None, {}, [], [], 0
    async for message in messages:
        if uid is None:
            uid, metadata = message.uid, read_metadata(message)
        elif message.uid != uid:
            raise NodeRefused("The pieces of a request speak of different blocks.")
        for part in message.tensors:
            size += len(part.buffer)
            if size > most_bytes:
                raise NodeRefused(f"A request may have {most_bytes:,} bytes on this node, and more came.")
            if part.dtype and parts:  # only the first piece of a tensor names its type
                done.append(combine_from_streaming(parts))
                parts = []
            parts.append(part)
    if parts:
        done.append(combine_from_streaming(parts))
    return uid or "", metadata, done


def most_bytes(tokens: int, hidden_size: int, blocks: int) -> int:
    """Of a request over so many blocks: inputs, gradients, and the deep prompts of each block."""
    return (2 + blocks) * tokens * hidden_size * _WIDEST


def write_tensor(tensor: torch.Tensor, compression: int) -> WireTensor:
    """`tensor` is on the CPU, and may be changed by it."""
    return serialize_torch_tensor(tensor, compression, allow_inplace=True)


def pieces(tensors: Iterable[WireTensor]) -> Iterator[ExpertResponse]:
    """Answers of at most one message's size each that have these tensors one after the other."""
    for tensor in tensors:
        for part in split_for_streaming(tensor, DEFAULT_MAX_MSG_SIZE):
            yield ExpertResponse(tensors=[part])

"""Petals' RPCs as a client calls them: what a step of a session looks like on the wire, and who is asked by what name.

Knows hivemind's messages and P2P. Does not know routes or sessions, and imports nothing of petals, whose client imports it.
"""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import torch
from hivemind import MSGPackSerializer, PeerID, deserialize_torch_tensor, serialize_torch_tensor
from hivemind.p2p import P2P, P2PHandlerError
from hivemind.proto import runtime_pb2

messages: Any = runtime_pb2  # its classes are made at run time

_HANDLER = "TransformerConnectionHandler"
# Hidden states, deep prompts and hypo_ids are the three arguments of a step, in this order; an empty tensor stands for none.
_THREE_ARGUMENTS = ((b"__T0", b"__T1", b"__T2"), {})
_NO_PROMPTS, _NO_HYPO_IDS = (
    serialize_torch_tensor(torch.empty(0, dtype=kind)) for kind in (torch.float32, torch.int64)
)


class BadAnswer(ValueError):
    """A node answered something else than hidden states of the shape that it was sent."""


class NodeRpc:
    """The calls of one node."""

    def __init__(self, p2p: P2P, peer_id: PeerID):
        self._p2p, self.peer_id = p2p, peer_id

    async def inference(self, requests: AsyncIterator[Any]) -> AsyncGenerator[Any, None]:
        """Open a session's stream. Its answers end in the order of the requests; a node's error comes as P2PHandlerError."""
        stream: Any = await self._p2p.iterate_protobuf_handler(
            self.peer_id, f"{_HANDLER}.rpc_inference", requests, messages.ExpertResponse
        )
        return stream

    async def info(self, uid: str = "") -> dict[str, Any]:
        """What the node tells about itself and, with a block's uid, about that block."""
        info = MSGPackSerializer.loads((await self._ask(uid)).serialized_info)
        if not isinstance(info, dict):
            raise BadAnswer("A node told nothing about itself that can be read")
        return info

    async def ping(self) -> None:
        """Returns as soon as the node says anything at all."""
        try:
            await self._ask("")
        except P2PHandlerError:  # that it will not tell is an answer, too
            return

    async def _ask(self, uid: str) -> Any:
        return await self._p2p.call_protobuf_handler(
            self.peer_id, f"{_HANDLER}.rpc_info", messages.ExpertUID(uid=uid), messages.ExpertInfo
        )


def compression_of(info: dict[str, Any]) -> Any:
    """How hidden states are packed for a node, by what it tells about a block."""
    return info["inference_schema"][0][0].compression


def step_request(
    uid: str,
    hidden: torch.Tensor,
    prompts: torch.Tensor | None,
    hypo_ids: torch.Tensor | None,
    *,
    compression: Any,
    metadata: dict[str, Any],
) -> Any:
    """The message of one step, or of one chunk of it. Shapes as in RemoteSession.step; the prompts are those of `uid`'s blocks."""
    tensors = (
        serialize_torch_tensor(hidden, compression),
        _NO_PROMPTS if prompts is None else serialize_torch_tensor(prompts.contiguous(), compression),
        _NO_HYPO_IDS if hypo_ids is None else serialize_torch_tensor(hypo_ids),
    )
    metadata = {**metadata, "args_structure": _THREE_ARGUMENTS}
    return messages.ExpertRequest(uid=uid, tensors=tensors, metadata=MSGPackSerializer.dumps(metadata))


def last_request(metadata: dict[str, Any] | None = None) -> Any:
    """Without tensors: no more steps come."""
    return messages.ExpertRequest(metadata=MSGPackSerializer.dumps(metadata) if metadata else b"")


def read_about(response: Any) -> dict[str, Any]:
    """What a node says of a session along with its first answer; upstream's say nothing. Raises BadAnswer."""
    if not response.metadata:
        return {}
    try:
        about = MSGPackSerializer.loads(response.metadata)
    except Exception as e:  # msgpack's own errors are many, and these are a stranger's bytes
        raise BadAnswer("What a node says of a session cannot be read") from e
    if not isinstance(about, dict):
        raise BadAnswer("What a node says of a session is no table")
    return about


def read_answer(response: Any, shape: torch.Size, least: int) -> torch.Tensor:
    """The hidden states of an answer to a step of this shape [batch, tokens, hidden]: those of its last tokens, at least `least`.

    Raises BadAnswer, for another shape before it takes memory for it.
    """
    sizes = [list(tensor.size) for tensor in response.tensors]
    tokens = sizes[0][1] if sizes and len(sizes[0]) == len(shape) else -1
    if not least <= tokens <= shape[1] or sizes[0] != [shape[0], tokens, shape[2]]:
        raise BadAnswer(f"The node answered {sizes} to {list(shape)}, of which at least {least} tokens were wanted")
    shape = torch.Size(sizes[0])
    try:
        hidden = deserialize_torch_tensor(response.tensors[0])
    except (AssertionError, KeyError, RuntimeError, TypeError, ValueError) as e:
        raise BadAnswer(f"The node answered what cannot be unpacked: {e}") from e
    if hidden.shape != shape or not hidden.is_floating_point() or hidden.numel() != math.prod(shape):
        raise BadAnswer(f"The node answered {hidden.dtype} {list(hidden.shape)} to {list(shape)}")
    return hidden

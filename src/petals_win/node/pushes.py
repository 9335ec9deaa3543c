"""A session's outputs on their way to the server of the next blocks, past the client.

Knows what clients say of the next servers. Whatever fails here is made good by the client, who sends each step itself, too.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from hivemind import MSGPackSerializer
from hivemind.p2p import PeerID

from petals_win.node.wire import ExpertRequest, WireTensor
from petals_win.swarm.lines import Way
from petals_win.swarm.protocol import LINE

logger = logging.getLogger(__name__)

_MOST_BLOCKS = 4096  # that a client may name: more than any model has


class Pushes:
    """All of one session, in the order of its steps.

    :param stub_of: makes the stub of a peer
    :param way_to: finds the way to a peer, on which outputs go if their client uses lines
    :param name: of the model, by which the next server knows its blocks
    :param timeout: seconds for one
    """

    def __init__(
        self, stub_of: Callable[[PeerID], Any], way_to: Callable[[PeerID], Way | None], name: str, timeout: float
    ):
        self._stub_of, self._way_to, self._name, self._timeout = stub_of, way_to, name, timeout
        self._turn = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()

    def push(self, output: WireTensor, request: ExpertRequest, metadata: dict[str, Any]) -> None:
        """Send on the outputs of a step, with all else that came with its request, to the next server that this names."""
        try:
            (peer, session_id, start, end), *others = metadata["next_servers"]
            if not 0 <= start < end <= _MOST_BLOCKS:
                raise ValueError(f"no blocks {start}:{end}")
            about = {**metadata, "session_id": session_id, "next_servers": others, "pushed": True}
            pushed = ExpertRequest(
                uid=" ".join(f"{self._name}.{block}" for block in range(start, end)),
                tensors=[output, *request.tensors[1:]],
                metadata=MSGPackSerializer.dumps(about),
            )
            peer_id = PeerID.from_base58(peer)
            if LINE in metadata and not self._tasks and self._by_line(peer_id, session_id, pushed):
                return
        except Exception:
            logger.debug("Outputs cannot be pushed to the next server:", exc_info=True)
            return
        task = asyncio.create_task(self._push(peer_id, pushed))
        self._tasks.add(task)  # else it could be collected
        task.add_done_callback(self._tasks.discard)

    def _by_line(self, peer_id: PeerID, session_id: str, pushed: ExpertRequest) -> bool:
        way = self._way_to(peer_id)
        return way is not None and way.line is not None and way.line.send(session_id, pushed.SerializeToString())

    async def _push(self, peer_id: PeerID, pushed: ExpertRequest) -> None:
        async with self._turn:
            try:
                await self._stub_of(peer_id).rpc_push(pushed, timeout=self._timeout)
            except Exception:
                logger.debug("Outputs could not be pushed to the next server:", exc_info=True)

    def close(self) -> None:
        """Give up those that are not sent yet."""
        for task in self._tasks:
            task.cancel()

"""Where the sessions of a swarm go: petals' sequence manager, for whoever may not wait for it on an event loop.

Knows the manager's methods and how a session is opened at a node. Does not know steps. It is handed the manager, and imports
nothing of petals, whose client imports it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from hivemind import PeerID
from hivemind.p2p import P2PDaemonError
from hivemind.p2p.p2p_daemon_bindings.control import P2PDaemonLost

from petals_win.client.looking import LookUpFailed
from petals_win.client.server_session import ServerSession
from petals_win.client.wire import NodeRpc, compression_of
from petals_win.swarm.naming import chain_for

_INFO_SECONDS = 4.0  # for what a node tells about its blocks, before the first session of all


class NodeFailure(Exception):
    """A node of a route has failed, or no route was found. The cause says how.

    :param peer_id: None if no route was found
    """

    def __init__(self, peer_id: PeerID | None, blocks: tuple[int, int], cause: Exception):
        super().__init__(f"the node of the blocks {blocks[0]}:{blocks[1]}" if peer_id else "the search for nodes")
        self.peer_id, self.blocks, self.cause = peer_id, blocks, cause

    def told_or_lost(self) -> Exception:
        """What to tell whoever asked: what the node said, or that its blocks are lost."""
        if self.peer_id is not None and isinstance(self.cause, OSError | P2PDaemonError):  # time-outs are OSErrors
            lost = BlocksLost(range(*self.blocks))
            lost.__cause__ = self.cause
            return lost
        return self.cause


class BlocksLost(ConnectionError):
    """The nodes of the blocks `block_indices` cannot be reached, also after several tries. The cause is the last one's."""

    def __init__(self, block_indices: Sequence[int]):
        self.block_indices = list(block_indices)
        super().__init__(f"No PC that serves the blocks {block_indices[0]} to {block_indices[-1]} can be reached now")


class Routes:
    """Routes over the nodes that `manager`, a petals RemoteSequenceManager, knows."""

    def __init__(self, manager: Any):
        self._manager = manager

    @property
    def num_blocks(self) -> int:
        return len(self._manager)

    @property
    def max_attempts(self) -> int | None:
        """How often in a row a step may fail; None: any number of times."""
        return self._manager.config.max_retries

    @property
    def pushes(self) -> bool:
        """Whether nodes pass hidden states straight on to each other."""
        return self._manager.config.use_server_to_server

    def pause(self, failures: int) -> float:
        """Seconds to wait after so many failures in a row: none after the first."""
        return self._manager.get_retry_delay(failures - 1)

    async def open(self, start: int, end: int, max_length: int) -> list[ServerSession]:
        """A session at each node of a route through the blocks [start, end), for up to `max_length` tokens.

        Raises NodeFailure; no session is open then.
        """
        try:
            # It may wait for a look-up.
            spans = await asyncio.to_thread(
                self._manager.make_sequence, start, end, mode="min_latency", cache_tokens_needed=max_length
            )
        except Exception as e:
            raise NodeFailure(None, (start, end), e) from e
        spans[-1].end = min(spans[-1].end, end)  # a route may be longer than it was asked for
        opening = [asyncio.ensure_future(self._open(span, max_length)) for span in spans]
        try:
            await asyncio.wait(opening)
        finally:
            done = [each for each in opening if each.done() and not each.cancelled()]
            if len(done) < len(spans) or any(each.exception() for each in done):
                for each in opening:
                    each.cancel()
                for each in done:
                    if each.exception() is None:
                        each.result().abort()
        return [each.result() for each in opening]

    async def _open(self, span: Any, max_length: int) -> ServerSession:
        manager = self._manager
        uids = manager.block_uids[span.start : span.end]
        chain = chain_for(span.server_info)
        rpc = NodeRpc(manager.state.p2p, span.peer_id)
        try:
            if manager.state.rpc_info is None:
                async with asyncio.timeout(_INFO_SECONDS):
                    manager.state.rpc_info = await rpc.info(chain(uids[:1]))
            metadata = manager.get_request_metadata("rpc_inference", chain(uids), peer_id=span.peer_id)
            session = ServerSession(
                rpc,
                span.start,
                span.end,
                chain(uids),
                compression=compression_of(manager.state.rpc_info),
                metadata={**metadata, "max_length": max_length},
                answer_seconds=manager.config.request_timeout,
            )
            await session.open(manager.config.connect_timeout)
        except Exception as e:
            raise NodeFailure(span.peer_id, (span.start, span.end), e) from e
        return session

    def failed(self, failure: NodeFailure) -> None:
        """Avoid the node that failed. Raises the cause if trying again is of no use."""
        if isinstance(failure.cause, LookUpFailed | P2PDaemonLost):
            raise failure.cause
        self._manager.on_request_failure(failure.peer_id)

    def succeeded(self, peer_id: PeerID) -> None:
        """A node that was avoided may be used again."""
        self._manager.on_request_success(peer_id)

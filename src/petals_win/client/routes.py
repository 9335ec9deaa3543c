"""Where the sessions of a swarm go: petals' sequence manager, for whoever may not wait for it on an event loop.

Knows the manager's methods and how a session is opened at a node. Does not know steps. It is handed the manager, and imports
nothing of petals, whose client imports it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence
from typing import Any

from hivemind import PeerID
from hivemind.moe.client.remote_expert_worker import RemoteExpertWorker
from hivemind.p2p import P2PDaemonError
from hivemind.p2p.p2p_daemon_bindings.control import P2PDaemonLost

from petals_win.client.looking import LookUpFailed
from petals_win.client.pages import LeftPages
from petals_win.client.server_session import ServerSession
from petals_win.client.wire import NodeRpc, compression_of
from petals_win.swarm.lines import NAME, Lines
from petals_win.swarm.naming import chain_for

_PING_SECONDS = 2.0  # for a node that was lost to say that it is there again
_INFO_SECONDS = 4.0  # for what a node tells about its blocks, before the first session of all


class NodeFailure(Exception):
    """A node of a route has failed, or no route was found. The cause says how.

    :param peer_id: None if no route was found
    """

    def __init__(self, peer_id: PeerID | None, blocks: tuple[int, int], cause: Exception):
        start, end = blocks
        node = f"the node …{str(peer_id)[-6:]} of the blocks {start}:{end}"
        super().__init__("the search for nodes" if peer_id is None else node)
        self.peer_id, self.blocks, self.cause = peer_id, blocks, cause

    @property
    def unreachable(self) -> bool:
        """Whether the node was not reached or said nothing, rather than something else than what it should."""
        return self.peer_id is not None and isinstance(self.cause, OSError | P2PDaemonError)  # time-outs are OSErrors

    def told_or_lost(self) -> Exception:
        """What to tell whoever asked: what the node said, or that its blocks are lost."""
        if self.unreachable:
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
        self._unreachable: set[PeerID] = set()  # nodes that are avoided, and may be there again at any moment
        self._lines = Lines(lambda peer_id: manager.state.p2p.call_binary_stream_handler(peer_id, NAME))
        self.left = LeftPages()

    @property
    def num_blocks(self) -> int:
        return len(self._manager)

    @property
    def about(self) -> str:
        """What outputs of the blocks depend on, beside their inputs: the blocks by their content, and the adapter."""
        return repr((list(self._manager.block_uids), getattr(self._manager.config, "active_adapter", None)))

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

    async def open(self, start: int, end: int, max_length: int, silent: Collection[PeerID]) -> list[ServerSession]:
        """A session at each node of a route through the blocks [start, end), for up to `max_length` tokens.

        Raises NodeFailure, and BlocksLost where only nodes of `silent` are left; no session is open then.

        :param silent: nodes that this step has waited for in vain. As long as there are some, nobody else is waited for as long.
        """
        spans = await self._find(start, end, max_length, silent)
        spans[-1].end = min(spans[-1].end, end)  # a route may be longer than it was asked for
        opening = [asyncio.ensure_future(self._open(span, max_length, silent)) for span in spans]
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

    async def _find(self, start: int, end: int, max_length: int, silent: Collection[PeerID]) -> list[Any]:
        while True:
            try:
                # It may wait for a look-up.
                spans = await asyncio.to_thread(
                    self._manager.make_sequence, start, end, mode="min_latency", cache_tokens_needed=max_length
                )
            except Exception as e:
                raise NodeFailure(None, (start, end), e) from e
            # The manager offers those that it avoided for their time, and all of them where a block has no others.
            lost = {*silent, *self._unreachable}
            again = [span for span in spans if span.peer_id in lost]
            alone = [span for span in again if self._lacks_others(span.start, min(span.end, end), lost)]
            if len(alone) < len(again):
                self._manager.on_request_failure(next(span.peer_id for span in again if span not in alone))
            elif not alone or not silent:
                return spans
            elif not await self._find_again(self._unreachable.difference(silent)):
                raise BlocksLost(range(alone[0].start, min(alone[0].end, end)))

    async def _open(self, span: Any, max_length: int, silent: Collection[PeerID]) -> ServerSession:
        manager = self._manager
        uids = manager.block_uids[span.start : span.end]
        chain = chain_for(span.server_info)
        rpc = NodeRpc(manager.state.p2p, span.peer_id)
        ours = getattr(span.server_info, "protocol", None) is not None
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
                remembers=ours,
                lines=self._lines if ours else None,
                answer_seconds=manager.config.request_timeout,
                alone=lambda: not silent and self._alone(span.peer_id, span.start, span.end),
            )
            await session.open(manager.config.connect_timeout)
        except Exception as e:
            raise NodeFailure(span.peer_id, (span.start, span.end), e) from e
        return session

    def _alone(self, peer_id: PeerID, start: int, end: int) -> bool:
        """Whether no other node that could be reached is known for some of the blocks."""
        return self._lacks_others(start, end, {peer_id, *self._unreachable})

    def _lacks_others(self, start: int, end: int, than: Collection[PeerID]) -> bool:
        known = self._manager.state.sequence_info.spans_containing_block[start:end]
        return not all(any(span.peer_id not in than for span in spans) for spans in known)

    def failed(self, failure: NodeFailure) -> None:
        """Avoid the node that failed. Raises the cause if trying again is of no use."""
        if isinstance(failure.cause, LookUpFailed | P2PDaemonLost):
            raise failure.cause
        if failure.peer_id is not None and failure.unreachable:
            self._unreachable.add(failure.peer_id)
        self._manager.on_request_failure(failure.peer_id)

    def succeeded(self, peer_id: PeerID) -> None:
        """A node that was avoided may be used again."""
        self._unreachable.discard(peer_id)
        self._manager.on_request_success(peer_id)

    async def learn(self, online: Collection[PeerID]) -> None:
        """Take in which nodes announce blocks: one that could not be reached is used again as soon as it answers, and one
        that is not in the routes gets there before it is needed. To look for it in the middle of an answer would take
        seconds, since the DHT waits for whoever has just been lost. Takes at most 2 s.
        """
        self._unreachable &= set(online)
        await self._find_again(self._unreachable)
        missing = set(online) - self.known
        if any(peer_id not in self._manager.state.banned_peers for peer_id in missing):
            self._manager._thread.trigger.set()

    async def _find_again(self, lost: Collection[PeerID]) -> bool:
        """Whether one of the nodes that could not be reached answers now, within 2 s."""
        called = list(lost)
        answers = await asyncio.gather(*(self._answers(peer_id) for peer_id in called))
        for peer_id, answered in zip(called, answers, strict=True):
            if answered:
                self.succeeded(peer_id)
        return any(answers)

    @property
    def known(self) -> set[PeerID]:
        """The nodes that routes are made of."""
        return {span.peer_id for span in self._manager.state.sequence_info.spans_by_priority}

    async def _answers(self, peer_id: PeerID) -> bool:
        call = RemoteExpertWorker.run_coroutine(NodeRpc(self._manager.state.p2p, peer_id).ping(), return_future=True)
        try:
            await asyncio.wait_for(call, _PING_SECONDS)
        except (OSError, P2PDaemonError):
            return False
        return True

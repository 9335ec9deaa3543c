"""How long a conversation the nodes of a swarm have room for, as they tell by Petals' RPC `rpc_info`.

Knows that RPC. Does not know HTTP, nor who asks for what.
"""

from __future__ import annotations

import asyncio
import logging

from hivemind import PeerID
from hivemind.moe.client.remote_expert_worker import RemoteExpertWorker
from hivemind.p2p import P2P
from petals.data_structures import UID_DELIMITER

from petals_win.client.wire import BadAnswer, NodeRpc
from petals_win.node.petals_rpc import SESSION_TOKENS
from petals_win.swarm.naming import chain_for
from petals_win.swarm.state import PeerState, SwarmState

logger = logging.getLogger(__name__)

_ASK_SECONDS = 3.0


class Rooms:
    """Each node that is online is asked once for each range of blocks that it serves."""

    def __init__(self, swarm_name: str):
        self._swarm_name = swarm_name
        self._tokens: dict[tuple[str, int, int], int | None] = {}  # None: a node that does not say

    async def ask(self, state: SwarmState, p2p: P2P) -> None:
        """Ask the nodes that are new. One that does not answer is asked again the next time."""
        online = {(peer.peer_id, peer.start, peer.end): peer for peer in state.peers if peer.online}
        self._tokens = {key: tokens for key, tokens in self._tokens.items() if key in online}
        new = [key for key in online if key not in self._tokens]
        answers = await asyncio.gather(*(self._ask(online[key], p2p) for key in new), return_exceptions=True)
        for key, answer in zip(new, answers, strict=True):
            if isinstance(answer, Exception):
                logger.debug("The node %s does not tell how much room it has: %r", key[0], answer)
            elif isinstance(answer, BaseException):
                raise answer
            else:
                self._tokens[key] = answer

    async def _ask(self, peer: PeerState, p2p: P2P) -> int | None:
        asking = NodeRpc(p2p, PeerID.from_base58(peer.peer_id)).info(
            chain_for(peer)([f"{self._swarm_name}{UID_DELIMITER}{peer.start}"])
        )
        answer = RemoteExpertWorker.run_coroutine(asking, return_future=True)
        try:
            tokens = (await asyncio.wait_for(answer, _ASK_SECONDS)).get(SESSION_TOKENS)
        except BadAnswer:
            return None
        return tokens if type(tokens) is int and tokens > 0 else None

    def longest(self, state: SwarmState) -> int | None:
        """How many tokens a conversation may have on the route with most room; None if it is not known to be bounded."""
        most: list[float] = [0] * state.num_blocks
        for peer in state.peers:
            tokens = self._tokens.get((peer.peer_id, peer.start, peer.end))
            for block in range(peer.start, min(peer.end, state.num_blocks)) if peer.online else ():
                most[block] = max(most[block], float("inf") if tokens is None else tokens)
        least = min(most, default=0)
        return int(least) if 0 < least < float("inf") else None

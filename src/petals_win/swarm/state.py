"""Who serves which blocks of a model, read from the DHT. Knows petals' records. Does not know HTTP."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from functools import partial

from hivemind import DHT
from petals.data_structures import UID_DELIMITER, ServerState
from petals.utils.dht import compute_spans, read_module_infos


@dataclass(frozen=True)
class PeerState:
    """One node: its blocks [start, end), what it tells about itself. Speeds are tokens per second of one block."""

    peer_id: str
    start: int
    end: int
    online: bool
    throughput: float
    name: str | None = None
    version: str | None = None
    dtype: str | None = None
    cache_tokens_left: int | None = None
    content_id: str | None = None
    relayed: bool | None = None


@dataclass(frozen=True)
class SwarmState:
    """All nodes that announce blocks of one model, online or still loading."""

    num_blocks: int
    peers: tuple[PeerState, ...]

    @property
    def missing_blocks(self) -> tuple[int, ...]:
        """The blocks that no node serves now."""
        served = {block for peer in self.peers if peer.online for block in range(peer.start, peer.end)}
        return tuple(block for block in range(self.num_blocks) if block not in served)


async def read_state(dht: DHT, dht_prefix: str, num_blocks: int, *, timeout: float = 10) -> SwarmState:
    """Look the blocks of a model up. Call it on any event loop.

    :param dht_prefix: ModelSource.swarm_name, or upstream's prefix alone
    :raises TimeoutError: the DHT did not answer within `timeout` seconds
    """
    uids = [f"{dht_prefix}{UID_DELIMITER}{block}" for block in range(num_blocks)]
    look_up = partial(read_module_infos, uids=uids, active_adapter=None, expiration_time=None, latest=True)
    future = dht.run_coroutine(look_up, return_future=True)
    infos = await asyncio.wait_for(asyncio.wrap_future(future), timeout)  # pyright: ignore[reportArgumentType]
    spans = compute_spans(infos, min_state=ServerState.JOINING)
    peers = [
        PeerState(
            peer_id=peer_id.to_base58(),
            start=span.start,
            end=span.end,
            online=span.state is ServerState.ONLINE,
            throughput=span.throughput,
            name=span.server_info.public_name,
            version=span.server_info.version,
            dtype=span.server_info.torch_dtype,
            cache_tokens_left=span.server_info.cache_tokens_left,
            content_id=span.server_info.content_id,
            relayed=span.server_info.using_relay,
        )
        for peer_id, span in spans.items()
    ]
    return SwarmState(num_blocks, tuple(sorted(peers, key=lambda peer: (peer.start, peer.end, peer.peer_id))))

"""The addresses of a swarm's nodes: told, noted, and dialled again by a node that was away.

A node without --peers would start a swarm of its own; one that knows who was with it before finds them again.
Knows the DHT and the records of naming.py. Does not know files.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from hivemind.p2p import P2PDaemonError, P2PHandlerError, PeerID
from hivemind.p2p.p2p_daemon import Multiaddr

logger = logging.getLogger(__name__)

MOST_MEMBERS = 32  # that are remembered: one of them has to answer
_MOST_ADDRESSES = 8  # of one
_LONGEST = 256  # characters of an address
_ANSWER_SECONDS = 5
_NOTE_SECONDS = 5  # between two looks: a node that is killed knows whoever joined before that
_LOOPBACK = ("/ip4/127.", "/ip6/::1/")


def addresses_to_announce(maddrs: Iterable[object]) -> tuple[str, ...]:
    """Of a node's own addresses those by which other PCs may find it; those of this PC alone if it has no others."""
    texts = [str(maddr) for maddr in maddrs]
    others = [text for text in texts if not text.startswith(_LOOPBACK)]
    return tuple((others or texts)[:_MOST_ADDRESSES])


def checked_members(found: object) -> dict[str, list[str]]:
    """Of addresses by peer ids those that are some, and of that peer. They come from others, or from a file."""
    members: dict[str, list[str]] = {}
    for peer, addresses in found.items() if isinstance(found, Mapping) else ():
        for address in addresses if isinstance(addresses, list | tuple) else ():
            if isinstance(address, str) and len(address) <= _LONGEST and address.endswith(f"/p2p/{peer}"):
                try:
                    Multiaddr(address)
                except ValueError as e:
                    logger.debug("No address of a member: %s", e)
                else:
                    members.setdefault(peer, []).append(address)
        if len(members) == MOST_MEMBERS:
            break
    return {peer: addresses[:_MOST_ADDRESSES] for peer, addresses in members.items()}


def read_members(dht: Any, content: str) -> dict[str, list[str]]:
    """Addresses of the nodes that serve this content now, this one left out, by their peer ids. Blocks."""
    from petals.utils.dht import _get_remote_module_infos  # petals imports this module

    look_up = partial(_get_remote_module_infos, uids=[content], active_adapter=None, expiration_time=None, latest=True)
    (found,) = dht.run_coroutine(look_up)
    own = dht.peer_id
    return checked_members(
        {peer.to_base58(): info.addresses for peer, info in found.servers.items() if peer != own and info.state.value}
    )


def rejoin(dht: Any, members: Mapping[str, list[str]]) -> int:
    """Dial nodes known from before, all at once, and make those that answer neighbours. Blocks; returns how many answered."""
    return dht.run_coroutine(partial(_rejoin, members=members)) if members else 0


async def _rejoin(_dht: Any, node: Any, members: Mapping[str, list[str]]) -> int:
    answers = await asyncio.gather(*(_dial(node, peer, addresses) for peer, addresses in members.items()))
    if any(answers):
        await asyncio.wait_for(node.find_nearest_nodes([node.node_id]), _ANSWER_SECONDS)
    return sum(answers)


async def _dial(node: Any, peer: str, addresses: list[str]) -> bool:
    """Whether the peer answers, and is in the routing table now."""
    peer_id = PeerID.from_base58(peer)
    maddrs = [Multiaddr(address.rpartition("/p2p/")[0]) for address in addresses]
    try:
        async with asyncio.timeout(_ANSWER_SECONDS):
            await node.p2p._client.connect(peer_id, maddrs)
            return await node.protocol.call_ping(peer_id) is not None
    except (TimeoutError, OSError, P2PDaemonError, P2PHandlerError) as e:
        logger.debug("%s, known from before, does not answer: %s", peer, e)
        return False


@contextmanager
def noting_members(dht: Any, content: str, remember: Callable[[dict[str, list[str]]], None]) -> Iterator[None]:
    """Meanwhile, in a thread of its own, hand the other nodes' addresses to `remember` again and again."""
    stop = threading.Event()

    def note() -> None:
        while not stop.wait(_NOTE_SECONDS):
            try:
                remember(read_members(dht, content))
            except Exception as e:  # the next time will do, and the node serves on without
                logger.debug("The nodes of the swarm could not be noted: %r", e)

    thread = threading.Thread(target=note, name="note members", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(_ANSWER_SECONDS)

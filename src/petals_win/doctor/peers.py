"""Other PCs: whether the given peers can be reached, and whether their clocks agree with this one's.

Knows multiaddrs and the DHT's ping, whose answer carries the peer's time. Takes no part in the swarm.
"""

from __future__ import annotations

import asyncio
import re
import socket
import time
from collections.abc import Iterator
from typing import Any

from petals_win.doctor.findings import Asked, Finding, finding_of
from petals_win.errors import UserError
from petals_win.host.clock import CLOCK_FIX
from petals_win.host.loop import new_event_loop

_CONNECT_S = 5
_PING_S = 20
# Records of the DHT carry the time at which they end: with clocks further apart nodes drop what others announce.
_MOST_S, _MUCH_S = 3.0, 1.0


def check_peers(asked: Asked) -> Iterator[Finding]:
    for peer in asked.peers:
        yield from _check_peer(peer)


def _check_peer(peer: str) -> Iterator[Finding]:
    unreachable = _connect(peer)
    if unreachable is not None:
        yield unreachable
        return
    try:
        ahead, doubt = _ask_time(peer)
    except UserError as e:
        yield finding_of(e)
        return
    yield Finding("ok", f"{peer} answers")
    yield judge_clock(ahead, doubt)


def judge_clock(ahead_s: float, doubt_s: float) -> Finding:
    """What it means that a peer's clock is so many seconds ahead, give or take some."""
    apart = abs(ahead_s)
    way = "ahead of" if ahead_s > 0 else "behind"
    text = f"Its clock is {apart:.1f} s {way} this PC's; a swarm needs them within {_MOST_S:.0f} s"
    if apart - doubt_s > _MOST_S:
        return Finding("error", text, CLOCK_FIX)
    if apart + doubt_s > _MUCH_S:
        return Finding("warning", f"{text} (measured to {doubt_s:.1f} s)", CLOCK_FIX)
    return Finding("ok", f"Its clock agrees with this PC's within {apart + doubt_s:.1f} s")


def _connect(peer: str) -> Finding | None:
    """What is wrong with the peer's TCP address, None if somebody listens there (or it is no TCP address)."""
    if "/p2p/" not in peer or not peer.startswith("/"):
        text = f"{peer} is no address of a peer"
        return Finding(
            "error",
            text,
            "Copy the whole address that petals-win serve has printed: /ip4/192.168.1.5/tcp/31330/p2p/12D3...",
        )
    found = re.match(r"/(?:ip4|ip6|dns|dns4|dns6)/([^/]+)/tcp/(\d+)(?=/)", peer)
    if found is None:
        return None
    host, port = found[1], int(found[2])
    try:
        socket.create_connection((host, port), timeout=_CONNECT_S).close()
    except (OSError, OverflowError) as e:
        if isinstance(e, ConnectionRefusedError):
            text, fix = f"{host} is there, but nothing listens on its port {port}", (
                "Start petals-win serve there again, by the same command as before: it comes back at the same address. If it prints "
                "another one, use that."
            )
        else:
            text, fix = f"{host}, port {port}, cannot be reached: {e}", (
                "Check that the PC is on and in the same network as this one, and that its firewall lets p2pd in: "
                "petals-win doctor tells there."
            )
        return Finding("error", text, fix)
    return None


def _ask_time(peer: str) -> tuple[float, float]:
    """By how many seconds the peer's clock is ahead, and the doubt of it. Raises UserError if it does not answer."""
    loop = new_event_loop()
    try:
        return loop.run_until_complete(asyncio.wait_for(_ping(peer), 2 * _PING_S))
    except TimeoutError as e:
        raise UserError(f"{peer} did not answer within {2 * _PING_S} s. Start petals-win there again.") from e
    finally:
        loop.close()


async def _ping(peer: str) -> tuple[float, float]:
    from hivemind.p2p import P2P, P2PDaemonError, P2PHandlerError, PeerID
    from hivemind.proto import dht_pb2

    messages: Any = dht_pb2  # made at run time, where no type checker looks
    p2p = await P2P.create(initial_peers=[peer], dht_mode="client", nat_port_map=False, startup_timeout=_PING_S)
    try:
        peer_id = PeerID.from_base58(peer.rpartition("/p2p/")[2])
        # Without an id of ours, so that the peer does not take us for a member of the swarm.
        request = messages.PingRequest(peer=messages.NodeInfo())
        began, began_at = time.monotonic(), time.time()
        answer: Any = await asyncio.wait_for(
            p2p.call_protobuf_handler(peer_id, "DHTProtocol.rpc_ping", request, messages.PingResponse), _PING_S
        )
        half = (time.monotonic() - began) / 2
    except (TimeoutError, P2PDaemonError, P2PHandlerError) as e:
        raise UserError(f"{peer} is reached but does not answer. Start petals-win there again.") from e
    finally:
        await p2p.shutdown()
    return answer.dht_time - (began_at + half), half

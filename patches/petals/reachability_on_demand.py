"""Start the reachability probe when a peer first asks for it, on the DHT's event loop.

Why: each node started a second p2pd at once, in a thread of its own by asyncio.run (on Windows a loop that nobody stopped, seen
    as "RuntimeError: Event loop is closed" at exit), although only peers behind a NAT ever ask. The health check of the public
    swarm used requests, which nothing else needs; httpx comes with huggingface-hub.
Status: pending
Upstream-issue: none
Drop-when: upstream starts the probe on demand.
"""

from petals_win.upstream.declare import add, redirect_import, remove_import, replace, swap_call

remove_import("petals.server.reachability", "Future")
remove_import("petals.server.reachability", "partial")
remove_import("petals.server.reachability", "threading")
redirect_import("petals.server.reachability", "requests", "import httpx as requests")
swap_call(
    "petals.server.reachability:ReachabilityProtocol.rpc_check",
    "self.call_check",
    "self._call_from_probe",
    digest="a4862a04b1e33742",
)


@replace("petals.server.reachability:ReachabilityProtocol.attach_to_dht", digest="e6b3ce136fa50855")
@classmethod
def attach_to_dht(cls, dht: DHT, await_ready: bool = False, **kwargs) -> "ReachabilityProtocol":
    protocol = cls(**kwargs)
    protocol._dht = dht
    protocol._probe_lock = None

    async def _register(_dht: DHT, node: DHTNode) -> None:
        protocol._probe_lock = asyncio.Lock()
        await protocol.add_p2p_handlers(node.p2p)

    registered = dht.run_coroutine(_register, return_future=True)
    if await_ready:
        registered.result()
    return protocol


@replace("petals.server.reachability:ReachabilityProtocol.shutdown", digest="a74cc0d38d0c2f23")
def shutdown(self):
    if self.probe is not None and self._dht.is_alive():
        self._dht.call(self.probe.shutdown(), 10)


@add("petals.server.reachability:ReachabilityProtocol")
async def _call_from_probe(self, remote_peer: PeerID, *, check_peer: PeerID) -> Optional[bool]:
    """Dial the peer from a daemon that is not connected to it yet, as a stranger would."""
    async with self._probe_lock:
        if self.probe is None:
            p2p = await self._dht.replicate_p2p()
            initial_peers = [str(addr) for addr in await p2p.get_visible_maddrs(latest=True)]
            for peer in await p2p.list_peers():
                initial_peers.extend(f"{addr}/p2p/{peer.peer_id}" for addr in peer.addrs)
            self.probe = await P2P.create(initial_peers, **STRIPPED_PROBE_ARGS)
    return await self.call_check(remote_peer, check_peer=check_peer)

"""Make routes of announcements that make sense.

Why: one announcement with a peer that is none ("AttributeError: 'int' object has no attribute …"), a speed of 0
    ("ZeroDivisionError") or blocks in the wrong order failed every client's and every node's look-up.
Status: pending
Upstream-issue: none
Drop-when: upstream checks announcements.
"""

from petals_win.upstream.declare import add, add_import, replace

add_import("petals.utils.dht", "from petals_win.swarm.records import read_servers")


@replace("petals.utils.dht:_get_remote_module_infos", digest="627e6c73731fcdad")
async def _get_remote_module_infos(dht, node, uids, active_adapter, expiration_time, latest) -> List[RemoteModuleInfo]:
    """Who announces each of the blocks: with `latest` by their newest announcements, else by any that is still valid."""
    if expiration_time is None:
        expiration_time = math.inf if latest else get_dht_time()
    found = await node.get_many(uids, expiration_time, num_workers=min(len(uids), dht.num_workers or len(uids)))
    infos = [RemoteModuleInfo(uid, read_servers(uid, found[uid], _known_server)) for uid in uids]
    if active_adapter:
        for info in infos:
            info.servers = {peer: server for peer, server in info.servers.items() if active_adapter in server.adapters}
    return infos


@add("petals.utils.dht")
def _known_server(peer_id: str, announcement: tuple) -> tuple[PeerID, ServerInfo]:
    return PeerID.from_base58(peer_id), ServerInfo.from_tuple(announcement)


@replace("petals.utils.dht:compute_spans", digest="94896a1498486544")
def compute_spans(module_infos: List[RemoteModuleInfo], *, min_state: ServerState) -> Dict[PeerID, RemoteSpanInfo]:
    """The blocks of each server, counted from the first of `module_infos` and within them, by its announcements of highest state."""
    first = parse_uid(module_infos[0].uid)[1] if module_infos else 0
    spans: Dict[PeerID, RemoteSpanInfo] = {}
    for block, module_info in enumerate(module_infos):
        for peer_id, server in module_info.servers.items():
            span = spans.get(peer_id)
            if server.state.value < min_state.value or span and server.state.value < span.state.value:
                continue
            start, end = block, block + 1
            if server.start_block is not None and server.end_block is not None:
                start = max(server.start_block - first, 0)
                end = min(server.end_block - first, len(module_infos))
            if not span or span.state.value < server.state.value:
                spans[peer_id] = RemoteSpanInfo(peer_id, start, end, server)
            elif block == span.end:  # not beyond: what lies between is another server's
                span.end = end
    return spans

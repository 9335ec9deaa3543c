"""Make routes of announcements that make sense, and go on announcing whatever happens.

Why: one announcement with a peer that is none ("AttributeError: 'int' object has no attribute …"), a speed of 0
    ("ZeroDivisionError") or blocks in the wrong order failed every client's and every node's look-up. The thread that announces a
    node ended with the first exception, and the node left the swarm a minute later, without a word.
Status: pending
Upstream-issue: none
Drop-when: upstream checks announcements, and its announcer survives a failure.
"""

from petals_win.upstream.declare import add, add_import, replace, swap_call

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


add_import("petals.server.server", "from petals_win.node.announcing import repeat")


@replace("petals.server.server:ModuleAnnouncerThread.run", digest="8aedbabe2cd1f09c")
def run(self) -> None:
    leaving = lambda: self.server_info.state == ServerState.OFFLINE  # noqa: E731
    repeat(self._announce_once, "announce its blocks", self.update_period, self.trigger, leaving)


@add("petals.server.server:ModuleAnnouncerThread")
def _announce_once(self) -> None:
    """Tell the swarm about these blocks."""
    leaving = self.server_info.state == ServerState.OFFLINE
    self.server_info.cache_tokens_left = max(0, self.memory_cache.bytes_left // self.bytes_per_token)
    self.server_info.next_pings = None
    if not leaving:
        self._ping_next_servers()
        pings = self.ping_aggregator.to_dict().items()
        self.server_info.next_pings = {peer_id.to_base58(): seconds for peer_id, seconds in pings}
    ends = get_dht_time() + self.expiration
    declare_active_modules(self.dht, self.module_uids, self.server_info, expiration_time=ends)
    if not leaving and not self.dht_prefix.startswith("_"):  # that is how a private model's name begins
        self.dht.store("_petals.models", self.model_info.to_dict(), ends, subkey=self.dht_prefix)


swap_call(
    "petals.server.server:Server._should_choose_other_blocks",
    "block_selection.should_choose_other_blocks",
    "_may_choose_other_blocks",
    digest="e1a8b4438adc7d04",
)


@add("petals.server.server")
def _may_choose_other_blocks(peer_id, module_infos, balance_quality) -> bool:
    """False as long as this node's own announcement is not found: it may be late."""
    known = any(peer_id in info.servers for info in module_infos)
    return known and block_selection.should_choose_other_blocks(peer_id, module_infos, balance_quality)

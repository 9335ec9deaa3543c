"""Take a server that failed out of the routes at once.

Why: a failed server was removed from the records of its blocks, but the spans that routes are made from were sorted anew only at
    the next look into the DHT, up to a minute later. Until then each retry went to the same dead server ("all dials failed"),
    and a session had used its retries up. What no server is to blame for, and no other could do better, was tried again, too.
Status: pending
Upstream-issue: none
Drop-when: upstream sorts the spans anew when a server fails.
"""

from petals_win.upstream.declare import add_import, replace

add_import("petals.client.routing.sequence_manager", "import sys")
add_import(
    "petals.client.routing.sequence_manager", "from hivemind.p2p.p2p_daemon_bindings.control import P2PDaemonLost"
)
add_import("petals.client.routing.sequence_manager", "from petals_win.client.looking import LookUpFailed")


@replace("petals.client.routing.sequence_manager:RemoteSequenceManager.on_request_failure", digest="bd6c39bd615f3157")
def on_request_failure(self, peer_id: Optional[PeerID]):
    """Avoid a peer that failed; None: it is not known which one. If a block has no server left, the DHT is asked again.

    Called where a failure is handled, before it is tried again. Raises the failure if that would be of no use.
    """
    failure = sys.exception()
    if isinstance(failure, (LookUpFailed, P2PDaemonLost)):
        raise failure
    if peer_id is not None:
        self.state.banned_peers.register_failure(peer_id)
    with self.lock_changes:
        info = self.state.sequence_info
        lost = [block for block in info.block_infos if block.servers.pop(peer_id, None) is not None]
        if lost:
            info.spans_by_priority, info.spans_containing_block = info._sort_spans(info.block_infos)
        if not all(block.servers for block in info.block_infos):
            self.update(wait=False)

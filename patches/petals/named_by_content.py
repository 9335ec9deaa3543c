"""Know a model in the swarm by its content as well as by its name, and a node by the protocol that it speaks.

Why: blocks were announced under the model's name alone, which is its folder's: of one model in the folders Tiny and tiny two
    swarms came to be, and nodes of two revisions answered one question together. petals_win.swarm.naming tells how nodes of this
    version, of older ones and of upstream meet. Pushed outputs are known by their session, for the node that pushes may call
    the blocks otherwise.
Status: pending
Upstream-issue: none
Drop-when: upstream names a model by its content.
"""

from petals_win.upstream.declare import add, add_import, bases, replace, swap_call

add_import("petals.data_structures", "from petals_win.swarm.protocol import Announced")
bases("petals.data_structures:ServerInfo", "Announced", digest="e3b0c44298fc1c14")

add_import("petals.utils.dht", "from petals_win.swarm.naming import MODELS, keys_of, servers_of, split_names")
add_import("petals.client.sequential_autograd", "from petals_win.swarm.naming import chain_for")
add_import("petals.client.routing.sequence_manager", "from petals_win.swarm.naming import chain_for")
add_import("petals.client.routing.sequence_manager", "from petals_win.swarm.protocol import PROTOCOL")
add_import("petals.server.handler", "from petals_win.swarm.protocol import PROTOCOL, mismatch")
swap_call(
    "petals.client.sequential_autograd:sequential_forward",
    "CHAIN_DELIMITER.join",
    "chain_for(span.server_info)",
    digest="13602f6cab80ac74",
)
swap_call(
    "petals.client.sequential_autograd:sequential_backward",
    "CHAIN_DELIMITER.join",
    "chain_for(span.server_info)",
    digest="28d3ffd12daca6d2",
)
swap_call(
    "petals.client.routing.sequence_manager:RemoteSequenceManager.rpc_info",
    "runtime_pb2.ExpertUID",
    "self._first_block_at(peer_id)",
    digest="e8d89c048085303c",
)
swap_call(
    "petals.server.handler:TransformerConnectionHandler.rpc_info",
    "MSGPackSerializer.dumps",
    "self._dump_with_protocol",
    digest="06a141617d5c0c29",
)


@replace("petals.utils.dht:_declare_active_modules", digest="8c87dc85baa779bd")
async def _declare_active_modules(
    dht: DHT, node: DHTNode, uids: List[ModuleUID], server_info: ServerInfo, expiration_time: DHTExpiration
) -> Dict[ModuleUID, bool]:
    keys, prefix = keys_of(uids), parse_uid(uids[0])[0]
    subkeys, values = [dht.peer_id.to_base58()] * len(keys), [server_info.to_tuple()] * len(keys)
    if split_names(prefix)[1] is not None:
        keys, subkeys, values = [*keys, MODELS], [*subkeys, prefix], [*values, True]
    at_once = min(len(keys), dht.num_workers or len(keys))
    return await node.store_many(keys, values, expiration_time, subkeys=subkeys, num_workers=at_once)


@replace("petals.utils.dht:get_remote_module_infos", digest="9bb134b17973ff93")
def get_remote_module_infos(
    dht, uids, expiration_time=None, active_adapter=None, *, latest=False, return_future=False
):
    """A RemoteModuleInfo for each block, with its servers, found by both of the model's names; or a future of the list."""
    how = {"active_adapter": active_adapter, "expiration_time": expiration_time, "latest": latest}
    return dht.run_coroutine(partial(read_module_infos, uids=uids, **how), return_future=return_future)


@add("petals.utils.dht")
async def read_module_infos(dht, node, uids, active_adapter, expiration_time, latest) -> List[RemoteModuleInfo]:
    found = await _get_remote_module_infos(dht, node, keys_of(uids), active_adapter, expiration_time, latest)
    servers = servers_of(uids, [info.servers for info in found])
    return [RemoteModuleInfo(uid=uid, servers=some) for uid, some in zip(uids, servers)]


@add("petals.client.routing.sequence_manager:RemoteSequenceManager")
def _first_block_at(self, peer_id: PeerID):
    """Makes the request for information about the first block, as the server calls it."""
    server = self.state.sequence_info.block_infos[0].servers.get(peer_id)
    return lambda uid: runtime_pb2.ExpertUID(uid=uid if server is None else chain_for(server)([uid]))


@replace(
    "petals.client.routing.sequence_manager:RemoteSequenceManager.get_request_metadata", digest="46fa5f5551290e6d"
)
def get_request_metadata(self, protocol: str, args_structure: Any = None, *args, **kwargs) -> Optional[Dict[str, Any]]:
    """What goes along with a request.

    :param protocol: of "rpc_forward", "rpc_backward" and "rpc_inference" the one that is called
    :param args_structure: of the arguments packed by petals.utils.packaging
    """
    return {
        "protocol": PROTOCOL,
        "points": self.policy.get_points(protocol, *args, **kwargs),
        "active_adapter": self.config.active_adapter,
        "args_structure": args_structure,
    }


@replace("petals.server.handler:TransformerConnectionHandler._get_active_adapter", digest="771dd42b2da1d6d8")
def _get_active_adapter(self, metadata: dict) -> str:
    """The adapter that a request asks for. Refuses requests of another protocol, and adapters that are not served."""
    reason = mismatch(metadata.get("protocol"), "This client")
    if reason is not None:
        raise ValueError(reason)
    adapter = metadata.get("active_adapter") or ""
    if adapter and adapter not in self.adapters:
        raise KeyError(f"adapter {adapter} not found")
    return adapter


@replace("petals.server.handler:TransformerConnectionHandler.rpc_push", digest="5d691604bc090fb6")
async def rpc_push(self, request: runtime_pb2.ExpertRequest, context: P2PContext) -> runtime_pb2.ExpertResponse:
    """Take the outputs of the blocks before, sent by their server, for a session that is open here."""
    session_id = MSGPackSerializer.loads(request.metadata)["session_id"]
    self._log_request("rpc_push", request.uid.split(CHAIN_DELIMITER), context, debug=f"session_id={session_id}")
    self._put_into_session_queue(session_id, request)
    return runtime_pb2.ExpertResponse()


@add("petals.server.handler:TransformerConnectionHandler")
def _dump_with_protocol(self, info: Dict[str, Any]) -> bytes:
    return MSGPackSerializer.dumps({**info, "protocol": PROTOCOL, "content_id": self.content_id})

"""Know a model in the swarm by its content as well as by its name, and a node by the protocol that it speaks.

Why: blocks were announced under the model's name alone, which is its folder's: of one model in the folders Tiny and tiny two
    swarms came to be, and nodes of two revisions answered one question together. petals_win.swarm.naming tells how nodes of this
    version, of older ones and of upstream meet.
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

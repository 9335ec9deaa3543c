"""Serve all requests of a node by one handler on the DHT's event loop.

Why: upstream starts eight handler processes and connects them by multiprocessing queues, listened to from executor threads
    ("PicklingError" under spawn); pushed tensors had to find the process that owns their session.
Status: windows-only
Upstream-issue: none
Drop-when: upstream's server runs in one process.
"""

from petals_win.upstream.declare import add_import, remove, remove_import, replace

add_import("petals.server.handler", "from petals_win.node.served import ServedSession")
remove_import("petals.server.handler", "mp")
remove("petals.server.handler:Event", digest="ab1c6ef79e8de298")
remove("petals.server.handler:TransformerConnectionHandler._listen_to_event_queue", digest="546b55e2f98833d1")
remove("petals.server.handler:TransformerConnectionHandler.add_p2p_handlers", digest="e1c9b48699695741")
remove("petals.server.handler:TransformerConnectionHandler.shutdown", digest="e25f5442e87f4ebf")


@replace("petals.server.handler:TransformerConnectionHandler.__init__", digest="ce8829fc512b973b")
def __init__(
    self,
    dht,
    module_backends,
    *,
    adapters,
    dht_prefix,
    quant_type,
    content_id=None,
    task_prioritizer=DummyTaskPrioritizer(),
    **limits,
):
    super().__init__(dht, module_backends)
    self.dht_prefix, self.content_id, self.adapters, self.quant_type = dht_prefix, content_id, adapters, quant_type
    # What a session may hold is each session's own business, which says why it does not do more.
    self.inference_max_length, self._context_length = sys.maxsize, limits["inference_max_length"]
    self.request_timeout, self.session_timeout, self.step_timeout = (
        limits[f"{what}_timeout"] for what in ("request", "session", "step")
    )
    self._prioritizer = task_prioritizer
    self._session_queues: Dict[str, asyncio.Queue] = {}


@replace("petals.server.handler:TransformerConnectionHandler._managed_session", digest="245cba563cfd1476")
@contextlib.contextmanager
def _managed_session(self, session_id: str):
    if session_id in self._session_queues:
        raise ValueError(f"A session with the id {session_id} is open already")
    self._session_queues[session_id] = asyncio.Queue()
    try:
        yield
    finally:
        # Whoever still waits for a push learns that the session has ended.
        self._session_queues.pop(session_id).put_nowait(None)


@replace("petals.server.handler:TransformerConnectionHandler._put_into_session_queue", digest="cc7e41babd75866d")
def _put_into_session_queue(self, session_id: str, request: runtime_pb2.ExpertRequest):
    queue = self._session_queues.get(session_id)
    if queue is None:
        logger.debug(f"A push came for the session {session_id}, which is not open here")
    else:
        queue.put_nowait(request)


@replace("petals.server.handler:TransformerConnectionHandler._get_from_session_queue", digest="b240fb8dcc391954")
async def _get_from_session_queue(self, session_id: str) -> Optional[runtime_pb2.ExpertRequest]:
    return await self._session_queues[session_id].get()


@replace("petals.server.handler:TransformerConnectionHandler._allocate_cache", digest="830e1ef0b8ee922d")
@contextlib.asynccontextmanager
async def _allocate_cache(self, backends, *, batch_size, max_length, timeout) -> AsyncIterator[Any]:
    """A session of the span over these blocks, within the node's budget for KV caches; it is closed at the end."""
    first = backends[0]
    session = ServedSession(
        first.span,
        first.compute,
        first.memory_cache,
        batch_size=batch_size,
        max_length=min(max_length, self._context_length),
        blocks=(first.block_index, backends[-1].block_index + 1),
        patience=timeout,
    )
    try:
        yield session
    finally:
        session.close()

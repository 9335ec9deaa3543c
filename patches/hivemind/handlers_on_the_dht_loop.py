"""Serve requests on the event loop of the DHT instead of in forked handler processes.

Why: ConnectionHandler and TaskPoolBase derive from ForkProcess, which Windows lacks ("AttributeError: module
    'multiprocessing.context' has no attribute 'ForkProcess'"); starting them by spawn fails at pickling locks.
Status: windows-only
Upstream-issue: none
Drop-when: hivemind serves without forking.
"""

from petals_win.upstream.declare import bases, remove_import, replace

remove_import("hivemind.moe.server.connection_handler", "mp")
remove_import("hivemind.moe.server.connection_handler", "switch_to_uvloop")
bases("hivemind.moe.server.connection_handler:ConnectionHandler", "ServicerBase", digest="2a524df6ae891389")
bases("hivemind.moe.server.task_pool:TaskPoolBase", "threading.Thread", "metaclass=ABCMeta", digest="7e9da9cc94822be8")


@replace("hivemind.moe.server.connection_handler:ConnectionHandler.__init__", digest="b846548b1c3103e8")
def __init__(
    self,
    dht: DHT,
    module_backends: Dict[str, ModuleBackend],
    *,
    balanced: bool = True,
    shutdown_timeout: float = 10,
    start: bool = False,
):
    self.dht, self.balanced, self.shutdown_timeout = dht, balanced, shutdown_timeout
    self.module_backends = module_backends
    self._p2p: Optional[P2P] = None
    if start:
        self.run_in_background(await_ready=True)


@replace("hivemind.moe.server.connection_handler:ConnectionHandler.run", digest="fe59d75ba3fbceb9")
async def _serve(self, _dht, _node) -> None:
    self._p2p = await self.dht.replicate_p2p()
    await self.add_p2p_handlers(self._p2p, balanced=self.balanced)


@replace("hivemind.moe.server.connection_handler:ConnectionHandler.run_in_background", digest="d66b9e9fcc98d21b")
def run_in_background(self, await_ready: bool = True, timeout: Optional[float] = None) -> None:
    """Register the handlers; with `await_ready`, return when peers can call them."""
    self.ready = self.dht.run_coroutine(self._serve, return_future=True)
    if await_ready:
        self.wait_until_ready(timeout)


@replace("hivemind.moe.server.connection_handler:ConnectionHandler.shutdown", digest="f3603197a3409576")
def shutdown(self):
    """Unregister the handlers, so that peers get an error at once instead of waiting. Does nothing a second time."""
    p2p, self._p2p = self._p2p, None
    if p2p is not None and self.dht.is_alive():
        self.dht.call(self.remove_p2p_handlers(p2p), self.shutdown_timeout)

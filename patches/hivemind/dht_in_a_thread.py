"""Run the DHT node in a thread with its own event loop.

Why: DHT derives from multiprocessing.context.ForkProcess, which Windows lacks (AttributeError at import hivemind), waits on
    a pipe with loop.add_reader, which the Proactor loop lacks (NotImplementedError), and sets signal handlers off the main
    thread. In one process a call is a coroutine handed to the loop: no pickling, no pipe, no polling.
Status: windows-only
Upstream-issue: none
Drop-when: hivemind runs its DHT in a thread.
"""

from petals_win.upstream.declare import add_import, remove_import, replace

remove_import("hivemind.dht.dht", "mp")
remove_import("hivemind.dht.dht", "os")
remove_import("hivemind.dht.dht", "signal")
remove_import("hivemind.dht.dht", "switch_to_uvloop")
add_import("hivemind.dht.dht", "from petals_win.host.loop import LoopThread")
add_import("hivemind.dht.dht", "from hivemind.p2p.p2p_daemon_bindings.control import P2PDaemonLost")


@replace("hivemind.dht.dht:DHT", digest="00239c09f6dc5190")
class DHT(LoopThread):
    """One DHT node on the event loop of its own thread, and blocking calls into it from any other thread.

    The node's P2P instance and every servicer that is registered through `run_coroutine` share this loop.

    :param initial_peers: multiaddrs (ending in /p2p/ID) of peers to join; none starts a new swarm
    :param start: start the thread at once; otherwise call `run_in_background`
    :param p2p: attach to the daemon of this P2P instance instead of starting one
    :param daemon: as in threading.Thread
    :param num_workers: how many keys are stored or looked up at the same time
    :param record_validators: combined validators of stored records
    :param shutdown_timeout: seconds that `shutdown` waits for the node to leave
    :param await_ready: block until the node has joined, and raise what prevented it
    :param kwargs: passed on to DHTNode and P2P
    """

    def __init__(
        self,
        initial_peers=None,
        *,
        start,
        p2p=None,
        daemon=True,
        num_workers=DEFAULT_NUM_WORKERS,
        record_validators=(),
        shutdown_timeout=10,
        await_ready=True,
        **kwargs,
    ):
        super().__init__(name="dht")
        if initial_peers is not None and (
            isinstance(initial_peers, str)
            or not isinstance(initial_peers, Sequence)
            or not all(isinstance(peer, (Multiaddr, str)) for peer in initial_peers)
        ):
            raise TypeError(
                "initial_peers must be a list of multiaddrs, e.g. ['/ip4/192.168.1.5/tcp/31330/p2p/12D3…']"
            )
        self.initial_peers, self.num_workers, self.kwargs = initial_peers, num_workers, kwargs
        self.shutdown_timeout = shutdown_timeout
        self.daemon = daemon
        self._record_validator = CompositeValidator(record_validators)
        self._daemon_listen_maddr = p2p.daemon_listen_maddr if p2p is not None else None
        self._ready = MPFuture()
        self.lost = MPFuture()  # gets the reason when the node's own daemon ends, though nobody has shut it down
        self._node = None
        self._client_mode = None
        self._replicas = {}  # event loop -> P2P instance that shares this node's daemon
        if start:
            self.run_in_background(await_ready=await_ready)

    def run_in_background(self, await_ready: bool = True, timeout: Optional[float] = None) -> None:
        self.start()
        self.submit(self._join_swarm())
        if await_ready:
            self.wait_until_ready(timeout)

    async def _join_swarm(self) -> None:
        try:
            p2p = await P2P.replicate(self._daemon_listen_maddr) if self._daemon_listen_maddr is not None else None
            settings = {"num_workers": self.num_workers, "record_validator": self._record_validator, **self.kwargs}
            self._node = await DHTNode.create(initial_peers=self.initial_peers, p2p=p2p, **settings)
        except BaseException as e:
            self._ready.set_exception(e)
        else:
            if p2p is None:
                self._node.p2p.lost.add_done_callback(lambda ended: self.lost.set_result(ended.result()))
            self._ready.set_result(None)

    def wait_until_ready(self, timeout: Optional[float] = None) -> None:
        try:
            self._ready.result(timeout)
        except BaseException:
            self.stop(self.shutdown_timeout)
            raise

    def shutdown(self) -> None:
        """Leave the swarm and end the thread. Safe to call twice."""
        if not self.is_alive():
            return
        try:
            self.call(self._leave_swarm(), self.shutdown_timeout)
        except TimeoutError:
            logger.warning(f"The DHT node did not leave within {self.shutdown_timeout} s; ending its thread anyway")
        finally:
            self.stop(self.shutdown_timeout)

    async def _leave_swarm(self) -> None:
        while self._replicas:
            loop, replica = self._replicas.popitem()
            if loop.is_running():
                await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(replica.shutdown(), loop))
        if self._node is not None:
            try:
                await self._node.shutdown()
            except P2PDaemonLost:  # it has no handlers left to remove
                await self._node.p2p.shutdown()

    def _await(self, coro: Awaitable[ReturnType], return_future: bool) -> Union[ReturnType, MPFuture[ReturnType]]:
        if return_future:
            return self.submit(coro)
        return self.call(coro)

    def get(
        self, key: DHTKey, latest: bool = False, return_future: bool = False, **kwargs
    ) -> Union[Optional[ValueWithExpiration[DHTValue]], MPFuture]:
        """Look a key up; `latest` asks for the newest value known, otherwise the first unexpired one will do."""
        return self._await(self._node.get(key, latest=latest, **kwargs), return_future)

    def store(
        self, key, value, expiration_time, subkey=None, return_future: bool = False, **kwargs
    ) -> Union[bool, MPFuture]:
        """Store a value at the nearest nodes until `expiration_time` (DHT time, seconds); True if one of them took it."""
        return self._await(self._node.store(key, value, expiration_time, subkey=subkey, **kwargs), return_future)

    def run_coroutine(self, coro, return_future: bool = False) -> Union[ReturnType, MPFuture[ReturnType]]:
        """Run `coro(dht, node)` on the node's loop and return its result, or a future of it."""

        async def _run() -> ReturnType:
            return await coro(self, self._node)

        return self._await(_run(), return_future)

    def add_validators(self, record_validators: Iterable[RecordValidatorBase]) -> None:
        """Check records with these validators too. The node must have joined."""
        if not self._ready.done():
            raise RuntimeError(
                "The DHT has not joined its swarm yet: pass record_validators to its constructor instead"
            )
        self._node.protocol.record_validator.extend(record_validators)

    @property
    def peer_id(self) -> PeerID:
        return self._node.peer_id

    @property
    def client_mode(self) -> bool:
        return self._node.protocol.client_mode

    def get_visible_maddrs(self, latest: bool = False) -> List[Multiaddr]:
        """Addresses at which others can reach this node; `latest` asks the daemon again."""
        return self.call(self._node.get_visible_maddrs(latest=latest))

    async def replicate_p2p(self) -> P2P:
        """The node's own P2P instance on its own loop; on another loop, one more that shares the same daemon."""
        loop = asyncio.get_running_loop()
        if loop is self.loop:
            return self._node.p2p
        if loop not in self._replicas:
            self._replicas[loop] = await P2P.replicate(self._node.p2p.daemon_listen_maddr)
        return self._replicas[loop]

"""Open and accept the local connections to p2pd through petals_win.daemon.

Why: the control client knows asyncio.open_unix_connection and bare TCP; on Windows only loopback TCP exists, which any local
    user can connect to and whose port is known only after binding, but the address was sent to the daemon before. A failed
    read left callers waiting for ever, and so did every call that was begun after p2pd had ended. A response that came in the
    moment in which its call was given up ended the reading of the connection, and with it all calls of the process from then on.
Status: windows-only
Upstream-issue: none
Drop-when: hivemind supports loopback TCP with a secret.
"""

from petals_win.upstream.declare import add, add_import, replace

add_import(
    "hivemind.p2p.p2p_daemon_bindings.control", "from petals_win.daemon.control import open_control, serve_control"
)
add_import("hivemind.p2p.p2p_daemon_bindings.control", "from petals_win.host.futures import WaitedFor")
add_import("hivemind.p2p.p2p_daemon_bindings.control", "from petals_win.daemon.process import DaemonLost")


@replace("hivemind.p2p.p2p_daemon_bindings.control:DaemonConnector.open_connection", digest="f12a09cc081fb0a0")
async def open_connection(self) -> (asyncio.StreamReader, asyncio.StreamWriter):
    try:
        return await open_control(str(self.control_maddr))
    except (ConnectionError, FileNotFoundError) as e:
        raise P2PDaemonLost() from e


@add("hivemind.p2p.p2p_daemon_bindings.control", after="DaemonConnector")
class P2PDaemonLost(P2PDaemonError, DaemonLost):
    """p2pd has ended, or its connection to this process has."""

    def __init__(self):
        super().__init__("The peer-to-peer daemon p2pd is lost: it has ended. Start petals-win again.")


@replace("hivemind.p2p.p2p_daemon_bindings.control:ControlClient.listen", digest="09a7f9bc3583d30f")
@asynccontextmanager
async def listen(self) -> AsyncIterator["ControlClient"]:
    async with serve_control(str(self.listen_maddr), self._handler) as address:
        self.listen_maddr = Multiaddr(address)
        self.listening.set()
        yield self


@replace("hivemind.p2p.p2p_daemon_bindings.control:ControlClient._ensure_persistent_conn", digest="68916f815d561521")
async def _ensure_persistent_conn(self):
    self.listening, self._lost, self._pending_calls = asyncio.Event(), False, WaitedFor()
    reader, writer = await self.daemon_connector.open_persistent_connection()
    self._read_task = asyncio.create_task(self._read_until_lost(reader))
    self._write_task = asyncio.create_task(self._write_until_lost(writer))


@add("hivemind.p2p.p2p_daemon_bindings.control:ControlClient")
async def _read_until_lost(self, reader: asyncio.StreamReader):
    try:
        await self._read_from_persistent_conn(reader)
    except ConnectionError as e:
        logger.debug(f"The connection to p2pd broke: {e}")
    finally:
        self._lost = True
        for call in self._pending_calls.values():
            if not call.done():
                call.set_exception(P2PDaemonLost())


@add("hivemind.p2p.p2p_daemon_bindings.control:ControlClient")
async def _write_until_lost(self, writer: asyncio.StreamWriter):
    with closing(writer):
        while True:
            message = await self._pending_messages.get()
            if not self._lost:
                try:
                    await write_pbmsg(writer, message)
                except ConnectionError as e:  # whoever waits for an answer hears it from the reader
                    logger.debug(f"The connection to p2pd broke: {e}")
                continue
            call = self._pending_calls.get(UUID(bytes=message.callId))
            if call is not None and not call.done():
                call.set_exception(P2PDaemonLost())

"""Start the p2pd that petals_win.daemon finds, over the kind of local socket that the system has.

Why: hivemind looks for a file `p2pd` without .exe inside its own package, talks to it over /unix/tmp/hivemind-… sockets that
    anybody can squat and Windows Python cannot open ("AttributeError: module 'asyncio' has no attribute
    'open_unix_connection'"), leaves it running when Python is killed, reports "Daemon failed to start" without its output, and does not notice its end.
Status: windows-only
Upstream-issue: none
Drop-when: hivemind takes the binary and the control address as arguments.
"""

from petals_win.upstream.declare import add, add_import, remove, replace, swap_call

add_import("hivemind.p2p.p2p_daemon", "from collections import deque")
add_import("hivemind.p2p.p2p_daemon", "from contextlib import nullcontext")
add_import("hivemind.p2p.p2p_daemon", "from petals_win.daemon.binary import find_p2pd")
add_import("hivemind.p2p.p2p_daemon", "from petals_win.daemon.control import control_address, remove_control_socket")
add_import(
    "hivemind.p2p.p2p_daemon",
    "from petals_win.daemon.process import explain_end, explain_start_failure, start_p2pd, start_timeout_s",
)
add_import("hivemind.p2p.p2p_daemon", "from petals_win.host.futures import AwaitableFuture")
swap_call("hivemind.p2p.p2p_daemon:P2P.create", "path", "_installed_p2pd", digest="9a00d0dfe188216a")
swap_call("hivemind.p2p.p2p_daemon:P2P.create", "Multiaddr", "_local_maddr", digest="9a00d0dfe188216a", nth=1)
swap_call("hivemind.p2p.p2p_daemon:P2P.create", "Multiaddr", "_local_maddr", digest="9a00d0dfe188216a", nth=2)
swap_call(
    "hivemind.p2p.p2p_daemon:P2P.create",
    "asyncio.subprocess.create_subprocess_exec",
    "start_p2pd",
    digest="9a00d0dfe188216a",
)
swap_call(
    "hivemind.p2p.p2p_daemon:P2P.create",
    "self._make_process_args",
    "self._noted_process_args",
    digest="9a00d0dfe188216a",
)
swap_call("hivemind.p2p.p2p_daemon:P2P.create", "asyncio.wait_for", "_wait_for_start", digest="9a00d0dfe188216a")
swap_call(
    "hivemind.p2p.p2p_daemon:P2P.create", "P2PDaemonError", "self._start_failure", digest="9a00d0dfe188216a", nth=5
)
swap_call("hivemind.p2p.p2p_daemon:P2P.replicate", "Multiaddr", "_local_maddr", digest="1f6a676d0d269870")
remove("hivemind.p2p.p2p_daemon:P2P._terminate", digest="b98529b7534b62af")


@add("hivemind.p2p.p2p_daemon")
def _installed_p2pd(_package, _name):
    return nullcontext(find_p2pd().path)


@add("hivemind.p2p.p2p_daemon")
def _local_maddr(unix_maddr: str) -> Multiaddr:
    kind, token = unix_maddr.removeprefix(P2P._UNIX_SOCKET_PREFIX).removesuffix(".sock").split("-", 1)
    return Multiaddr(control_address(kind, token))


@add("hivemind.p2p.p2p_daemon")
def _wait_for_start(ready: asyncio.Future, timeout: float) -> Awaitable[None]:
    return asyncio.wait_for(ready, start_timeout_s(timeout))


@add("hivemind.p2p.p2p_daemon:P2P")
def _noted_process_args(self, *args, **kwargs) -> List[str]:
    self._bootstrap_peers = kwargs.get("bootstrapPeers")
    self.lost = AwaitableFuture()  # gets the reason when the daemon ends, unless this instance has ended it
    # Who opens a port on the router serves strangers anyway; nobody else relays for them.
    return self._make_process_args(*args, relayService=kwargs["natPortMap"], **kwargs)


@add("hivemind.p2p.p2p_daemon:P2P")
def _start_failure(self, happened: str) -> Exception:
    if self._bootstrap_peers:
        happened += f" while it connected to {self._bootstrap_peers}"
    return explain_start_failure(self._first_lines, happened)


@replace("hivemind.p2p.p2p_daemon:P2P._read_outputs", digest="6d84a4d88935729d")
async def _read_outputs(self, ready: asyncio.Future) -> None:
    self._first_lines = []
    last_lines = deque(maxlen=5)
    async for raw in self._child.stdout:
        line = raw.decode(errors="replace").rstrip()
        if self._alive:  # what it says while it is being ended is of no interest
            last_lines.append(line)
            self._log_p2pd_message(line)
        if ready.done():
            continue
        self._first_lines.append(line)
        if line.startswith("Control socket:"):
            self._daemon_listen_maddr = Multiaddr(line.split(": ", 1)[1])
        elif line.startswith("Peer ID:"):
            ready.set_result(None)
    child = self._child
    if child is None:  # ended by shutdown()
        return
    status = await child.wait()  # so that nothing is left of it when the end is known
    if not ready.done():
        ready.set_exception(self._start_failure("it ended at once"))
    elif self._alive:
        self._alive = False
        self.lost.set_result(explain_end(status, last_lines))


@replace("hivemind.p2p.p2p_daemon:P2P.__del__", digest="fe69c7f3169367ae")
def __del__(self):
    # Without a loop nothing can be closed in order; ending the child is what must not be forgotten.
    if self._child is not None and self._child.returncode is None:
        with suppress(ProcessLookupError, RuntimeError):
            self._child.terminate()


@replace("hivemind.p2p.p2p_daemon:P2P.shutdown", digest="0e4389c131e602b5")
async def shutdown(self) -> None:
    """Close the connections to the daemon, and end the daemon if this instance started it. Safe to call twice."""
    self._alive = False
    if self._client is not None:
        self._client.close()
    tasks = [task for task in (self._listen_task, self._reader_task) if task is not None]
    child, self._child = self._child, None
    if child is not None and child.returncode is None:
        with suppress(ProcessLookupError):
            child.terminate()
        try:
            await asyncio.wait_for(child.wait(), 5)
        except asyncio.TimeoutError:
            child.kill()
            await child.wait()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    if child is not None:
        remove_control_socket(str(self._daemon_listen_maddr))
    remove_control_socket(str(self._client_listen_maddr))


@replace("hivemind.p2p.p2p_daemon:P2P.add_binary_stream_handler", digest="226a6cd62a6cd3e7")
async def add_binary_stream_handler(self, name: str, handler: p2pclient.StreamHandler, balanced: bool = False) -> None:
    """Let peers open streams to `handler`. The listener is bound before the daemon hears of it."""
    if self._listen_task is None:
        self._start_listening()
    await asyncio.wait_for(self._client.control.listening.wait(), 10)
    await self._client.stream_handler(name, handler, balanced)

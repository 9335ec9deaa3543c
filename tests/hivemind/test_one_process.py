"""The patched hivemind: DHT, RPCs and the daemon's life in one process, over real p2pd processes."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import AsyncIterator  # noqa: UP035  (hivemind tells streams by typing's name)

import hivemind
import psutil
import pytest
from hivemind import DHT, P2PContext, ServicerBase, get_dht_time
from hivemind.p2p import P2P, P2PDaemonError, P2PHandlerError
from hivemind.proto import dht_pb2
from hivemind.utils.mpfuture import MPFuture

from petals_win.daemon.process import DaemonError
from petals_win.errors import UserError

UNUSED = "/ip4/127.0.0.1/tcp/9/p2p/QmedTaZXmULqwspJXz44SsPZyTNKxhnnFvYRajfH7MGhCY"


@pytest.fixture
def pair() -> Iterator[tuple[DHT, DHT]]:
    first = DHT(start=True)
    second = DHT(initial_peers=[str(maddr) for maddr in first.get_visible_maddrs()], start=True)
    yield first, second
    second.shutdown()
    first.shutdown()


class Echo(ServicerBase):
    """A unary RPC and a stream RPC that say how many requests they got, and one that never answers."""

    def __init__(self) -> None:
        self.cancelled = threading.Event()

    async def rpc_unary(self, request: dht_pb2.PingRequest, context: P2PContext) -> dht_pb2.PingResponse:
        if request.validate:
            raise ValueError("not today")
        return dht_pb2.PingResponse(dht_time=7.0, available=True)

    async def rpc_stream(
        self, requests: AsyncIterator[dht_pb2.PingRequest], context: P2PContext
    ) -> AsyncIterator[dht_pb2.PingResponse]:
        count = 0
        async for _ in requests:
            count += 1
            yield dht_pb2.PingResponse(dht_time=float(count))

    async def rpc_never(self, request: dht_pb2.PingRequest, context: P2PContext) -> dht_pb2.PingResponse:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        raise AssertionError


def serve_echo(dht: DHT) -> Echo:
    echo = Echo()

    async def register(dht, node):
        await echo.add_p2p_handlers(node.p2p)

    dht.run_coroutine(register)
    return echo


def test_store_and_get(pair):
    first, second = pair
    assert second.store("key", [1, "two"], get_dht_time() + 60)
    assert first.get("key").value == [1, "two"]
    assert first.get("another") is None
    future = first.get("key", return_future=True)
    assert future.result(30).value == [1, "two"]


def test_calls_of_both_kinds(pair):
    first, second = pair
    serve_echo(first)

    async def call(dht, node):
        stub = Echo.get_stub(node.p2p, first.peer_id)
        assert (await stub.rpc_unary(dht_pb2.PingRequest(), timeout=30)).available
        with pytest.raises(P2PHandlerError, match="not today"):
            await stub.rpc_unary(dht_pb2.PingRequest(validate=True), timeout=30)

        async def three():
            for _ in range(3):
                yield dht_pb2.PingRequest()

        return [response.dht_time async for response in await stub.rpc_stream(three())]

    assert second.run_coroutine(call) == [1.0, 2.0, 3.0]


def test_a_timeout_cancels_the_remote_call(pair):
    first, second = pair
    echo = serve_echo(first)

    async def call(dht, node):
        with pytest.raises(asyncio.TimeoutError):
            await Echo.get_stub(node.p2p, first.peer_id).rpc_never(dht_pb2.PingRequest(), timeout=3)

    second.run_coroutine(call)
    assert echo.cancelled.wait(30)


def test_a_lost_daemon_ends_calls_in_work(pair):
    first, second = pair
    serve_echo(first)

    async def call(dht, node):
        task = asyncio.create_task(Echo.get_stub(node.p2p, first.peer_id).rpc_never(dht_pb2.PingRequest()))
        await asyncio.sleep(0.5)
        psutil.Process(node.p2p._child.pid).kill()
        with pytest.raises(P2PDaemonError, match="lost"):
            await asyncio.wait_for(task, 30)

    second.run_coroutine(call)


@pytest.fixture
def new_children():
    """The child processes that a test has started; others may run a swarm for the whole session."""
    before = psutil.Process().children()
    return lambda: [child for child in psutil.Process().children() if child not in before]


def test_shutdown_leaves_nothing(new_children):
    before = set(threading.enumerate())
    dht = DHT(start=True)
    (daemon,) = new_children()
    sockets = [] if sys.platform == "win32" else [c.laddr for c in daemon.net_connections("unix") if c.laddr]
    dht.shutdown()
    dht.shutdown()
    assert not daemon.is_running() and not [path for path in sockets if os.path.exists(path)]
    assert not [t for t in set(threading.enumerate()) - before if not t.daemon or t.name == "dht"]
    with pytest.raises(RuntimeError, match="not running"):
        dht.get("key")


def test_no_peer_answers(new_children):
    with pytest.raises(DaemonError, match="None of the peers answered") as caught:
        DHT(initial_peers=[UNUSED], start=True)
    assert UNUSED.rpartition("/")[2] in str(caught.value)
    assert not new_children()


def test_no_such_daemon(monkeypatch):
    monkeypatch.setenv("PETALS_WIN_P2PD", "/no/such/p2pd")
    with pytest.raises(UserError, match="PETALS_WIN_P2PD"):
        DHT(start=True)


def test_a_daemon_that_never_gets_ready(tmp_path, monkeypatch, new_children):
    if sys.platform == "win32":
        silent, script = tmp_path / "p2pd.cmd", "@echo starting something\n@ping -n 60 127.0.0.1 >nul\n"
    else:
        silent, script = tmp_path / "p2pd", "#!/bin/sh\necho starting something\nexec sleep 60\n"
    silent.write_text(script)
    silent.chmod(0o755)
    monkeypatch.setenv("PETALS_WIN_P2PD", str(silent))
    monkeypatch.setenv("PETALS_WIN_P2PD_TIMEOUT", "1")
    begin = time.monotonic()
    with pytest.raises(DaemonError, match="starting something"):
        DHT(start=True)
    assert time.monotonic() - begin < 30
    assert not new_children()


def test_a_future_from_another_thread():
    future = MPFuture()
    threading.Timer(0.1, future.set_result, ["done"]).start()

    async def wait():
        return await future

    assert asyncio.run(asyncio.wait_for(wait(), 30)) == "done"


def test_another_loop_shares_the_daemon(pair):
    first, _ = pair
    serve_echo(first)

    async def on_another_loop():
        p2p = await first.replicate_p2p()
        assert p2p.peer_id == first.peer_id
        await p2p.shutdown()
        return isinstance(p2p, P2P)

    assert asyncio.run(on_another_loop())


def test_names_that_load_on_demand():
    assert hivemind.ModuleBackend.__name__ == "ModuleBackend"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        getattr(hivemind, "nothing")  # noqa: B009

"""What happens to a DHT node and its calls when p2pd is ended by somebody else."""

from __future__ import annotations

import asyncio
import threading

import psutil
import pytest
from hivemind import DHT, get_dht_time
from hivemind.p2p import P2PDaemonError
from hivemind.p2p.p2p_daemon_bindings.control import P2PDaemonLost

from petals_win.errors import UserError


@pytest.fixture
def dht():
    dht = DHT(start=True)
    yield dht
    dht.shutdown()


def daemon_of(dht: DHT) -> psutil.Process:
    return psutil.Process(dht._node.p2p._child.pid)


def test_the_node_hears_of_it_at_once_and_nothing_is_left(dht):
    told = threading.Event()
    dht.lost.add_done_callback(lambda _: told.set())
    daemon = daemon_of(dht)
    daemon.kill()
    assert told.wait(2)
    assert "p2pd has ended" in dht.lost.result()
    assert not daemon.is_running(), "not even a zombie"


def test_calls_after_it_raise_instead_of_waiting(dht):
    told = threading.Event()
    dht.lost.add_done_callback(lambda _: told.set())
    daemon_of(dht).kill()
    assert told.wait(2)

    async def call(dht, node):
        with pytest.raises(P2PDaemonLost) as caught:
            await asyncio.wait_for(node.p2p.call_protobuf_handler(node.peer_id, "x", _request(), type(_request())), 5)
        assert isinstance(caught.value, UserError) and isinstance(caught.value, P2PDaemonError)
        for attempt in (
            node.p2p.get_visible_maddrs(latest=True),
            node.p2p.list_peers(),
            node.p2p.call_binary_stream_handler(node.peer_id, "x"),
        ):
            with pytest.raises(P2PDaemonLost):
                await asyncio.wait_for(attempt, 5)

    dht.run_coroutine(call)
    # What needs no other peer still works, and what needs one ends.
    assert dht.store("key", 1, get_dht_time() + 60, return_future=True).result(10) in (True, False)


def test_another_loop_hears_of_it_with_its_next_call(dht):
    daemon = daemon_of(dht)

    async def on_another_loop():
        p2p = await dht.replicate_p2p()
        daemon.kill()
        with pytest.raises(P2PDaemonLost):
            while True:
                await asyncio.wait_for(p2p.call_protobuf_handler(p2p.peer_id, "x", _request(), type(_request())), 5)
        await p2p.shutdown()

    asyncio.run(on_another_loop())


def test_an_orderly_end_is_no_loss():
    dht = DHT(start=True)
    dht.shutdown()
    assert not dht.lost.done()


def _request():
    from hivemind.proto import dht_pb2

    return dht_pb2.PingRequest()

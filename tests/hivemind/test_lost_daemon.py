"""What happens to a DHT node and its calls when p2pd is ended by somebody else."""

from __future__ import annotations

import asyncio
import threading

import psutil
import pytest
from hivemind import DHT, get_dht_time
from hivemind.p2p import P2PDaemonError
from hivemind.p2p.p2p_daemon_bindings.control import P2PDaemonLost
from hivemind.proto import p2pd_pb2

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
    assert told.wait(30)
    assert "p2pd has ended" in dht.lost.result()
    assert not daemon.is_running(), "not even a zombie"


def test_calls_after_it_raise_instead_of_waiting(dht):
    told = threading.Event()
    dht.lost.add_done_callback(lambda _: told.set())
    daemon_of(dht).kill()
    assert told.wait(30)

    async def call(dht, node):
        with pytest.raises(P2PDaemonLost) as caught:
            await asyncio.wait_for(node.p2p.call_protobuf_handler(node.peer_id, "x", _request(), type(_request())), 30)
        assert isinstance(caught.value, UserError) and isinstance(caught.value, P2PDaemonError)
        for attempt in (
            node.p2p.get_visible_maddrs(latest=True),
            node.p2p.list_peers(),
            node.p2p.call_binary_stream_handler(node.peer_id, "x"),
        ):
            with pytest.raises(P2PDaemonLost):
                await asyncio.wait_for(attempt, 30)

    dht.run_coroutine(call)
    # What needs no other peer still works, and what needs one ends.
    assert dht.store("key", 1, get_dht_time() + 60, return_future=True).result(30) in (True, False)


def test_an_answer_in_the_moment_in_which_its_call_is_given_up(dht):
    """It is passed over. An error would end the reading, and so all calls of this process from then on."""

    async def call(dht, node):
        control = node.p2p._client.control
        asked = asyncio.create_task(control.call_unary_handler(node.peer_id, "x", b""))
        await asyncio.sleep(0)
        call_id, waited_for = [*control._pending_calls.items()][-1]
        waited_for.cancel()  # the call itself hears of it in a later turn of the loop
        message = p2pd_pb2.PersistentConnectionResponse(callId=call_id.bytes)
        message.callUnaryResponse.response = b"late"
        arriving = asyncio.StreamReader()
        arriving.feed_data(bytes([message.ByteSize()]) + message.SerializeToString())
        arriving.feed_eof()
        await control._read_from_persistent_conn(arriving)
        with pytest.raises(asyncio.CancelledError):
            await asked
        assert call_id not in control._pending_calls.keys()

    dht.run_coroutine(call)


def test_another_loop_hears_of_it_with_its_next_call(dht):
    daemon = daemon_of(dht)

    async def on_another_loop():
        p2p = await dht.replicate_p2p()
        daemon.kill()
        with pytest.raises(P2PDaemonLost):
            while True:
                await asyncio.wait_for(p2p.call_protobuf_handler(p2p.peer_id, "x", _request(), type(_request())), 30)
        await p2p.shutdown()

    asyncio.run(on_another_loop())


def test_an_orderly_end_is_no_loss():
    dht = DHT(start=True)
    dht.shutdown()
    assert not dht.lost.done()


def _request():
    from hivemind.proto import dht_pb2

    return dht_pb2.PingRequest()
